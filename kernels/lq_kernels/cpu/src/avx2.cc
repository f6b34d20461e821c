// AVX2 with FMA: Haswell and later, Zen and later.
#include <immintrin.h>

#include "engine.h"

namespace lq {
namespace {

struct Avx2 {
  typedef __m256 F;
  typedef __m256i I;
  static constexpr int kLanes = 8, kAccumulators = 8, kTileVectors = 2, kFewRows = 4;

  static F zero() { return _mm256_setzero_ps(); }
  static F set1(float v) { return _mm256_set1_ps(v); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static I load(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }

  template <int W>
  struct Decoder {
    F centre, low, high;
    bool lookup;
    Decoder(float c, const float* codebook) : centre(set1(c)), lookup(codebook) {
      low = lookup ? load(codebook) : zero();
      high = lookup ? load(codebook + 8) : zero();
    }
    F operator()(I word, int i) const {
      const I field = _mm256_srli_epi32(word, W * i);
      if (W == 4 && lookup) {  // `vpermps` looks at three bits; the fourth chooses between the halves
        const F upper = _mm256_castsi256_ps(_mm256_slli_epi32(field, 28));
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, field), _mm256_permutevar8x32_ps(high, field), upper);
      }
      return _mm256_sub_ps(_mm256_cvtepi32_ps(_mm256_and_si256(field, _mm256_set1_epi32((1 << W) - 1))), centre);
    }
  };

  template <int W, int M>
  static void plane(const Words& w, const float* x, int64_t x_row, float low, float, const Decoder<W>& decode,
                    float* acc) {
    plane_in_registers<Avx2, W, M>(w, x, x_row, low, decode, acc);
  }
};

bool supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

}  // namespace

const Kernel kAvx2 = {"avx2", supported, always, always, scratch_bytes, begin, panels<Avx2>};

}  // namespace lq
