// Byte-pair encoding of single pieces with a table of ranks, as tiktoken does it: a piece that is a token is
// that token; otherwise, starting from bytes, the adjacent parts whose concatenation has the lowest rank are
// merged, the leftmost first on equal ranks, until no two adjacent parts make a token. Ranks are ids.
//
// The tables are read only and shared by threads; what changes lives in a Scratch, one to a thread. Its cache
// remembers the merges of short pieces; a new piece overwrites an old one in the same place, so it is
// bounded.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/piece_key.h"

namespace flexchat {

class BpeEncoder {
 public:
  // tokens[id]: its bytes. Throws Error on an empty or repeated token and when one of the 256 bytes is
  // missing.
  explicit BpeEncoder(std::vector<std::string> tokens);

  const std::vector<std::string>& tokens() const { return tokens_; }
  int32_t find(std::string_view bytes) const;  // id, or -1

  class Scratch {
   public:
    Scratch();
    void clear() { n_ids_ = 0; }
    std::span<const int32_t> ids() const { return {ids_.get(), n_ids_}; }

   private:
    friend class BpeEncoder;
    struct alignas(64) Cached {  // a cache line
      static constexpr uint32_t kMaxIds = 11;
      PieceKey key;
      uint32_t n_ids = 0;
      int32_t ids[kMaxIds] = {};
    };
    // One part of the piece being merged.
    struct Part {
      int32_t id;
      int32_t rank;           // of merging with the next part; kNoRank when that makes no token
      uint32_t before, next;  // neighbours, used by merge_long only
    };
    int32_t* room(size_t n) {  // space for n more ids
      if (capacity_ - n_ids_ < n) grow(n);
      return ids_.get() + n_ids_;
    }
    void grow(size_t n);

    std::unique_ptr<int32_t[]> ids_;
    size_t n_ids_ = 0, capacity_ = 0;
    std::vector<Cached> cache_;
    std::vector<Part> parts_;
    std::vector<uint64_t> heap_;
  };

  // Appends the ids of `piece` (not empty) to scratch.ids(). `end`: end of the text the piece lies in.
  void encode(std::string_view piece, const char* end, Scratch& scratch) const {
    int32_t* const out = scratch.room(piece.size() + Scratch::Cached::kMaxIds);
    if (piece.size() <= kMaxKeyBytes) {
      const PieceKey key = make_piece_key(piece, end);
      const uint64_t hash = hash_key(key);
      const int32_t id = find_short(key, hash);
      if (id >= 0) {
        *out = id;
        ++scratch.n_ids_;
      } else {
        scratch.n_ids_ += encode_short(piece, key, hash, scratch, out);
      }
    } else {
      scratch.n_ids_ += encode_long(piece, scratch, out);
    }
  }

 private:
  static constexpr int32_t kNoRank = INT32_MAX;
  struct Short {
    PieceKey key;
    int32_t id = -1;  // -1: free slot
  };
  struct Pair {
    uint64_t key = 0;
    int32_t id = -1;
  };

  int32_t find_short(const PieceKey& key, uint64_t hash) const {
    for (size_t i = hash & short_mask_;; i = (i + 1) & short_mask_) {
      const Short& slot = short_[i];
      if (slot.key == key || slot.id < 0) return slot.id;
    }
  }
  int32_t find_long(std::string_view bytes, uint64_t hash) const;
  // Rank of the token that two tokens make side by side, or kNoRank.
  int32_t pair_rank(int32_t a, int32_t b) const {
    const uint64_t key = static_cast<uint64_t>(static_cast<uint32_t>(a)) << 32 | static_cast<uint32_t>(b);
    for (size_t i = hash_words(key, 0) & pair_mask_;; i = (i + 1) & pair_mask_) {
      const Pair& slot = pairs_[i];
      if (slot.id < 0) return kNoRank;
      if (slot.key == key) return slot.id;
    }
  }
  void index_tokens();
  void index_pairs();
  size_t encode_short(std::string_view piece, const PieceKey& key, uint64_t hash, Scratch& scratch,
                      int32_t* out) const;
  size_t encode_long(std::string_view piece, Scratch& scratch, int32_t* out) const;
  size_t merge(std::string_view piece, int32_t* out) const;                         // up to 63 bytes
  size_t merge_long(std::string_view piece, Scratch& scratch, int32_t* out) const;  // any length

  std::vector<std::string> tokens_;
  std::vector<Short> short_;   // tokens of up to kMaxKeyBytes bytes
  std::vector<int32_t> long_;  // the others: id, -1 for a free slot
  std::vector<Pair> pairs_;
  size_t short_mask_ = 0, pair_mask_ = 0;
  int32_t byte_id_[256];
};

}  // namespace flexchat
