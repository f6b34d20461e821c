"""Packing of small integer codes into uint32 words: the canonical layout, one for all backends and for files.

A matrix of codes is `[K, N]`: K input channels (the axis the product sums over), N output channels. A *plane* of width
p in {1, 2, 4, 8} holds p bits of every code, 32/p codes to a word, little-endian along K:

    word[r, n] bits [p*i, p*(i+1))  =  code[r * 32/p + i, n] bits of this plane,      i = 0 .. 32/p - 1

Widths 1, 2, 4 and 8 are one plane, which is GPTQ's order. The others are sums of planes, lowest bits first in the
widest plane: 3 = 2+1, 5 = 4+1, 6 = 4+2, 7 = 4+2+1. So 3 bits cost 3 bits, unpacking is shifts and masks, no code
straddles two words, and a matrix cut along K at multiples of 32 is cut between words in every plane.

When K is no multiple of 32/p the last word of a plane is padded with zero bits; the padding is counted by
`packed_bits`. Leading axes before K (a stack of experts) are carried along.
"""

import functools
import operator

import jax.numpy as jnp
from jax import Array

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def plane_widths(bits: int) -> tuple[int, ...]:
    """Widths of the planes of a `bits`-bit code, lowest bits first. Raises ValueError outside 1..8."""
    if bits not in PLANES:
        raise ValueError(f"a code has 1 to 8 bits, not {bits}")
    return PLANES[bits]


def words_along(length: int, width: int) -> int:
    """uint32 words that `length` codes fill along the packed axis in a plane of `width` bits."""
    return -(-length * width // 32)


def packed_bits(shape: tuple[int, ...], bits: int) -> int:
    """Bits that codes of `shape` `[..., K, N]` occupy once packed along K, padding included."""
    *lead, K, N = shape
    count = N
    for n in lead:
        count *= n
    return 32 * count * sum(words_along(K, width) for width in plane_widths(bits))


def pack(codes: Array, bits: int) -> tuple[Array, ...]:
    """Packs unsigned codes `[..., K, N]` (any integer dtype, values in [0, 2**bits)) into planes `[..., words, N]`."""
    codes = codes.astype(jnp.uint32)
    planes, shift = [], 0
    for width in plane_widths(bits):
        planes.append(_pack_plane((codes >> shift) & ((1 << width) - 1), width))
        shift += width
    return tuple(planes)


def unpack(planes: tuple[Array, ...], bits: int, length: int) -> Array:
    """The codes `[..., length, N]` as uint32."""
    fields, shift = [], 0
    for words, width in zip(planes, plane_widths(bits), strict=True):
        fields.append(_unpack_plane(words, width, length) << shift)
        shift += width
    return functools.reduce(operator.or_, fields)


def _pack_plane(fields: Array, width: int) -> Array:
    *lead, K, N = fields.shape
    per_word = 32 // width
    words = words_along(K, width)
    padding = [(0, 0)] * len(lead) + [(0, words * per_word - K), (0, 0)]
    fields = jnp.pad(fields, padding).reshape(*lead, words, per_word, N)
    shifts = (width * jnp.arange(per_word, dtype=jnp.uint32))[:, None]
    return jnp.sum(fields << shifts, axis=-2, dtype=jnp.uint32)  # fields do not overlap: the sum is the bitwise or


def _unpack_plane(words: Array, width: int, length: int) -> Array:
    *lead, rows, N = words.shape
    per_word = 32 // width
    shifts = (width * jnp.arange(per_word, dtype=jnp.uint32))[:, None]
    fields = (words[..., :, None, :] >> shifts) & jnp.uint32((1 << width) - 1)
    return fields.reshape(*lead, rows * per_word, N)[..., :length, :]
