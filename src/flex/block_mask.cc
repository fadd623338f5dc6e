// Quadtree construction of block masks.
//
// A mask is mostly a conjunction, and most regions are mixed because of one of its terms. So terms are
// bounded one by one, and those that hold in a whole region are not asked again in its parts.
#include "flex/block_mask.h"

#include <algorithm>
#include <bit>

#include "base/error.h"
#include "flex/interval.h"

namespace flexchat::flex {
namespace {

enum State : uint8_t { empty = 0, full_block = 1, partial_block = 2 };

// Query blocks classified together. Bounds the scratch memory to this many rows of blocks.
constexpr int64_t stripe = 64;

// Terms of a conjunction that are bounded one by one.
constexpr size_t max_terms = 64;

// What `mask` is the conjunction of.
std::vector<Expr> split_terms(const Expr& mask) {
  std::vector<Expr> terms = {mask};
  for (size_t i = 0; i < terms.size();) {
    const Expr term = terms[i];
    if (term.node().op != Op::logical_and || terms.size() == max_terms) {
      ++i;
      continue;
    }
    terms[i] = term.node().args[0];
    terms.push_back(term.node().args[1]);
  }
  return terms;
}

int64_t blocks_of(int64_t positions, int64_t block) { return (positions + block - 1) / block; }

// A rectangle of blocks.
struct Region {
  int64_t i, n_i, j, n_j;  // query blocks [i, i + n_i), key blocks [j, j + n_j)
};

// Classifies the blocks of one (b, h), a stripe at a time.
class RowClassifier {
 public:
  RowClassifier(std::vector<IntervalAnalysis>& terms, const Extent& extent, int64_t b, const BlockMask& mask)
      : terms_(terms),
        q_offset_(extent.q_offset(b)),
        q_len_(extent.q_len(b)),
        kv_len_(extent.kv_len(b)),
        block_q_(mask.block_q),
        block_kv_(mask.block_kv),
        pitch_(mask.n_kv_blocks) {}

  // states: (n_i, n_kv_blocks), for query blocks [i, i + n_i).
  void classify(int64_t i, int64_t n_i, std::vector<uint8_t>& states) {
    first_i_ = i;
    states_ = states.data();
    std::fill_n(states_, n_i * pitch_, uint8_t{empty});
    const int64_t existing_i = std::min(n_i, blocks_of(q_len_, block_q_) - i);
    const int64_t existing_j = blocks_of(kv_len_, block_kv_);
    if (existing_i > 0 && existing_j > 0) descend({i, existing_i, 0, existing_j}, all_terms());
  }

 private:
  Box positions(const Region& r) const {
    return {q_offset_ + r.i * block_q_, q_offset_ + std::min(q_len_, (r.i + r.n_i) * block_q_) - 1,
            r.j * block_kv_, std::min(kv_len_, (r.j + r.n_j) * block_kv_) - 1};
  }

  void fill(const Region& r, State state) {
    for (int64_t i = r.i; i < r.i + r.n_i; ++i) {
      std::fill_n(states_ + (i - first_i_) * pitch_ + r.j, r.n_j, uint8_t{state});
    }
  }

  uint64_t all_terms() const { return ~uint64_t{0} >> (max_terms - terms_.size()); }

  // open: one bit for each term that has not been found to hold in all of a region around r.
  void descend(const Region& r, uint64_t open) {
    const Box box = positions(r);
    for (uint64_t left = open; left != 0; left &= left - 1) {
      const uint64_t lowest = left & (~left + 1);
      const Truth truth = terms_[static_cast<size_t>(std::countr_zero(left))].truth(box);
      if (truth == Truth::never) return;
      if (truth == Truth::always) open &= ~lowest;
    }
    if (open == 0) return fill(r, full_block);
    if (r.n_i == 1 && r.n_j == 1) return fill(r, partial_block);
    // Halve the sides, but leave a side alone that is much shorter, so that pieces become square.
    const bool cut_i = r.n_i > 1 && 2 * r.n_i > r.n_j, cut_j = r.n_j > 1 && 2 * r.n_j > r.n_i;
    const int64_t half_i = cut_i ? r.n_i / 2 : r.n_i, half_j = cut_j ? r.n_j / 2 : r.n_j;
    descend({r.i, half_i, r.j, half_j}, open);
    if (cut_j) descend({r.i, half_i, r.j + half_j, r.n_j - half_j}, open);
    if (!cut_i) return;
    descend({r.i + half_i, r.n_i - half_i, r.j, half_j}, open);
    if (cut_j) descend({r.i + half_i, r.n_i - half_i, r.j + half_j, r.n_j - half_j}, open);
  }

