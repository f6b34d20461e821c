// NEON on AArch64, where every processor has it.
#include <arm_neon.h>

#include "engine.h"

namespace lq {
namespace {

struct Neon {
  typedef float32x4_t F;
  typedef uint32x4_t I;
  static constexpr int kLanes = 4, kAccumulators = 16, kTileVectors = 4, kFewRows = 4;

  static F zero() { return vdupq_n_f32(0.0f); }
  static F set1(float v) { return vdupq_n_f32(v); }
  static F load(const float* p) { return vld1q_f32(p); }
  static I load(const uint32_t* p) { return vld1q_u32(p); }
  static void store(float* p, F v) { vst1q_f32(p, v); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F fnma(F a, F b, F c) { return vfmsq_f32(c, a, b); }

  template <int W>
  struct Decoder {
    F centre;
    uint8x16x4_t codebook;
    bool lookup;
    Decoder(float c, const float* b) : centre(set1(c)), codebook(), lookup(b) {
      if (!lookup) return;
      for (int i = 0; i < 4; ++i) codebook.val[i] = vreinterpretq_u8_f32(vld1q_f32(b + 4 * i));
    }
    F operator()(I word, int i) const {
      const I code = vandq_u32(vshlq_u32(word, vdupq_n_s32(-W * i)), vdupq_n_u32((1u << W) - 1));
      if (W == 4 && lookup) {  // `tbl` picks bytes: four neighbouring ones for every code
        const I bytes = vmlaq_n_u32(vdupq_n_u32(0x03020100u), code, 0x04040404u);
        return vreinterpretq_f32_u8(vqtbl4q_u8(codebook, vreinterpretq_u8_u32(bytes)));
      }
      return vsubq_f32(vcvtq_f32_u32(code), centre);
    }
  };

  template <int W, int M>
  static void plane(const Words& w, const float* x, int64_t x_row, float low, float, const Decoder<W>& decode,
                    float* acc) {
    plane_in_registers<Neon, W, M>(w, x, x_row, low, decode, acc);
  }
};

bool supported() { return true; }

}  // namespace

const Kernel kNeon = {"neon", supported, always, always, scratch_bytes, begin, panels<Neon>};

}  // namespace lq
