// What one product is, and what an instruction set offers to compute it.
//
//   y[m, n] = sum_k x[m, k] * (code[k, n] - zero[k / group, n]) * scale[k / group, n]
//
// Terms: a *plane* holds `width` bits of every code, 32 / width codes to a word, little-endian along k; codes of 3, 5,
// 6 and 7 bits are several planes, lowest bits first. A *panel* is kPanel neighbouring columns. A *block* is 32 codes
// of every column: a plane of width w has w rows of words in it. A *group* shares one scale; it is whole blocks, or a
// whole segment.
#ifndef LQ_PRODUCT_H_
#define LQ_PRODUCT_H_

#include <stddef.h>
#include <stdint.h>

namespace lq {

constexpr int64_t kPanel = 128;  // columns: eight AVX-512 vectors, the accumulators of one row
constexpr int64_t kBlock = 32;   // codes

// Scales, zeros, x and y keep their own types; ffi.cc maps XLA's names to these.
enum class Type { kF32, kBF16, kF16, kU8, kS8, kU32, kS32 };

struct Plane {
  const uint32_t* words;
  int64_t rows;   // rows of words; the last block may be short
  int64_t row;    // words from one row to the next
  int64_t panel;  // words from one panel to the next
  int width;      // 1, 2, 4 or 8
  int low;        // the position of its bits in the code
};

// A row of scales or zeros for each group; element (g, n) of panel p lies at p * panel + g * row + n % kPanel.
struct Grouped {
  const void* data;  // null: absent
  Type type;
  int64_t row, panel;
};

struct Segment {
  int bits;
  int planes;
  Plane plane[3];
  Grouped scales, zeros;
  float zero_point;  // used when zeros are absent
  int64_t length;    // input channels
  int64_t group;     // input channels that share a scale
  int64_t x_begin;   // first channel in x
  int64_t padded_begin;  // the same when every segment is padded to whole blocks
};

struct Product {
  int64_t M, K, N;
  const void* x;  // [M, K]
  Type x_type;
  void* y;  // [M, N]
  Type y_type;
  const float* codebook;  // 2^bits values that the codes stand for, or null: the integers
  const Segment* segments;
  int64_t count;
  int64_t padded_K;
  // The widest rows that may be read beyond column N: a prepared matrix is padded to whole panels, a canonical one is
  // not.
  bool padded_N;
};

// An instruction set. `begin` runs once per product, `panels` for disjoint ranges of panels, in any order and on any
// thread: every element of y is computed by one call in one fixed order.
struct Kernel {
  const char* name;
  bool (*supported)();
  bool (*serves)(const Product&);
  bool (*prefers)(const Product&);  // unless forced, the next one is taken where this says no
  size_t (*scratch_bytes)(const Product&);
  void (*begin)(const Product&, void* scratch);
  void (*panels)(const Product&, const void* scratch, int64_t first, int64_t last);
};

// Each is defined by the file of its name; those that the compiler cannot build are left out of `kernels()` in ffi.cc.
extern const Kernel kPlain, kAvx2, kAvx512, kAvx512Vnni, kAmx, kNeon;

}  // namespace lq

#endif  // LQ_PRODUCT_H_
