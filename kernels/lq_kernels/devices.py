"""What a program is compiled for, when nobody says: platform and kind of device."""

import jax


def default_platform() -> str:
    """The default device's platform, as lowering rules call it."""
    platform = jax.devices()[0].platform
    if platform == "gpu":
        return "rocm" if "rocm" in jax.devices()[0].client.platform_version.lower() else "cuda"
    return platform


def known_platform(name: str | None) -> str:
    """`name` as lowering rules call it; the default device's when None. Raises ValueError for "gpu", which is two."""
    if name == "gpu":
        raise ValueError("platform 'gpu' may be either of two: write 'cuda' or 'rocm'")
    return name or default_platform()


def device_kind(platform: str) -> str | None:
    """The kind of device that is compiled for.

    The abstract mesh's when one is set (compiling ahead of time), else that of the platform's first device; None where
    the platform has none.
    """
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if abstract is not None:
        return abstract.device_kind
    try:
        return jax.devices(platform)[0].device_kind
    except RuntimeError:
        return None
