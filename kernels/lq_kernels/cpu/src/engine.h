// The product over one panel after another, for any instruction set V.
//
// Input channels are taken in *chunks*: a group, or 256 codes of a larger one. Within a chunk codes are multiplied as
// they are (up to a constant centre), so products are exact and the scale is applied once; the zero point enters
// through the chunk's sum of x:
//
//   y += ((sum_k x_k (code_k - centre)) - (zero - centre) sum_k x_k) * scale
//
// The centre is half the code range: matrices with the usual symmetric zero point have nothing left to subtract, and
// others little to cancel. It also bounds the length of a float32 chain of additions by 256.
//
// Few rows: codes are unpacked in registers (`V::plane`). More rows: one block of 32 codes is unpacked to float32 in
// the first-level cache and multiplied with all rows.
//
// Internal linkage throughout, for the reason given in convert.h.
#ifndef LQ_ENGINE_H_
#define LQ_ENGINE_H_

#include "convert.h"

namespace lq {
namespace {

constexpr int64_t kChunk = 256;  // codes
constexpr int64_t kRows = 64;    // rows of x that share one unpacking: their sums stay in the second-level cache

inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Chunk {
  const Segment* segment;
  int64_t begin;   // first code, within the segment
  int64_t length;  // codes
  int64_t group;   // within the segment
};

// Calls f(index, chunk) for every chunk of the product, in order.
template <class F>
inline void for_each_chunk(const Product& p, F f) {
  int64_t index = 0;
  for (int64_t s = 0; s < p.count; ++s) {
    const Segment& segment = p.segments[s];
    for (int64_t group = 0, begin = 0; begin < segment.length; ++group, begin += segment.group) {
      const int64_t end = at_most(begin + segment.group, segment.length);
      for (int64_t k = begin; k < end; k += kChunk) f(index++, Chunk{&segment, k, at_most(kChunk, end - k), group});
    }
  }
}

inline int64_t count_chunks(const Product& p) {
  int64_t count = 0;
  for_each_chunk(p, [&](int64_t, const Chunk&) { ++count; });
  return count;
}

// What `begin` leaves for all panels: x as float32, every segment padded with zeros to whole blocks, and its chunk
// sums.
struct Activations {
  float* x;     // [M, padded_K]
  float* sums;  // [chunks, M]
};

inline Activations activations(const Product& p, const void* scratch) {
  float* x = static_cast<float*>(const_cast<void*>(scratch));
  return {x, x + p.M * p.padded_K};
}

inline size_t scratch_bytes(const Product& p) {
  return static_cast<size_t>(p.M * (p.padded_K + count_chunks(p))) * sizeof(float);
}

inline void begin(const Product& p, void* scratch) {
  const Activations a = activations(p, scratch);
  for (int64_t m = 0; m < p.M; ++m) {
    for (int64_t s = 0; s < p.count; ++s) {
      const Segment& segment = p.segments[s];
      float* to = a.x + m * p.padded_K + segment.padded_begin;
      load_floats(p.x, p.x_type, m * p.K + segment.x_begin, segment.length, to);
      const int64_t padded = divide_up(segment.length, kBlock) * kBlock;
      memset(to + segment.length, 0, static_cast<size_t>(padded - segment.length) * sizeof(float));
    }
    for_each_chunk(p, [&](int64_t index, const Chunk& chunk) {
      const float* x = a.x + m * p.padded_K + chunk.segment->padded_begin + chunk.begin;
      float lanes[8] = {};  // a sum in eight strands: shorter chains, and the compiler may use vectors
      for (int64_t k = 0; k + 8 <= chunk.length; k += 8)
        for (int i = 0; i < 8; ++i) lanes[i] += x[k + i];
      for (int64_t k = chunk.length / 8 * 8; k < chunk.length; ++k) lanes[k % 8] += x[k];
      a.sums[index * p.M + m] =
          ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
    });
  }
}

// The words of one plane in one chunk and panel, all kPanel columns readable.
struct Words {
  const uint32_t* data;
  int64_t row;   // words from one row to the next
  int64_t rows;  // those that exist; a short last block has fewer
};

// The zero point of a symmetric matrix.
inline float centre_of(int bits) { return bits == 1 ? 0.5f : static_cast<float>(1 << (bits - 1)); }

// What is subtracted from the fields of one plane: the highest takes it all.
inline float centre_of(const Segment& segment, const Plane& plane) {
  const bool highest = plane.low + plane.width == segment.bits;
  return highest ? centre_of(segment.bits) / static_cast<float>(1 << plane.low) : 0.0f;
}

// Room for the words of a chunk that cannot be used where they are.
struct Copies {
  alignas(64) uint32_t words[kChunk * 8 / 32][kPanel];  // as stored, what is missing filled with zeros
  alignas(64) uint32_t nibbles[kChunk / 8][kPanel];     // codes of a codebook, widened to four bits
};

// The words where they are, or their copy in `copy` where columns are missing, or rows of a short last block when
// `whole_blocks` are wanted.
inline Words words_of(const Plane& plane, const Chunk& chunk, int64_t panel, int64_t columns, bool padded,
                      bool whole_blocks, uint32_t (*copy)[kPanel]) {
  const int64_t first = chunk.begin * plane.width / 32;
  const int64_t rows = at_most(divide_up(chunk.length * plane.width, 32), plane.rows - first);
  const int64_t wanted = whole_blocks ? divide_up(chunk.length, kBlock) * plane.width : rows;
  const uint32_t* data = plane.words + panel * plane.panel + first * plane.row;
  if ((columns == kPanel || padded) && rows == wanted) return {data, plane.row, rows};
  memset(copy, 0, static_cast<size_t>(wanted * kPanel) * 4);
  for (int64_t r = 0; r < rows; ++r) memcpy(copy[r], data + r * plane.row, static_cast<size_t>(columns) * 4);
  return {copy[0], kPanel, wanted};
}

// Codes of one to four bits as one plane of four, so that one table serves every codebook.
inline Words as_nibbles(const Chunk& chunk, int64_t panel, int64_t columns, bool padded, Copies* copies) {
  const int64_t rows = divide_up(chunk.length, 8);
  memset(copies->nibbles, 0, static_cast<size_t>(rows * kPanel) * 4);
  for (int i = 0; i < chunk.segment->planes; ++i) {
    const Plane& plane = chunk.segment->plane[i];
    const Words words = words_of(plane, chunk, panel, columns, padded, false, copies->words);
    const int per_word = 32 / plane.width;
    const uint32_t mask = (1u << plane.width) - 1;
    for (int64_t k = 0; k < at_most(words.rows * per_word, rows * 8); ++k) {
      const uint32_t* from = words.data + k / per_word * words.row;
      uint32_t* to = copies->nibbles[k / 8];
      const int down = static_cast<int>(k % per_word) * plane.width, up = static_cast<int>(k % 8) * 4 + plane.low;
      for (int64_t n = 0; n < kPanel; ++n) to[n] |= (from[n] >> down & mask) << up;
    }
  }
  return {copies->nibbles[0], kPanel, rows};
}

// acc[M, kPanel] += 2^low * x[M, codes] @ fields[codes, kPanel], unpacked in registers: C vectors by M rows at a time.
template <class V, int W, int M>
inline void plane_in_registers(const Words& w, const float* x, int64_t x_row, float low,
                               const typename V::template Decoder<W>& decode, float* acc) {
  constexpr int C = V::kAccumulators / M, kStep = C * V::kLanes;
  static_assert(kPanel % kStep == 0, "a panel is whole steps");
  for (int64_t n = 0; n < kPanel; n += kStep) {
    typename V::F sum[M][C];
    for (int m = 0; m < M; ++m)
      for (int c = 0; c < C; ++c) sum[m][c] = V::zero();
    for (int64_t r = 0; r < w.rows; ++r) {
      const uint32_t* row = w.data + r * w.row + n;
      const float* xr = x + r * (32 / W);
#pragma GCC unroll 32
      for (int i = 0; i < 32 / W; ++i)
        for (int c = 0; c < C; ++c) {
          const typename V::F f = decode(V::load(row + c * V::kLanes), i);
          for (int m = 0; m < M; ++m) sum[m][c] = V::fma(V::set1(xr[m * x_row + i]), f, sum[m][c]);
        }
    }
    for (int m = 0; m < M; ++m)
      for (int c = 0; c < C; ++c) {
        float* to = acc + m * kPanel + n + c * V::kLanes;
        V::store(to, V::fma(sum[m][c], V::set1(low), V::load(to)));
      }
  }
}

template <class V, int W>
inline void plane_any_rows(const Words& w, const float* x, int64_t x_row, int64_t rows, float low, float centre,
                           const float* codebook, float* acc) {
  const typename V::template Decoder<W> decode(centre, codebook);
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4) V::template plane<W, 4>(w, x + m * x_row, x_row, low, centre, decode, acc + m * kPanel);
  if (rows - m >= 2) {
    V::template plane<W, 2>(w, x + m * x_row, x_row, low, centre, decode, acc + m * kPanel);
    m += 2;
  }
  if (rows > m) V::template plane<W, 1>(w, x + m * x_row, x_row, low, centre, decode, acc + m * kPanel);
}

// block[kBlock, begin..end of kPanel] += 2^low * fields, for the rows of words there are; = when `first`.
template <class V, int W>
inline void unpack_block(const Words& w, float low, float centre, const float* codebook, bool first, int64_t begin,
                         int64_t end, float* block) {
  const typename V::template Decoder<W> decode(centre, codebook);
  for (int64_t r = 0; r < at_most(w.rows, W); ++r)
    for (int64_t n = begin; n < end; n += V::kLanes) {
      const typename V::I word = V::load(w.data + r * w.row + n);
      float* to = block + r * (32 / W) * kPanel + n;
#pragma GCC unroll 32
      for (int i = 0; i < 32 / W; ++i, to += kPanel)
        V::store(to, first ? decode(word, i) : V::fma(decode(word, i), V::set1(low), V::load(to)));
    }
}

// acc[R, kPanel] += x[R, kBlock] @ block[kBlock, kPanel]
template <class V, int R>
inline void multiply_block(const float* block, const float* x, int64_t x_row, float* acc) {
  constexpr int C = V::kTileVectors, kStep = C * V::kLanes;
  for (int64_t n = 0; n < kPanel; n += kStep) {
    typename V::F sum[R][C];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) sum[r][c] = V::load(acc + r * kPanel + n + c * V::kLanes);
    for (int64_t k = 0; k < kBlock; ++k) {
      typename V::F b[C];
      for (int c = 0; c < C; ++c) b[c] = V::load(block + k * kPanel + n + c * V::kLanes);
      for (int r = 0; r < R; ++r) {
        const typename V::F xv = V::set1(x[r * x_row + k]);
        for (int c = 0; c < C; ++c) sum[r][c] = V::fma(xv, b[c], sum[r][c]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) V::store(acc + r * kPanel + n + c * V::kLanes, sum[r][c]);
  }
}

template <class V>
inline void multiply_rows(const float* block, const float* x, int64_t x_row, int64_t rows, float* acc) {
  int64_t m = 0;
  for (; m + 6 <= rows; m += 6) multiply_block<V, 6>(block, x + m * x_row, x_row, acc + m * kPanel);
  x += m * x_row, acc += m * kPanel;
  switch (rows - m) {
    case 5: return multiply_block<V, 5>(block, x, x_row, acc);
    case 4: return multiply_block<V, 4>(block, x, x_row, acc);
    case 3: return multiply_block<V, 3>(block, x, x_row, acc);
    case 2: return multiply_block<V, 2>(block, x, x_row, acc);
    case 1: return multiply_block<V, 1>(block, x, x_row, acc);
    default: return;
  }
}

// Calls f(width as a type, words, 2^low, centre) for each plane of the chunk; once, as nibbles, where there is a
// codebook.
template <int W>
struct Width {
  static constexpr int value = W;
};

template <class F>
inline void for_each_plane(const Product& p, const Chunk& chunk, int64_t panel, int64_t columns, Copies* copies, F f) {
  if (p.codebook) return f(Width<4>{}, as_nibbles(chunk, panel, columns, p.padded_N, copies), 1.0f, 0.0f);
  for (int i = 0; i < chunk.segment->planes; ++i) {
    const Plane& plane = chunk.segment->plane[i];
    const Words words = words_of(plane, chunk, panel, columns, p.padded_N, false, copies->words);
    const float low = static_cast<float>(1 << plane.low), centre = centre_of(*chunk.segment, plane);
    switch (plane.width) {
      case 1: f(Width<1>{}, words, low, centre); break;
      case 2: f(Width<2>{}, words, low, centre); break;
      case 4: f(Width<4>{}, words, low, centre); break;
      default: f(Width<8>{}, words, low, centre); break;
    }
  }
}

template <class V>
inline void few_rows(const Product& p, const Chunk& chunk, int64_t panel, int64_t columns, const float* x, int64_t rows,
                     Copies* copies, float* acc) {
  for_each_plane(p, chunk, panel, columns, copies, [&](auto width, const Words& words, float low, float centre) {
    plane_any_rows<V, decltype(width)::value>(words, x, p.padded_K, rows, low, centre, p.codebook, acc);
  });
}

template <class V>
inline void many_rows(const Product& p, const Chunk& chunk, int64_t panel, int64_t columns, const float* x,
                      int64_t rows, Copies* copies, float* acc) {
  alignas(64) float block[kBlock * kPanel];
  for (int64_t k = 0; k < chunk.length; k += kBlock) {
    const Chunk part{chunk.segment, chunk.begin + k, at_most(kBlock, chunk.length - k), chunk.group};
    const bool whole = part.length == kBlock;
    if (!whole) memset(block, 0, sizeof(block));  // what a short plane leaves out meets zeros of x, but must be finite
    bool first = whole;
    for_each_plane(p, part, panel, columns, copies, [&](auto width, const Words& words, float low, float centre) {
      unpack_block<V, decltype(width)::value>(words, low, centre, p.codebook, first, 0, kPanel, block);
      first = false;
    });
    multiply_rows<V>(block, x + k, p.padded_K, rows, acc);
  }
}

// What turns a chunk's sums into its part of y.
struct Epilogue {
  alignas(64) float scale[kPanel];
  alignas(64) float zero[kPanel];  // less the centre
  bool has_zero;
};

inline void load_epilogue(const Product& p, const Chunk& chunk, int64_t panel, int64_t columns, Epilogue* e) {
  const Segment& s = *chunk.segment;
  const int64_t row = p.padded_N ? kPanel : columns;
  const auto offset = [&](const Grouped& g) { return panel * g.panel + chunk.group * g.row; };
  if (row < kPanel) memset(e, 0, sizeof(*e));
  load_floats(s.scales.data, s.scales.type, offset(s.scales), row, e->scale);
  const float centre = p.codebook ? 0.0f : centre_of(s.bits);
  if (s.zeros.data) {
    load_floats(s.zeros.data, s.zeros.type, offset(s.zeros), row, e->zero);
    for (int64_t n = 0; n < kPanel; ++n) e->zero[n] -= centre;
  } else if (s.zero_point != centre) {
    for (int64_t n = 0; n < kPanel; ++n) e->zero[n] = s.zero_point - centre;
  }
  e->has_zero = s.zeros.data || s.zero_point != centre;
}

// total += (acc - zero * sum(x)) * scale
template <class V>
inline void finish(const Epilogue& e, const float* acc, const float* sums, int64_t rows, float* total) {
  for (int64_t m = 0; m < rows; ++m) {
    const typename V::F sum = V::set1(sums[m]);
    for (int64_t n = 0; n < kPanel; n += V::kLanes) {
      typename V::F v = V::load(acc + m * kPanel + n);
      if (e.has_zero) v = V::fnma(sum, V::load(e.zero + n), v);
      float* to = total + m * kPanel + n;
      V::store(to, V::fma(v, V::load(e.scale + n), V::load(to)));
    }
  }
}

template <class V>
inline void panels(const Product& p, const void* scratch, int64_t first, int64_t last) {
  const Activations a = activations(p, scratch);
  alignas(64) float total[kRows * kPanel];
  alignas(64) float acc[kRows * kPanel];
  Copies copies;
  Epilogue epilogue;
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t columns = at_most(kPanel, p.N - panel * kPanel);
    for (int64_t m = 0; m < p.M; m += kRows) {
      const int64_t rows = at_most(kRows, p.M - m);
      const size_t used = static_cast<size_t>(rows * kPanel) * sizeof(float);
      memset(total, 0, used);
      for_each_chunk(p, [&](int64_t index, const Chunk& chunk) {
        memset(acc, 0, used);
        const float* x = a.x + m * p.padded_K + chunk.segment->padded_begin + chunk.begin;
        (rows <= V::kFewRows ? few_rows<V> : many_rows<V>)(p, chunk, panel, columns, x, rows, &copies, acc);
        load_epilogue(p, chunk, panel, columns, &epilogue);
        finish<V>(epilogue, acc, a.sums + index * p.M + m, rows, total);
      });
      for (int64_t r = 0; r < rows; ++r)
        store_floats(total + r * kPanel, p.y, p.y_type, (m + r) * p.N + panel * kPanel, columns);
    }
  }
}

inline bool always(const Product&) { return true; }

}  // namespace
}  // namespace lq

#endif  // LQ_ENGINE_H_
