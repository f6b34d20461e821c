"""Every verb of the command line as a function, for notebooks and other people's code.

    model, params, tokenizer = lq.load("path/or/hub-name")
    calib = lq.calibration_windows(tokenizer, "wikitext2", samples=128, length=2048)
    scores = lq.score(model, params, calib, metric="lim")
    plan = lq.allocate(scores, bpw=3.0, bits=(2, 3, 4))
    qparams = lq.quantize(model, params, plan)
    logits = model.apply({"params": qparams}, tokens)          # the same model definition
    texts = lq.generate(model, lq.prepare(qparams), prompts, max_new_tokens=64)

These hold a whole model in memory, but for `lq.quantize_checkpoint("path/or/hub-name", plan, "out")`. For one that does
not fit, use it and the streaming functions underneath with a `ParameterSource`: `lq.models.open_checkpoint`,
`lq.importance.score`, `lq.transforms.TransformedSource`, `lq.quantizers.quantized_source`,
`lq.checkpoint.write_quantized`, `lq.evaluation.evaluate`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lq import importance
from lq.allocation import Plan, allocate, uniform_plan
from lq.assets import resolve_data, resolve_model
from lq.calibration import data as calibration_data
from lq.calibration.data import Windows
from lq.checkpoint import QuantizedCheckpoint, check_output, is_quantized, open_quantized, write_quantized
from lq.errors import UserError
from lq.evaluation import Evaluation, Reference
from lq.evaluation import evaluate as evaluate_source
from lq.evaluation import make_reference as reference_of
from lq.importance import Scores
from lq.importance.units import Unit
from lq.models.config import ModelConfig
from lq.models.decoder import Decoder
from lq.models.loading import Checkpoint, load_tokenizer, open_checkpoint
from lq.models.matrices import model_shapes
from lq.models.prepared import prepare
from lq.models.source import InMemory, Params, part_names
from lq.numerics.segmented import is_packed
from lq.pipeline import Pipeline
from lq.progress import Progress
from lq.quantizers import SCALINGS, described, quantized_source
from lq.search import SEARCHES
from lq.search import search as search_source
from lq.transforms import transform as transform_params

__all__ = [
    "allocate",
    "calibration_windows",
    "evaluate",
    "evaluation_windows",
    "load",
    "make_reference",
    "open_model",
    "prepare",
    "quantize",
    "quantize_checkpoint",
    "save",
    "score",
    "search",
    "transform",
    "uniform_plan",
]


def open_model(name_or_path: str | Path) -> Checkpoint | QuantizedCheckpoint:
    """Opens a Hugging Face directory or hub name, a quantized checkpoint, or "standin"; reads no weights yet."""
    path = resolve_model(str(name_or_path))
    return open_quantized(path) if is_quantized(path) else open_checkpoint(path)


def load(name_or_path: str | Path, dtype=None) -> tuple[Decoder, Params, Any]:
    """Loads a model into memory, dense or quantized.

    Args:
      name_or_path: as for `open_model`.
      dtype: of the dense parameters and of the computation; as stored, and float32 computation, when None.

    Returns:
      (model, params, tokenizer): `model.apply({"params": params}, tokens)` gives logits `[batch, length, vocabulary]`.

    Raises:
      UserError: no such model, damaged files, no tokenizer.
    """
    source = open_model(name_or_path)
    return Decoder(source.config, dtype or jnp.float32), source.params(dtype), load_tokenizer(source.path)


def calibration_windows(tokenizer, data: str, *, samples: int = 128, length: int = 2048, seed: int = 0) -> Windows:
    """`samples` random windows of `length` tokens; `data` is a text file, "wikitext2", "c4" or "standin"."""
    return calibration_data.calibration_windows(tokenizer, resolve_data(data, "calibration"), samples, length, seed)


def evaluation_windows(
    tokenizer, data: str, *, length: int = 2048, stride: int | None = None, limit: int | None = None
) -> Windows:
    """Consecutive windows to evaluate on, from the same kinds of source as `calibration_windows`."""
    return calibration_data.evaluation_windows(
        tokenizer, resolve_data(data, "evaluation"), length, stride=stride, limit=limit
    )


def score(model: Decoder, params: Params, calibration: Windows | None = None, *, metric: str, **options) -> Scores:
    """Scores every block; `options` are the metric's, see `lq list importance`."""
    _check_windows(calibration, "calibration")
    return importance.score(InMemory(model.config, params), metric, calibration, options)


def transform(model: Decoder, params: Params, name: str, *, dtype=None, **options) -> tuple[Decoder, Params]:
    """A model that computes the same with other weights, which may quantize better. `params` is left alone.

        model, params = lq.transform(model, params, "hadamard", seed=1)

    Args:
      model, params: dense.
      name: of the transform, see `lq list transforms`.
      dtype: of the parameters; float32 of those that change when None, the others stay as they are.
      options: the transform's.

    Raises:
      UserError: an unknown transform or option, a model it cannot be applied to, packed parameters.
    """
    config, params = transform_params(model.config, params, name, options, dtype)
    return Decoder(config, model.dtype), params


