// Hashing of text pieces. Nearly all pieces are short, so up to 15 bytes they are compared and hashed as two
// machine words: the bytes zero-padded, and the length in the last byte (so "a" and "a\0" differ).
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>

namespace flexchat {

static_assert(std::endian::native == std::endian::little, "piece keys are read as little-endian words");

constexpr size_t kMaxKeyBytes = 15;

struct PieceKey {
  uint64_t low = 0, high = 0;
  bool operator==(const PieceKey&) const = default;
  size_t size() const { return high >> 56; }
};

// Key of a piece of at most kMaxKeyBytes bytes. `end` is the end of the text that the piece lies in: with 16
// readable bytes two plain loads do.
inline PieceKey make_piece_key(std::string_view piece, const char* end) {
  static constexpr auto kMasks = [] {
    std::array<std::array<uint64_t, 2>, 16> masks{};
    for (size_t n = 0; n < 16; ++n) {
      masks[n][0] = n >= 8 ? ~uint64_t{0} : (uint64_t{1} << (8 * n)) - 1;
      masks[n][1] = n <= 8 ? 0 : (uint64_t{1} << (8 * (n - 8))) - 1;
    }
    return masks;
  }();
  uint64_t words[2] = {0, 0};
  if (end - piece.data() >= 16) {
    std::memcpy(words, piece.data(), 16);
    words[0] &= kMasks[piece.size()][0];
    words[1] &= kMasks[piece.size()][1];
  } else {
    std::memcpy(words, piece.data(), piece.size());
  }
  return {words[0], words[1] | static_cast<uint64_t>(piece.size()) << 56};
}

// The bytes of `key` written to `bytes`.
inline std::string_view piece_of_key(const PieceKey& key, char (&bytes)[16]) {
  std::memcpy(bytes, &key.low, 8);
  std::memcpy(bytes + 8, &key.high, 8);
  return {bytes, key.size()};
}

inline uint64_t hash_words(uint64_t a, uint64_t b) {
  const auto product = static_cast<unsigned __int128>(a ^ 0x9E3779B97F4A7C15u) * (b ^ 0xD6E8FEB86659FD93u);
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}
inline uint64_t hash_key(const PieceKey& key) { return hash_words(key.low, key.high); }

// Any length from 16 bytes on; the last 16 bytes may be read twice.
inline uint64_t hash_long_piece(std::string_view piece) {
  uint64_t h = piece.size();
  const auto mix = [&](size_t at) {
    uint64_t words[2];
    std::memcpy(words, piece.data() + at, 16);
    h = hash_words(words[0] ^ h, words[1]);
  };
  for (size_t at = 0; at + 16 < piece.size(); at += 16) mix(at);
  mix(piece.size() - 16);
  return h;
}

}  // namespace flexchat
