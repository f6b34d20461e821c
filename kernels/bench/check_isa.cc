// Checks one instruction set against float64 without Python or XLA: for processors that are only emulated.
//
//   S=kernels/lq_kernels/cpu/src
//   aarch64-linux-gnu-g++ -std=c++17 -O3 -ffp-contract=off -static -I$S -DKERNEL=kNeon
//       kernels/bench/check_isa.cc $S/neon.cc -o check_neon
//   qemu-aarch64 ./check_neon
//
// prints the largest error relative to |x| @ |w| for every width and exits with 1 when one is beyond 4e-6. The same
// with -DKERNEL=kPlain and plain.cc, or for x86 with the flags that building.py gives to the file.
#include <stdio.h>
#include <stdlib.h>

#include <array>
#include <cmath>
#include <random>
#include <vector>

#include "product.h"

namespace lq {
namespace {

const int kWidths[9][3] = {{}, {1}, {2}, {2, 1}, {4}, {4, 1}, {4, 2}, {4, 2, 1}, {8}};

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Case {
  int bits;
  int64_t M, K, N, group;
  bool zeros, codebook;
};

double worst_error(const Case& c, std::mt19937* random) {
  std::uniform_real_distribution<float> uniform(0.5f, 1.5f);
  std::normal_distribution<float> normal;
  const int64_t groups = divide_up(c.K, c.group);
  std::vector<uint32_t> codes(c.K * c.N);
  std::vector<float> x(c.M * c.K), scales(groups * c.N), zeros(groups * c.N), codebook(16), y(c.M * c.N);
  for (auto& v : codes) v = (*random)() & ((1u << c.bits) - 1);
  for (auto& v : x) v = normal(*random);
  for (auto& v : scales) v = uniform(*random);
  for (auto& v : zeros) v = static_cast<float>((*random)() & ((1u << c.bits) - 1));
  for (auto& v : codebook) v = normal(*random);

  Segment segment = {};
  std::vector<uint32_t> words[3];
  for (int low = 0; segment.planes < 3 && kWidths[c.bits][segment.planes]; ++segment.planes) {
    const int width = kWidths[c.bits][segment.planes];
    const int64_t rows = divide_up(c.K * width, 32);
    std::vector<uint32_t>& plane = words[segment.planes];
    plane.assign(rows * c.N, 0);
    for (int64_t k = 0; k < c.K; ++k)
      for (int64_t n = 0; n < c.N; ++n)
        plane[k * width / 32 * c.N + n] |= (codes[k * c.N + n] >> low & ((1u << width) - 1)) << k * width % 32;
    segment.plane[segment.planes] = {plane.data(), rows, c.N, kPanel, width, low};
    low += width;
  }
  segment.bits = c.bits, segment.length = c.K, segment.group = c.group;
  segment.zero_point = c.codebook ? 0.0f : 1.25f;
  segment.scales = {scales.data(), Type::kF32, c.N, kPanel};
  if (c.zeros) segment.zeros = {zeros.data(), Type::kF32, c.N, kPanel};
  Product p = {};
  p.M = c.M, p.K = c.K, p.N = c.N, p.count = 1, p.segments = &segment;
  p.x = x.data(), p.y = y.data();
  p.codebook = c.codebook ? codebook.data() : nullptr;
  p.padded_K = divide_up(c.K, kBlock) * kBlock;

  if (!KERNEL.serves(p)) return 0;
  std::vector<char> scratch(KERNEL.scratch_bytes(p) + 64);
  void* aligned = scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64);
  KERNEL.begin(p, aligned);
  KERNEL.panels(p, aligned, 0, divide_up(c.N, kPanel));

  double worst = 0;
  for (int64_t m = 0; m < c.M; ++m)
    for (int64_t n = 0; n < c.N; ++n) {
      double want = 0, size = 0;
      for (int64_t k = 0; k < c.K; ++k) {
        const int64_t g = k / c.group * c.N + n;
        const double code = codes[k * c.N + n], zero = c.zeros ? zeros[g] : segment.zero_point;
        const double w = (c.codebook ? codebook[codes[k * c.N + n]] : code - zero) * static_cast<double>(scales[g]);
        want += x[m * c.K + k] * w, size += std::abs(x[m * c.K + k] * w);
      }
      worst = std::max(worst, std::abs(y[m * c.N + n] - want) / size);
    }
  return worst;
}

}  // namespace
}  // namespace lq

int main() {
  std::mt19937 random(1);
  bool good = true;
  const std::vector<std::array<int64_t, 3>> shapes = {{128, 128, 32}, {600, 200, 256}, {130, 33, 130}};
  for (int bits = 1; bits <= 8; ++bits)
    for (int codebook = 0; codebook <= (bits <= 4); ++codebook) {
      double worst = 0;
      for (int64_t M : std::vector<int64_t>{1, 2, 3, 7, 16})
        for (bool zeros : {false, true})
          for (auto [K, N, group] : shapes)
            if (!(codebook && zeros))
              worst = std::max(worst, lq::worst_error({bits, M, K, N, group, zeros, codebook != 0}, &random));
      printf("%s, %d bits%s: %.2e\n", lq::KERNEL.name, bits, codebook ? ", codebook" : "", worst);
      good = good && worst <= 4e-6;
    }
  return good ? 0 : 1;
}