def quantize(
    model: Decoder,
    params: Params,
    plan: Plan,
    *,
    method: str = "rtn",
    options: Mapping[str, Any] | None = None,
    calibration: Windows | None = None,
    scaling: str | Mapping[str, Any] | None = None,
    bias_correction: bool = False,
    propagate: bool | None = None,
    batch_size: int = 8,
    quiet: bool = False,
) -> Params:
    """The parameters with every matrix of the plan packed; what stays dense is in 16 bits. `params` is left alone.

    Where this process has several devices, output channels are shared out among them; the result is on one.

    Args:
      model, params, plan: the original, transformed or not (`lq.transform`), and what each matrix becomes.
      method, options: the quantizer, see `lq list quantizers`.
      calibration: text; methods that need none do not look at it.
      scaling: "awq" or "smoothquant", channel scales folded into every block before it is quantized; with options as
        `{"name": "awq", "scale_grid": 10}`.
      bias_correction: undo the mean error of every matrix; takes a model with biases, `lq.transform(model, params,
        "add_biases")`.
      propagate: calibrate every block on what the quantized blocks before it let through, or on the original's states;
        None: as is usual for the method, which a note says.
      batch_size: calibration windows per device step.
      quiet: shows neither progress nor notes on standard error.

    Raises:
      UserError: a plan for matrices of other shapes, an unknown method, scaling or option, what cannot be combined,
        missing calibration, packed parameters, weights that are not finite.
    """
    _check_fits(plan, model.config)
    _check_windows(calibration, "calibration")
    if any(is_packed(leaf) for leaf in jax.tree.leaves(params, is_leaf=is_packed)):
        raise UserError("params: packed already; give the original model's")
    recipe = _pipeline(method, options, [], scaling, bias_correction, propagate).recipe
    progress = Progress(quiet=quiet)
    source = quantized_source(
        InMemory(model.config, params), plan.specs, recipe, calibration, batch_size=batch_size, note=progress.note
    )
    parts, packed, heavy = part_names(source), {}, {path.split("/")[0] for path in plan.specs}
    with progress.stage(f"quantize ({recipe.name})", len(parts)) as step:
        for part in parts:
            packed[part] = source.part(part)
            step(described(source, part), light=part not in heavy)
    return packed


def quantize_checkpoint(
    original: str | Path,
    plan: Plan,
    out: str | Path,
    *,
    method: str = "rtn",
    options: Mapping[str, Any] | None = None,
    calibration: Windows | None = None,
    transforms: Sequence[str | Mapping[str, Any]] = (),
    scaling: str | Mapping[str, Any] | None = None,
    bias_correction: bool = False,
    propagate: bool | None = None,
    batch_size: int = 8,
    resume: bool = False,
    quiet: bool = False,
) -> Plan:
    """A model quantized from disk to disk, one block in memory: what `lq quantize` does.

    Args:
      original: directory or hub name of the model, or "standin".
      plan: what each of its matrices becomes.
      out: a new directory; a checkpoint that `open_model` and `load` read.
      transforms: of the whole model, in order, each a name or a mapping with `name` and options.
      resume: go on with what an interrupted call with the same arguments left in `out`.
      method and the others: as for `quantize`. Bias correction gives biases to a model that has none.

    Returns:
      The plan as it is true of the transformed model.

    Raises:
      UserError: as for `quantize`; a plan of another model; an `out` that holds something else, or this without
        `resume`.
    """
    if type(batch_size) is not int or batch_size < 1:
        raise UserError(f"batch_size: {batch_size!r}; write a whole number from 1")
    check_output(out, resume)
    _check_windows(calibration, "calibration")
    pipeline = _pipeline(method, options, transforms, scaling, bias_correction, propagate)
    source, progress = open_checkpoint(resolve_model(str(original))), Progress(quiet=quiet)
    _check_fits(plan, source.config)
    return pipeline.write(source, plan, Path(out), calibration, batch_size=batch_size, resume=resume, progress=progress)


def search(
    model: Decoder,
    params: Params,
    plan: Plan,
    calibration: Windows,
    *,
    bits: Sequence[int] = (2, 3, 4),
    unit: Unit = "matrix",
    method: str = "evolution",
    options: Mapping[str, Any] | None = None,
    quantizer: str = "rtn",
    quantizer_options: Mapping[str, Any] | None = None,
    batch_size: int = 8,
    quiet: bool = False,
) -> Plan:
    """A plan of no more bits that loses less KL divergence, found by trying; see `lq.search.search`.

    Args:
      model, params, plan: the original, and where the search begins.
      calibration: text, to quantize by and to judge on.
      bits: widths to choose from.
      unit: what changes its width together.
      method, options: the search, see `lq list searches`.
      quantizer, quantizer_options: what the candidates are made by.
      batch_size: windows per device step.
      quiet: shows no progress on standard error.

    Raises:
      UserError: as `lq.search.search`.
    """
    _check_windows(calibration, "calibration")
    chosen = SEARCHES.options(method, options or {})
    recipe = Pipeline.read(quantizer, quantizer_options).recipe
    with Progress(quiet=quiet).stage(f"search ({method})", chosen.generations) as step:
        return search_source(
            InMemory(model.config, params),
            plan,
            calibration,
            bits=bits,
            unit=unit,
            method=method,
            options=options,
            recipe=recipe,
            batch_size=batch_size,
            on_generation=lambda generation: step(f"KL {generation.loss:.5f}"),
        )


