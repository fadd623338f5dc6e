#include "base/dtype.h"

#include <array>
#include <cmath>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/strings.h"

namespace flexchat {
namespace {

struct Info {
  DType dtype;
  std::string_view name;
  int64_t size;
};
constexpr std::array<Info, 9> kInfo = {{{DType::f64, "f64", 8},
                                        {DType::f32, "f32", 4},
                                        {DType::bf16, "bf16", 2},
                                        {DType::f16, "f16", 2},
                                        {DType::f8e4m3, "f8e4m3", 1},
                                        {DType::f8e5m2, "f8e5m2", 1},
                                        {DType::i64, "i64", 8},
                                        {DType::i32, "i32", 4},
                                        {DType::u8, "u8", 1}}};
const Info& info(DType d) { return kInfo[static_cast<size_t>(d)]; }

template <class T>
T at(const void* data, int64_t i) {
  T value;
  std::memcpy(&value, static_cast<const char*>(data) + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return value;
}
template <class T>
void put(void* data, int64_t i, T value) {
  std::memcpy(static_cast<char*>(data) + i * static_cast<int64_t>(sizeof(T)), &value, sizeof(T));
}

}  // namespace

int64_t dtype_size(DType dtype) { return info(dtype).size; }
std::string_view dtype_name(DType dtype) { return info(dtype).name; }

DType parse_dtype(std::string_view name) {
  std::vector<std::string> names;
  for (const Info& i : kInfo) {
    if (i.name == name) return i.dtype;
    names.emplace_back(i.name);
  }
  fail("unknown dtype '{}'{}; allowed: {}", name, did_you_mean(name, names), join(names));
}

float to_float(f16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 0x1Fu, mantissa = x.bits & 0x3FFu;
  if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(static_cast<float>(mantissa) * 0x1p-24f));
  }
  const uint32_t e = exponent == 31 ? 0xFFu : exponent + 112u;
  return std::bit_cast<float>(sign | (e << 23) | (mantissa << 13));
}

f16_t to_f16(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  const auto sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  const uint32_t a = u & 0x7FFFFFFFu;
  if (a > 0x7F800000u) return {static_cast<uint16_t>(sign | 0x7E00u)};
  if (a >= 0x477FF000u) return {static_cast<uint16_t>(sign | 0x7C00u)};  // rounds to 65536 or more
  if (a < 0x38800000u) {  // below 2^-14: adding 0.5 aligns the ulp to 2^-24 and rounds to even
    const float r = std::bit_cast<float>(a) + 0.5f;
    return {static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(r) - 0x3F000000u))};
  }
  const uint32_t rounded = a + 0xFFFu + ((a >> 13) & 1u) - 0x38000000u;
  return {static_cast<uint16_t>(sign | (rounded >> 13))};
}

double load_element(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f64:
      return at<double>(data, i);
    case DType::f32:
      return static_cast<double>(at<float>(data, i));
    case DType::bf16:
      return static_cast<double>(to_float(at<bf16_t>(data, i)));
    case DType::f16:
      return static_cast<double>(to_float(at<f16_t>(data, i)));
    case DType::i64:
      return static_cast<double>(at<int64_t>(data, i));
    case DType::i32:
      return at<int32_t>(data, i);
    case DType::u8:
      return at<uint8_t>(data, i);
    default:
      fail("no scalar conversion from {}", dtype_name(dtype));
  }
}

void store_element(void* data, DType dtype, int64_t i, double value) {
  switch (dtype) {
    case DType::f64:
      return put(data, i, value);
    case DType::f32:
      return put(data, i, static_cast<float>(value));
    case DType::bf16:
      return put(data, i, to_bf16(static_cast<float>(value)));
    case DType::f16:
      return put(data, i, to_f16(static_cast<float>(value)));
    case DType::i64:
      return put(data, i, static_cast<int64_t>(value));
    case DType::i32:
      return put(data, i, static_cast<int32_t>(value));
    case DType::u8:
      return put(data, i, static_cast<uint8_t>(value));
    default:
      fail("no scalar conversion to {}", dtype_name(dtype));
  }
}

}  // namespace flexchat
