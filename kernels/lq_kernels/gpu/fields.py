"""Where the codes of one thread lie in its 32-bit words, and how they become bfloat16 pairs.

A thread of a warpgroup holds, of one 64 x 128 tile and for each of its two rows, 16 pairs of codes: one pair for each
register of the matrix instruction's A operand. Both codes of a pair are treated alike in the two 16-bit halves of a
word, so all there is to describe is one half. Sixteen fields of b bits fill b halves exactly: every width 1..8 costs b
bits, and none is split into planes.

A bfloat16 has 7 mantissa bits. A field that lies at mantissa bit p turns into the number 2**(7-p) + code with one `or`
of an exponent, wherever p is: the shift only has to bring it somewhere into the mantissa, so one shift serves as many
fields as the mantissa holds, and none is needed for the lowest. The offset is subtracted exactly, together with the
zero point.

16 is no multiple of 3, 5, 6 or 7: in each half some bits are left over. The fields that found no room are cut into
pieces and laid into the left-over bits, such that the pieces of a field come to lie beside each other after shifts that
are mostly needed anyhow; a piece costs one three-input logic instruction. A 3-bit code costs what a 4-bit code costs.

8 bits do not fit a mantissa: the low 7 are a field, the top one lies where it is the exponent bit of 2.0.
"""

import dataclasses
import functools

FIELDS = 16  # code pairs of one row that a thread holds of a tile
MANTISSA = 7


@dataclasses.dataclass(frozen=True)
class Piece:
    """`width` bits of a code, from bit `source` up, at bits [at, at + width) of half `word`."""

    word: int
    at: int
    source: int
    width: int


@dataclasses.dataclass(frozen=True)
class Field:
    """Where one code lies, and to which mantissa bit its lowest bit is brought."""

    pieces: tuple[Piece, ...]
    p: int

    @property
    def offset(self) -> int:
        """The bfloat16 made of the field is `offset + code`."""
        return 1 << (MANTISSA - self.p)

    @property
    def exponent(self) -> int:
        """The bits of the bfloat16 number `offset`."""
        return (127 + MANTISSA - self.p) << MANTISSA


@functools.cache
def fields(bits: int) -> tuple[Field, ...]:
    """The 16 fields of one row in a thread's `bits` words, in the order of the A registers they fill."""
    return _BUILDERS[bits]()


def _whole(bits: int, word: int, at: int, p: int) -> Field:
    return Field((Piece(word, at, 0, bits),), p)


def _one() -> tuple[Field, ...]:
    # p = 0 is left free: one bit has the zero point 1/2, and 128 + 1/2 would need nine significant bits.
    places = [(at, at) for at in range(1, 7)] + [(at, at - 6) for at in range(7, 13)]
    places += [(13, 4), (14, 5), (15, 6), (0, 3)]
    return tuple(_whole(1, 0, at, p) for at, p in places)


def _two() -> tuple[Field, ...]:
    places = [(0, 0), (2, 2), (4, 4), (6, 0), (8, 2), (10, 4), (12, 2), (14, 4)]
    return tuple(_whole(2, word, at, p) for word in range(2) for at, p in places)


def _three() -> tuple[Field, ...]:
    found = []
    for word in range(3):
        # Bit 15 is left over; shifted with the field at 12 it comes to mantissa bit 5, 4 or 3.
        found += [_whole(3, word, at, p) for at, p in ((0, 0), (3, 3), (6, 0), (9, 3), (12, 2 - word))]
    return (*found, Field(tuple(Piece(word, 15, 2 - word, 1) for word in range(3)), 3))


def _four() -> tuple[Field, ...]:
    return tuple(_whole(4, word, at, 0) for word in range(4) for at in (0, 4, 8, 12))


def _five() -> tuple[Field, ...]:
    # The left-over bits of words 3 and 4 are shifted with the fields at 10.
    last = (0, 0, 0, 0, 1)
    found = [_whole(5, word, at, p) for word in range(5) for at, p in ((0, 0), (5, 0), (10, last[word]))]
    return (*found, Field(tuple(Piece(word, 15, word, 1) for word in range(5)), 2))


def _six() -> tuple[Field, ...]:
    found = []
    for first in (0, 3):
        a, b, c = first, first + 1, first + 2
        found += [_whole(6, word, at, 0) for word in (a, b, c) for at in (0, 6)]
        found += [Field((Piece(a, 12, 0, 4), Piece(c, top, 4, 2)), 0) for a, top in ((a, 12), (b, 14))]
    return tuple(found)


def _seven() -> tuple[Field, ...]:
    found = [_whole(7, word, at, 0) for word in range(7) for at in (0, 7)]
    for words, last in (((0, 1, 2), 14), ((4, 5, 6), 15)):
        pieces = [Piece(word, 14, 2 * i, 2) for i, word in enumerate(words)]
        found.append(Field((*pieces, Piece(3, last, 6, 1)), 0))
    return tuple(found)


def _eight() -> tuple[Field, ...]:
    return tuple(
        Field((Piece(word, at, 0, 7), Piece(word, top, 7, 1)), 0) for word in range(8) for at, top in ((0, 14), (7, 15))
    )


_BUILDERS = {1: _one, 2: _two, 3: _three, 4: _four, 5: _five, 6: _six, 7: _seven, 8: _eight}
