// The sizes of a tensor's dimensions, held inline: shapes are made for every operation, so they must not
// allocate.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "base/error.h"

namespace flexchat {

class Shape {
 public:
  static constexpr size_t kMaxRank = 8;

  Shape() = default;
  Shape(std::initializer_list<int64_t> sizes) {
    for (int64_t n : sizes) push_back(n);
  }
  template <class Iterator>
  Shape(Iterator begin, Iterator end) {
    for (; begin != end; ++begin) push_back(*begin);
  }

  size_t size() const { return rank_; }
  bool empty() const { return rank_ == 0; }
  int64_t& operator[](size_t i) { return sizes_[i]; }
  int64_t operator[](size_t i) const { return sizes_[i]; }
  int64_t back() const { return sizes_[rank_ - 1]; }
  const int64_t* begin() const { return sizes_.data(); }
  const int64_t* end() const { return sizes_.data() + rank_; }
  // Error beyond kMaxRank dimensions (files may ask for more).
  void push_back(int64_t n) {
    if (rank_ == kMaxRank) fail("a tensor has at most {} dimensions", kMaxRank);
    sizes_[rank_++] = n;
  }

  bool operator==(const Shape& other) const { return std::equal(begin(), end(), other.begin(), other.end()); }
  bool operator<(const Shape& other) const {
    return std::lexicographical_compare(begin(), end(), other.begin(), other.end());
  }

 private:
  std::array<int64_t, kMaxRank> sizes_{};
  size_t rank_ = 0;
};

std::string shape_string(const Shape& shape);  // "(2, 3)"
int64_t shape_numel(const Shape& shape);

}  // namespace flexchat
