// AVX-512 with VNNI and VBMI: Ice Lake servers and later, Zen 4 and later.
//
// `vpdpbusd` multiplies 64 codes, as unsigned bytes, by signed bytes of x, and adds the products of four to each 32-bit
// lane: exact integers. fixed.h makes the bytes of x. A lane is a column; the four bytes of a word are a *quad* of
// codes. What is subtracted from every code, the centre, is subtracted in integers too, which stay below 2^24: y is
// rounded only when the sums of the digits are put together, and then relative to what comes out.
#include "fixed.h"

namespace lq {
namespace {

typedef __m512i I;

constexpr int64_t kLanes = 16;
constexpr int64_t kUnpackOnce = 4;  // rows from which codes of several planes are unpacked for all, not for each

inline I bytes(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }

// The compiler's own choice of registers for `_mm512_dpbusd_epi32` copies half of the sums in every turn of a loop.
inline void add_products(I* sums, I codes, I x) { asm("vpdpbusd %2, %1, %0" : "+v"(*sums) : "v"(codes), "v"(x)); }

// Loads that the compiler must not merge: it would keep what is read twice in more registers than there are.
inline I load(const uint32_t* words) {
  I word;
  asm volatile("vmovdqu64 %1, %0" : "=v"(word) : "m"(*reinterpret_cast<const I*>(words)));
  return word;
}

inline I broadcast(const int8_t* four) {
  I x;
  asm volatile("vpbroadcastd %1, %0" : "=v"(x) : "m"(*reinterpret_cast<const int8_t (*)[4]>(four)));
  return x;
}

// The kinds of codes. A block is 8 / kQuads rows of words of the first plane, and each of these kQuads quads. `Held` is
// what is kept of one row of words while its quads are unpacked, for kGroup vectors of columns at a time.
template <int W>
struct OnePlane {
  static constexpr int kQuads = 8 / W, kGroup = 4;
  typedef const uint32_t* Held;

  static Held hold(const Words* planes, int64_t row, int64_t column) {
    return planes[0].data + row * planes[0].row + column;
  }

  static I quad(Held row, int h) {
    const I word = load(row);
    if (W == 8) return word;
    if (W > 1) return _mm512_and_si512(_mm512_srli_epi32(word, W * h), bytes((1 << W) - 1));
    // Twice the code of one bit, see fixed.h.
    return _mm512_and_si512(h ? _mm512_srli_epi32(word, h - 1) : _mm512_add_epi32(word, word), bytes(2));
  }
};

// For `vpmultishiftqb`: the bits that a plane of width W has for each byte of row r of a first plane of width F, to lie
// from bit `low` on.
template <int F, int W>
struct Places {
  alignas(64) uint8_t place[64] = {};
  constexpr Places(int r, int low) {
    for (int i = 0; i < 64; ++i)
      place[i] = static_cast<uint8_t>((i / 4 % 2 * 32 + (r * (32 / F) + i % 4 * (8 / F)) * W % 32 - low) & 63);
  }
};

template <int F, int W, int LOW>
inline I spread(const Words& w, int64_t row, int64_t column) {
  static constexpr Places<F, W> kPlaces[4] = {{0, LOW}, {1, LOW}, {2, LOW}, {3, LOW}};
  const I word = load(w.data + row * W / F * w.row + column);
  return _mm512_multishift_epi64_epi8(_mm512_load_si512(kPlaces[row % F].place), word);
}

// A second plane of width W, and perhaps a third of one bit.
template <int F, int W, bool THIRD = false>
struct Planes {
  static constexpr int kQuads = 8 / F, kGroup = 2;
  struct Held {
    const uint32_t* first;
    I second, third;
  };

  static Held hold(const Words* planes, int64_t row, int64_t column) {
    const uint32_t* first = planes[0].data + row * planes[0].row + column;
    const I second = spread<F, W, F>(planes[1], row, column);
    return {first, second, THIRD ? spread<F, 1, F + W>(planes[2], row, column) : second};
  }

  static I quad(const Held& held, int h) {
    // 0xE2: the first's bits where the mask has ones, the last's where it has none.
    I code = _mm512_srli_epi32(load(held.first), F * h);
    code = _mm512_ternarylogic_epi32(code, bytes((1 << F) - 1), _mm512_srli_epi32(held.second, W * h), 0xE2);
    if (THIRD)
      code = _mm512_ternarylogic_epi32(code, bytes((1 << (F + W)) - 1), _mm512_srli_epi32(held.third, h), 0xE2);
    return _mm512_and_si512(code, bytes((1 << (F + W + THIRD)) - 1));
  }
};

// Brings the words of the next chunk, a line at a time, while this one is multiplied. One row of a prepared matrix goes
// without: it is read from end to end, which the processor's own prefetching does best, and disturbed by ours.
struct Ahead {
  const Words* planes;
  int64_t count, per_row;  // planes left; lines for each row of words that is multiplied
  int64_t line;

