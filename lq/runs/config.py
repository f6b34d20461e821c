"""What an experiment is, as a YAML file. Every field is checked before anything is computed.

    model: standin                       # a directory in Hugging Face layout, a hub name, or the model shipped with lq
    output: runs/example
    calibration: {data: standin, samples: 32, length: 512}
    evaluation: {data: standin, window: 512, windows: 24}
    quantization: {method: rtn, group_size: 128}
    allocation:
      bits: [2, 4]
      budgets: [3.5, 3.0, 2.5]           # bits per weight, scales and zero points included
      orders: [lim, zd, first_last, {metric: random, seeds: 5}, {metric: lim, reverse: true}]
    baselines: {uniform: [8, 4, 3, 2]}
    moves: {high: 4, low: 2, orders: [lim, zd]}

Orders times budgets is the sweep. Random orders have the seeds 0, 1, 2 ...; `{metric: random, seeds: 5, options: {seed:
7}}` are those of 7 to 11. An unknown key, a wrong type or an impossible value is one line that says where it stands.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lq.allocation import ALLOCATORS
from lq.allocation.latency import MOST_SECONDS
from lq.errors import UserError
from lq.importance import METRICS
from lq.numerics.spec import QuantSpec
from lq.pipeline import Pipeline
from lq.quantizers import QUANTIZERS
from lq.registry import Registry

MOST_SAMPLES, MOST_SEEDS = 1_000_000, 1000  # beyond these a number is a slip of the pen

GroupSize = Literal[32, 64, 128, 256] | None
BATCH_SIZE = "batch_size"  # the option of metrics that read the calibration windows in batches


def _storable(bits: int) -> int:
    if bits != 16 and bits not in range(1, 9):
        raise ValueError(f"{bits}; write 1 to 8, or 16 to leave it dense")
    return bits


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is not a regular expression ({error})") from None
    return text


def known(registry: Registry) -> AfterValidator:
    """A name in `registry`."""

    def check(name: str) -> str:
        registry[name]
        return name

    return AfterValidator(check)


Bits = Annotated[int, Field(ge=1, le=8)]
Pattern = Annotated[str, AfterValidator(_pattern)]  # a regular expression
WidthOrDense = Annotated[int, AfterValidator(_storable)]
Budget = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Section(BaseModel):
    """Unknown keys are errors, nothing is converted silently."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class CalibrationSection(Section):
    data: str = "standin"  # a text file or directory, wikitext2, c4, or the text shipped with lq
    samples: Annotated[PositiveInt, Field(le=MOST_SAMPLES)] = 32
    length: Annotated[int, Field(ge=2)] = 512  # tokens per sample
    seed: NonNegativeInt = 0
    batch_size: PositiveInt = 8  # windows per device step, of quantizers and of every metric that reads text in batches


class EvaluationSection(Section):
    data: str = "standin"
    window: Annotated[int, Field(ge=2)] = 512  # tokens
    stride: PositiveInt | None = None  # the window when null: windows do not overlap
    windows: PositiveInt | None = None  # the first so many; all when null
    batch_size: PositiveInt = 8
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the computation

    @model_validator(mode="after")
    def _check(self):
        if self.stride is not None and self.stride > self.window:
            raise ValueError(f"stride ({self.stride}) must not be above window ({self.window}): it would skip tokens")
        return self


class QuantizationSection(Section):
    method: Annotated[str, known(QUANTIZERS)] = "rtn"
    options: dict[str, Any] = Field(default_factory=dict)
    transforms: list[str | dict[str, Any]] = Field(
        default_factory=list
    )  # names, or {name: hadamard, seed: 1}; in order
    bias_correction: bool = False
    propagate: bool | None = None  # calibrate on quantized states, or the original's; null: as is usual for the method
    group_size: GroupSize = 128  # null: the whole column
    symmetric: bool = False
    scale_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    zero_dtype: Literal["bfloat16", "float16", "float32"] | None = None  # of zero points that need not be whole
    rank: NonNegativeInt = 0  # of the low-rank residual
    mixed: bool = False  # widths of their own for runs of 128 input channels
    by_energy: bool = False  # groups of channels in the order of their energy

    @property
    def spec(self) -> QuantSpec:
        """What all matrices share but for their width."""
        return QuantSpec(
            bits=8,
            group_size=self.group_size,
            symmetric=self.symmetric,
            scale_dtype=self.scale_dtype,
            zero_dtype=self.zero_dtype,
            rank=self.rank,
            mixed=self.mixed,
            by_energy=self.by_energy,
        )

    @property
    def pipeline(self) -> Pipeline:
        """Raises UserError for what does not exist or cannot be combined."""
        return Pipeline.read(self.method, self.options, self.transforms, self.bias_correction, self.propagate)

    @field_validator("options")
    @classmethod
    def _check_options(cls, options: dict, info: ValidationInfo) -> dict:
        if "method" in info.data:
            QUANTIZERS.options(info.data["method"], options)
        return options

    @model_validator(mode="after")
    def _check(self):
        recipe = self.pipeline.recipe
        if check := recipe.quantizer.check:
            check(recipe.options, self.spec)
        return self


