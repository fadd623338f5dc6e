// Scalar conversions, exhaustively over all 65536 patterns of the 16-bit types, against slow definitions.
#include "base/dtype.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/rng.h"

namespace flexchat {
namespace {

// A 16-bit pattern read from its definition: sign, `e` exponent bits, `m` mantissa bits.
double decode(uint16_t bits, int e, int m) {
  const double sign = bits >> 15 ? -1 : 1;
  const int exponent = (bits >> m) & ((1 << e) - 1), mantissa = bits & ((1 << m) - 1);
  const int bias = (1 << (e - 1)) - 1;
  if (exponent == (1 << e) - 1) {
    return mantissa ? std::numeric_limits<double>::quiet_NaN()
                    : sign * std::numeric_limits<double>::infinity();
  }
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - m);
  return sign * std::ldexp((1 << m) + mantissa, exponent - bias - m);
}
double decode_bf16(uint16_t bits) { return decode(bits, 8, 7); }
double decode_f16(uint16_t bits) { return decode(bits, 5, 10); }

TEST(DType, NamesAndSizes) {
  const std::pair<const char*, int64_t> known[] = {{"f64", 8}, {"f32", 4},    {"bf16", 2},
                                                   {"f16", 2}, {"f8e4m3", 1}, {"f8e5m2", 1},
                                                   {"i64", 8}, {"i32", 4},    {"u8", 1}};
  for (const auto& [name, size] : known) {
    const DType d = parse_dtype(name);
    EXPECT_EQ(dtype_name(d), name);
    EXPECT_EQ(dtype_size(d), size);
    EXPECT_EQ(is_float(d), std::string(name).find('f') != std::string::npos);
  }
  try {
    parse_dtype("bf17");
    FAIL() << "accepted";
  } catch (const Error& e) {
    EXPECT_STREQ(e.what(),
                 "unknown dtype 'bf17' (did you mean 'bf16'?); allowed: f64, f32, bf16, f16, f8e4m3, "
                 "f8e5m2, i64, i32, u8");
  }
}

TEST(DType, EveryBf16PatternRoundTrips) {
  for (uint32_t p = 0; p < 65536; ++p) {
    const bf16_t x{static_cast<uint16_t>(p)};
    const float f = to_float(x);
    const double expected = decode_bf16(x.bits);
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(f)) << p;
      ASSERT_TRUE(std::isnan(to_float(to_bf16(f)))) << p;
    } else {
      ASSERT_EQ(static_cast<double>(f), expected) << p;
      ASSERT_EQ(to_bf16(f).bits, p);
    }
  }
}

TEST(DType, EveryF16PatternRoundTrips) {
  for (uint32_t p = 0; p < 65536; ++p) {
    const f16_t x{static_cast<uint16_t>(p)};
    const float f = to_float(x);
    const double expected = decode_f16(x.bits);
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(f)) << p;
      ASSERT_TRUE(std::isnan(to_float(to_f16(f)))) << p;
    } else {
      ASSERT_EQ(static_cast<double>(f), expected) << p;
      ASSERT_EQ(std::signbit(f), (p >> 15) != 0) << p;
      ASSERT_EQ(to_f16(f).bits, p);
    }
  }
}

// Between each pair of neighbours: just below the middle goes down, the middle to the even one, just above
// up. `infinity` is the pattern of +inf, which stands for the value one step above the largest finite one.
template <class Encode, class Decode>
void check_nearest_even(uint16_t infinity, const Encode& encode, const Decode& decode_bits) {
  for (uint32_t p = 0; p < infinity; ++p) {
    const double low = decode_bits(static_cast<uint16_t>(p));
    const double high = p + 1 == infinity ? 2 * low - decode_bits(static_cast<uint16_t>(p - 1))
                                          : decode_bits(static_cast<uint16_t>(p + 1));
    const auto middle = static_cast<float>((low + high) / 2);
    if (static_cast<double>(middle) != (low + high) / 2) continue;  // below f32's own subnormals
    const uint32_t even = p % 2 == 0 ? p : p + 1;
    for (const uint32_t sign : {0u, 0x8000u}) {
      const float s = sign ? -1.0f : 1.0f;
      ASSERT_EQ(encode(s * std::nextafter(middle, 0.0f)), sign | p) << p;
      ASSERT_EQ(encode(s * middle), sign | even) << p;
      ASSERT_EQ(encode(s * std::nextafter(middle, std::numeric_limits<float>::infinity())), sign | (p + 1))
          << p;
    }
  }
}

