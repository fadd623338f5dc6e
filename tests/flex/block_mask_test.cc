// Block masks and linear masks against brute force: the mask evaluated at every element.
#include "flex/block_mask.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "base/rng.h"
#include "flex/eval.h"
#include "flex/linear_mask.h"
#include "flex/mods.h"
#include "flex/parse.h"
#include "flex/program.h"
#include "testing/random_expression.h"

namespace flexchat::flex {
namespace {

Tensor integers(const std::vector<int64_t>& values, Shape shape) {
  return Tensor::from<int64_t>(values, std::move(shape), DType::i32);
}

// 'F' full, 'P' partial, '.' empty.
char listed(const BlockMask& mask, int64_t b, int64_t h, int64_t i, int64_t j) {
  const auto in = [&](std::span<const int32_t> list) {
    EXPECT_TRUE(std::is_sorted(list.begin(), list.end()));
    return std::binary_search(list.begin(), list.end(), static_cast<int32_t>(j));
  };
  const bool full = in(mask.full_blocks(b, h, i)), partial = in(mask.partial_blocks(b, h, i));
  EXPECT_FALSE(full && partial);
  return full ? 'F' : partial ? 'P' : '.';
}

// The same blocks by the mask's linear form, if it has one.
class LinearBlocks {
 public:
  LinearBlocks(const Expr& mask, const Bindings& bindings, const Extent& e)
      : extent_(e), captures_(Program({mask}).captures), linear_(linear_mask(mask, captures_)) {
    for (const Capture& capture : captures_) tensors_.push_back(bindings.at(capture));
  }
  bool exists() const { return linear_.has_value(); }

  char listed(const BlockMask& mask, int64_t b, int64_t h, int64_t i, int64_t j) const {
    const int64_t q = i * mask.block_q, kv = j * mask.block_kv, n_q = extent_.q_len(b),
                  n_kv = extent_.kv_len(b), offset = extent_.q_offset(b);
    if (q >= n_q || kv >= n_kv) return '.';
    const Box box = {offset + q, offset + std::min(n_q, q + mask.block_q) - 1, kv,
                     std::min(n_kv, kv + mask.block_kv) - 1};
    const Truth truth = mask_truth(*linear_, LinearRow{b, h, n_q, n_kv}, box,
                                   [&](const LinearRead& read) { return elements(read, b, h, box); });
    return truth == Truth::never ? '.' : truth == Truth::always ? 'F' : 'P';
  }

 private:
  IntegerRange elements(const LinearRead& read, int64_t b, int64_t h, const Box& box) const {
    const Tensor& x = tensors_[static_cast<size_t>(read.capture)];
    int64_t offset = 0, step = 0, first = 0, last = 0, stride = 1;
    for (int axis = read.n_axes - 1; axis >= 0; --axis) {
      const Var var = read.index[axis];
      if (var == Var::b) offset += b * stride;
      if (var == Var::h) offset += h * stride;
      if (var == Var::q || var == Var::kv) {
        step = stride;
        first = var == Var::q ? box.q_first : box.kv_first;
        last = var == Var::q ? box.q_last : box.kv_last;
      }
      stride *= x.dim(axis);
    }
    const auto at = [&](int64_t i) { return static_cast<int64_t>(x.get(offset + i * step)); };
    IntegerRange all{at(first), at(first)};
    for (int64_t i = first; i <= last; ++i) all = {std::min(all.lo, at(i)), std::max(all.hi, at(i))};
    return all;
  }