  void fetch() {
    for (int64_t i = 0; i < per_row && count; ++i) {
      _mm_prefetch(planes->data + (planes->rows + line / 8) * planes->row + line % 8 * kLanes, _MM_HINT_T1);
      if (++line == 8 * planes->rows) line = 0, ++planes, --count;
    }
  }
};

// What all rows share of one chunk and panel.
struct Shared {
  const Words* planes;
  int64_t blocks;
  const Epilogue* epilogue;
};

// One row of x in one chunk and panel.
struct Row {
  const int8_t* digits;
  const Fixed* fixed;
  float* total;  // [kPanel]
  float* upper;  // [kPanel]: the sums of the upper two of four digits, for the lower two
  Ahead* ahead;  // null: nothing is to be fetched
};

// total += the chunk's part of y, for three digits. Four have too many sums for the registers: they are two and two, the
// upper first, and the words come from the first-level cache the second time.
enum class Digits { kThree, kUpper, kLower };

template <class Codes, Digits D>
inline void multiply(const Shared& s, const Row& row) {
  constexpr int H = Codes::kQuads, G = Codes::kGroup, C = kPanel / kLanes;
  constexpr int T = D == Digits::kThree ? 3 : 2, kFirst = D == Digits::kUpper ? 2 : 0;
  I acc[T][C];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) acc[t][c] = _mm512_set1_epi32(row.fixed->start[kFirst + t]);
  const int8_t* x = row.digits;
  for (int64_t r = 0; r < s.blocks * (8 / H); ++r, x += H * 4 * kDigits) {
    if (row.ahead && D != Digits::kLower) row.ahead->fetch();
#pragma GCC unroll 8
    for (int first = 0; first < C; first += G) {
      typename Codes::Held held[G];
#pragma GCC unroll 8
      for (int c = 0; c < G; ++c) held[c] = Codes::hold(s.planes, r, (first + c) * kLanes);
#pragma GCC unroll 8
      for (int h = 0; h < H; ++h) {
        I quads[G];
#pragma GCC unroll 8
        for (int c = 0; c < G; ++c) quads[c] = Codes::quad(held[c], h);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
          const I four = broadcast(x + (h * kDigits + kFirst + t) * 4);
#pragma GCC unroll 8
          for (int c = 0; c < G; ++c) add_products(&acc[t][first + c], quads[c], four);
        }
      }
    }
  }
  const Epilogue& e = *s.epilogue;
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) {
    const int64_t n = c * kLanes;
    __m512 v = _mm512_cvtepi32_ps(acc[T - 1][c]);
#pragma GCC unroll 8
    for (int t = T - 2; t >= 0; --t) v = Avx512::fma(v, Avx512::set1(256.0f), _mm512_cvtepi32_ps(acc[t][c]));
    if (D == Digits::kUpper) {
      Avx512::store(row.upper + n, v);
      continue;
    }
    if (D == Digits::kLower) v = Avx512::fma(Avx512::load(row.upper + n), Avx512::set1(65536.0f), v);
    v = _mm512_mul_ps(v, Avx512::set1(row.fixed->unit));
    if (e.has_zero) v = Avx512::fnma(Avx512::set1(row.fixed->sum), Avx512::load(e.zero + n), v);
    Avx512::store(row.total + n, Avx512::fma(v, Avx512::load(e.scale + n), Avx512::load(row.total + n)));
  }
}

template <class Codes>
void multiply_row(const Shared& s, const Row& row) {
  if (row.fixed->terms <= 3) return multiply<Codes, Digits::kThree>(s, row);
  multiply<Codes, Digits::kUpper>(s, row);
  multiply<Codes, Digits::kLower>(s, row);
}

// All codes of a chunk as a plane of bytes.
template <class Codes>
void unpack_chunk(const Shared& s, uint32_t (*to)[kPanel]) {
  constexpr int H = Codes::kQuads;
  for (int64_t r = 0; r < s.blocks * (8 / H); ++r, to += H)
    for (int64_t n = 0; n < kPanel; n += kLanes) {
      const auto held = Codes::hold(s.planes, r, n);
#pragma GCC unroll 8
      for (int h = 0; h < H; ++h) _mm512_store_si512(to[h] + n, Codes::quad(held, h));
    }
}

struct Operations {
  void (*multiply)(const Shared&, const Row&);
  void (*unpack)(const Shared&, uint32_t (*)[kPanel]);
};

template <class Codes>
constexpr Operations operations() {
  return {multiply_row<Codes>, unpack_chunk<Codes>};
}

constexpr Operations kOperations[9] = {{},
                                       operations<OnePlane<1>>(),
                                       operations<OnePlane<2>>(),
                                       operations<Planes<2, 1>>(),
                                       operations<OnePlane<4>>(),
                                       operations<Planes<4, 1>>(),
                                       operations<Planes<4, 2>>(),
                                       operations<Planes<4, 2, true>>(),
                                       operations<OnePlane<8>>()};

