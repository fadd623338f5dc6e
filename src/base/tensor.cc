#include "base/tensor.h"

#include <algorithm>
#include <cstring>

#include "base/error.h"

namespace flexchat {

std::string shape_string(const Shape& shape) {
  std::string out = "(";
  for (size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + ")";
}

int64_t shape_numel(const Shape& shape) {
  int64_t n = 1;
  for (int64_t d : shape) n *= d;
  return n;
}

Tensor::Tensor(Arena& arena, Shape shape, DType dtype)
    : shape_(std::move(shape)), numel_(shape_numel(shape_)), dtype_(dtype) {
  if (std::any_of(shape_.begin(), shape_.end(), [](int64_t d) { return d < 0; })) {
    fail("a tensor cannot have shape {}", shape_string(shape_));
  }
  const auto bytes = static_cast<size_t>(numel_ * dtype_size(dtype));
  void* block = arena.allocate(bytes);
  storage_.reset(new Storage{&arena, block, bytes});
  data_ = block;
}

Tensor Tensor::zeros(Arena& arena, Shape shape, DType dtype) {
  Tensor t(arena, std::move(shape), dtype);
  std::memset(t.data(), 0, static_cast<size_t>(t.bytes()));
  return t;
}

Tensor Tensor::reshape(Shape shape) const {
  if (shape_numel(shape) != numel_) fail("cannot view {} as {}", shape_string(shape_), shape_string(shape));
  Tensor t = *this;
  t.shape_ = std::move(shape);
  return t;
}

Tensor Tensor::rows(int64_t begin, int64_t count) const {
  if (rank() < 1 || begin < 0 || count < 0 || begin + count > dim(0)) {
    fail("rows [{}, {}) of a tensor {}", begin, begin + count, shape_string(shape_));
  }
  const int64_t row = dim(0) == 0 ? 0 : numel_ / dim(0);
  Tensor t = *this;
  t.data_ = static_cast<char*>(data_) + begin * row * dtype_size(dtype_);
  t.shape_[0] = count;
  t.numel_ = count * row;
  return t;
}

}  // namespace flexchat
