#include "base/rng.h"

#include <cmath>
#include <numbers>

namespace flexchat {

uint32_t Rng::next_u32() {
  const uint64_t block = position_ / 4;
  if (block != block_index_) {
    block_ = philox4x32({static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32),
                         static_cast<uint32_t>(stream_), static_cast<uint32_t>(stream_ >> 32)},
                        seed_);
    block_index_ = block;
  }
  return block_[position_++ % 4];
}

double Rng::uniform() { return static_cast<double>(next_u64() >> 11) * 0x1p-53; }

double Rng::normal() {
  const double u = 1.0 - uniform(), v = uniform();  // u in (0, 1]
  return std::sqrt(-2.0 * std::log(u)) * std::cos(2.0 * std::numbers::pi * v);
}

uint64_t Rng::below(uint64_t bound) {
  const uint64_t limit = ~uint64_t{0} - (~uint64_t{0} % bound + 1) % bound;  // last value of a whole cycle
  uint64_t x = next_u64();
  while (x > limit) x = next_u64();
  return x % bound;
}

}  // namespace flexchat