def evaluate(
    model: Decoder,
    params: Params,
    windows: Windows,
    *,
    reference: Reference | None = None,
    batch_size: int = 8,
) -> Evaluation:
    """Perplexity, and with a `reference` KL divergence to it and top-1 agreement.

    Raises:
      UserError: windows longer than the model's context, or a reference made over others or in other batches.
    """
    _check_windows(windows, "evaluation")
    source = InMemory(model.config, params)
    return evaluate_source(source, windows, reference=reference, batch_size=batch_size, dtype=_dtype(model))


def make_reference(model: Decoder, params: Params, windows: Windows, *, batch_size: int = 8) -> Reference:
    """What `evaluate` needs of the original: its last hidden states over the same windows, in the same batches."""
    _check_windows(windows, "evaluation")
    return reference_of(InMemory(model.config, params), windows, batch_size=batch_size, dtype=_dtype(model))


def save(
    out: str | Path,
    model: Decoder,
    qparams: Params,
    plan: Plan,
    *,
    original: str | Path,
    method: str,
    options: Mapping[str, Any] | None = None,
    calibration: Windows | None = None,
    transforms: Sequence[str | Mapping[str, Any]] = (),
    scaling: str | Mapping[str, Any] | None = None,
    bias_correction: bool = False,
    propagate: bool | None = None,
    batch_size: int = 8,
) -> None:
    """Writes quantized parameters as a checkpoint `lq.load` and every command read.

    Args:
      out: a new directory.
      model, qparams, plan: what `quantize` took and gave.
      original: directory or hub name the model came from; config and tokenizer are copied from there.
      transforms: what `transform` did before, in order, each a name or a mapping with `name` and options; for the
        record.
      method and the others: as `quantize` was given them, for the record.

    Raises:
      UserError: `out` is not empty, the plan is for matrices of other shapes, `qparams` are not packed by it or hold
        dense leaves of more than 16 bits, an unknown method or option, or `original` is another model or itself
        quantized.
    """
    check_output(out)
    _check_windows(calibration, "calibration")
    pipeline = _pipeline(method, options, transforms, scaling, bias_correction, propagate)
    record = pipeline.record(calibration, batch_size)
    description = open_checkpoint(resolve_model(str(original))).path
    write_quantized(InMemory(model.config, qparams), plan, Path(out), quantizer=record, description=description)


def _pipeline(method: str, options, transforms, scaling, bias_correction: bool, propagate: bool | None) -> Pipeline:
    """What the arguments that `quantize`, `quantize_checkpoint` and `save` share ask for."""
    if isinstance(transforms, str | Mapping):
        raise UserError(f"transforms: {transforms!r} is no list; write [{transforms!r}]")
    return Pipeline.read(method, options, [*transforms, *_scalings(scaling)], bias_correction, propagate)


def _scalings(scaling: str | Mapping[str, Any] | None) -> list[str | Mapping[str, Any]]:
    """As a list of none or one. Raises UserError for what does not scale channels."""
    name = scaling.get("name") if isinstance(scaling, Mapping) else scaling
    if name is not None and name not in SCALINGS:
        raise UserError(f"scaling: {name!r} is not one of {', '.join(SCALINGS)}; other transforms: lq.transform")
    return [scaling] if scaling else []


def _check_windows(windows: object, name: str) -> None:
    if windows is not None and not isinstance(windows, Windows):
        raise UserError(
            f"{name}: {type(windows).__name__} is not what lq.{name}_windows returns; of tokens of your own make "
            "lq.Windows(tokens, source, how)"
        )


def _dtype(model: Decoder):
    """That of the computation."""
    return model.dtype or jnp.float32


def _check_fits(plan: Plan, config: ModelConfig) -> None:
    """Shapes and not the fingerprint: parameters may have been loaded in another dtype than they were scored in."""
    if not isinstance(plan, Plan):
        raise UserError(f"plan: {plan!r} is no Plan; make one with lq.allocate, or read one with Plan.read")
    shapes = model_shapes(config)
    if plan.shapes != shapes:
        other = next(path for path in {**plan.shapes, **shapes} if plan.shapes.get(path) != shapes.get(path))
        raise UserError(f"plan: made for another model (they differ in {other}); make it from this model's scores")
