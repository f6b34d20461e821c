"""`Recipe`: which quantizer, with which options, and what is done around it; checked as a whole before any work.

Steps are taken in this order, each where the recipe asks for it:

    fold norms, rotate        the model as a whole, `lq.transforms`, before anything is measured
    channel scales            per block: AWQ's search, or SmoothQuant's closed form
    codes                     per block: the quantizer, its clipping search included
    low-rank residual         per matrix, where its spec has a rank (LoRC); before codes that a block learns together
    bias correction           per matrix: the mean error of its output is added to its bias
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lq.errors import UserError
from lq.models.config import ModelConfig
from lq.models.matrices import model_shapes
from lq.numerics.spec import QuantSpec
from lq.quantizers.registry import QUANTIZERS, SCALINGS
from lq.registry import Method

MIXABLE = "2 to 7 bits and more than 128 input channels, a multiple of 128, in one matrix (see QuantSpec.mixes)"

ORDERABLE = "several whole groups of input channels in one matrix"
ORDER_REFUSED = "cannot round a matrix in groups or segments of channels by their energy; write gptq, rsq or rtn"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the matrices of a model are quantized. Raises UserError for names and options that do not exist."""

    method: str = "rtn"
    options: Any = None  # of the method; its defaults when None
    scaling: str | None = None  # a name in `SCALINGS`: channel scales folded into the block before it is quantized
    scaling_options: Any = None
    bias_correction: bool = False
    # Whether a block is calibrated on what the quantized blocks before it let through, or on the original model's
    # states. None: as the method's option of this name says; of a method that has none, if biases are corrected.
    # Afterwards it is what holds, and still None where nothing is calibrated.
    propagate: bool | None = None

    def __post_init__(self):
        if self.options is None:
            object.__setattr__(self, "options", QUANTIZERS.options(self.method, {}))
        self._resolve_propagation()
        if getattr(self.options, "scale", False):
            if self.scaling is not None:
                raise UserError(
                    f"{self.method} scales the channels itself; write scale: false, or leave out {self.scaling}"
                )
            object.__setattr__(self, "scaling", self.method)
            object.__setattr__(self, "scaling_options", self.options)
        if self.scaling is not None and self.scaling_options is None:
            object.__setattr__(self, "scaling_options", SCALINGS.options(self.scaling, {}))

    def _resolve_propagation(self):
        """Makes one thing of `propagate` and the method's option of this name."""
        if self.propagate is None and self.calibrated:
            object.__setattr__(self, "propagate", getattr(self.options, "propagate", self.bias_correction))
        elif self.propagate is not None and not self.calibrated:
            raise UserError(f"propagate: {self.name} reads no calibration text; leave it out")
        elif hasattr(self.options, "propagate"):
            object.__setattr__(self, "options", dataclasses.replace(self.options, propagate=self.propagate))

    @property
    def quantizer(self) -> Method:
        return QUANTIZERS[self.method]

    @property
    def calibrated(self) -> bool:
        """Whether calibration text is needed."""
        return "calibration" in self._method_needs or self.scaling is not None or self.bias_correction

    @property
    def name(self) -> str:
        """In words, for tables and messages: `awq + gptq`, `rtn + bias correction`."""
        before = [self.scaling] if self.scaling is not None and self.scaling != self.method else []
        return " + ".join([*before, self.method, *(["bias correction"] if self.bias_correction else [])])

    @property
    def needs(self) -> frozenset[str]:
        """Fields of `InputStats` that are collected for every matrix."""
        return self._method_needs - {"calibration"}

    @property
    def _method_needs(self) -> frozenset[str]:
        return self.quantizer.needs | self.quantizer.needs_more(self.options)

    def of_matrix(self, path: str) -> "Recipe":
        """The recipe as it is for one matrix: AWQ clips no queries and keys."""
        if self.quantizer.per_matrix is None:
            return self
        return dataclasses.replace(
            self, options=self.quantizer.per_matrix(self.options, path), scaling=None, scaling_options=None
        )

    @property
    def true_sequential(self) -> bool:
        """Whether a matrix is calibrated on what the quantized matrices before it in its block let through."""
        return bool(getattr(self.options, "true_sequential", False))

    @property
    def reconstructs_blocks(self) -> bool:
        """Whether all matrices of a block are found together, so that its output is near the original's."""
        return self.quantizer.block is not None and getattr(self.options, "unit", "block") == "block"

    def check(self, config: ModelConfig, specs: Mapping[str, QuantSpec]) -> None:
        """Raises UserError, with the reason, for what cannot be combined, or would cost bytes and gain nothing."""
        checks = [(self.quantizer.check, self.options)]
        if self.scaling is not None:
            checks.append((SCALINGS[self.scaling].check, self.scaling_options))
        for spec in sorted(set(specs.values()), key=str):
            for check, options in checks:
                if check is not None:
                    check(options, spec)
            if not spec.symmetric:
                self._check_zeros(spec)
            if spec.mixed and self.quantizer.segments is None:
                able = " or ".join(name for name, method in QUANTIZERS.items() if method.segments is not None)
                raise UserError(f"mixed: {self.method} cannot choose widths for runs of channels; write method {able}")
            if spec.ordered and self.quantizer.widths is None:
                raise UserError(f"{'by_energy' if spec.by_energy else 'widths'}: {self.method} {ORDER_REFUSED}")
        if self.quantizer.segments is not None and specs:
            self._check_mixed(config, specs)
        if any(spec.by_energy for spec in specs.values()):
            self._check_by_energy(config, specs)
        if self.bias_correction and not (config.qkv_bias and config.attention_out_bias and config.mlp_bias):
            raise UserError(
                f"bias_correction: the matrices of this {config.family} model have no biases to correct; "
                "add them with the transform add_biases, or leave bias_correction out"
            )

    def _check_zeros(self, spec: QuantSpec) -> None:
        fractional = self.quantizer.fractional(self.options, spec)
        if fractional and spec.zero_dtype is None:
            raise UserError(
                f"{self.method}: its zero points are no codes, and rounded to codes they lose all it gains; "
                "write a zero_dtype (--zero-dtype bfloat16), or the method rtn"
            )
        if spec.zero_dtype is not None and not fractional:
            raise UserError(
                f"zero_dtype: {self.method} chooses zero points that are codes, for which {spec.zero_dtype} is wasted; "
                "leave it out"
            )

    def _check_mixed(self, config: ModelConfig, specs: Mapping[str, QuantSpec]) -> None:
        if not any(spec.mixed for spec in specs.values()):
            raise UserError(
                f"{self.method}: chooses widths for runs of channels, for which these specs have no room; write mixed: "
                "true (--mixed), or the method gptq"
            )
        if not (set(specs) - set(self.unmixed(config, specs))):
            raise UserError(
                f"{self.method}: no matrix of this model has runs of channels to choose widths for; that takes "
                f"{MIXABLE}; write the method gptq"
            )

    def _check_by_energy(self, config: ModelConfig, specs: Mapping[str, QuantSpec]) -> None:
        neighbours = self.unordered(config, specs)
        if len(neighbours) == sum(spec.by_energy for spec in specs.values()):
            raise UserError(
                f"by_energy: no matrix of this model has {ORDERABLE}; write a smaller group_size, or leave it out"
            )
        if neighbours and getattr(self.options, "static_groups", None) is False:
            raise UserError(
                f"{self.method}: static_groups false, but the groups of {neighbours[0]} are of neighbours, since it "
                f"has not {ORDERABLE}; leave static_groups out"
            )

    def unordered(self, config: ModelConfig, specs: Mapping[str, QuantSpec]) -> list[str]:
        """The matrices that keep groups of neighbours where groups by energy were asked for."""
        shapes = model_shapes(config)
        return [path for path, spec in specs.items() if spec.by_energy and not spec.orders(shapes[path])]

    def unmixed(self, config: ModelConfig, specs: Mapping[str, QuantSpec]) -> list[str]:
        """The matrices that keep one width where widths for runs of their channels were asked for."""
        shapes = model_shapes(config)
        return [path for path, spec in specs.items() if spec.mixed and not spec.mixes(shapes[path])]

    def notes(self, config: ModelConfig, specs: Mapping[str, QuantSpec]) -> list[str]:
        """Lines for the user on how it is calibrated, and what will not be done as asked."""
        found = []
        if self.calibrated:
            states = "what the quantized blocks before it let through" if self.propagate else "the original's states"
            setting = f"propagate: {str(self.propagate).lower()}"
            found.append(f"{self.name}: every block is calibrated on {states} ({setting})")
        if unmixed := self.unmixed(config, specs):
            few = ", ".join(unmixed[:2]) + (" ..." if len(unmixed) > 2 else "")
            kept = f"{len(unmixed)} of {len(specs)} matrices keep one width ({few})"
            found.append(f"mixed: {kept}; several take {MIXABLE}")
        if any(spec.by_energy for spec in specs.values()) and (unordered := self.unordered(config, specs)):
            few = ", ".join(unordered[:2]) + (" ..." if len(unordered) > 2 else "")
            kept = f"{len(unordered)} of {len(specs)} matrices keep groups of neighbours ({few})"
            found.append(f"by_energy: {kept}; it takes {ORDERABLE}")
        return found

    def to_dict(self) -> dict:
        """As JSON; what makes a write the same one."""
        found: dict[str, Any] = {"method": self.method, "options": dataclasses.asdict(self.options)}
        if self.scaling not in (None, self.method):
            found |= {"scaling": self.scaling, "scaling_options": dataclasses.asdict(self.scaling_options)}
        if self.bias_correction:
            found["bias_correction"] = True
        if self.calibrated:
            found["propagate"] = self.propagate
        return found
