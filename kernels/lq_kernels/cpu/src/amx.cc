// AMX (bfloat16 tiles): Sapphire Rapids and later.
//
// A tile multiplication takes 16 rows of x by 32 codes by 16 columns, and sums in float32. Codes less their centre have
// at most eight significant bits: exact in bfloat16. So is x as a sum of terms of eight bits each: one for bfloat16,
// two for float16, three for float32. Products are therefore exact, and the result is as accurate as one of float32
// products. (What is below 2^-126 in a term is taken for zero by the hardware.)
//
// The second operand holds pairs of codes: 32-bit lane n of row p is code k(p, 0) of column n in its low half, k(p, 1)
// in its high half. Any order of the 32 codes of a block will do when x has the same. So the pairs are those that need
// the fewest instructions: the codes half a word apart, which one shift brings into place, and one `vpermw` then turns
// into two bfloat16 numbers by a table.
#if !defined(__linux__)
#error "asking for AMX is done in the way of Linux"
#endif

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "avx512.h"

namespace lq {
namespace {

constexpr int64_t kHalf = kPanel / 2;          // columns at a time: four tiles of sums
constexpr int64_t kTile = 16 * 64;             // bytes
constexpr int64_t kMostRows = 128;             // rows of x that share one unpacking
constexpr int64_t kPanelsAtOnce = 4;
constexpr int64_t kMostBlocks = kChunk / kBlock;

// How x is cut into tiles.
struct Tiling {
  int64_t terms;      // bfloat16 numbers that make one of x
  bool stacked;       // the terms of few rows lie in one tile, one below the other
  int64_t tiles;      // of rows, all terms of `rows` rows each
  int64_t rows;       // of x in one tile
  int64_t tile_rows;  // of the tile
};

inline Tiling tiling_of(const Product& p) {
  const int64_t terms = p.x_type == Type::kF32 ? 3 : p.x_type == Type::kF16 ? 2 : 1;
  if (p.M * terms <= 16) return {terms, true, 1, p.M, p.M * terms};
  const int64_t tiles = divide_up(p.M, 16), rows = divide_up(p.M, tiles);
  return {terms, false, tiles, rows, rows};
}

inline int64_t tiles_of_block(const Tiling& t) { return t.stacked ? 1 : t.tiles * t.terms; }

// Bits between the codes of a pair's halves and its neighbours; 0: neighbours are a pair.
inline int pair_width(int bits) {
  static const int kWidth[9] = {0, 1, 2, 2, 4, 4, 0, 0, 8};
  return kWidth[bits];
}

// The place of half h of pair p within its block.
inline int code_of(int bits, int p, int h) {
  const int w = pair_width(bits);
  if (w == 0) return 2 * p + h;
  const int pairs = 16 / w;  // of a word
  return p / pairs * (32 / w) + p % pairs + h * pairs;
}

inline float* tiles_begin(const Product& p, const void* scratch) {
  const uintptr_t end = reinterpret_cast<uintptr_t>(scratch) + scratch_bytes(p);
  return reinterpret_cast<float*>((end + 63) / 64 * 64);
}

size_t amx_scratch_bytes(const Product& p) {
  const int64_t tiles = p.padded_K / kBlock * tiles_of_block(tiling_of(p));
  return scratch_bytes(p) + 64 + static_cast<size_t>(tiles * kTile);
}

// One block of one row of x, as `terms` rows of 32 bfloat16 in the order of the pairs, `step` bytes apart.
inline void split(const float* x, int64_t terms, __m512i order, uint8_t* to, int64_t step) {
  const __m512i top = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
  __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + 16);
  for (int64_t t = 0; t < terms; ++t, to += step) {
    // Cut, not rounded: a term keeps eight bits, and what is left is exact.
    const __m512i high_a = _mm512_and_si512(_mm512_castps_si512(a), top);
    const __m512i high_b = _mm512_and_si512(_mm512_castps_si512(b), top);
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(high_a, order, high_b));
    a = _mm512_sub_ps(a, _mm512_castsi512_ps(high_a));
    b = _mm512_sub_ps(b, _mm512_castsi512_ps(high_b));
  }
}

