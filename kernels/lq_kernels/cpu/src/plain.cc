// Any processor: the compiler's portable vectors of four.
#include "engine.h"

namespace lq {
namespace {

struct Plain {
  typedef float F __attribute__((vector_size(16)));
  typedef uint32_t I __attribute__((vector_size(16)));
  typedef int32_t S __attribute__((vector_size(16)));
  static constexpr int kLanes = 4, kAccumulators = 8, kTileVectors = 1, kFewRows = 4;

  static F zero() { return F{}; }
  static F set1(float v) { return F{v, v, v, v}; }
  static F load(const float* p) { return read<F>(p); }
  static I load(const uint32_t* p) { return read<I>(p); }
  static void store(float* p, F v) { memcpy(p, &v, sizeof(v)); }
  static F fma(F a, F b, F c) { return a * b + c; }
  static F fnma(F a, F b, F c) { return c - a * b; }

  template <class T, class P>
  static T read(const P* p) {
    T v;
    memcpy(&v, p, sizeof(v));
    return v;
  }

  template <int W>
  struct Decoder {
    F centre;
    const float* codebook;
    Decoder(float c, const float* b) : centre(set1(c)), codebook(b) {}
    F operator()(I word, int i) const {
      const I code = (word >> static_cast<uint32_t>(W * i)) & ((1u << W) - 1);
      if (W == 4 && codebook) return F{codebook[code[0]], codebook[code[1]], codebook[code[2]], codebook[code[3]]};
      return __builtin_convertvector(reinterpret_cast<S>(code), F) - centre;
    }
  };

  template <int W, int M>
  static void plane(const Words& w, const float* x, int64_t x_row, float low, float, const Decoder<W>& decode,
                    float* acc) {
    plane_in_registers<Plain, W, M>(w, x, x_row, low, decode, acc);
  }
};

bool supported() { return true; }

}  // namespace

const Kernel kPlain = {"plain", supported, always, always, scratch_bytes, begin, panels<Plain>};

}  // namespace lq
