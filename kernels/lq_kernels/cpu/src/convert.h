// Conversions between float32 and the stored types, exact upwards and rounded to nearest even downwards.
//
// Everything here has internal linkage: the file is compiled once for each instruction set, and a shared symbol would
// let the linker hand code for AVX-512 to a processor without it.
#ifndef LQ_CONVERT_H_
#define LQ_CONVERT_H_

#include <string.h>

#include "product.h"

namespace lq {
namespace {

inline float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

inline float from_bf16(uint16_t h) { return as_float(static_cast<uint32_t>(h) << 16); }

inline uint16_t to_bf16(float value) {
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;  // rounding up could carry a NaN into zero
  return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? quiet : rounded);
}

// Integers only: XLA's threads flush subnormal floats to zero, and those of float16 lie within float32's normal range.
inline float from_f16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, fraction = h & 1023u;
  if (exponent == 31) return as_float(sign | 0x7F800000u | fraction << 13);
  if (exponent != 0) return as_float(sign | (exponent + 112u) << 23 | fraction << 13);
  const float magnitude = static_cast<float>(fraction) * 5.9604644775390625e-8f;  // 2^-24
  return as_float(sign | as_bits(magnitude));
}

inline uint16_t to_f16(float value) {
  const uint32_t bits = as_bits(value), magnitude = bits & 0x7FFFFFFFu;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  if (magnitude > 0x7F800000u) return sign | 0x7E00u;
  if (magnitude >= 0x477FF000u) return sign | 0x7C00u;  // from the middle between the largest value and 2^16 on
  if (magnitude >= 0x38800000u) {                       // 2^-14: normal
    const uint32_t rounded = magnitude + 0xFFFu + (magnitude >> 13 & 1u);
    return static_cast<uint16_t>(sign | ((rounded >> 13) - (112u << 10)));
  }
  if (magnitude < 0x33000000u) return sign;  // less than half of the smallest subnormal
  const uint32_t shift = 126u - (magnitude >> 23), fraction = (magnitude & 0x7FFFFFu) | 0x800000u;
  const uint32_t half = 1u << (shift - 1), odd = fraction >> shift & 1u;
  return static_cast<uint16_t>(sign | ((fraction + half - 1u + odd) >> shift));
}

inline int64_t bytes_of(Type type) {
  switch (type) {
    case Type::kBF16:
    case Type::kF16:
      return 2;
    case Type::kU8:
    case Type::kS8:
      return 1;
    default:
      return 4;
  }
}

// out[0..count) = from[offset..offset + count), as float32.
inline void load_floats(const void* from, Type type, int64_t offset, int64_t count, float* out) {
  const uint8_t* u8 = static_cast<const uint8_t*>(from) + offset * bytes_of(type);
  const uint16_t* u16 = reinterpret_cast<const uint16_t*>(u8);
  const uint32_t* u32 = reinterpret_cast<const uint32_t*>(u8);
  switch (type) {
    case Type::kF32:
      memcpy(out, u8, static_cast<size_t>(count) * 4);
      break;
    case Type::kBF16:
      for (int64_t i = 0; i < count; ++i) out[i] = from_bf16(u16[i]);
      break;
    case Type::kF16:
      for (int64_t i = 0; i < count; ++i) out[i] = from_f16(u16[i]);
      break;
    case Type::kU8:
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(u8[i]);
      break;
    case Type::kS8:
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(static_cast<int8_t>(u8[i]));
      break;
    case Type::kU32:
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(u32[i]);
      break;
    case Type::kS32:
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(static_cast<int32_t>(u32[i]));
      break;
  }
}

// to[offset..offset + count) = in[0..count), rounded once.
inline void store_floats(const float* in, void* to, Type type, int64_t offset, int64_t count) {
  uint16_t* u16 = static_cast<uint16_t*>(to) + offset;
  switch (type) {
    case Type::kBF16:
      for (int64_t i = 0; i < count; ++i) u16[i] = to_bf16(in[i]);
      break;
    case Type::kF16:
      for (int64_t i = 0; i < count; ++i) u16[i] = to_f16(in[i]);
      break;
    default:
      memcpy(static_cast<float*>(to) + offset, in, static_cast<size_t>(count) * 4);
  }
}

}  // namespace
}  // namespace lq

#endif  // LQ_CONVERT_H_
