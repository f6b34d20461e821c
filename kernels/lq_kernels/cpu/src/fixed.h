// x as integers: in each chunk, every row is a power of two times whole numbers of three or four signed bytes.
//
//   x[k] = unit * (d0[k] + 256 d1[k] + 65536 d2[k] + 2^24 d3[k]),   -128 <= d[k] <= 127
//
// Three bytes are used where they hold every x exactly: bfloat16 that spans no more than 15 bits in a chunk, say. Four
// are used where they do, or where they round no x by more than 2^-17.9 = 4.1e-6 of itself: they round by 2^-30.9 of the
// greatest, so the least that is not zero must reach 2^-13 of it. Otherwise x stays float32. The error of y by this is
// then within 4.1e-6 of |x| @ |w|, whatever w is.
//
// Each row is converted by itself: y does not depend on the rows beside it.
#ifndef LQ_FIXED_H_
#define LQ_FIXED_H_

#include "avx512.h"

namespace lq {
namespace {

constexpr int kDigits = 4;  // the room for them; the fourth is zero where three do

// One row's chunk.
struct Fixed {
  int32_t start[kDigits];  // -centre times the sum of each digit
  float unit;              // of the products; NaN where x is not finite
  float sum;               // of the numbers
  int32_t terms;           // digits in use; none: the float32 x is multiplied
};

struct FixedPoint {
  int8_t* digits;  // [M, blocks, quads, kDigits, 4], codes in the order of `code_of`
  Fixed* chunks;   // [chunks, M]
};

inline FixedPoint fixed_point(const Product& p, const void* scratch) {
  const uintptr_t end = reinterpret_cast<uintptr_t>(scratch) + scratch_bytes(p);
  int8_t* digits = reinterpret_cast<int8_t*>((end + 63) / 64 * 64);
  return {digits, reinterpret_cast<Fixed*>(digits + p.M * p.padded_K * kDigits)};
}

inline size_t fixed_scratch_bytes(const Product& p) {
  return scratch_bytes(p) + 64 + static_cast<size_t>(p.M * p.padded_K * kDigits) +
         static_cast<size_t>(p.M * count_chunks(p)) * sizeof(Fixed);
}

// The code that byte j of quad q holds: one of each byte of a word, since a shift and a mask bring these into place.
inline int code_of(int bits, int q, int j) {
  const int width = bits == 3 ? 2 : bits > 4 && bits < 8 ? 4 : bits;  // of the first plane
  const int quads = 8 / width;                                       // of a word
  return q / quads * (32 / width) + j * quads + q % quads;
}

inline __m512i magnitude(const float* x) {
  return _mm512_and_si512(_mm512_loadu_si512(x), _mm512_set1_epi32(0x7FFFFFFF));
}

// The unit of so many digits, a power of two, and its inverse.
struct Unit {
  float value, inverse;
};

inline Unit unit_of(uint32_t greatest, int terms) {
  // The least e with greatest / 2^e <= 0x7F7F7F7F / 2^31, the largest number of digits up to 127. With 2^e next above
  // greatest that is a significand up to 0x7EFEFE beyond its one; from 0x7EFEFF on the addition carries.
  const int32_t e = static_cast<int32_t>((greatest + 0x10101u) >> 23) + 1, shift = 8 * terms - 1;
  return {as_float(static_cast<uint32_t>(e - shift) << 23), as_float(static_cast<uint32_t>(254 + shift - e) << 23)};
}

inline __m512i whole(const float* x, const Unit& unit) {
  return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), _mm512_set1_ps(unit.inverse)));
}

inline bool exact(const float* x, int64_t count, const Unit& unit) {
  __mmask16 differ = 0;
  for (int64_t k = 0; k < count; k += 16) {
    const __m512 back = _mm512_mul_ps(_mm512_cvtepi32_ps(whole(x + k, unit)), _mm512_set1_ps(unit.value));
    differ |= _mm512_cmp_ps_mask(back, _mm512_loadu_ps(x + k), _CMP_NEQ_UQ);
  }
  return !differ;
}

