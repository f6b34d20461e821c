"""Measures every quantizer of a config on one model: widths x group sizes x rotation x seeds.

    python -m experiments.quantizers.compare CONFIG.yaml [--methods NAME,NAME ...] [--only REGEX] [--out DIR]

One line of `rows.jsonl` for each model, appended as soon as it is measured; what is there is not measured again, so
that an interrupted comparison goes on where it was, and several processes may share a directory, each with methods of
its own. `identity.json` says what the rows are of: model, texts, rotation, the options of every method. A config that
says otherwise is refused; methods may be added. `tables.py` prints and draws what was found.
"""

import argparse
import dataclasses
import itertools
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import yaml
from pydantic import Field, NonNegativeInt, ValidationError

from experiments.mistakes import in_one_line
from experiments.rows import append, claim, rows_of
from lq.allocation import uniform_plan
from lq.assets import resolve_data, resolve_model
from lq.calibration.data import calibration_windows, evaluation_windows
from lq.errors import UserError
from lq.evaluation import evaluate, make_reference
from lq.models.fingerprint import fingerprint
from lq.models.loading import load_tokenizer, open_checkpoint
from lq.models.source import InMemory
from lq.runs.config import Bits, CalibrationSection, EvaluationSection, QuantizationSection, Section


class MethodSection(Section):
    """One quantizer, at every width and group size, with and without the rotation."""

    name: str
    method: str
    options: dict[str, Any] = Field(default_factory=dict)
    transforms: list[str | dict[str, Any]] = Field(default_factory=list)
    symmetric: bool = False
    zero_dtype: str | None = None
    rank: NonNegativeInt = 0
    mixed: bool = False
    by_energy: bool = False
    bias_correction: bool = False
    rotated: bool = True  # with the rotation as well

    def quantization(self, group_size: int, before: list[dict]) -> QuantizationSection:
        """The same as a section of a run's config; `before` are transforms that come first."""
        fields = self.model_dump(exclude={"name", "rotated", "transforms"})
        return QuantizationSection(**fields, group_size=group_size, transforms=[*before, *self.transforms])  # type: ignore


