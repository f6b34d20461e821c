"""Between an accumulator [64 channels, tokens] in registers and shared memory [tokens, 64 channels].

Pallas transposes only 16-bit arrays on the way. A tile is stored once per thousands of its products, so that plain
stores of single elements, four threads to a bank, do not show.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu


def store_transposed(array: Array, ref, interpret) -> None:
    """`ref[n, m] = array[m, n]`, array in the WGMMA layout."""
    if interpret:
        ref[...] = array.T
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()))
    def store(ctx, values, memory):
        from jaxlib.mlir.dialects import memref, vector

        for register, place in zip(values.registers.flat, _places(values.shape[1]), strict=True):
            for v, indices in enumerate(place):
                memref.store(vector.extract(register, [], [v]), memory, indices)

    store(array, ref)


def load_transposed(ref, tokens: int, interpret) -> Array:
    """What `store_transposed` stored, float32 [64, tokens], each thread reading what its like has written."""
    if interpret:
        return ref[...].T
    layout = plgpu.Layout.WGMMA
    result = plgpu.ShapeDtypeStruct((64, tokens), jnp.dtype("float32"), layout=layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=result)
    def load(ctx, memory):
        from jax.experimental.mosaic import gpu as mgpu
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import memref, vector

        pair = ir.VectorType.get((2,), ir.F32Type.get())
        shape = layout.to_mgpu().registers_shape((64, tokens))
        registers = np.empty(shape, dtype=object)
        registers.flat = [
            vector.from_elements(pair, [memref.load(memory, indices) for indices in place]) for place in _places(tokens)
        ]
        return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=None)

    return load(ref)


def _places(tokens: int):
    """[token, channel] of both elements of each of a thread's registers: thread 32 w + 4 r + c has, for f and i,
    channel 16 w + r + 8 i and tokens 8 f + 2 c and 8 f + 2 c + 1."""
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, gpu

    index = ir.IndexType.get()

    def constant(value: int):
        return mgpu.c(value, index)

    thread = arith.remui(gpu.thread_id(gpu.Dimension.x), constant(128))
    warp, lane = arith.divui(thread, constant(32)), arith.remui(thread, constant(32))
    row = arith.addi(arith.muli(warp, constant(16)), arith.divui(lane, constant(4)))
    column = arith.muli(arith.remui(lane, constant(4)), constant(2))
    for f in range(tokens // 8):
        for i in range(2):
            channel = arith.addi(row, constant(8 * i))
            yield [(arith.addi(column, constant(8 * f + v)), channel) for v in range(2)]