void amx_begin(const Product& p, void* scratch) {
  begin(p, scratch);
  const Activations a = activations(p, scratch);
  const Tiling t = tiling_of(p);
  uint8_t* to = reinterpret_cast<uint8_t*>(tiles_begin(p, scratch));
  memset(to, 0, static_cast<size_t>(p.padded_K / kBlock * tiles_of_block(t) * kTile));
  for (int64_t s = 0; s < p.count; ++s) {
    const Segment& segment = p.segments[s];
    alignas(64) uint16_t order[32];  // the high half of a float32 is the odd one of its 16-bit lanes
    for (int i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>(2 * code_of(segment.bits, i / 2, i % 2) + 1);
    const __m512i picks = _mm512_load_si512(order);
    for (int64_t k = 0; k < segment.length; k += kBlock) {
      uint8_t* block = to + (segment.padded_begin + k) / kBlock * tiles_of_block(t) * kTile;
      for (int64_t m = 0; m < p.M; ++m) {
        const float* x = a.x + m * p.padded_K + segment.padded_begin + k;
        uint8_t* row = t.stacked ? block + m * 64 : block + m / t.rows * t.terms * kTile + m % t.rows * 64;
        split(x, t.terms, picks, row, t.stacked ? p.M * 64 : kTile);
      }
    }
  }
}

// Also fetches ahead; more rows than for AVX-512, since they are used faster.
inline __m512i load_words(const Words& w, int64_t row, int64_t column) {
  const uint32_t* words = w.data + row * w.row + column;
  _mm_prefetch(words + 2 * Avx512::kNear * w.row, _MM_HINT_T0);
  _mm_prefetch(words + Avx512::kFar * w.row, _MM_HINT_T2);
  return _mm512_loadu_si512(words);
}

// 32 bfloat16: the number less the centre, of the index's lowest `bits` bits; those above do not matter.
inline __m512i table_of_bits(int bits) {
  alignas(64) uint16_t entry[32];
  for (int i = 0; i < 32; ++i) entry[i] = to_bf16(static_cast<float>(i & ((1 << bits) - 1)) - centre_of(bits));
  return _mm512_load_si512(entry);
}

// Each unpacks one block of half a panel: tile c of `to`, row p, gets pair p of columns 16 c and on.
using Unpack = void (*)(const Words* planes, int64_t block, int64_t column, uint8_t* to);

template <int W>
void unpack_plane(const Words* planes, int64_t block, int64_t column, uint8_t* to) {
  const __m512i table = table_of_bits(W);
  for (int64_t c = 0; c < 4; ++c)
    for (int64_t r = 0; r < W; ++r) {
      const __m512i word = load_words(planes[0], block * W + r, column + 16 * c);
      __m512i* row = reinterpret_cast<__m512i*>(to + c * kTile) + r * (16 / W);
#pragma GCC unroll 16
      for (int j = 0; j < 16 / W; ++j) row[j] = _mm512_permutexvar_epi16(_mm512_srli_epi32(word, W * j), table);
    }
}

// 3 = 2 + 1 bits: the bits of byte 2 r of the one plane belong to the low halves, those of byte 2 r + 1 to the high
// ones.
void unpack_3(const Words* planes, int64_t block, int64_t column, uint8_t* to) {
  const __m512i table = table_of_bits(3), two = _mm512_set1_epi16(3);
  const __m512i bytes[2] = {_mm512_set1_epi64(static_cast<int64_t>(0x8005800480018000u)),
                            _mm512_set1_epi64(static_cast<int64_t>(0x8007800680038002u))};
  const __m512i upper = _mm512_set4_epi32(0x08080808, 0x08080808, 0, 0);  // lanes 2 and 3 of each 128 bits
  for (int64_t c = 0; c < 4; ++c) {
    const __m512i ones = load_words(planes[1], block, column + 16 * c);
    for (int64_t r = 0; r < 2; ++r) {
      const __m512i twos = load_words(planes[0], block * 2 + r, column + 16 * c);
      const __m512i spread = _mm512_slli_epi16(_mm512_shuffle_epi8(ones, _mm512_add_epi8(bytes[r], upper)), 2);
      __m512i* row = reinterpret_cast<__m512i*>(to + c * kTile) + r * 8;
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        const __m512i low = _mm512_srli_epi32(twos, 2 * j), high = _mm512_srli_epi16(spread, j);
        const __m512i index = _mm512_ternarylogic_epi32(two, low, high, 0xCA);  // two ? low : high, bit by bit
        row[j] = _mm512_permutexvar_epi16(index, table);
      }
    }
  }
}

