#include "backend/suballocator.h"

#include <algorithm>
#include <iterator>

#include "base/error.h"

namespace flexchat {

Suballocator::Suballocator(size_t capacity, size_t granularity)
    : capacity_(capacity / granularity * granularity), granularity_(granularity) {}

size_t Suballocator::rounded(size_t bytes) const {
  return std::max(granularity_, (bytes + granularity_ - 1) / granularity_ * granularity_);
}

void Suballocator::insert_hole(size_t offset, size_t bytes) {
  holes_.emplace(offset, bytes);
  by_size_.emplace(bytes, offset);
}

void Suballocator::erase_hole(std::map<size_t, size_t>::iterator hole) {
  by_size_.erase({hole->second, hole->first});
  holes_.erase(hole);
}

std::optional<size_t> Suballocator::allocate(size_t bytes) {
  if (bytes > capacity_) return std::nullopt;
  const size_t size = rounded(bytes);
  const auto fit = by_size_.lower_bound({size, 0});
  if (fit != by_size_.end()) {
    const auto [hole, offset] = *fit;
    erase_hole(holes_.find(offset));
    if (hole > size) insert_hole(offset + size, hole - size);
    in_use_ += size;
    return offset;
  }
  if (size > capacity_ - top_) return std::nullopt;
  const size_t offset = top_;
  top_ += size;
  in_use_ += size;
  return offset;
}

void Suballocator::release(size_t offset, size_t bytes) {
  size_t begin = offset, end = offset + rounded(bytes);
  auto next = holes_.lower_bound(begin);
  const bool has_previous = next != holes_.begin();
  const auto previous = has_previous ? std::prev(next) : holes_.end();
  if (end > top_ || (next != holes_.end() && next->first < end) ||
      (has_previous && previous->first + previous->second > begin)) {
    fail_run("released {} bytes at offset {} that were not allocated", bytes, offset);
  }
  in_use_ -= end - begin;
  if (next != holes_.end() && next->first == end) {
    end += next->second;
    erase_hole(next);
  }
  if (has_previous && previous->first + previous->second == begin) {
    begin = previous->first;
    erase_hole(previous);
  }
  if (end == top_) {
    top_ = begin;
  } else {
    insert_hole(begin, end - begin);
  }
}

std::vector<Suballocator::Span> Suballocator::take_free(size_t begin, size_t end) {
  begin = begin / granularity_ * granularity_;
  end = std::min(rounded(end), capacity_);
  std::vector<Span> taken;
  auto hole = holes_.upper_bound(begin);
  if (hole != holes_.begin()) --hole;
  while (hole != holes_.end() && hole->first < end) {
    const auto [offset, bytes] = *hole;
    const Span span = {std::max(begin, offset), std::min(end, offset + bytes)};
    const auto whole = hole++;
    if (span.begin >= span.end) continue;
    taken.push_back(span);
    erase_hole(whole);
    if (offset < span.begin) insert_hole(offset, span.begin - offset);
    if (span.end < offset + bytes) insert_hole(span.end, offset + bytes - span.end);
  }
  if (end > top_) {
    const size_t first = std::max(begin, top_);
    if (first > top_) insert_hole(top_, first - top_);
    taken.push_back({first, end});
    top_ = end;
  }
  for (const Span& span : taken) in_use_ += span.end - span.begin;
  return taken;
}

}  // namespace flexchat