  std::vector<IntervalAnalysis>& terms_;
  int64_t q_offset_, q_len_, kv_len_, block_q_, block_kv_, pitch_;
  int64_t first_i_ = 0;
  uint8_t* states_ = nullptr;
};

void append_row(const uint8_t* states, int64_t n, BlockMask& mask) {
  for (int64_t j = 0; j < n; ++j) {
    if (states[j] == full_block) mask.full.blocks.push_back(static_cast<int32_t>(j));
    if (states[j] == partial_block) mask.partial.blocks.push_back(static_cast<int32_t>(j));
  }
  mask.full.begin.push_back(mask.full.count());
  mask.partial.begin.push_back(mask.partial.count());
}

// lists: `groups` groups of n_rows lists of numbers below n_columns.
BlockLists transpose(const BlockLists& lists, int64_t groups, int64_t n_rows, int64_t n_columns) {
  BlockLists result;
  result.begin.assign(static_cast<size_t>(groups * n_columns + 1), 0);
  result.blocks.resize(lists.blocks.size());
  const auto for_each = [&](const auto& visit) {
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t i = 0; i < n_rows; ++i) {
        for (const int32_t j : lists.row(g * n_rows + i)) visit(static_cast<size_t>(g * n_columns + j), i);
      }
    }
  };
  for_each([&](size_t column, int64_t) { ++result.begin[column + 1]; });
  for (size_t c = 1; c < result.begin.size(); ++c) result.begin[c] += result.begin[c - 1];
  std::vector<int64_t> next(result.begin.begin(), result.begin.end() - 1);
  for_each([&](size_t column, int64_t i) {
    result.blocks[static_cast<size_t>(next[column]++)] = static_cast<int32_t>(i);
  });
  return result;
}

void check_lengths(const char* name, const std::vector<int64_t>& lengths, int64_t n_batch, int64_t least,
                   int64_t most) {
  if (lengths.empty()) return;
  check(static_cast<int64_t>(lengths.size()) == n_batch, "{} has {} entries for a batch of {}", name,
        lengths.size(), n_batch);
  for (size_t b = 0; b < lengths.size(); ++b) {
    check(lengths[b] >= least && lengths[b] <= most, "{}[{}] is {}; allowed are {} to {}", name, b,
          lengths[b], least, most);
  }
}

}  // namespace

void Extent::check() const {
  constexpr int64_t most = 2147483647;
  flexchat::check(n_batch >= 1 && n_head >= 1, "a batch of {} rows and {} heads; at least 1 of each", n_batch,
                  n_head);
  flexchat::check(n_q >= 0 && n_q <= most && n_kv >= 0 && n_kv <= most,
                  "{} queries and {} keys; allowed are 0 to {}", n_q, n_kv, most);
  check_lengths("q_lens", q_lens, n_batch, 0, n_q);
  check_lengths("kv_lens", kv_lens, n_batch, 0, n_kv);
  check_lengths("q_offsets", q_offsets, n_batch, 0, most - n_q);
}

bool Extent::uniform() const {
  const auto equal = [](const std::vector<int64_t>& v) {
    return std::all_of(v.begin(), v.end(), [&](int64_t x) { return x == v.front(); });
  };
  return equal(q_lens) && equal(kv_lens) && equal(q_offsets);
}

double BlockMask::visited_share() const {
  if (n_blocks() == 0) return 0;
  return static_cast<double>(full.count() + partial.count()) / static_cast<double>(n_blocks());
}

BlockMask BlockMask::transposed() const {
  BlockMask result = *this;
  std::swap(result.block_q, result.block_kv);
  std::swap(result.n_q_blocks, result.n_kv_blocks);
  result.full = transpose(full, n_batch * n_head, n_q_blocks, n_kv_blocks);
  result.partial = transpose(partial, n_batch * n_head, n_q_blocks, n_kv_blocks);
  return result;
}

BlockMask build_block_mask(const Expr& mask, const Bindings& bindings, const Extent& extent, int64_t block_q,
                           int64_t block_kv) {
  check_mask(mask);
  extent.check();
  check(block_q >= 1 && block_kv >= 1, "a block of {} queries x {} keys; at least 1 of each", block_q,
        block_kv);

  BlockMask result;
  result.block_q = block_q;
  result.block_kv = block_kv;
  result.n_q_blocks = blocks_of(extent.n_q, block_q);
  result.n_kv_blocks = blocks_of(extent.n_kv, block_kv);
  result.n_batch = mask.uses(Var::b) || !extent.uniform() ? extent.n_batch : 1;
  result.n_head = mask.uses(Var::h) ? extent.n_head : 1;

  std::vector<IntervalAnalysis> terms;
  for (const Expr& term : split_terms(mask)) terms.emplace_back(term, bindings);
  std::vector<uint8_t> states(static_cast<size_t>(std::min(stripe, result.n_q_blocks) * result.n_kv_blocks));
  for (int64_t b = 0; b < result.n_batch; ++b) {
    for (int64_t h = 0; h < result.n_head; ++h) {
      for (IntervalAnalysis& term : terms) term.set_row(b, h, extent.q_len(b), extent.kv_len(b));
      RowClassifier classifier(terms, extent, b, result);
      for (int64_t i = 0; i < result.n_q_blocks; i += stripe) {
        const int64_t n_i = std::min(stripe, result.n_q_blocks - i);
        classifier.classify(i, n_i, states);
        for (int64_t r = 0; r < n_i; ++r)
          append_row(states.data() + r * result.n_kv_blocks, result.n_kv_blocks, result);
      }
    }
  }
  return result;
}

}  // namespace flexchat::flex
