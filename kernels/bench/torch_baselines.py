"""The same products by torch, where torch with CUDA is installed: its bfloat16 matmul and its own int4 kernel.

`_weight_int4pack_mm` is torch's weight-only int4 product (groups of 128, bfloat16 scales and zeros). Timed with CUDA
events over a rotation of matrices, as ours are.
"""

import statistics
import time


def available() -> str | None:
    """None when torch can be timed, else why not."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def make_bf16(K: int, N: int):
    import torch

    return torch.randn(K, N, device="cuda", dtype=torch.bfloat16)


def make_int4(K: int, N: int):
    import torch

    codes = torch.randint(0, 256, (N, K // 2), device="cuda", dtype=torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    return packed, torch.rand(K // 128, N, 2, device="cuda", dtype=torch.bfloat16)


def multiply_int4(x, w):
    import torch

    return torch.ops.aten._weight_int4pack_mm(x, w[0], 128, w[1])


METHODS = {"torch bf16": (make_bf16, lambda x, w: x @ w), "torch int4": (make_int4, multiply_int4)}


def time_product(name: str, rows: int, K: int, N: int, *, cache_bytes: int, repeats: int) -> dict:
    """Median and minimum microseconds of one product, replayed as a CUDA graph; the reason when it cannot run."""
    import torch

    make, product = METHODS[name]
    nbytes = K * N * 2 if name == "torch bf16" else K * N // 2 + K // 128 * N * 4
    copies = max(2, min(32, -(-4 * cache_bytes // nbytes)))
    try:
        matrices = [make(K, N) for _ in range(copies)]
        x = torch.randn(rows, K, device="cuda", dtype=torch.bfloat16)
        for w in matrices[:2]:
            product(x, w)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for w in matrices:
                product(x, w)
        times = []
        for _ in range(repeats + 1):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / copies)
    except Exception as problem:  # a kernel that is not there is a result
        return {"method": name, "rows": rows, "K": K, "N": N, "failure": f"{type(problem).__name__}: {problem}"[:300]}
    return {
        "method": name,
        "rows": rows,
        "K": K,
        "N": N,
        "microseconds": statistics.median(times[1:]),
        "minimum": min(times[1:]),
        "weight_bytes": nbytes,
        "copies": copies,
    }


def time_all(shapes, rows, *, cache_bytes: int, repeats: int, deadline: float) -> list[dict]:
    found = []
    for K, N in shapes:
        for m in rows:
            for name in METHODS:
                if time.monotonic() > deadline:
                    return found
                found.append(time_product(name, m, K, N, cache_bytes=cache_bytes, repeats=repeats))
    return found
