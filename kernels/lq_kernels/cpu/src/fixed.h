// x as integers: in each chunk, every row is a power of two times whole numbers of three or four signed bytes.
//
//   x[k] = unit * (d0[k] + 256 d1[k] + 65536 d2[k] + 2^24 d3[k]),   -128 <= d[k] <= 127
//
// The greatest |x| of the chunk takes 23 bits and a sign, so |x| is rounded by no more than 2^-22.9 of it: as good as a
// float32 sum unless that greatest one stands alone. Where fewer than half of the numbers that are not zero reach 1/32
// of it, the fourth byte is used, which rounds by 2^-30.9, and where fewer than half reach 2^-13, x stays float32. So
// each x is off by no more than 2^-17.9 = 4.1e-6 of the chunk's median |x|, in either direction: the error of y by it
// is far below 4e-6 of |x| @ |w|, whatever w is at the greatest x. bfloat16 that spans fewer than 15 bits in a chunk is
// exact.
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

// Of the numbers that are not zero, at least half have a magnitude of `least`.
inline bool half_reach(const float* x, int64_t count, uint32_t least) {
  int64_t reach = 0, all = 0;
  for (int64_t k = 0; k < count; k += 16) {
    const __m512i v = magnitude(x + k);
    reach += __builtin_popcount(_mm512_cmpge_epu32_mask(v, _mm512_set1_epi32(static_cast<int>(least))));
    all += __builtin_popcount(_mm512_test_epi32_mask(v, v));
  }
  return 2 * reach >= all;
}

// The digits in use for `count` numbers, the greatest magnitude of which has these bits.
inline int terms_of(const float* x, int64_t count, uint32_t greatest) {
  constexpr uint32_t kTwo = 1u << 23;  // a factor of two
  if (greatest < 34 * kTwo) return 0;  // 2^-93: the unit would be subnormal
  if (half_reach(x, count, greatest - 5 * kTwo)) return 3;
  return half_reach(x, count, greatest - 13 * kTwo) ? 4 : 0;
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
  // 2^e > greatest (1 + 2^-7): a digit of 127 at the top may not round up to 128.
  const int32_t e = static_cast<int32_t>((greatest + (1u << 16)) >> 23) + 1, shift = 8 * f.terms - 1;
  const __m512 per_unit = _mm512_set1_ps(as_float(static_cast<uint32_t>(127 + 127 + shift - e) << 23));
  const float unit = as_float(static_cast<uint32_t>(e - shift) << 23);
  const __m512i half = _mm512_set1_epi32(static_cast<int>(0x80808080u)), one = _mm512_set1_epi8(1);
  __m512i sums = _mm512_setzero_si512();
  for (int64_t k = 0; k < count; k += kBlock, digits += kBlock * kDigits) {
    __m512i q[2];
    for (int i = 0; i < 2; ++i) {
      // Bytes from 0 to 255 by adding 128 to each, then from -128 to 127.
      const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + k + 16 * i), per_unit));
      q[i] = _mm512_xor_si512(_mm512_add_epi32(whole, half), half);
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
  f.unit = bits == 1 ? unit / 2 : unit;  // codes of one bit are doubled, so that their centre is a whole number
  f.sum = static_cast<float>(sum) * unit;
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
