"""One model evaluated on its own: what `lq eval` prints."""

import time
from pathlib import Path

import jax.numpy as jnp

from lq.api import evaluation_windows, open_model
from lq.checkpoint import QuantizedCheckpoint
from lq.errors import UserError
from lq.evaluation import evaluate, make_reference
from lq.models.loading import load_tokenizer
from lq.models.matrices import parameter_count
from lq.runs.environment import device_name, peak_memory_bytes, versions

DTYPES = ("float32", "bfloat16", "float16")


def evaluate_one(
    model: str,
    data: str,
    window: int,
    stride: int | None,
    limit: int | None,
    original: str | None,
    batch_size: int,
    dtype: str,
) -> dict:
    """Perplexity, its protocol and sizes; with `original` KL and top-1 agreement too. Values are ready for JSON."""
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: write {', '.join(DTYPES)}")
    started = time.perf_counter()
    source = open_model(model)
    windows = evaluation_windows(load_tokenizer(source.path), data, length=window, stride=stride, limit=limit)
    reference = None
    if original is not None:
        reference = make_reference(open_model(original), windows, batch_size=batch_size, dtype=jnp.dtype(dtype))
    result = evaluate(
        source, windows, stride=stride, reference=reference, batch_size=batch_size, dtype=jnp.dtype(dtype)
    )
    quantized = isinstance(source, QuantizedCheckpoint)
    facts = {
        "model": model,
        "bits per weight": source.plan.bpw if quantized else 16.0,
        "code bits": source.plan.code_bits if quantized else 16.0,
        "bytes on disk": sum(file.stat().st_size for file in source.path.glob("*.safetensors")),
        "bytes on device": source.plan.nbytes if quantized else 2 * parameter_count(source.config),
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
