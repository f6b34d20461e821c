"""What `lq list` prints, read off the registries."""

import dataclasses

from lq.registry import Registry


def catalogue(kind: str) -> list[list[str]]:
    """Rows of (name, what it is, options with their defaults)."""
    if kind == "importance":
        from lq.importance import METRICS

        return _methods(METRICS)
    if kind == "allocators":
        from lq.allocation import ALLOCATORS

        return _methods(ALLOCATORS)
    if kind == "searches":
        from lq.search import SEARCHES

        return _methods(SEARCHES)
    if kind == "quantizers":
        from lq.quantizers import QUANTIZERS

        return _methods(QUANTIZERS)
    if kind == "formats":
        from lq.numerics.spec import GROUP_SIZES, SCALE_BITS

        sizes, dtypes = "|".join(map(str, GROUP_SIZES)), "|".join(SCALE_BITS)
        options = f"bits=1..8, group_size={sizes}|column, symmetric=True|False, scale_dtype={dtypes}, "
        options += f"zero_dtype=None|{dtypes}, rank=0.., mixed=True|False, by_energy=True|False"
        return [["int", "integer codes with a scale, and a zero point unless symmetric, per group", options]]
    if kind == "transforms":
        from lq.quantizers import SCALINGS
        from lq.transforms import TRANSFORMS

        return [*_methods(TRANSFORMS), *_methods(SCALINGS)]  # in the order in which they may be applied
    from lq.models.families import FAMILIES

    return [[name, "model_type in config.json", ""] for name in FAMILIES]


def _methods(registry: Registry) -> list[list[str]]:
    return [[name, method.summary, _options(method.options)] for name, method in registry.items()]


def _options(cls: type) -> str:
    return ", ".join(f"{field.name}={_default(field)}" for field in dataclasses.fields(cls))


def _default(field: dataclasses.Field):
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()