class PinSection(Section):
    match: Pattern  # anywhere in a matrix path such as block_0/mlp/down_proj
    bits: WidthOrDense


class Order(Section):
    """An order of blocks: a metric, perhaps reversed, or random with several seeds, from `options.seed` on (0)."""

    metric: Annotated[str, known(METRICS)]
    reverse: bool = False
    seeds: Annotated[PositiveInt, Field(le=MOST_SEEDS)] = 1  # random only: this many orders
    options: dict[str, Any] = Field(default_factory=dict)

    @property
    def is_random(self) -> bool:
        return self.metric == "random"

    @property
    def name(self) -> str:
        """Tells orders apart: `lim`, `reverse lim`, `zd sides=two`.

        The seed of a random order is told by its rows, and a batch size is no part of what is measured.
        """
        unnamed = ("seed", BATCH_SIZE) if self.is_random else (BATCH_SIZE,)
        given = sorted((key, value) for key, value in self.options.items() if key not in unnamed)
        options = "".join(f" {key}={value}" for key, value in given)
        return ("reverse " if self.reverse else "") + self.metric + options

    def each_seed(self) -> list[int | None]:
        """The seeds of a random order; `[None]` for any other."""
        first = self.options.get("seed", 0)
        return list(range(first, first + self.seeds)) if self.is_random else [None]

    @model_validator(mode="after")
    def _check(self):
        if self.seeds > 1 and not self.is_random:
            raise ValueError(f"seeds belongs to the metric random, not to {self.metric}")
        return self

    @field_validator("options")
    @classmethod
    def _check_options(cls, options: dict, info: ValidationInfo) -> dict:
        metric, first = info.data.get("metric"), options.get("seed", 0)
        if metric == "random" and (type(first) is not int or first < 0):
            raise ValueError(f"seed: {first!r} is not a whole number from 0 up")
        if metric is not None:
            METRICS.options(metric, options)
        return options


def _different(orders: list[Order]) -> list[Order]:
    names = [order.name for order in orders]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"the order {name!r} is listed twice")
    return orders


def _distinct(numbers: list) -> list:
    """Rows are named by these numbers in six digits, so that is where they must differ."""
    seen: dict[str, float] = {}
    for number in numbers:
        shown = f"{number:g}"
        if shown in seen:
            same = "is listed twice" if seen[shown] == number else f"and {seen[shown]} are alike in six digits"
            raise ValueError(f"{number} {same}; leave one out")
        seen[shown] = number
    return numbers


def _order(value):
    return {"metric": value} if isinstance(value, str) else value


OrderField = Annotated[Order, BeforeValidator(_order)]
Orders = Annotated[list[OrderField], AfterValidator(_different)]


class LatencySection(Section):
    """A second limit beside the budget, for what the matrices that are free take together."""

    table: str  # a JSON file, matrix -> option -> seconds
    seconds: Annotated[float, Field(gt=0, le=MOST_SECONDS)]


class AllocationSection(Section):
    method: Annotated[str, known(ALLOCATORS)] = "rank"
    # What a unit is taken to lose: as measured (null, where the metric measures), by its place, or by its score.
    options: dict[str, Any] = Field(default_factory=dict)  # of the method
    costs: Literal["measured", "place", "value"] | None = None
    bits: Annotated[list[Bits], Field(min_length=1)] = Field(default_factory=lambda: [2, 4])
    # To choose from as well; null: the quantization's alone.
    group_sizes: Annotated[list[GroupSize], Field(min_length=1)] | None = None
    budgets: Annotated[list[Budget], AfterValidator(_distinct)] = Field(default_factory=list)  # bits per weight
    orders: Orders = Field(default_factory=list)
    pins: list[PinSection] = Field(default_factory=list)
    embedding_bits: WidthOrDense = 16
    head_bits: WidthOrDense = 16
    count: Literal["blocks", "all"] = "blocks"  # what the average is taken over
    latency: LatencySection | None = None

    @model_validator(mode="after")
    def _check(self):
        ALLOCATORS.options(self.method, self.options)
        return self


