"""One model evaluated on its own: what `lq eval` prints."""

import time
from pathlib import Path

import jax.numpy as jnp

from lq.api import evaluation_windows, open_model
from lq.calibration.stream import window_for
from lq.checkpoint import QuantizedCheckpoint
from lq.errors import UserError
from lq.evaluation import evaluate, make_reference
from lq.models.loading import load_tokenizer
from lq.runs.environment import device_name, peak_memory_bytes, versions
from lq.runs.weighed import COUNTED, Weighed

DTYPES = ("float32", "bfloat16", "float16")


def evaluate_one(
    model: str,
    data: str,
    window: int | None,
    stride: int | None,
    limit: int | None,
    original: str | None,
    batch_size: int,
    dtype: str,
) -> dict:
    """Perplexity, its protocol and sizes; with `original` KL and top-1 agreement too. Values are ready for JSON.

    `window` is in tokens; 512 or the model's context when None. Bits per weight of a quantized model are over what its
    plan counts, those of an original over the blocks' matrices, as plans count by default; the facts say which.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: write {', '.join(DTYPES)}")
    started = time.perf_counter()
    source = open_model(model)
    reference_source = None if original is None else open_model(original)
    tokenizer = load_tokenizer(source.path)
    length = window_for(source.config, window)
    if reference_source is not None and reference_source.config.vocab_size != source.config.vocab_size:
        raise UserError(
            f"--original {original}: a vocabulary of {reference_source.config.vocab_size} tokens, that of {model} has "
            f"{source.config.vocab_size}; give the model it was made of"
        )
    windows = evaluation_windows(tokenizer, data, length=length, stride=stride, limit=limit)
    reference = None
    if reference_source is not None:
        reference = make_reference(reference_source, windows, batch_size=batch_size, dtype=jnp.dtype(dtype))
    quantized = isinstance(source, QuantizedCheckpoint)
    weighed = Weighed(source)
    result = evaluate(
        source if quantized else weighed,
        windows,
        reference=reference,
        batch_size=batch_size,
        dtype=jnp.dtype(dtype),
    )
    facts = {
        "model": model,
        "bits per weight": source.plan.bpw if quantized else weighed.bits_per_weight(),
        "code bits": source.plan.code_bits if quantized else weighed.bits_per_weight(),
        "counted in bits per weight": COUNTED[source.plan.count if quantized else "blocks"],
        "bytes on disk": sum(file.stat().st_size for file in source.path.glob("*.safetensors")),
        "bytes on device": source.plan.nbytes if quantized else weighed.nbytes,
        "perplexity": result.perplexity,
        "corpus": Path(result.corpus).name,
        "protocol": result.protocol,
        "tokens scored": result.tokens,
    }
    if reference is not None:
        facts |= {"KL to the original, nats per token": result.kl, "top-1 agreement": result.top1}
    return facts | {
        "dtype": dtype,
        "device": device_name(),
        "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
        "seconds": round(time.perf_counter() - started, 1),
        "peak memory, MB": peak_memory_bytes() // 1_000_000,
    }
