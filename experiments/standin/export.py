"""Writes the trained stand-in as lq ships it: model in Hugging Face layout, held-out texts, sources and licences.

python -m experiments.standin.export --run DIR [--assets lq/assets] [--step N]
python -m experiments.standin.export --run DIR --model narrow --assets experiments/standin    # the model alone
"""

import argparse
import functools
import importlib.metadata
import json
import shutil
import sysconfig
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import safetensors.numpy

from experiments.standin.corpus import PACKAGES, documents, provenance
from experiments.standin.train import END, LENGTH, MODELS, initialize, optimizer
from lq.models.config import ModelConfig
from lq.models.families import to_hf

TEXT_BYTES = 400_000  # of each shipped text


def restore(run: Path, config: ModelConfig, step: int | None):
    """The parameters of a checkpoint, the last one when `step` is None, and its step."""
    manager = ocp.CheckpointManager(run.absolute() / "checkpoints")
    step = manager.latest_step() if step is None else step
    params = jax.eval_shape(functools.partial(initialize, config), jax.random.key(0))
    abstract = {"params": params, "state": jax.eval_shape(optimizer(1).init, params)}
    return manager.restore(step, args=ocp.args.StandardRestore(abstract))["params"], step


def write_model(config: ModelConfig, params, run: Path, out: Path) -> None:
    """config.json, tokenizer and bfloat16 weights."""
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    rope = config.kinds[0].rope
    out.mkdir(parents=True, exist_ok=True)
    written = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_blocks,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_positions,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": rope.theta},
        bos_token_id=0,
        eos_token_id=0,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    written.save_pretrained(out)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(run / "tokenizer.json"), bos_token=END, eos_token=END, model_max_length=LENGTH
    )
    tokenizer.save_pretrained(out)
    tensors = dict(to_hf(config, jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)))
    safetensors.numpy.save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)


def write_texts(out: Path) -> None:
    """Calibration and evaluation text from held-out files, and the licences of what is quoted."""
    out.mkdir(parents=True, exist_ok=True)
    files = {}
    for split in ("calibration", "evaluation"):
        chosen, size = [], 0
        # Every source is held out in proportion; walking them in turn keeps the mixture in the first 400 kB.
        for document in _in_turn([d for d in documents() if d.split == split]):
            if size + len(document.text.encode()) <= TEXT_BYTES:
                chosen.append(document)
                size += len(document.text.encode()) + 2
        (out / f"{split}.txt").write_text("\n\n".join(d.text for d in chosen), encoding="utf-8")
        files[split] = [f"{d.source}/{d.name}" for d in chosen]
    used = {name.split("/")[0] for names in files.values() for name in names}
    sources = [row for row in provenance() if row["source"] in used]
    (out / "sources.json").write_text(json.dumps({"sources": sources, "files": files}, indent=1) + "\n")
    licences = out / "licences"
    licences.mkdir(exist_ok=True)
    for source in sorted(used):
        for i, file in enumerate(_licence_files(source)):
            shutil.copyfile(file, licences / f"{source}{'' if i == 0 else f'-{i}'}.txt")


def _in_turn(documents: list):
    """One document of each source after the other."""
    queues = {}
    for document in documents:
        queues.setdefault(document.source, []).append(document)
    while queues:
        for source in list(queues):
            yield queues[source].pop(0)
            if not queues[source]:
                del queues[source]


def _licence_files(source: str) -> list[Path]:
    if source == "stdlib":
        return [Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"]
    distribution = importlib.metadata.distribution(PACKAGES[source][0])
    found = [f for f in distribution.files or () if f.name.upper().startswith(("LICENSE", "LICENCE", "COPYING"))]
    own = [f for f in found if ".dist-info" in f.parts[0]]
    if not own:
        raise FileNotFoundError(f"{source}: no licence file among its installed files")
    return [Path(str(distribution.locate_file(f))) for f in sorted(own, key=lambda f: (len(f.parts), str(f)))[:1]]


def write_curve(run: Path, step: int, out: Path) -> None:
    """The training curve up to the exported step, and how the unigram model does."""
    rows = [json.loads(line) for line in (run / "curve.jsonl").read_text().splitlines()]
    curve = [row for row in rows[1:] if row["step"] <= step]
    out.write_text(json.dumps({**rows[0], "sources": provenance(), "curve": curve}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--model", choices=MODELS, default="standin")
    parser.add_argument("--assets", type=Path, default=Path("lq/assets"))
    parser.add_argument("--step", type=int)
    args = parser.parse_args()
    config = MODELS[args.model].config
    params, step = restore(args.run, config, args.step)
    write_model(config, params, args.run, args.assets / args.model)
    write_curve(args.run, step, Path(__file__).parent / f"curve-{args.model}.json")
    if args.model == "standin":
        write_texts(args.assets / "texts")


if __name__ == "__main__":
    main()