class BaselineSection(Section):
    uniform: Annotated[list[Bits], AfterValidator(_distinct)] = Field(default_factory=list)
    finer_groups: bool = True  # the same widths in groups of 64 and 32, where the main group is larger


class MoveSection(Section):
    """The paper's sweep: all blocks at `high`, then the least important one after the other at `low`."""

    high: Bits = 4
    low: Bits = 2
    orders: Annotated[Orders, Field(min_length=1)]
    every: PositiveInt = 1  # evaluate after every so many blocks

    @model_validator(mode="after")
    def _check(self):
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        for order in self.orders:
            unit = getattr(METRICS.options(order.metric, order.options), "unit", "block")
            if unit != "block":
                raise ValueError(f"{order.metric} orders units {unit}, and the sweep moves blocks; write unit: block")
        return self


class Experiment(Section):
    title: str = "Layer-wise quantization"
    model: str
    output: str
    calibration: CalibrationSection = CalibrationSection()
    evaluation: EvaluationSection = EvaluationSection()
    quantization: QuantizationSection = QuantizationSection()
    allocation: AllocationSection = AllocationSection()
    baselines: BaselineSection = BaselineSection()
    moves: MoveSection | None = None
    _file: str = PrivateAttr("")

    @property
    def file(self) -> str:
        """The config it was read from, as the user wrote it; empty when it was made in code."""
        return self._file


@contextlib.contextmanager
def at(place: str, drop: str = "") -> Iterator[None]:
    """Puts `place`, a file or the path of a key, before the message of a UserError, in place of `drop`."""
    try:
        yield
    except UserError as error:
        message = str(error).removeprefix(drop)
        raise UserError(f"{place}: {message}" if place else message) from error


class _Repeated(yaml.YAMLError):
    """A key that a mapping holds twice; `line` counts from 1."""

    def __init__(self, key: str, line: int):
        super().__init__(f"the key {key} is given twice; keep one")
        self.line = line


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, where YAML's own loader silently takes the last."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                raise _Repeated(key.value, key.start_mark.line + 1)
            seen.add((key.tag, key.value))
        return node


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Reads and checks a config; `overrides` are `a.b=value` with a YAML value.

    Raises UserError, one line with the path of the offending key.
    """
    data = read_mapping(path, "configs/ for examples")
    for item in overrides:
        _override(data, item)
    try:
        experiment = Experiment.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}") from None
    experiment._file = str(path)
    return experiment


def read_mapping(path: Path, examples: str) -> dict[str, Any]:
    """The keys of a YAML file. Raises UserError, one line with its name, for one that has none or is none.

    Args:
      path: of the file.
      examples: where there are some, for a user whose file is not there.
    """
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such config; see {examples}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a directory; give a YAML file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a YAML file") from None
    except _Repeated as error:
        raise UserError(f"{path}:{error.line}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or a date that there is not
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else f"{path}"
        problem = "not text" if isinstance(error, UnicodeDecodeError) else getattr(error, "problem", None) or error
        raise UserError(f"{where}: not valid YAML ({problem})") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected keys such as model: and output:, found {type(data).__name__}")
    return data


def dump_experiment(experiment: Experiment) -> str:
    """The config with every default filled in, as YAML."""
    return yaml.safe_dump(experiment.model_dump(), sort_keys=False)


def _override(data: dict, item: str) -> None:
    key, separator, text = item.partition("=")
    if not separator or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise UserError(f"--set {item}: write key.subkey=value")
    try:
        value = yaml.load(text, _Loader)
    except _Repeated as error:
        raise UserError(f"--set {item}: {error}") from None
    except (yaml.YAMLError, ValueError):  # the second for a date that there is not
        raise UserError(f"--set {item}: the value is not valid YAML") from None
    *parents, last = key.split(".")
    for parent in parents:
        child = data.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"--set {item}: {parent} is no section")
        data = child
    data[last] = value


def first_problem(error: ValidationError) -> str:
    """The first of a config's mistakes, as `key.path: message`, and how many more there are."""
    problems = error.errors()
    first = problems[0]
    where = ".".join(str(part) for part in first["loc"])
    value = first.get("input")
    if first["type"] == "extra_forbidden":
        what = "unknown key"
    elif first["type"] == "missing":
        what = "required, not given"
    else:
        what = first["msg"].removeprefix("Value error, ")
        scalar = isinstance(value, str | int | float | bool) or value is None
        if scalar and not (first["type"] == "value_error" and repr(value) in what):
            what = f"{what} (got {value!r})"
    more = f"; and {len(problems) - 1} more" if len(problems) > 1 else ""
    return f"{where}: {what}{more}" if where else f"{what}{more}"
