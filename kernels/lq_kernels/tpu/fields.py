"""How the codes of one chunk lie in 32-bit words, and the shifts and masks that bring them out.

A *chunk* is 256 input channels. A *container* is what a code is unpacked into: 16 bits (a bfloat16), 8 (an int8) or 4
(an int4). A *tile* is 8 rows of int32 words, one register row: 8 * 32 / container codes. Reinterpreted at the
container's width, word r of a tile becomes rows r * 32 / container + i, lowest bits first; that is what the Mosaic
compiler's bitcast does, at no cost. So codes come out in the order of their channels and x needs no permutation.

A code is stored as *pieces*: runs of bits of a code, at one place of a stored tile's lanes, a lane being as wide as the
container. Each container tile is the `or` of its pieces, shifted and masked, for a whole register at once. Widths that
do not divide the container leave spare bits; the spare bits of several stored tiles make up further codes. So every
width b takes exactly b stored tiles per chunk, and 14 or 15 of 16 codes of 1 to 5 and 7 bits (6 of 8 codes of 6 bits)
cost one shift, one mask and one `or`.

Containers of 16 bits: the code goes to the top bits of a bfloat16's mantissa under the exponent of 2**b, which makes
the number 2**b + code without any conversion. Of 8 and 4 bits: the code's highest bit is flipped when packed and it
goes to the top of the container, which makes the signed number (code - 2**(b-1)) * 2**(container - b).
"""

import dataclasses
import functools

import jax.numpy as jnp
from jax import Array, lax

CHUNK = 256  # input channels
TILE_ROWS = 8
MANTISSA = 7  # bits of a bfloat16


@dataclasses.dataclass(frozen=True)
class Piece:
    """Bits [low, low + width) of a code, at bits [place, place + width) of every lane of stored tile `tile`."""

    tile: int
    place: int
    low: int
    width: int


@dataclasses.dataclass(frozen=True)
class Scheme:
    """The places of all codes of a chunk: for each container tile the pieces of its codes."""

    bits: int
    container: int
    stored_tiles: int
    pieces: tuple[tuple[Piece, ...], ...]  # [256 / codes per container tile]

    @property
    def words(self) -> int:
        """Rows of words per chunk."""
        return self.stored_tiles * TILE_ROWS

    @property
    def signed(self) -> bool:
        return self.container < 16

    @property
    def offset(self) -> int:
        """The unpacked number is multiple * (code + offset)."""
        return -(1 << self.bits - 1) if self.signed else 1 << self.bits

    @property
    def multiple(self) -> int:
        return 1 << self.container - self.bits if self.signed else 1


@functools.cache
def scheme(bits: int, container: int, widened: bool = False) -> Scheme:
    """The layout of `bits`-bit codes for a container of 16, 8 or 4 bits.

    widened: stored as wide as the container, nothing to unpack but the conversion.
    """
    if bits > (MANTISSA if container == 16 else container):
        raise ValueError(f"a {bits}-bit code does not fit a container of {container} bits")
    tiles = CHUNK * container // 32 // TILE_ROWS
    if widened:
        return Scheme(bits, container, tiles, tuple((Piece(i, container - bits, 0, bits),) for i in range(tiles)))
    pieces = _mantissa_pieces(bits) if container == 16 else _plane_pieces(bits, container, tiles)
    return Scheme(bits, container, bits, pieces)