  Extent extent_;
  std::vector<Capture> captures_;
  std::vector<Tensor> tensors_;
  std::optional<LinearMask> linear_;
};

struct Tally {
  int64_t blocks = 0, cautious = 0;  // cautious: listed partial although full or empty
  int64_t linear_blocks = 0, linear_cautious = 0;
};

// What the block really holds; 'x' when it has no element at all.
char truth(Evaluator& evaluator, const Extent& e, const BlockMask& mask, int64_t b, int64_t h, int64_t i,
           int64_t j) {
  bool any = false, all = true, exists = false;
  for (int64_t q = i * mask.block_q; q < std::min(e.q_len(b), (i + 1) * mask.block_q); ++q) {
    for (int64_t kv = j * mask.block_kv; kv < std::min(e.kv_len(b), (j + 1) * mask.block_kv); ++kv) {
      const bool allowed = evaluator({0, b, h, e.q_offset(b) + q, kv, e.q_len(b), e.kv_len(b)}) != 0;
      any = any || allowed;
      all = all && allowed;
      exists = true;
    }
  }
  return !exists ? 'x' : !any ? '.' : all ? 'F' : 'P';
}

Tally compare(const Expr& expr, const Bindings& bindings, const Extent& e, int64_t block_q,
              int64_t block_kv) {
  const BlockMask mask = build_block_mask(expr, bindings, e, block_q, block_kv);
  const LinearBlocks linear(expr, bindings, e);
  Evaluator evaluator({expr}, bindings);
  Tally tally;
  for (int64_t b = 0; b < e.n_batch; ++b) {
    for (int64_t h = 0; h < e.n_head; ++h) {
      for (int64_t i = 0; i < mask.n_q_blocks; ++i) {
        for (int64_t j = 0; j < mask.n_kv_blocks; ++j) {
          const char real = truth(evaluator, e, mask, b, h, i, j), said = listed(mask, b, h, i, j);
          ++tally.blocks;
          const bool sound = real == 'x' ? said == '.' : said == real || said == 'P';
          tally.cautious += real != 'x' && said != real;
          EXPECT_TRUE(sound) << to_text(expr) << "\nblock " << i << ", " << j << " of row " << b << ", head "
                             << h << " is listed " << said << " but holds " << real;
          if (!sound) return tally;
          if (!linear.exists()) continue;
          const char linear_said = linear.listed(mask, b, h, i, j);
          ++tally.linear_blocks;
          tally.linear_cautious += real != 'x' && linear_said != real;
          const bool linear_sound =
              real == 'x' ? linear_said == '.' : linear_said == real || linear_said == 'P';
          EXPECT_TRUE(linear_sound) << to_text(expr) << "\nblock " << i << ", " << j << " of row " << b
                                    << ", head " << h << " is " << linear_said << " in linear form but holds "
                                    << real;
          if (!linear_sound) return tally;
        }
      }
    }
  }
  return tally;
}

// Random row lengths and offsets.
Extent random_extent(Rng& rng, int64_t longest) {
  Extent e{.n_batch = 1 + static_cast<int64_t>(rng.below(3)),
           .n_head = 1 + static_cast<int64_t>(rng.below(2)),
           .n_q = static_cast<int64_t>(rng.below(static_cast<uint64_t>(longest))),
           .n_kv = static_cast<int64_t>(rng.below(static_cast<uint64_t>(longest)))};
  const auto draw = [&](std::vector<int64_t>& lengths, int64_t most) {
    if (rng.below(2) == 0) return;
    for (int64_t b = 0; b < e.n_batch; ++b)
      lengths.push_back(static_cast<int64_t>(rng.below(static_cast<uint64_t>(most + 1))));
  };
  draw(e.q_lens, e.n_q);
  draw(e.kv_lens, e.n_kv);
  draw(e.q_offsets, longest);
  return e;
}

TEST(BlockMask, AgreesWithBruteForceOnRandomExpressions) {
  constexpr int64_t longest = 24, positions = 2 * longest;
  const std::vector<Capture> captures = {Capture("doc", {Axis::b, Axis::pos}, Type::integer),
                                         Capture("len", {Axis::b}, Type::integer),
                                         Capture("shift", {Axis::h}, Type::integer),
                                         Capture("bias", {Axis::q, Axis::kv}), Capture("gain", {Axis::pos})};
  RandomExpressions random(1, captures, false);
  Rng& rng = random.rng();
  Tally total;
  for (int round = 0; round < 12000; ++round) {
    const Extent e = random_extent(rng, longest);
    std::vector<int64_t> doc, len, shift;
    std::vector<double> bias, gain;
    for (int64_t i = 0; i < e.n_batch * positions; ++i) doc.push_back(static_cast<int64_t>(rng.below(4)));
    for (int64_t i = 0; i < e.n_batch; ++i) len.push_back(static_cast<int64_t>(rng.below(longest)));
    for (int64_t i = 0; i < e.n_head; ++i) shift.push_back(static_cast<int64_t>(rng.below(9)) - 4);
    for (int64_t i = 0; i < positions * longest; ++i) bias.push_back(rng.normal());
    for (int64_t i = 0; i < positions; ++i) gain.push_back(rng.normal());
    Bindings bindings;
    bindings.set("doc", integers(doc, {e.n_batch, positions}))
        .set("len", integers(len, {e.n_batch}))
        .set("shift", integers(shift, {e.n_head}))
        .set("bias", Tensor::from<double>(bias, {positions, longest}, DType::f32))
        .set("gain", Tensor::from<double>(gain, {positions}, DType::f64));
    const Expr mask = random.boolean(1 + static_cast<int>(rng.below(4)));
    const Tally tally = compare(mask, bindings, e, 1 + static_cast<int64_t>(rng.below(9)),
                                1 + static_cast<int64_t>(rng.below(9)));
    total.blocks += tally.blocks;
    total.cautious += tally.cautious;
    total.linear_blocks += tally.linear_blocks;
    total.linear_cautious += tally.linear_cautious;
    if (HasFailure()) FAIL() << "round " << round;
  }
  // The analysis must not buy its soundness with "mixed" everywhere.
  EXPECT_LT(static_cast<double>(total.cautious), 0.2 * static_cast<double>(total.blocks));
  EXPECT_GT(total.linear_blocks, total.blocks / 5);
  EXPECT_LT(static_cast<double>(total.linear_cautious), 0.2 * static_cast<double>(total.linear_blocks));
  RecordProperty("cautious", std::to_string(total.cautious) + " of " + std::to_string(total.blocks));
}

TEST(BlockMask, IsExactForNamedMasks) {
  constexpr int64_t longest = 40, positions = 2 * longest;
  const Capture doc("doc", {Axis::b, Axis::pos}, Type::integer), len("len", {Axis::b}, Type::integer);
  Rng rng(2);
  for (int round = 0; round < 400; ++round) {
    const Extent e = random_extent(rng, longest);
    std::vector<int64_t> ids, lengths;
    for (int64_t b = 0; b < e.n_batch; ++b) {
      int64_t id = 0;
      for (int64_t i = 0; i < positions; ++i)
        ids.push_back(id += rng.below(6) == 0 ? 1 + static_cast<int64_t>(rng.below(2)) : 0);
      lengths.push_back(static_cast<int64_t>(rng.below(longest)));
    }
    Bindings bindings;
    bindings.set("doc", integers(ids, {e.n_batch, positions})).set("len", integers(lengths, {e.n_batch}));
    const auto w = 1 + static_cast<int64_t>(rng.below(20));
    const auto [score, b, h, q, kv, n_q, n_kv] = variables();
    for (const Expr& mask :
         {causal(), causal() && window(w), abs(q - kv) < w, document(doc), causal() && document(doc),
          causal() && window(w) && document(doc), prefix_lm(len), padding(len), causal() && padding(len),
          causal() && sink(w), floor_div(q, w) == floor_div(kv, w), Expr(true), Expr(false)}) {
      const Tally tally = compare(mask, bindings, e, 1 + static_cast<int64_t>(rng.below(9)),
                                  1 + static_cast<int64_t>(rng.below(9)));
      ASSERT_FALSE(HasFailure());
      EXPECT_EQ(tally.cautious, 0) << to_text(mask);
      const bool divides = to_text(mask).find("//") != std::string::npos;
      EXPECT_EQ(tally.linear_blocks, divides ? 0 : tally.blocks) << to_text(mask);
      EXPECT_EQ(tally.linear_cautious, 0) << to_text(mask);
    }
  }
}

TEST(BlockMask, SharesRowsThatCannotDiffer) {
  const Capture shift("shift", {Axis::h}, Type::integer);
  Extent e{.n_batch = 4, .n_head = 8, .n_q = 100, .n_kv = 100};
  BlockMask mask = build_block_mask(causal(), {}, e, 32, 32);
  EXPECT_EQ(mask.n_batch, 1);
  EXPECT_EQ(mask.n_head, 1);
  EXPECT_EQ(mask.full.row(mask.row(3, 7, 2)).size(), 2u);
  mask = build_block_mask(variables().q + shift(variables().h) < 50,
                          Bindings().set("shift", integers(std::vector<int64_t>(8, 3), {8})), e, 32, 32);
  EXPECT_EQ(mask.n_batch, 1);
  EXPECT_EQ(mask.n_head, 8);
  e.kv_lens = {100, 100, 100, 99};
  EXPECT_EQ(build_block_mask(causal(), {}, e, 32, 32).n_batch, 4);
  e.kv_lens = {99, 99, 99, 99};
  EXPECT_EQ(build_block_mask(causal(), {}, e, 32, 32).n_batch, 1);
}

TEST(BlockMask, DecodeReadsLogicalPositions) {
  // One query at position 300 of a window of 128 over 301 keys: keys 173 to 300.
  const Extent e{.n_q = 1, .n_kv = 301, .q_offsets = {300}};
  const BlockMask mask = build_block_mask(causal() && window(128), {}, e, 16, 64);
  EXPECT_EQ(std::vector<int32_t>(mask.full_blocks(0, 0, 0).begin(), mask.full_blocks(0, 0, 0).end()),
            (std::vector<int32_t>{3, 4}));
  EXPECT_EQ(std::vector<int32_t>(mask.partial_blocks(0, 0, 0).begin(), mask.partial_blocks(0, 0, 0).end()),
            (std::vector<int32_t>{2}));
  EXPECT_DOUBLE_EQ(mask.visited_share(), 3.0 / 5.0);
}

TEST(BlockMask, TransposedListsTheSamePairs) {
  const Extent e{.n_batch = 2, .n_head = 1, .n_q = 70, .n_kv = 90, .q_offsets = {0, 20}};
  const BlockMask mask = build_block_mask(causal() && window(30), {}, e, 8, 16), other = mask.transposed();
  ASSERT_EQ(other.n_q_blocks, mask.n_kv_blocks);
  for (int64_t b = 0; b < 2; ++b) {
    for (int64_t i = 0; i < mask.n_q_blocks; ++i) {
      for (int64_t j = 0; j < mask.n_kv_blocks; ++j)
        EXPECT_EQ(listed(mask, b, 0, i, j), listed(other, b, 0, j, i));
    }
  }
  EXPECT_EQ(other.full.count() + other.partial.count(), mask.full.count() + mask.partial.count());
}

void expect_error(const std::string& part, const Expr& mask, const Bindings& bindings, const Extent& e,
                  int64_t block = 16) {
  try {
    build_block_mask(mask, bindings, e, block, block);
    FAIL() << "expected an error with: " << part;
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
  }
}

TEST(BlockMask, RefusesBadInput) {
  const Capture doc("doc", {Axis::pos}, Type::integer);
  const Extent e{.n_batch = 2, .n_q = 32, .n_kv = 32};
  const Tensor short_ids = integers(std::vector<int64_t>(20, 0), {20});
  expect_error("doc[pos]: the index of axis 1 may be 0 to 31, outside [0, 20)", document(doc),
               Bindings().set("doc", short_ids), e);
  expect_error("doc[pos] has no values", document(doc), {}, e);
  expect_error("needs 1 axes, but its values have 2", document(doc),
               Bindings().set("doc", short_ids.reshape({4, 5})), e);
  expect_error("holds integers, but its values are f32", document(doc),
               Bindings().set("doc", Tensor::from<double>(std::vector<double>(32, 0.0), {32}, DType::f32)),
               e);
  expect_error("must not read score", variables().score < 1, {}, e);
  expect_error("a mask must be a condition", variables().q, {}, e);
  expect_error("at least 1 of each", causal(), {}, e, 0);
  Extent bad = e;
  bad.kv_lens = {32, 33};
  expect_error("kv_lens[1] is 33; allowed are 0 to 32", causal(), {}, bad);
  bad.kv_lens = {32};
  expect_error("kv_lens has 1 entries for a batch of 2", causal(), {}, bad);
}

TEST(BlockMask, AgreesWithItsLinearFormOnALongSequence) {
  constexpr int64_t t = 16384;
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < t; ++i) ids.push_back(i / 700);
  const Capture doc("doc", {Axis::b, Axis::pos}, Type::integer);
  const Bindings bindings = Bindings().set("doc", integers(ids, {1, t}));
  const Expr mask = causal() && window(1024) && document(doc);
  const Extent e{.n_q = t, .n_kv = t};
  const BlockMask built = build_block_mask(mask, bindings, e, 128, 64);
  const LinearBlocks linear(mask, bindings, e);
  ASSERT_TRUE(linear.exists());
  for (int64_t i = 0; i < built.n_q_blocks; ++i) {
    for (int64_t j = 0; j < built.n_kv_blocks; ++j)
      ASSERT_EQ(linear.listed(built, 0, 0, i, j), listed(built, 0, 0, i, j)) << "block " << i << ", " << j;
  }
}

}  // namespace
}  // namespace flexchat::flex
