// Tensors: shapes, views that share storage, and blocks that go back to their arena.
#include "base/tensor.h"

#include <gtest/gtest.h>

#include "base/error.h"

namespace flexchat {
namespace {

TEST(Tensor, ShapeText) {
  EXPECT_EQ(shape_string({}), "()");
  EXPECT_EQ(shape_string({3}), "(3)");
  EXPECT_EQ(shape_string({2, 3}), "(2, 3)");
  EXPECT_EQ(shape_numel({}), 1);
  EXPECT_EQ(shape_numel({2, 0, 5}), 0);
}

TEST(Tensor, UndefinedUntilGivenMemory) {
  const Tensor none;
  EXPECT_FALSE(none.defined());
  EXPECT_EQ(none.numel(), 0);
  EXPECT_EQ(none.data(), nullptr);
}

TEST(Tensor, DimensionsAndBytes) {
  HostArena arena;
  const Tensor t = Tensor::zeros(arena, {2, 3, 4}, DType::bf16);
  EXPECT_TRUE(t.defined());
  EXPECT_EQ(t.rank(), 3);
  EXPECT_EQ(t.numel(), 24);
  EXPECT_EQ(t.bytes(), 48);
  EXPECT_EQ(t.dim(0), 2);
  EXPECT_EQ(t.dim(-1), 4);
  EXPECT_EQ(&t.arena(), &arena);
  for (int64_t i = 0; i < t.numel(); ++i) EXPECT_EQ(t.get(i), 0);
  EXPECT_THROW(Tensor(arena, {2, -1}, DType::f32), Error);
}

TEST(Tensor, ScalarAndEmpty) {
  HostArena arena;
  Tensor scalar = Tensor::zeros(arena, {}, DType::f64);
  scalar.set(0, 2.5);
  EXPECT_EQ(scalar.item(), 2.5);
  const Tensor empty = Tensor::zeros(arena, {0, 7}, DType::f32);
  EXPECT_EQ(empty.numel(), 0);
  EXPECT_TRUE(empty.defined());
  EXPECT_EQ(empty.rows(0, 0).numel(), 0);
}

TEST(Tensor, FromCopiesAndConverts) {
  const std::vector<float> values = {1, 2, 3, 4, 5, 6};
  const Tensor t = Tensor::from<float>(values, {2, 3}, DType::i32);
  for (int64_t i = 0; i < 6; ++i) EXPECT_EQ(t.as<int32_t>()[i], i + 1);
}

TEST(Tensor, ViewsShareStorage) {
  const std::vector<double> values = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
  const Tensor t = Tensor::from<double>(values, {4, 3}, DType::f16);
  const Tensor flat = t.reshape({2, 6}), middle = t.rows(1, 2);
  Tensor copy;
  copy = t;
  EXPECT_EQ(flat.shape(), (Shape{2, 6}));
  EXPECT_EQ(middle.shape(), (Shape{2, 3}));
  EXPECT_EQ(middle.numel(), 6);
  for (int64_t i = 0; i < 6; ++i) EXPECT_EQ(middle.get(i), static_cast<double>(i + 3));
  middle.set(0, 100);
  EXPECT_EQ(t.get(3), 100);
  EXPECT_EQ(flat.get(3), 100);
  EXPECT_EQ(copy.get(3), 100);
  EXPECT_EQ(t.rows(4, 0).numel(), 0);
  EXPECT_EQ(middle.rows(1, 1).get(0), 6) << "a view of a view counts from the view";
}

TEST(Tensor, WrongViewsAreErrors) {
  HostArena arena;
  const Tensor t = Tensor::zeros(arena, {4, 3}, DType::f32), scalar = Tensor::zeros(arena, {}, DType::f32);
  EXPECT_THROW((void)t.reshape({5, 3}), Error);
  EXPECT_THROW((void)t.rows(-1, 2), Error);
  EXPECT_THROW((void)t.rows(3, 2), Error);
  EXPECT_THROW((void)t.rows(0, -1), Error);
  EXPECT_THROW((void)scalar.rows(0, 1), Error);
}

TEST(Tensor, TheLastViewGivesTheBlockBack) {
  HostArena arena;
  Tensor view;
  void* block = nullptr;
  {
    const Tensor t = Tensor::zeros(arena, {16, 16}, DType::f32);
    block = t.data();
    view = t.rows(3, 2);
  }
  EXPECT_EQ(arena.stats().in_use, 1024u);
  view = Tensor();
  EXPECT_EQ(arena.stats().in_use, 0u);
  EXPECT_EQ(Tensor(arena, {256}, DType::f32).data(), block) << "the same size gets the same address again";
}

}  // namespace
}  // namespace flexchat