TEST(DType, Bf16RoundsToNearestEven) {
  check_nearest_even(
      0x7F80, [](float x) { return uint32_t{to_bf16(x).bits}; }, decode_bf16);
}

TEST(DType, F16RoundsToNearestEven) {
  check_nearest_even(
      0x7C00, [](float x) { return uint32_t{to_f16(x).bits}; }, decode_f16);
}

TEST(DType, RandomFloatsGoToTheNearest) {
  Rng rng(5);
  for (int i = 0; i < 200'000; ++i) {
    const float x = std::bit_cast<float>(rng.next_u32());
    if (!std::isfinite(x)) continue;
    const uint16_t half = to_f16(x).bits, brain = to_bf16(x).bits;
    const auto nearest = [&](uint16_t bits, uint16_t infinity, const auto& decode_bits) {
      if ((bits & 0x7FFF) == infinity) return true;  // overflow: the limits are checked above
      const double error = std::abs(decode_bits(bits) - static_cast<double>(x));
      for (const int step : {-1, 1}) {
        const auto neighbour = static_cast<uint16_t>(bits + step);
        const double other = decode_bits(neighbour);
        if (std::isfinite(other) && std::abs(other - static_cast<double>(x)) < error) return false;
      }
      return std::signbit(decode_bits(bits)) == std::signbit(x);
    };
    ASSERT_TRUE(nearest(half, 0x7C00, decode_f16)) << std::hexfloat << x;
    ASSERT_TRUE(nearest(brain, 0x7F80, decode_bf16)) << std::hexfloat << x;
  }
}

TEST(DType, NotANumberStaysOneWhateverItsPayload) {
  for (const uint32_t bits : {0x7F800001u, 0xFF800001u, 0x7FC00000u, 0x7FFFFFFFu, 0xFFFFFFFFu, 0x7F80FFFFu}) {
    const float nan = std::bit_cast<float>(bits);
    EXPECT_TRUE(std::isnan(to_float(to_bf16(nan)))) << bits;
    EXPECT_TRUE(std::isnan(to_float(to_f16(nan)))) << bits;
    EXPECT_EQ(to_bf16(nan).bits >> 15, bits >> 31);
    EXPECT_EQ(to_f16(nan).bits >> 15, bits >> 31);
  }
}

TEST(DType, ElementsOfEveryScalarType) {
  alignas(8) unsigned char memory[64] = {};
  for (const DType d : {DType::f64, DType::f32, DType::bf16, DType::f16, DType::i64, DType::i32, DType::u8}) {
    for (int64_t i = 0; i < 8; ++i) store_element(memory, d, i, static_cast<double>(3 * i));
    for (int64_t i = 0; i < 8; ++i)
      EXPECT_EQ(load_element(memory, d, i), static_cast<double>(3 * i)) << dtype_name(d);
  }
  store_element(memory, DType::i64, 0, -0x1p53);
  EXPECT_EQ(load_element(memory, DType::i64, 0), -0x1p53);
  store_element(memory, DType::i32, 1, -7);
  EXPECT_EQ(load_element(memory, DType::i32, 1), -7);
  store_element(memory, DType::f64, 0, 0.1);
  EXPECT_EQ(load_element(memory, DType::f64, 0), 0.1);
  store_element(memory, DType::f32, 0, 0.1);
  EXPECT_EQ(load_element(memory, DType::f32, 0), static_cast<double>(0.1f));
  store_element(memory + 1, DType::f32, 0, 2.5);  // unaligned memory is fine
  EXPECT_EQ(load_element(memory + 1, DType::f32, 0), 2.5);
  EXPECT_THROW(load_element(memory, DType::f8e4m3, 0), Error);
  EXPECT_THROW(store_element(memory, DType::f8e5m2, 0, 1), Error);
}

}  // namespace
}  // namespace flexchat
