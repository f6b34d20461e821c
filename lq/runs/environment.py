"""What a result was measured with: versions, device, memory."""

import importlib.metadata
import os
import platform
import resource
import sys

PACKAGES = ("lq", "jax", "jaxlib", "flax", "numpy", "transformers")


def versions() -> dict[str, str]:
    """Installed versions of what a number may depend on. Imports nothing."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def device_name() -> str:
    """The default device: its kind, how many there are, and the CPU's name when it is one."""
    import jax

    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind}"
    return f"{_cpu_name()} ({os.cpu_count()} cores)"


def peak_memory_bytes() -> int:
    """The largest resident size of this process so far.

    Linux's own count is read where there is one: what `getrusage` says begins with the size of the process that
    started this one.
    """
    try:
        with open("/proc/self/status") as f:
            return next(1024 * int(line.split()[1]) for line in f if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def describe_environment(seeds: dict) -> dict:
    """The `environment` of `Results`."""
    return {
        "versions": versions(),
        "device": device_name(),
        "platform": platform.platform(),
        "seeds": seeds,
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            names = [line.split(":", 1)[1].strip() for line in f if line.startswith("model name")]
        return names[0] if names else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()
