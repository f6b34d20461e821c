// AVX-512 (F, BW, DQ, VL): Skylake servers and later, Zen 4 and later.
//
// `vpermps` looks sixteen codes up at once in a table of sixteen numbers, and ignores all but the lowest four bits of
// its index. For one to four rows the table is built from x: a nibble of a plane holds the bits of 4 / W neighbouring
// codes, so
//
//   table[nibble] = sum_j x[k + j] * (field_j(nibble) - centre)
//
// and a shift, a lookup and an addition multiply 4 / W codes: the cost of a plane is that of its bytes, whatever its
// width. (T-MAC does the same with byte tables: Wei et al., 2024, arXiv:2407.00088.)
//
// Internal linkage, for the reason given in convert.h.
#ifndef LQ_AVX512_H_
#define LQ_AVX512_H_

#include <immintrin.h>

#include "engine.h"

namespace lq {
namespace {

struct Avx512 {
  typedef __m512 F;
  typedef __m512i I;
  static constexpr int kLanes = 16, kAccumulators = 16, kTileVectors = 4, kFewRows = 4;

  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float v) { return _mm512_set1_ps(v); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static I load(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }

  template <int W>
  struct Decoder {  // W <= 4: the table repeats, so the bits above the field do not matter
    F table;
    Decoder(float centre, const float* codebook) {
      alignas(64) float entry[16];
      for (int i = 0; i < 16; ++i) entry[i] = codebook ? codebook[i] : static_cast<float>(i & ((1 << W) - 1)) - centre;
      table = _mm512_load_ps(entry);
    }
    F operator()(I word, int i) const { return _mm512_permutexvar_ps(_mm512_srli_epi32(word, W * i), table); }
  };

  template <int W, int M>
  static void plane(const Words& w, const float* x, int64_t x_row, float low, float centre, const Decoder<W>& decode,
                    float* acc) {
    constexpr int C = M == 4 ? 4 : 8;  // vectors of a row in registers
    for (int64_t n = 0; n < kPanel; n += C * kLanes) some_vectors<W, M, C>(w, n, x, x_row, low, centre, decode, acc);
  }

  template <int W, int M, int C>
  static void some_vectors(const Words& w, int64_t n, const float* x, int64_t x_row, float low, float centre,
                           const Decoder<W>& decode, float* acc) {
    F sum[M][C], field[4];
    for (int m = 0; m < M; ++m)
      for (int c = 0; c < C; ++c) sum[m][c] = zero();
    for (int j = 0; j < 4; ++j) field[j] = field_of_nibble(j % (4 / (W > 4 ? 4 : W)), W, centre);
    for (int64_t r = 0; r < w.rows; ++r) {
      const uint32_t* row = w.data + r * w.row + n;
      const float* xr = x + r * (32 / W);
      for (int c = 0; c < C; ++c) {
        _mm_prefetch(row + kNear * w.row + c * kLanes, _MM_HINT_T0);
        _mm_prefetch(row + kFar * w.row + c * kLanes, _MM_HINT_T2);
      }
#pragma GCC unroll 8
      for (int i = 0; i < (W == 8 ? 4 : 8); ++i) {
        F table[M];
        for (int m = 0; m < M && W < 4; ++m) table[m] = table_of(xr + m * x_row + i * (4 / (W > 4 ? 4 : W)), field, W);
        for (int c = 0; c < C; ++c) {
          const I word = load(row + c * kLanes);
          if (W >= 4) {
            const F f = decode(word, i);
            for (int m = 0; m < M; ++m) sum[m][c] = fma(set1(xr[m * x_row + i]), f, sum[m][c]);
          } else {
            const I nibble = _mm512_srli_epi32(word, 4 * i);
            for (int m = 0; m < M; ++m) sum[m][c] = _mm512_add_ps(sum[m][c], _mm512_permutexvar_ps(nibble, table[m]));
          }
        }
      }
    }
    for (int m = 0; m < M; ++m)
      for (int c = 0; c < C; ++c) {
        float* to = acc + m * kPanel + n + c * kLanes;
        store(to, fma(sum[m][c], set1(low), load(to)));
      }
  }

  // Rows of words fetched ahead, to the first-level cache and to the second. The first alone has too few line buffers
  // to cover the memory's latency: with both, one thread reached 0.9 of what it can read instead of 0.6.
  static constexpr int64_t kNear = 2, kFar = 48;

  // For every nibble, the field of W bits at place j, less the centre.
  static F field_of_nibble(int j, int width, float centre) {
    alignas(64) float entry[16];
    for (int i = 0; i < 16; ++i) entry[i] = static_cast<float>(i >> (j * width % 4) & ((1 << width) - 1)) - centre;
    return _mm512_load_ps(entry);
  }

  static F table_of(const float* x, const F* field, int width) {
    F table = _mm512_mul_ps(set1(x[0]), field[0]);
    for (int j = 1; j < 4 / width; ++j) table = fma(set1(x[j]), field[j], table);
    return table;
  }
};

// Bytes: or the code into the mantissa of 2^23, subtract 2^23 and the centre at once.
template <>
struct Avx512::Decoder<8> {
  F offset;
  Decoder(float centre, const float*) : offset(set1(8388608.0f + centre)) {}
  F operator()(I word, int i) const {
    const I mantissa = _mm512_ternarylogic_epi32(_mm512_srli_epi32(word, 8 * i), _mm512_set1_epi32(0xFF),
                                                 _mm512_set1_epi32(0x4B000000), 0xEA);  // (a & b) | c
    return _mm512_sub_ps(_mm512_castsi512_ps(mantissa), offset);
  }
};

inline bool supports_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

}  // namespace
}  // namespace lq

#endif  // LQ_AVX512_H_
