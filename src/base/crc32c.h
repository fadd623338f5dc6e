// CRC-32C (Castagnoli polynomial), the checksum of checkpoint files. Uses the processor's instruction where
// it has one; both ways give the same value.
#pragma once

#include <cstddef>
#include <cstdint>

namespace flexchat {

// A checksum over bytes that arrive in pieces. How they are cut into pieces does not change the value.
class Crc32c {
 public:
  void update(const void* data, size_t bytes);
  uint32_t value() const { return ~state_; }

 private:
  uint32_t state_ = ~uint32_t{0};
};

uint32_t crc32c(const void* data, size_t bytes);

// The table-driven way alone, for machines without the instruction and for tests.
uint32_t crc32c_portable(const void* data, size_t bytes);

}  // namespace flexchat
