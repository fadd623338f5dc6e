// Element types and their scalar conversions. f64 exists for the reference backend only.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <string_view>

namespace flexchat {

enum class DType : uint8_t { f64, f32, bf16, f16, f8e4m3, f8e5m2, i64, i32, u8 };

int64_t dtype_size(DType dtype);           // bytes of one element
std::string_view dtype_name(DType dtype);  // "f32"
DType parse_dtype(std::string_view name);  // throws Error naming the allowed words
constexpr bool is_float(DType d) { return d <= DType::f8e5m2; }

// bfloat16: the upper half of an f32, rounded to nearest even.
struct bf16_t {
  uint16_t bits;
};
// IEEE half.
struct f16_t {
  uint16_t bits;
};

inline float to_float(bf16_t x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline bf16_t to_bf16(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  if ((u & 0x7FFFFFFFu) > 0x7F800000u) return {static_cast<uint16_t>((u >> 16) | 0x40u)};  // keep NaN a NaN
  return {static_cast<uint16_t>((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16)};
}
float to_float(f16_t x);
f16_t to_f16(float x);  // round to nearest even, overflow to infinity

// One element at index i of an array of `dtype`, as double; integers convert exactly up to 2^53.
double load_element(const void* data, DType dtype, int64_t i);
void store_element(void* data, DType dtype, int64_t i, double value);

}  // namespace flexchat