// 5 = 4 + 1 bits: the bits of byte r of the one plane belong to row r, the low nibble to the low halves.
void unpack_5(const Words* planes, int64_t block, int64_t column, uint8_t* to) {
  const __m512i table = table_of_bits(5), nibble = _mm512_set1_epi16(15), one = _mm512_set1_epi8(1);
  __m512i bytes = _mm512_set4_epi32(static_cast<int>(0x800C800Cu), static_cast<int>(0x80088008u),
                                    static_cast<int>(0x80048004u), static_cast<int>(0x80008000u));
  for (int64_t r = 0; r < 4; ++r, bytes = _mm512_add_epi8(bytes, one))
    for (int64_t c = 0; c < 4; ++c) {
      const __m512i fours = load_words(planes[0], block * 4 + r, column + 16 * c);
      const __m512i ones = load_words(planes[1], block, column + 16 * c);
      const __m512i spread = _mm512_slli_epi16(_mm512_shuffle_epi8(ones, bytes), 4);
      __m512i* row = reinterpret_cast<__m512i*>(to + c * kTile) + r * 4;
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const __m512i high = _mm512_srlv_epi16(spread, _mm512_set1_epi32(j | (j + 4) << 16));
        const __m512i index = _mm512_ternarylogic_epi32(nibble, _mm512_srli_epi32(fours, 4 * j), high, 0xCA);
        row[j] = _mm512_permutexvar_epi16(index, table);
      }
    }
}

// The high 16 bits of two vectors of float32 as pairs.
inline __m512i pairs_of(__m512 low, __m512 high) {
  const __m512i shifted = _mm512_srli_epi32(_mm512_castps_si512(low), 16);
  return _mm512_mask_blend_epi16(0xAAAAAAAAu, shifted, _mm512_castps_si512(high));
}

void unpack_8(const Words* planes, int64_t block, int64_t column, uint8_t* to) {
  const Avx512::Decoder<8> decode(128.0f, nullptr);
  for (int64_t c = 0; c < 4; ++c)
    for (int64_t r = 0; r < 8; ++r) {
      const __m512i word = load_words(planes[0], block * 8 + r, column + 16 * c);
      __m512i* row = reinterpret_cast<__m512i*>(to + c * kTile) + r * 2;
      row[0] = pairs_of(decode(word, 0), decode(word, 2));
      row[1] = pairs_of(decode(word, 1), decode(word, 3));
    }
}

// Any width, through float32.
template <int BITS, int... W>
void unpack_planes(const Words* planes, int64_t block, int64_t column, uint8_t* to) {
  alignas(64) float codes[kBlock * kPanel];
  int low = 0, i = 0;
  const auto add = [&](auto width) {
    constexpr int w = decltype(width)::value;
    const Words words = {planes[i].data + block * w * planes[i].row, planes[i].row, w};
    const float centre = low + w == BITS ? static_cast<float>(1 << (w - 1)) : 0.0f;
    const float scale = static_cast<float>(1 << low);
    unpack_block<Avx512, w>(words, scale, centre, nullptr, i == 0, column, column + kHalf, codes);
    low += w, ++i;
  };
  (add(Width<W>{}), ...);
  for (int64_t c = 0; c < 4; ++c) {
    __m512i* row = reinterpret_cast<__m512i*>(to + c * kTile);
    const float* from = codes + column + 16 * c;
    for (int p = 0; p < 16; ++p, from += 2 * kPanel) row[p] = pairs_of(Avx512::load(from), Avx512::load(from + kPanel));
  }
}

inline Unpack unpack_of(int bits) {
  static const Unpack kUnpack[9] = {nullptr,         unpack_plane<1>, unpack_plane<2>,
                                    unpack_3,        unpack_plane<4>, unpack_5,
                                    unpack_planes<6, 4, 2>, unpack_planes<7, 4, 2, 1>, unpack_8};
  return kUnpack[bits];
}

// Tiles 0..3 are sums, 4..6 terms of x, 7 codes.
inline void configure(int64_t rows) {
  struct alignas(64) {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } config = {};
  config.palette = 1;
  for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = static_cast<uint8_t>(i < 7 ? rows : 16);
  _tile_loadconfig(&config);
}

