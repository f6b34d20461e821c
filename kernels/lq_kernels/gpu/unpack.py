"""From a thread's words to the A operand of the matrix instruction, in registers.

What is done to a register is written once, in `_register`, against the few operations it needs. They exist twice:
as MLIR, which becomes the kernel (`_Mlir`), and as array operations on one value per thread (`_Arrays`), by which
Pallas' interpreter and the tests run the very same steps. Only this file knows of the difference.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from lq_kernels.gpu.fields import Field, fields
from lq_kernels.gpu.layout import StreamSegment

# Layout of 32 words of which thread 32 w + 4 r + c reads word 8 w + r.
ROW_PAIRS = plgpu.Layout.TILED(
    plgpu.Tiling(((32,), (8,), (1,))), warp_dims=(-3,), lane_dims=(-2, plgpu.Replicated(4)), vector_dim=-1
)
ROWS = plgpu.Layout.WGMMA.reduce(1)


def words_layout(facts: StreamSegment):
    """The layout in which a warpgroup loads its words of a tile, `[code_rows, 64]`."""
    return plgpu.Layout.WG_STRIDED((facts.code_rows, 64), vec_size=facts.vector)


def unpack_columns(words: Array, zeros: Array | None, facts: StreamSegment, first: int, count: int, interpret) -> Array:
    """code - zero of fields [first, first + count) as bfloat16 [64, 8 * count].

    Args:
      words: int32 [code_rows, 64], in `words_layout`.
      zeros: int32 [32], pairs of bfloat16 in ROW_PAIRS; None: the segment's constant.
    """
    chosen = fields(facts.bits)[first : first + count]
    if interpret:
        return _columns_of_arrays(words, zeros, facts, chosen)
    layout = plgpu.Layout.WGMMA
    result = plgpu.ShapeDtypeStruct((64, 8 * count), jnp.dtype("bfloat16"), layout=layout)
    if zeros is None:
        emit = plgpu.inline_mgpu(arg_types=(words_layout(facts),), return_type=result)
        return emit(lambda ctx, w: _columns_of_registers(w, None, facts, chosen, layout))(words)
    emit = plgpu.inline_mgpu(arg_types=(words_layout(facts), ROW_PAIRS), return_type=result)
    return emit(lambda ctx, w, z: _columns_of_registers(w, z, facts, chosen, layout))(words, zeros)


def scales_of_pairs(pairs: Array, interpret) -> Array:
    """int32 [32] in ROW_PAIRS, pairs of bfloat16 -> float32 [64] in ROWS."""
    if interpret:
        return _rows_of_pairs(lax.bitcast_convert_type(pairs, jnp.bfloat16).astype(jnp.float32))

    @plgpu.inline_mgpu(
        arg_types=(ROW_PAIRS,), return_type=plgpu.ShapeDtypeStruct((64,), jnp.dtype("float32"), layout=ROWS)
    )
    def widen(ctx, array):
        ops = _Mlir()
        word = ops.word_of(array.registers.item())
        return _row_array([ops.float32(ops.left(word, 16)), ops.float32(ops.mask(word, 0xFFFF0000))])

    return widen(pairs)


def scales_of_words(low: Array, high: Array, interpret) -> Array:
    """Two int32 [32] in ROW_PAIRS, the bits of float32 for rows r and r + 8 -> float32 [64] in ROWS."""
    if interpret:
        return _rows_of_pairs(lax.bitcast_convert_type(jnp.stack([low, high], axis=-1), jnp.float32))

    @plgpu.inline_mgpu(
        arg_types=(ROW_PAIRS, ROW_PAIRS), return_type=plgpu.ShapeDtypeStruct((64,), jnp.dtype("float32"), layout=ROWS)
    )
    def join(ctx, first, second):
        ops = _Mlir()
        return _row_array([ops.float32(ops.word_of(a.registers.item())) for a in (first, second)])

    return join(low, high)


def _register(ops, words: list, field: Field, facts: StreamSegment, zero):
    """code - zero for the pair of codes in `field`. `words`: those of one row; `zero`: a pair, or None."""
    if facts.bits == 8:
        low, top = field.pieces
        value = ops.bfloat16(_magic(ops, ops.right(words[low.word], low.at), 0x7F, field))
        value = ops.subtract(value, ops.constant(field.offset))
        bit = ops.mask(ops.right(words[top.word], top.at - 14), 0x40004000)  # 2.0 where the top bit is set
        value = ops.multiply_add(ops.bfloat16(bit), ops.constant(64.0), value)
        return ops.subtract(value, ops.constant(facts.zero_point) if zero is None else zero)
    merged, mask = None, 0
    for piece in field.pieces:
        shifted = ops.right(words[piece.word], piece.at - piece.source - field.p)
        if merged is not None:
            shifted = ops.select(mask | mask << 16, merged, shifted)
        merged, mask = shifted, mask | ((1 << piece.width) - 1) << (piece.source + field.p)
    value = ops.bfloat16(_magic(ops, merged, mask, field))
    if zero is not None:
        return ops.subtract(value, ops.add(zero, ops.constant(field.offset)))
    if _exact(field.offset + facts.zero_point):
        return ops.subtract(value, ops.constant(field.offset + facts.zero_point))
    return ops.subtract(ops.subtract(value, ops.constant(field.offset)), ops.constant(facts.zero_point))


def _magic(ops, word, mask: int, field: Field):
    return ops.insert(word, mask | mask << 16, field.exponent | field.exponent << 16)


def _exact(value: float) -> bool:
    return float(np.float32(value).astype(jnp.bfloat16)) == value


def _columns_of_registers(words, zeros, facts: StreamSegment, chosen: tuple[Field, ...], layout):
    ops = _Mlir()
    count, vector = facts.bits, facts.vector
    flat = [ops.element(words.registers.flat[k // vector], k % vector) for k in range(2 * count)]
    pair = None if zeros is None else ops.word_of(zeros.registers.item())
    shape = layout.to_mgpu().registers_shape((64, 8 * len(chosen)))
    registers = np.empty((len(chosen), 2), dtype=object)
    for row in range(2):
        zero = None if pair is None else ops.both_halves(pair, row)
        for f, field in enumerate(chosen):
            registers[f, row] = _register(ops, flat[row * count : (row + 1) * count], field, facts, zero)
    return ops.array(registers.reshape(shape), layout.to_mgpu())


def _columns_of_arrays(words: Array, zeros: Array | None, facts: StreamSegment, chosen: tuple[Field, ...]) -> Array:
    ops, count = _Arrays(), facts.bits
    flat = words.reshape(2 * count // facts.vector, 128, facts.vector).swapaxes(0, 1).reshape(128, 2 * count)
    pairs = None if zeros is None else jnp.repeat(lax.bitcast_convert_type(zeros, jnp.bfloat16), 4, axis=0)
    columns = []
    for field in chosen:
        for row in range(2):
            zero = None if pairs is None else jnp.stack([pairs[:, row]] * 2, axis=-1)
            own = [flat[:, row * count + j] for j in range(count)]
            columns.append(_register(ops, own, field, facts, zero))
    tile = jnp.stack(columns).reshape(len(chosen), 2, 4, 8, 4, 2)  # field, row, warp, r, c, half
    return tile.transpose(2, 1, 3, 0, 4, 5).reshape(64, 8 * len(chosen))


def _rows_of_pairs(pairs: Array) -> Array:
    """[32, 2] -> [64]: word 8 w + r is rows 16 w + r and 16 w + r + 8."""
    return pairs.reshape(4, 8, 2).swapaxes(1, 2).reshape(64)


def _row_array(values):
    from jax.experimental.mosaic import gpu as mgpu

    layout = ROWS.to_mgpu()
    registers = np.empty(2, dtype=object)
    registers[:] = values
    registers = registers.reshape(layout.registers_shape((64,)))
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


class _Arrays:
    """Words are int32 [threads]; pairs of bfloat16 are [threads, 2]."""

    def right(self, word, by: int):
        if by < 0:
            return lax.shift_left(word, jnp.int32(-by))
        return lax.shift_right_logical(word, jnp.int32(by))

    def insert(self, word, mask: int, constant: int):
        return (word & _signed(mask)) | _signed(constant)

    def mask(self, word, mask: int):
        return word & _signed(mask)

    def select(self, mask: int, ones, zeros):
        return ((ones ^ zeros) & _signed(mask)) ^ zeros

    def bfloat16(self, word):
        return lax.bitcast_convert_type(word, jnp.bfloat16)

    def constant(self, value: float):
        return jnp.bfloat16(value)

    def add(self, a, b):
        return a + b

    def subtract(self, a, b):
        return a - b

    def multiply_add(self, a, b, c):
        return (a.astype(jnp.float32) * b.astype(jnp.float32) + c.astype(jnp.float32)).astype(jnp.bfloat16)


class _Mlir:
    """Words are i32; pairs of bfloat16 are vector<2xbf16>, one 32-bit register."""

    def __init__(self):
        from jax.experimental.mosaic import gpu as mgpu
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, llvm, vector

        self._mgpu, self._ir = mgpu, ir
        self._arith, self._llvm, self._vector = arith, llvm, vector
        self._i32 = ir.IntegerType.get_signless(32)
        self._pair = ir.VectorType.get((2,), ir.BF16Type.get())

    def _integer(self, value: int):
        return self._mgpu.c(_signed(value).item(), self._i32)

    def element(self, register, i: int):
        return self._vector.extract(register, [], [i])

    def word_of(self, register):
        return self._mgpu.utils.bitcast(register, self._i32)

    def float32(self, word):
        single = self._ir.VectorType.get((1,), self._ir.F32Type.get())
        return self._mgpu.utils.bitcast(word, single)

    def right(self, word, by: int):
        if by == 0:
            return word
        if by < 0:
            return self.left(word, -by)
        return self._arith.shrui(word, self._integer(by))

    def left(self, word, by: int):
        return self._arith.shli(word, self._integer(by))

    def insert(self, word, mask: int, constant: int):
        # Left to itself ptxas makes two instructions of it, one for each immediate.
        operands = [word, self._integer(mask), self._integer(constant)]
        return self._llvm.inline_asm(self._i32, operands, "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", asm_dialect=0)

    def mask(self, word, mask: int):
        return self._arith.andi(word, self._integer(mask))

    def select(self, mask: int, ones, zeros):
        return self._arith.xori(self.mask(self._arith.xori(ones, zeros), mask), zeros)

    def both_halves(self, word, half: int):
        """One half of a word in both."""
        selector = self._integer(0x3232 if half else 0x1010)
        return self.bfloat16(
            self._llvm.inline_asm(self._i32, [word, selector], "prmt.b32 $0, $1, $1, $2;", "=r,r,r", asm_dialect=0)
        )

    def bfloat16(self, word):
        return self._mgpu.utils.bitcast(word, self._pair)

    def constant(self, value: float):
        bf16 = self._ir.BF16Type.get()
        return self._vector.broadcast(self._pair, self._mgpu.c(float(value), bf16))

    def add(self, a, b):
        return self._arith.addf(a, b)

    def subtract(self, a, b):
        return self._arith.subf(a, b)

    def multiply_add(self, a, b, c):
        # math.fma on bfloat16 is done in float32, one half after the other.
        operands = [self._mgpu.utils.bitcast(v, self._i32) for v in (a, b, c)]
        word = self._llvm.inline_asm(self._i32, operands, "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", asm_dialect=0)
        return self.bfloat16(word)

    def array(self, registers, layout):
        return self._mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _signed(value: int) -> np.int32:
    return np.uint32(value).view(np.int32)