// What one thread works in.
struct Room {
  alignas(64) uint32_t codes[kChunk / 4][kPanel];
  alignas(64) float total[kRows * kPanel];
  alignas(64) float acc[kPanel];
  Copies copies;
  Epilogue epilogue;
};

// Rows whose x stayed float32, one by one.
void float_rows(const Product& p, const Chunk& chunk, int64_t panel, const Fixed* fixed, const float* x,
                const float* sums, int64_t rows, Room* room) {
  for (int64_t m = 0; m < rows; ++m) {
    if (fixed[m].terms) continue;
    memset(room->acc, 0, sizeof(room->acc));
    const int64_t columns = at_most(kPanel, p.N - panel * kPanel);
    few_rows<Avx512>(p, chunk, panel, columns, x + m * p.padded_K, 1, &room->copies, room->acc);
    finish<Avx512>(room->epilogue, room->acc, sums + m, 1, room->total + m * kPanel);
  }
}

void chunk_of_panel(const Product& p, const Chunk& chunk, int64_t index, int64_t panel, const void* scratch, int64_t m,
                    int64_t rows, Room* room) {
  const Segment& segment = *chunk.segment;
  const int64_t columns = at_most(kPanel, p.N - panel * kPanel);
  Words planes[3];
  int64_t lines = 0;
  for (int64_t i = 0, copied = 0; i < segment.planes; copied += kChunk / 32 * segment.plane[i].width, ++i) {
    planes[i] = words_of(segment.plane[i], chunk, panel, columns, p.padded_N, true, room->copies.words + copied);
    lines += planes[i].rows * (kPanel / kLanes);
  }
  load_epilogue(p, chunk, panel, columns, &room->epilogue);
  const Words unpacked = {room->codes[0], kPanel, divide_up(chunk.length, kBlock) * 8};
  Shared shared = {planes, divide_up(chunk.length, kBlock), &room->epilogue};
  const Operations* operations = &kOperations[segment.bits];
  const bool once = segment.planes > 1 && rows >= kUnpackOnce;
  if (once) {
    operations->unpack(shared, room->codes);
    shared.planes = &unpacked;
    operations = &kOperations[8];
  }
  const int64_t start = once || planes[0].row != kPanel ? 0 : 1;  // the first row for which words are fetched ahead
  const int64_t turns = (rows - start) * shared.planes[0].rows;
  Ahead ahead = {planes, segment.planes, turns ? divide_up(lines, turns) : 0, 0};
  const int64_t at = m * p.padded_K + segment.padded_begin + chunk.begin;
  const FixedPoint f = fixed_point(p, scratch);
  const Fixed* fixed = f.chunks + index * p.M + m;
  for (int64_t r = 0; r < rows; ++r)
    operations->multiply(shared, {f.digits + (at + r * p.padded_K) * kDigits, fixed + r, room->total + r * kPanel,
                                  room->acc, r < start ? nullptr : &ahead});
  const Activations a = activations(p, scratch);
  float_rows(p, chunk, panel, fixed, a.x + at, a.sums + index * p.M + m, rows, room);
}

void vnni_panels(const Product& p, const void* scratch, int64_t first, int64_t last) {
  Room room;
  for (int64_t panel = first; panel < last; ++panel)
    for (int64_t m = 0; m < p.M; m += kRows) {
      const int64_t rows = at_most(kRows, p.M - m);
      memset(room.total, 0, static_cast<size_t>(rows * kPanel) * sizeof(float));
      for_each_chunk(p, [&](int64_t index, const Chunk& chunk) {
        chunk_of_panel(p, chunk, index, panel, scratch, m, rows, &room);
      });
      for (int64_t r = 0; r < rows; ++r)
        store_floats(room.total + r * kPanel, p.y, p.y_type, (m + r) * p.N + panel * kPanel,
                     at_most(kPanel, p.N - panel * kPanel));
    }
}

bool vnni_supported() {
  return supports_avx512() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
}

// A codebook's numbers are no integers.
bool vnni_serves(const Product& p) { return !p.codebook; }

// Timed on Zen 4 only. On Intel one or two rows, where it is the memory that decides and how it is read ahead, stay with
// AVX-512, which brought a core to 0.9 of what it reads; with more, arithmetic decides, and there is less of it here.
// float32 needs four digits: below five rows, tables of AVX-512 are as fast or faster.
bool vnni_prefers(const Product& p) {
  if (p.x_type == Type::kF32) return p.M > 4;
  return p.M > 2 || !__builtin_cpu_is("intel");
}

}  // namespace

const Kernel kAvx512Vnni = {"avx512_vnni", vnni_supported, vnni_serves, vnni_prefers, fixed_scratch_bytes, fix, vnni_panels};

}  // namespace lq