template <int T>
inline void multiply_terms(const uint8_t* x, const uint8_t* codes) {
  _tile_loadd(4, x, 64);
  if (T > 1) _tile_loadd(5, x + kTile, 64);
  if (T > 2) _tile_loadd(6, x + 2 * kTile, 64);
#define LQ_COLUMN(c)                                \
  _tile_loadd(7, codes + (c) * kTile, 64);          \
  if (T > 2) _tile_dpbf16ps(c, 6, 7);               \
  if (T > 1) _tile_dpbf16ps(c, 5, 7);               \
  _tile_dpbf16ps(c, 4, 7);
  LQ_COLUMN(0)
  LQ_COLUMN(1)
  LQ_COLUMN(2)
  LQ_COLUMN(3)
#undef LQ_COLUMN
}

// One tile of rows and half a panel over a chunk.
struct Blocks {
  Unpack unpack;  // null: they are unpacked already
  const Words* planes;
  int64_t count, column;
  uint8_t* codes;    // [count, 4, kTile]
  const uint8_t* x;  // the first block's tiles of these rows
  int64_t x_step;    // bytes from one block to the next
};

// The sums stay in tiles 0..3. A block is unpacked while the one before is multiplied: vector and tile units work side
// by side. The loads come before the stores of the next block, 4096 bytes further: loads that only look like a recent
// store, by the lowest twelve bits of their addresses, have to wait for it.
template <int T>
inline void multiply_chunk(const Blocks& b) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  if (b.unpack) b.unpack(b.planes, 0, b.column, b.codes);
  for (int64_t i = 0; i < b.count; ++i) {
    multiply_terms<T>(b.x + i * b.x_step, b.codes + i * 4 * kTile);
    if (b.unpack && i + 1 < b.count) b.unpack(b.planes, i + 1, b.column, b.codes + (i + 1) * 4 * kTile);
  }
}

inline void store_sums(float* sums) {
  _tile_stored(0, sums, kHalf * 4);
  _tile_stored(1, sums + 16, kHalf * 4);
  _tile_stored(2, sums + 32, kHalf * 4);
  _tile_stored(3, sums + 48, kHalf * 4);
}

// total += (the terms' sums - zero * sum(x)) * scale, for `rows` rows and half a panel.
struct Finish {
  const Epilogue* epilogue;
  const float *sums, *x_sums;
  int64_t column, rows;
  float* total;
};

inline void finish_half(const Tiling& t, const Finish& f) {
  const Epilogue& e = *f.epilogue;
  for (int64_t m = 0; m < f.rows; ++m)
    for (int64_t n = 0; n < kHalf; n += 16) {
      __m512 v = _mm512_loadu_ps(f.sums + m * kHalf + n);
      for (int64_t i = 1; t.stacked && i < t.terms; ++i)
        v = _mm512_add_ps(v, _mm512_loadu_ps(f.sums + (i * t.rows + m) * kHalf + n));
      if (e.has_zero) v = _mm512_fnmadd_ps(_mm512_set1_ps(f.x_sums[m]), _mm512_loadu_ps(e.zero + f.column + n), v);
      float* to = f.total + m * kPanel + f.column + n;
      _mm512_storeu_ps(to, _mm512_fmadd_ps(v, _mm512_loadu_ps(e.scale + f.column + n), _mm512_loadu_ps(to)));
    }
}

// What one thread works in.
struct Room {
  alignas(64) uint8_t codes[kMostBlocks * 4 * kTile];
  alignas(64) float sums[2][16 * kHalf];
  alignas(64) float total[kPanelsAtOnce * kMostRows * kPanel];
  Copies copies;
  Epilogue epilogue[2];
  // Sums are used when the next ones are on their way: the tiles need some hundred cycles to come out. Before these
  // are stored, for the reason given at `multiply_chunk`.
  Finish pending;
  bool waiting;
  int64_t steps, chunks;
};

inline void finish_pending(const Tiling& t, Room* room) {
  if (room->waiting) finish_half(t, room->pending);
  room->waiting = false;
}