// Whether every number that is not zero has a magnitude of `least`.
inline bool all_reach(const float* x, int64_t count, uint32_t least) {
  __mmask16 below = 0;
  for (int64_t k = 0; k < count; k += 16) {
    const __m512i v = magnitude(x + k);
    below |= _mm512_mask_cmplt_epu32_mask(_mm512_test_epi32_mask(v, v), v, _mm512_set1_epi32(static_cast<int>(least)));
  }
  return !below;
}

// The digits in use for `count` numbers, the greatest magnitude of which has these bits.
inline int terms_of(const float* x, int64_t count, uint32_t greatest) {
  constexpr uint32_t kTwo = 1u << 23;  // a factor of two
  if (greatest < 34 * kTwo) return 0;  // 2^-93: the unit would be subnormal
  if (exact(x, count, unit_of(greatest, 3))) return 3;
  return all_reach(x, count, greatest - 13 * kTwo) || exact(x, count, unit_of(greatest, 4)) ? 4 : 0;
}

// `count` numbers, whole blocks: what is beyond the chunk is zero. `order` picks the bytes of the halves of a block.
inline Fixed fix_chunk(const float* x, int64_t count, int bits, const __m512i* order, int8_t* digits) {
  Fixed f = {};
  __m512i most = _mm512_setzero_si512();
  for (int64_t k = 0; k < count; k += 16) most = _mm512_max_epu32(most, magnitude(x + k));
  const uint32_t greatest = _mm512_reduce_max_epu32(most);
  const bool finite = greatest < 0x7F800000u;
  f.terms = finite && greatest ? terms_of(x, count, greatest) : 3;
  if (!finite) f.unit = as_float(0x7FC00000u);
  if (!finite || !greatest || !f.terms) {
    memset(digits, 0, static_cast<size_t>(count * kDigits));
    return f;
  }
  const Unit unit = unit_of(greatest, f.terms);
  const __m512i half = _mm512_set1_epi32(static_cast<int>(0x80808080u)), one = _mm512_set1_epi8(1);
  __m512i sums = _mm512_setzero_si512();
  for (int64_t k = 0; k < count; k += kBlock, digits += kBlock * kDigits) {
    __m512i q[2];
    for (int i = 0; i < 2; ++i) {
      // Bytes from 0 to 255 by adding 128 to each, then from -128 to 127.
      q[i] = _mm512_xor_si512(_mm512_add_epi32(whole(x + k + 16 * i, unit), half), half);
    }
    for (int i = 0; i < 2; ++i) {
      const __m512i four_quads = _mm512_permutex2var_epi8(q[0], order[i], q[1]);
      _mm512_storeu_si512(digits + 64 * i, four_quads);
      sums = _mm512_dpbusd_epi32(sums, one, four_quads);
    }
  }
  int64_t sum = 0;
  for (int t = kDigits - 1; t >= 0; --t) {
    const int32_t digit = _mm512_mask_reduce_add_epi32(static_cast<__mmask16>(0x1111 << t), sums);
    f.start[t] = -digit * (1 << (bits == 1 ? 0 : bits - 1));
    sum = 256 * sum + digit;
  }
  f.unit = bits == 1 ? unit.value / 2 : unit.value;  // codes of one bit are doubled, so that their centre is a whole number
  f.sum = static_cast<float>(sum) * unit.value;
  return f;
}

inline void fix(const Product& p, void* scratch) {
  begin(p, scratch);
  const Activations a = activations(p, scratch);
  const FixedPoint f = fixed_point(p, scratch);
  for_each_chunk(p, [&](int64_t index, const Chunk& chunk) {
    alignas(64) uint8_t place[128];
    for (int i = 0; i < 128; ++i)
      place[i] = static_cast<uint8_t>(4 * code_of(chunk.segment->bits, i / 16, i % 4) + i / 4 % 4);
    const __m512i order[2] = {_mm512_load_si512(place), _mm512_load_si512(place + 64)};
    const int64_t k = chunk.segment->padded_begin + chunk.begin, count = divide_up(chunk.length, kBlock) * kBlock;
    for (int64_t m = 0; m < p.M; ++m) {
      const int64_t at = m * p.padded_K + k;
      f.chunks[index * p.M + m] = fix_chunk(a.x + at, count, chunk.segment->bits, order, f.digits + at * kDigits);
    }
  });
}

}  // namespace
}  // namespace lq

#endif  // LQ_FIXED_H_
