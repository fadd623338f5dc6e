// How often each distinct piece of the training text occurs. One counter per thread, added up at the end.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/piece_key.h"

namespace flexchat {

class PieceCounter {
 public:
  PieceCounter();

  // `end`: end of the text that `piece` lies in. Pieces are not empty.
  void add(std::string_view piece, const char* end, int64_t count = 1);
  void add_all(const PieceCounter& other);

  int64_t distinct() const { return static_cast<int64_t>(n_short_ + long_.size()); }

  // fn(std::string_view piece, int64_t count), in no particular order.
  template <class Fn>
  void for_each(const Fn& fn) const {
    char bytes[16];
    for (const Short& slot : short_) {
      if (slot.count > 0) fn(piece_of_key(slot.key, bytes), slot.count);
    }
    for (const Long& entry : long_) fn(long_piece(entry), entry.count);
  }

 private:
  struct Short {
    PieceKey key;
    int64_t count = 0;  // 0: free slot
  };
  struct Long {
    uint64_t hash;
    size_t offset, bytes;  // in text_
    int64_t count;
  };
  std::string_view long_piece(const Long& entry) const {
    return std::string_view(text_).substr(entry.offset, entry.bytes);
  }
  void add_short(const PieceKey& key, int64_t count);
  void add_long(std::string_view piece, int64_t count);
  void grow_short();
  void grow_long();

  std::vector<Short> short_;  // open addressing, size a power of two
  size_t n_short_ = 0;
  std::vector<uint32_t> long_slots_;  // index into long_ plus one; 0: free
  std::vector<Long> long_;
  std::string text_;  // bytes of the long pieces
};

}  // namespace flexchat
