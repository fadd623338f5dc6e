// Where blocks stand in a range of addresses: plain bookkeeping that touches no memory, so that the arena of
// any device can stand on it. Best fit, lowest address first, neighbouring holes joined.
//
// Deterministic: the same calls give the same offsets, however much of the range has memory behind it. The
// free end of the range is taken only when no hole fits, so a step that repeats its sizes repeats its
// addresses from the second time on.
#pragma once

#include <cstddef>
#include <map>
#include <optional>
#include <set>
#include <utility>
#include <vector>

namespace flexchat {

class Suballocator {
 public:
  // Offsets in [0, capacity), multiples of `granularity` (a power of two).
  explicit Suballocator(size_t capacity, size_t granularity = 512);

  size_t rounded(size_t bytes) const;  // bytes that a block takes: at least one granule
  // The offset of a new block; nothing when neither a hole nor the end of the range has room.
  std::optional<size_t> allocate(size_t bytes);
  // The block that allocate(bytes) gave. Throws RunError when (part of) it is not allocated.
  void release(size_t offset, size_t bytes);

  struct Span {
    size_t begin, end;  // offsets
  };
  // Allocates whatever is free in [begin, end): spans that are released one by one like any block.
  std::vector<Span> take_free(size_t begin, size_t end);

  size_t in_use() const { return in_use_; }
  size_t top() const { return top_; }  // the end of the last block: nothing beyond is in use
  size_t hole_bytes() const { return top_ - in_use_; }
  size_t largest_hole() const { return by_size_.empty() ? 0 : by_size_.rbegin()->first; }
  const std::map<size_t, size_t>& holes() const { return holes_; }  // offset -> bytes, below top()

 private:
  void insert_hole(size_t offset, size_t bytes);
  void erase_hole(std::map<size_t, size_t>::iterator hole);

  size_t capacity_, granularity_;
  size_t in_use_ = 0, top_ = 0;
  std::map<size_t, size_t> holes_;               // no two touch, none touches top_
  std::set<std::pair<size_t, size_t>> by_size_;  // the same holes as (bytes, offset)
};

}  // namespace flexchat
