"""`Pipeline`: everything that is done to a model on its way to packed weights, read from a config or a command line.

Transforms and quantizer are given by name, in the order in which they are applied; what cannot follow what is refused
with the reason:

    fold_norms, hadamard      rewrite the model as a whole
    awq, smoothquant          scale channels inside each block, by what calibration text shows
    the quantizer             and its clipping search; a low-rank residual where the plan's specs have a rank
    bias_correction           last; gives biases to models that have none
"""

import dataclasses
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from lq.allocation.plan import Plan, adapted
from lq.calibration.data import Windows
from lq.checkpoint import write_quantized
from lq.errors import UserError
from lq.models.config import ModelConfig
from lq.models.loading import Checkpoint
from lq.models.source import ParameterSource, Params, part_names
from lq.progress import Progress
from lq.quantizers import QUANTIZERS, Place, Recipe, described, quantized_source
from lq.quantizers.registry import SCALINGS
from lq.transforms import TRANSFORMS, TransformedSource

ADD_BIASES = "add_biases"  # what bias correction implies


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Transforms of the whole model, in order, and the recipe by which its blocks are quantized."""

    transforms: tuple[tuple[str, Any], ...] = ()  # name and options
    recipe: Recipe = dataclasses.field(default_factory=Recipe)

    @classmethod
    def read(
        cls,
        method: str = "rtn",
        options: Mapping[str, Any] | None = None,
        transforms: Sequence[str | Mapping[str, Any]] = (),
        bias_correction: bool = False,
        propagate: bool | None = None,
    ) -> "Pipeline":
        """From names and options as a config gives them; a transform is a name, or a mapping with `name` and options.

        `propagate` is `Recipe.propagate`. Raises UserError for an unknown name or option, for an order that cannot be,
        and for what is said twice in two ways.
        """
        if propagate is not None and (options or {}).get("propagate", propagate) is not propagate:
            raise UserError(f"propagate: {str(propagate).lower()}, and another one as an option of {method}; keep one")
        whole, scaling = [], None
        for given in transforms:
            name, fields = _named(given)
            if scaling is not None and name in SCALINGS:
                raise UserError(f"transforms: {scaling[0]} and {name} both scale the channels; keep one")
            if name in SCALINGS:
                scaling = (name, SCALINGS.options(name, fields))
            elif scaling is not None:
                TRANSFORMS[name]
                raise UserError(
                    f"transforms: {name} after {scaling[0]} would mix the channels that it scaled; write {name} first"
                )
            else:
                whole.append((name, _transform_options(name, fields)))
        names = [name for name, _ in whole]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"transforms: {name} is listed twice; keep one")
        if "fold_norms" in names[1:]:
            raise UserError("transforms: fold_norms comes first; hadamard folds the norms it needs itself")
        if bias_correction and ADD_BIASES not in names:
            whole.append((ADD_BIASES, TRANSFORMS.options(ADD_BIASES, {})))
        recipe = Recipe(
            method=method,
            options=QUANTIZERS.options(method, options or {}),
            scaling=scaling and scaling[0],
            scaling_options=scaling and scaling[1],
            bias_correction=bias_correction,
            propagate=propagate,
        )
        return cls(transforms=tuple(whole), recipe=recipe)

    @property
    def name(self) -> str:
        """In words: `hadamard + gptq`."""
        names = [name for name, _ in self.transforms if name != ADD_BIASES or not self.recipe.bias_correction]
        return " + ".join([*names, self.recipe.name])

    def transformed(self, source: ParameterSource) -> ParameterSource:
        """`source` with the transforms of the whole model. Raises UserError for a model that one is not made for."""
        for name, options in self.transforms:
            source = TransformedSource(source, name, dataclasses.asdict(options))
        return source

    def quantized(
        self,
        source: ParameterSource,
        plan: Plan,
        windows: Windows | None = None,
        *,
        batch_size: int = 8,
        cache: MutableMapping | None = None,
        place: Place | None = None,
        note: Callable[[str], None] = lambda line: None,
    ) -> tuple[ParameterSource, Plan]:
        """The model packed by `plan`, and the plan as it is true of the transformed model; see `quantized_source`."""
        changed = self.transformed(source)
        packed = quantized_source(
            changed, plan.specs, self.recipe, windows, batch_size=batch_size, cache=cache, place=place, note=note
        )
        return packed, adapted(plan, changed.config)

    def write(
        self,
        source: Checkpoint,
        plan: Plan,
        out: Path,
        windows: Windows | None = None,
        *,
        batch_size: int = 8,
        resume: bool = False,
        progress: Progress | None = None,
    ) -> Plan:
        """The same as a checkpoint in `out`, block by block; `resume` goes on with an interrupted one.

        Returns the plan as it is true of the transformed model. Raises UserError as `quantized` and `write_quantized`.
        """
        progress = progress or Progress(quiet=True)
        packed, plan = self.quantized(source, plan, windows, batch_size=batch_size, note=progress.note)
        quantized = {path.split("/")[0] for path in plan.specs}
        with progress.stage(f"quantize ({self.name})", len(part_names(source))) as step:
            write_quantized(
                packed,
                plan,
                out,
                quantizer=self.record(windows, batch_size),
                description=source.path,
                resume=resume,
                on_part=lambda part: step(described(packed, part), light=part not in quantized),
                on_kept=lambda part: step(f"{part}, kept", light=True),
            )
        return plan

    def check(self, config: ModelConfig, plan: Plan) -> None:
        """Raises UserError for what cannot be done to a model of this config with this plan."""
        changed = self.transformed(_Described(config)).config
        self.recipe.check(changed, plan.specs)

    def to_dict(self) -> dict:
        """As JSON: what makes a write the same one."""
        transforms = [{"name": name, **dataclasses.asdict(options)} for name, options in self.transforms]
        return {**({"transforms": transforms} if transforms else {}), **self.recipe.to_dict()}

    def record(self, windows: Windows | None, batch_size: int) -> dict:
        """What a checkpoint says of how it was made: `to_dict`, and the text where it was calibrated."""
        found = self.to_dict()
        if self.recipe.calibrated and windows is not None:
            found["calibration"] = {"tokens": windows.fingerprint, "how": windows.how, "batch_size": batch_size}
        return found


def _named(given: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if isinstance(given, str):
        return given, {}
    fields = dict(given)
    name = fields.pop("name", None)
    if not isinstance(name, str):
        raise UserError(f"transforms: {dict(given)!r} has no name; write for example {{name: hadamard, seed: 1}}")
    return name, fields


def _transform_options(name: str, fields: dict[str, Any]) -> Any:
    if name not in TRANSFORMS:
        known = ", ".join([*TRANSFORMS, *SCALINGS])
        raise UserError(f"unknown transform {name!r}; known: {known}")
    return TRANSFORMS.options(name, fields)


class _Described(ParameterSource):
    """A model's description without its parameters, which are not asked for."""

    def __init__(self, config: ModelConfig):
        self.config = config

    def part(self, name: str, dtype=None) -> Params:
        raise NotImplementedError(name)
