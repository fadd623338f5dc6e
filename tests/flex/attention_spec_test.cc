// Checks of attention calls: sizes, lengths, types, and that no captured index leaves its tensor.
#include <gtest/gtest.h>

#include <cmath>

#include "base/rng.h"
#include "flex/attention.h"
#include "flex/mods.h"
#include "support/temp_folder.h"

namespace flexchat {
namespace {

using flex::Axis;
using flex::Capture;
using flex::Expr;
using flex::Type;

AttentionShape shape_of(int64_t batch, int64_t q_len, int64_t kv_len) {
  return {.batch = batch, .q_len = q_len, .kv_len = kv_len, .n_head = 4, .n_kv_head = 2, .head_dim = 64};
}

std::string complaint(const AttentionSpec& spec, const AttentionShape& shape) {
  return message_of<Error>([&] { spec.check(shape); });
}
#define EXPECT_COMPLAINT(spec, shape, part) \
  EXPECT_NE(complaint(spec, shape).find(part), std::string::npos) << complaint(spec, shape)

Tensor integers(Shape shape, int64_t value) {
  Tensor t(host_arena(), std::move(shape), DType::i32);
  for (int64_t i = 0; i < t.numel(); ++i) t.set(i, static_cast<double>(value));
  return t;
}
Tensor numbers(Shape shape) { return Tensor::zeros(host_arena(), std::move(shape), DType::f32); }

// Memory that the CPU must not read.
class DeviceLikeArena final : public Arena {
 public:
  bool host() const override { return false; }
  void read(const void*, void*, size_t) const override { ADD_FAILURE() << "read of device memory"; }
  void* allocate(size_t) override { return this; }
  void release(void*, size_t) override {}
  Stats stats() const override { return {}; }
  void reset_peak() override {}
};

TEST(AttentionShape, Errors) {
  const AttentionShape good = shape_of(2, 5, 7);
  EXPECT_NO_THROW(good.check());
  const auto with = [&](auto change) {
    AttentionShape shape = good;
    change(shape);
    return message_of<Error>([&] { shape.check(); });
  };
  EXPECT_FALSE(with([](AttentionShape& s) { s.batch = 0; }).empty());
  EXPECT_FALSE(with([](AttentionShape& s) { s.q_len = -1; }).empty());
  EXPECT_FALSE(with([](AttentionShape& s) { s.head_dim = 0; }).empty());
  EXPECT_FALSE(with([](AttentionShape& s) { s.q_lens = {5, 6}; }).empty());
  EXPECT_FALSE(with([](AttentionShape& s) { s.kv_lens = {7}; }).empty());
  EXPECT_FALSE(with([](AttentionShape& s) { s.q_offsets = {-1, 0}; }).empty());
  EXPECT_NE(with([](AttentionShape& s) { s.n_kv_head = 3; }).find("4 query heads cannot share 3 key heads"),
            std::string::npos);
}

TEST(AttentionSpec, PlainValues) {
  const AttentionShape shape = shape_of(1, 4, 4);
  EXPECT_EQ(complaint({}, shape), "");
  EXPECT_EQ(complaint({.causal = true, .window = 0, .dropout = 0.5}, shape), "");
  EXPECT_COMPLAINT((AttentionSpec{.window = 3}), shape, "needs causal");
  EXPECT_COMPLAINT((AttentionSpec{.causal = true, .window = -2}), shape, "-2");
  EXPECT_COMPLAINT((AttentionSpec{.dropout = 1}), shape, "dropout");
  EXPECT_COMPLAINT((AttentionSpec{.dropout = std::nan("")}), shape, "dropout");
  EXPECT_COMPLAINT((AttentionSpec{.scale = HUGE_VAL}), shape, "scale");
  EXPECT_COMPLAINT((AttentionSpec{.page_size = -1}), shape, "page size");
  EXPECT_COMPLAINT((AttentionSpec{.mask = flex::variables().q}), shape, "mask");
  EXPECT_COMPLAINT((AttentionSpec{.score_mod = flex::causal()}), shape, "score mod");
}

TEST(AttentionSpec, CapturesMustCoverTheShape) {
  const auto [score, b, h, q, kv, n_q, n_kv] = flex::variables();
  const Capture doc("doc", {Axis::b, Axis::pos}, Type::integer), slope("slope", {Axis::h});
  AttentionSpec spec{.mask = flex::document(doc), .score_mod = flex::alibi(slope)};
  EXPECT_COMPLAINT(spec, shape_of(2, 8, 8), "doc[b,pos] has no values");
  spec.bindings.set("doc", integers({2, 8}, 3)).set("slope", numbers({4}));
  EXPECT_EQ(complaint(spec, shape_of(2, 8, 8)), "");
  EXPECT_EQ(complaint(spec, shape_of(1, 3, 8)), "");
  EXPECT_COMPLAINT(spec, shape_of(3, 8, 8), "index b of axis 1 ('b') may be 2 to 2");
  EXPECT_COMPLAINT(spec, shape_of(2, 8, 9), "index kv of axis 2 ('pos') may be 0 to 8");
  EXPECT_COMPLAINT(spec, shape_of(2, 9, 8), "that axis has size 8");
  // Offsets move queries; lengths shorten rows.
  AttentionShape shape = shape_of(2, 4, 8);
  shape.q_offsets = {0, 5};
  EXPECT_COMPLAINT(spec, shape, "index q of axis 2 ('pos') may be 0 to 8");
  shape.q_lens = {4, 3};
  EXPECT_EQ(complaint(spec, shape), "");
  shape.q_offsets = {0, 50};
  shape.kv_lens = {8, 0};  // nothing is computed in the second row
  EXPECT_EQ(complaint(spec, shape), "");
  spec.bindings.set("slope", numbers({3}));
  EXPECT_COMPLAINT(spec, shape, "slope[h]");
}

TEST(AttentionSpec, ComputedIndicesAreBounded) {
  const auto [score, b, h, q, kv, n_q, n_kv] = flex::variables();
  const Capture table("table", {Axis::h, Axis::any});
  AttentionSpec spec{.score_mod = flex::relative_position(table, 6)};
  spec.bindings.set("table", numbers({4, 13}));
  EXPECT_EQ(complaint(spec, shape_of(2, 100, 100)), "");
  spec.bindings.set("table", numbers({4, 12}));
  EXPECT_COMPLAINT(spec, shape_of(2, 100, 100), "may be 0 to 12, but that axis has size 12");
  EXPECT_EQ(complaint(spec, shape_of(2, 6, 100)), "");

  // Negative distances, which a causal mask would hide, count all the same.
  spec.score_mod = score + table(h, q - kv);
  EXPECT_COMPLAINT(spec, shape_of(1, 4, 4), "may be -3 to 3");
  EXPECT_COMPLAINT(spec, shape_of(1, 4, 4), "bound the index with min and max");

  // Through another captured tensor, row by row.
  const Capture bucket("bucket", {Axis::b}, Type::integer);
  spec.score_mod = score + table(h, bucket(b) + n_q);
  Tensor buckets = integers({2}, 2);
  spec.bindings.set("bucket", buckets);
  EXPECT_EQ(complaint(spec, shape_of(2, 9, 9)), "");
  buckets.set(1, 3);
  EXPECT_COMPLAINT(spec, shape_of(2, 9, 9), "may be 12 to 12");
  EXPECT_EQ(complaint(spec, shape_of(1, 9, 9)), "");
}

TEST(AttentionSpec, IntegersAndPositionsFitTheKernels) {
  const auto [score, b, h, q, kv, n_q, n_kv] = flex::variables();
  AttentionSpec spec{.mask = (q * 1000003 + kv) % 7 != 0};
  EXPECT_EQ(complaint(spec, shape_of(1, 2000, 2000)), "");
  EXPECT_COMPLAINT(spec, shape_of(1, 3000, 3000), "beyond 32 bits");
  spec.mask = flex::causal();
  EXPECT_EQ(complaint(spec, shape_of(1, 1, 1 << 24)), "");
  EXPECT_COMPLAINT(spec, shape_of(1, 1, (1 << 24) + 1), "position 16777216");
  EXPECT_EQ(complaint({.causal = true}, shape_of(1, 1, (1 << 24) + 1)), "");

  const Capture big("big", {Axis::kv}, Type::integer);
  Tensor values(host_arena(), {4}, DType::i64);
  for (int64_t i = 0; i < 4; ++i) values.set(i, static_cast<double>(i));
  spec = {.mask = big(kv) == q};
  spec.bindings.set("big", values);
  EXPECT_EQ(complaint(spec, shape_of(1, 4, 4)), "");
  values.set(2, 3e9);
  EXPECT_COMPLAINT(spec, shape_of(1, 4, 4), "beyond 32 bits");
}

TEST(AttentionSpec, WhatDecidesIsReadByTheCpu) {
  const auto [score, b, h, q, kv, n_q, n_kv] = flex::variables();
  static DeviceLikeArena device;
  const Capture gain("gain", {Axis::h}), ids("ids", {Axis::pos}, Type::integer), table("table", {Axis::any});
  AttentionSpec spec{.score_mod = score * gain(h)};
  spec.bindings.set("gain", Tensor(device, {4}, DType::f32));
  const AttentionShape shape = shape_of(1, 4, 4);
  EXPECT_EQ(complaint(spec, shape), "");
  spec.mask = gain(h) < 0.5;
  EXPECT_COMPLAINT(spec, shape, "gain[h] must be in host memory");
  spec.mask.reset();
  spec.score_mod = score * ids(q);
  spec.bindings.set("ids", Tensor(device, {4}, DType::i32));
  EXPECT_COMPLAINT(spec, shape, "ids[pos] must be in host memory");
  spec.score_mod = score + table(where(gain(h) < 0, 0, 1));
  spec.bindings.set("table", numbers({2}));
  EXPECT_COMPLAINT(spec, shape, "an index of table[any] depends on it");
  const Capture trained("gain", {Axis::h}, Type::number, true);
  spec.score_mod = score * gain(h) + trained(h);
  EXPECT_COMPLAINT(spec, shape, "declare it once");
}

TEST(AttentionDropout, BitsArePhiloxWords) {
  const auto words = philox4x32({5, 9, 2, 1}, 77);
  for (uint32_t i = 0; i < 4; ++i) EXPECT_EQ(attention_dropout_bits(77, 1, 2, 9, 20 + i), words[i]);
  EXPECT_NE(attention_dropout_bits(77, 1, 2, 9, 20), attention_dropout_bits(78, 1, 2, 9, 20));
  EXPECT_NE(attention_dropout_bits(77, 1, 2, 9, 20), attention_dropout_bits(77, 2, 1, 9, 20));
}

}  // namespace
}  // namespace flexchat