# By width, for lanes of 16 bits: stored tiles that belong together, places of whole codes in each, and for each further
# code the (tile, place, low, width) of its pieces in the spare bits.
_MANTISSA = {
    1: (1, (0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15), ()),
    2: (1, (0, 8, 2, 10, 4, 12, 6, 14), ()),
    3: (3, (1, 4, 7, 10, 13), (((0, 0, 0, 1), (1, 0, 1, 1), (2, 0, 2, 1)),)),
    4: (1, (0, 8, 4, 12), ()),
    5: (5, (0, 5, 10), (tuple((i, 15, i, 1) for i in range(5)),)),
    6: (3, (0, 6), (((0, 12, 0, 4), (2, 12, 4, 2)), ((1, 12, 0, 4), (2, 14, 4, 2)))),
    7: (
        7,
        (0, 7),
        (
            ((0, 14, 0, 2), (1, 14, 2, 2), (2, 14, 4, 2), (6, 14, 6, 1)),
            ((3, 14, 0, 2), (4, 14, 2, 2), (5, 14, 4, 2), (6, 15, 6, 1)),
        ),
    ),
}


def _mantissa_pieces(bits: int) -> tuple[tuple[Piece, ...], ...]:
    together, places, further = _MANTISSA[bits]
    codes = []
    for first in range(0, bits, together):
        codes += [(Piece(first + t, place, 0, bits),) for t in range(together) for place in places]
        codes += [tuple(Piece(first + t, *rest) for t, *rest in code) for code in further]
    return tuple(codes)


def _plane_pieces(bits: int, container: int, tiles: int) -> tuple[tuple[Piece, ...], ...]:
    """Planes whose widths divide the container, widest first at the top: each plane's fields go to as many tiles."""
    pieces, first, high = [[] for _ in range(tiles)], 0, bits
    for width in (8, 4, 2, 1):
        if not bits & width:
            continue
        high -= width
        per_lane = container // width
        for i in range(tiles):
            place = container - width * (i % per_lane + 1)  # the first is at the top, where it needs no shift
            pieces[i].append(Piece(first + i // per_lane, place, high, width))
        first += tiles // per_lane
    return tuple(map(tuple, pieces))


def unpack_tile(tiles: list[Array], s: Scheme, index: int) -> Array:
    """Container tile `index` of a chunk as int32 `[8, N]`, from its stored tiles; the magic exponent included."""
    if s.stored_tiles == len(s.pieces) and s.signed:
        return tiles[index]  # stored as it is wanted
    if s.container == 16:
        word = gather(tiles, [(p, p.low + MANTISSA - s.bits) for p in s.pieces[index]], 16)
        return word | _int32(_repeat((127 + s.bits) << MANTISSA, 16))
    return gather(tiles, [(p, p.low + s.container - s.bits) for p in s.pieces[index]], s.container)


def unpack_bytes(tiles: list[Array], s: Scheme, index: int) -> Array:
    """Container tiles 2 * index and 2 * index + 1 of 16 bits as one of unsigned bytes, int32 `[8, N]`, plain codes.

    The rows of the two tiles alternate: byte 2h + f of word r is row 2r + h of tile f.
    """
    pairs = [(p, p.low + 8 * f) for f in range(2) for p in s.pieces[2 * index + f]]
    return gather(tiles, pairs, 16)


def gather(tiles: list[Array], pairs: list[tuple[Piece, int]], lane: int) -> Array:
    """`or` of the pieces, each moved to its target bit within lanes of `lane` bits. Equal moves share one shift."""
    moves: dict[tuple[int, int], int] = {}
    for piece, target in pairs:
        mask = ((1 << piece.width) - 1) << target
        moves[piece.tile, piece.place - target] = moves.get((piece.tile, piece.place - target), 0) | mask
    parts = []
    for (tile, distance), mask in moves.items():
        word = tiles[tile]
        if distance:
            shift = lax.shift_right_logical if distance > 0 else lax.shift_left
            word = shift(word, jnp.full(word.shape, abs(distance), jnp.int32))
        parts.append(word if mask == (1 << lane) - 1 else word & _int32(_repeat(mask, lane)))
    return functools.reduce(lax.bitwise_or, parts)


def _repeat(pattern: int, lane: int) -> int:
    return sum(pattern << i for i in range(0, 32, lane))


def _int32(value: int) -> Array:
    return jnp.int32(value - (1 << 32) if value >= 1 << 31 else value)