class Comparison(Section):
    title: str
    model: str
    output: str
    calibration: CalibrationSection
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)]
    evaluation: EvaluationSection
    bits: Annotated[list[Bits], Field(min_length=1)]
    group_sizes: Annotated[list[int], Field(min_length=1)]
    rotation: dict[str, Any]
    methods: Annotated[list[MethodSection], Field(min_length=1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """One model: its name is unique."""

    name: str
    method: str
    bits: int
    group_size: int
    rotated: bool
    seed: int | None  # None where neither calibration nor rotation draws anything
    bpw: float
    bytes_on_device: int
    perplexity: float
    kl: float
    top1: float
    quantize_seconds: float


def read(path: Path) -> Comparison:
    """Raises UserError, one line with the key, for a config that is none."""
    try:
        return Comparison.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{path}: no such config; see experiments/quantizers/standin.yaml") from None
    except (yaml.YAMLError, ValidationError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None


def models(comparison: Comparison, only: list[str]) -> Iterator[tuple[str, MethodSection, int, int, bool, int | None]]:
    """Name, method, bits, group size, rotation and seed of every model: one seed's whole table before the next."""
    chosen = [method for method in comparison.methods if not only or method.name in only]
    for i, seed in enumerate(comparison.seeds):
        for method, group_size, rotated in itertools.product(chosen, comparison.group_sizes, (False, True)):
            if rotated and not method.rotated:
                continue
            calibrated = method.quantization(128, []).pipeline.recipe.calibrated
            drawn = calibrated or rotated  # otherwise nothing differs between seeds
            if i and not drawn:
                continue
            for bits in comparison.bits:
                where = f"{method.name}{', rotated' if rotated else ''}, {bits} bits, groups of {group_size}"
                name = f"{where}, seed {seed}" if drawn else where
                yield name, method, bits, group_size, rotated, seed if drawn else None


class Bench:
    """What all measurements share: the model, its tokens, the original's states."""

    def __init__(self, comparison: Comparison):
        self.comparison = comparison
        self.source = open_checkpoint(resolve_model(comparison.model))
        self.original = InMemory(self.source.config, self.source.params())
        self.tokenizer = load_tokenizer(self.source.path)
        e = comparison.evaluation
        data = resolve_data(e.data, "evaluation")
        self.windows = evaluation_windows(self.tokenizer, data, e.window, stride=e.stride, limit=e.windows)
        self.reference = make_reference(self.original, self.windows, batch_size=e.batch_size, dtype=jnp.dtype(e.dtype))

    def claim(self, out: Path) -> None:
        """Says in `out` what a row depends on but for what its name says; see `experiments.rows.claim`."""
        c = self.comparison
        fixed = {
            "model": fingerprint(self.source),
            "evaluation": self.windows.fingerprint,
            "calibration": self.calibration(0).fingerprint,
            "batch_size": c.calibration.batch_size,
            "rotation": c.rotation,
        }
        methods = {method.name: method.model_dump(exclude={"name", "rotated"}) for method in c.methods}
        claim(out, fixed, {"methods": methods})

    def calibration(self, seed: int):
        c = self.comparison.calibration
        data = resolve_data(c.data, "calibration")
        return calibration_windows(self.tokenizer, data, c.samples, c.length, seed)

    def measure(self, name: str, method: MethodSection, bits: int, group_size: int, rotated: bool, seed: int | None):
        """Quantizes, then evaluates; a first small evaluation is not needed, since seconds are of quantizing alone."""
        before = [{"seed": seed, **self.comparison.rotation}] if rotated else []
        section = method.quantization(group_size, before)
        pipeline = section.pipeline
        windows = self.calibration(seed or 0) if pipeline.recipe.calibrated else None
        plan = uniform_plan(self.source.config, dataclasses.replace(section.spec, bits=bits))
        started = time.perf_counter()
        batch_size = self.comparison.calibration.batch_size
        packed, plan = pipeline.quantized(self.original, plan, windows, batch_size=batch_size)
        model = InMemory(packed.config, packed.params())
        seconds = time.perf_counter() - started
        e = self.comparison.evaluation
        data = {"reference": self.reference, "batch_size": e.batch_size, "dtype": jnp.dtype(e.dtype)}
        found = evaluate(model, self.windows, **data)
        assert found.kl is not None
        assert found.top1 is not None
        return Measured(
            name=name,
            method=method.name,
            bits=bits,
            group_size=group_size,
            rotated=rotated,
            seed=seed,
            bpw=plan.bpw,
            bytes_on_device=plan.nbytes,
            perplexity=found.perplexity,
            kl=found.kl,
            top1=found.top1,
            quantize_seconds=round(seconds, 2),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--methods", default="", help="names in the config, comma-separated; all when not given")
    parser.add_argument("--only", type=re.compile, default="", help="models whose name this is found in")
    parser.add_argument("--out", type=Path, help="directory for rows.jsonl; the config's output when not given")
    arguments = parser.parse_args()
    comparison = read(arguments.config)
    chosen = [name for name in arguments.methods.split(",") if name]
    known = [method.name for method in comparison.methods]
    for name in chosen:
        if name not in known:
            raise UserError(f"--methods {name}: not in {arguments.config}; write some of {', '.join(known)}")
    out = arguments.out or Path(comparison.output)
    out.mkdir(parents=True, exist_ok=True)
    bench, file = Bench(comparison), out / "rows.jsonl"
    bench.claim(out)
    todo = [(name, *what) for name, *what in models(comparison, chosen) if re.search(arguments.only, name)]
    for i, (name, *what) in enumerate(todo, 1):
        if name not in {row.name for row in rows_of(file, Measured)}:
            row = bench.measure(name, *what)
            append(file, row)
            print(f"{i}/{len(todo)} {name}: {row.bpw:.4f} bpw, perplexity {row.perplexity:.4f}, KL {row.kl:.5f}, "
                  f"{row.quantize_seconds:.1f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    with in_one_line("compare"):
        main()
