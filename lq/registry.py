"""One kind of table for every kind of method: a name from the literature, a pure function, its options."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from lq.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A registered method. `function`'s first docstring line is what `lq list` prints."""

    function: Callable
    options: type  # a frozen dataclass, every field with a default
    needs: frozenset[str] = frozenset()  # what must be supplied: "calibration"; of quantizers fields of `InputStats`
    needs_more: Callable = lambda options: frozenset()  # and what else with these options
    proof: Callable | None = None  # of allocators: what `function` gives, its objective, and what none is below
    # Of quantizers, see `lq.quantizers`:
    prepare: Callable | None = None  # what of the statistics serves every matrix that reads the input
    per_matrix: Callable | None = None  # the options of one matrix, from the options and its path
    block: Callable | None = None  # for all matrices of a block together, see `lq.quantizers.reconstruct`
    segments: Callable | None = None  # codes of a mixed spec, see `lq.quantizers.baq`
    widths: Callable | None = None  # codes of a spec that gives widths, see `lq.quantizers.runs`
    token_weights: Callable | None = None  # how much every calibration token counts, see `lq.quantizers.rsq`
    # Whether zero points are chosen that are no codes, from the options and the spec; see `Recipe.check`.
    fractional: Callable = lambda options, spec: False
    check: Callable | None = None  # raises UserError when options do not fit what they are used with, before any work

    @property
    def summary(self) -> str:
        return (self.function.__doc__ or "").strip().split("\n")[0]


class Registry(Mapping[str, Method]):
    """Name -> `Method`. An unknown name is a `UserError` that lists the known ones."""

    def __init__(self, kind: str, methods: Mapping[str, Method]):
        self.kind = kind
        self._methods = dict(methods)

    def __getitem__(self, name: str) -> Method:
        if name not in self._methods:
            close = difflib.get_close_matches(name, self._methods, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"unknown {self.kind} {name!r}; known: {', '.join(self._methods)}{hint}")
        return self._methods[name]

    def __contains__(self, name: object) -> bool:
        return name in self._methods

    def __iter__(self) -> Iterator[str]:
        return iter(self._methods)

    def __len__(self) -> int:
        return len(self._methods)

    def options(self, name: str, given: Mapping[str, Any]):
        """The options of `name` with the `given` fields set. An unknown field or a wrong type is a `UserError`."""
        cls = self[name].options
        if not isinstance(given, Mapping):
            raise UserError(f"{self.kind} {name}: options {given!r}; write a mapping of names to values")
        fields = {f.name: f for f in dataclasses.fields(cls)}
        hints = typing.get_type_hints(cls)
        for key, value in given.items():
            if key not in fields:
                known = ", ".join(fields) or "none"
                raise UserError(f"{self.kind} {name}: unknown option {key!r}; options: {known}")
            if not _fits(value, hints[key]):
                raise UserError(f"{self.kind} {name}: option {key}: {value!r} is not {_describe(hints[key])}")
        return cls(**given)


def refuse_idle(options, method: str, names: Iterable[str], why: str) -> None:
    """Raises UserError for the first of the fields `names` that is not at its default: it would be ignored."""
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    for name in names:
        if (value := getattr(options, name)) != defaults[name]:
            raise UserError(f"{method}: option {name}: {value}, but {why}; leave it out")


def _fits(value, hint) -> bool:
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, h) for h in typing.get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is type(None):
        return value is None
    return isinstance(value, origin or hint)


def _describe(hint) -> str:
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(h) for h in typing.get_args(hint))
    return {float: "a number", int: "a whole number", bool: "true or false", type(None): "null"}.get(hint, str(hint))
