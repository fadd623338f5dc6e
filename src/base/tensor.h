// A contiguous, row-major array with a dtype, living in an arena. Copying a Tensor shares its storage.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/arena.h"
#include "base/dtype.h"
#include "base/shape.h"

namespace flexchat {

class Tensor {
 public:
  Tensor() = default;
  // Uninitialised memory.
  Tensor(Arena& arena, Shape shape, DType dtype);
  static Tensor zeros(Arena& arena, Shape shape, DType dtype);
  // A copy of `values` in host memory.
  template <class T>
  static Tensor from(std::span<const T> values, Shape shape, DType dtype) {
    Tensor t(host_arena(), std::move(shape), dtype);
    for (int64_t i = 0; i < t.numel(); ++i) t.set(i, static_cast<double>(values[static_cast<size_t>(i)]));
    return t;
  }

  bool defined() const { return storage_ != nullptr; }
  DType dtype() const { return dtype_; }
  const Shape& shape() const { return shape_; }
  int64_t dim(int i) const { return shape_[static_cast<size_t>(i < 0 ? i + rank() : i)]; }
  int rank() const { return static_cast<int>(shape_.size()); }
  int64_t numel() const { return numel_; }
  int64_t bytes() const { return numel_ * dtype_size(dtype_); }
  Arena& arena() const { return *storage_->arena; }

  void* data() const { return data_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

  // Same storage, other shape with the same number of elements.
  Tensor reshape(Shape shape) const;
  // Rows [begin, begin + count) along the first dimension; shares storage.
  Tensor rows(int64_t begin, int64_t count) const;

  // Host memory only: one element as double.
  double get(int64_t i) const { return load_element(data_, dtype_, i); }
  void set(int64_t i, double value) const { store_element(data_, dtype_, i, value); }
  double item() const { return get(0); }

 private:
  struct Storage {
    Arena* arena;
    void* block;
    size_t bytes;
    ~Storage() { arena->release(block, bytes); }
  };
  std::shared_ptr<Storage> storage_;
  void* data_ = nullptr;
  Shape shape_;
  int64_t numel_ = 0;
  DType dtype_ = DType::f32;
};

}  // namespace flexchat