// One chunk of one panel, for tiles [first, last) of rows.
inline void chunk_of_panel(const Product& p, const Tiling& t, const Chunk& chunk, int64_t index, int64_t panel,
                           const void* scratch, int64_t first, int64_t last, Room* room, float* total) {
  const Segment& segment = *chunk.segment;
  const int64_t columns = at_most(kPanel, p.N - panel * kPanel);
  const float* x_sums = activations(p, scratch).sums + index * p.M;
  const int64_t x_step = tiles_of_block(t) * kTile;
  const uint8_t* x = reinterpret_cast<const uint8_t*>(tiles_begin(p, scratch)) +
                     (segment.padded_begin + chunk.begin) / kBlock * x_step;
  Words planes[3];
  for (int64_t i = 0, copied = 0; i < segment.planes; copied += kChunk / 32 * segment.plane[i].width, ++i)
    planes[i] = words_of(segment.plane[i], chunk, panel, columns, p.padded_N, true, room->copies.words + copied);
  Epilogue* epilogue = &room->epilogue[room->chunks++ % 2];
  load_epilogue(p, chunk, panel, columns, epilogue);
  const int64_t terms = t.stacked ? 1 : t.terms;
  const auto multiply = terms == 1 ? multiply_chunk<1> : terms == 2 ? multiply_chunk<2> : multiply_chunk<3>;
  Blocks blocks = {nullptr, planes, divide_up(chunk.length, kBlock), 0, room->codes, nullptr, x_step};
  for (int64_t column = 0; column < columns; column += kHalf)
    for (int64_t tile = first; tile < last; ++tile) {
      float* sums = room->sums[room->steps++ % 2];
      blocks.unpack = tile == first ? unpack_of(segment.bits) : nullptr;
      blocks.column = column;
      blocks.x = x + tile * t.terms * kTile;
      multiply(blocks);
      finish_pending(t, room);
      store_sums(sums);
      const int64_t m = tile * t.rows;
      float* const to = total + (m - first * t.rows) * kPanel;
      room->pending = {epilogue, sums, x_sums + m, column, at_most(t.rows, p.M - m), to};
      room->waiting = true;
    }
}

// Panels that are taken together, chunk by chunk: many when the tiles of x would not stay in the second-level cache
// from one panel to the next; one when they do, since a panel by itself is one stream from memory.
inline int64_t panels_at_once(const Product& p, const Tiling& t) {
  return p.padded_K / kBlock * tiles_of_block(t) * kTile > (512 << 10) ? kPanelsAtOnce : 1;
}

void amx_panels(const Product& p, const void* scratch, int64_t first, int64_t last) {
  const Tiling t = tiling_of(p);
  const int64_t tiles_at_once = kMostRows / t.rows, width = panels_at_once(p, t);
  Room room;
  room.waiting = false;
  room.steps = room.chunks = 0;
  configure(t.tile_rows);
  for (int64_t panel = first; panel < last; panel += width) {
    const int64_t stop = at_most(last, panel + width);
    for (int64_t tile = 0; tile < t.tiles; tile += tiles_at_once) {
      const int64_t end = at_most(t.tiles, tile + tiles_at_once);
      const int64_t m = tile * t.rows, rows = at_most(p.M, end * t.rows) - m;
      const auto total = [&](int64_t each) { return room.total + (each - panel) * rows * kPanel; };
      memset(room.total, 0, static_cast<size_t>((stop - panel) * rows * kPanel) * sizeof(float));
      for_each_chunk(p, [&](int64_t index, const Chunk& chunk) {
        for (int64_t each = panel; each < stop; ++each)
          chunk_of_panel(p, t, chunk, index, each, scratch, tile, end, &room, total(each));
      });
      finish_pending(t, &room);
      for (int64_t each = panel; each < stop; ++each)
        for (int64_t r = 0; r < rows; ++r)
          store_floats(total(each) + r * kPanel, p.y, p.y_type, (m + r) * p.N + each * kPanel,
                       at_most(kPanel, p.N - each * kPanel));
    }
  }
  _tile_release();
}

// The processor has the tiles, the system saves them, and lets this process use them.
bool amx_supported() {
  static const bool yes = [] {
    unsigned a, b, c, d;
    if (!supports_avx512() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    if (!(d & 1u << 22) || !(d & 1u << 24)) return false;  // AMX-BF16, AMX-TILE
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return yes;
}

// A codebook's numbers have more than eight bits.
bool amx_serves(const Product& p) { return !p.codebook; }

// The tiles of one or two rows are nearly empty.
bool amx_prefers(const Product& p) { return p.M > 2; }

}  // namespace

const Kernel kAmx = {"amx", amx_supported, amx_serves, amx_prefers, amx_scratch_bytes, amx_begin, amx_panels};

}  // namespace lq
