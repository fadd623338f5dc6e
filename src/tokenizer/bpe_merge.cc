// Positions and neighbours live in flat arrays; a step touches only the occurrences of the pair it merges.
#include "tokenizer/bpe_merge.h"

#include <algorithm>
#include <limits>
#include <memory>

#include "base/error.h"
#include "tokenizer/piece_key.h"

namespace flexchat {
namespace {

constexpr uint32_t kBoundary = std::numeric_limits<uint32_t>::max();  // between two pieces
constexpr uint32_t kInside = kBoundary - 1;                           // where a merged-away token began

// Memory for position lists, which live until the end.
class PositionStore {
 public:
  uint32_t* take(size_t n) {
    if (n > left_) {
      left_ = std::max(n, size_t{1} << 20);
      blocks_.push_back(std::make_unique_for_overwrite<uint32_t[]>(left_));
      next_ = blocks_.back().get();
    }
    uint32_t* const out = next_;
    next_ += n;
    left_ -= n;
    return out;
  }

 private:
  std::vector<std::unique_ptr<uint32_t[]>> blocks_;
  uint32_t* next_ = nullptr;
  size_t left_ = 0;
};

uint64_t pair_key(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) << 32 | b; }

// Pair -> index, open addressing.
class PairIndex {
 public:
  PairIndex() : slots_(size_t{1} << 16) {}
  static constexpr uint32_t kNone = std::numeric_limits<uint32_t>::max();

  uint32_t find(uint64_t key) const {
    for (size_t i = home(key);; i = (i + 1) & (slots_.size() - 1)) {
      if (slots_[i].index == kNone || slots_[i].key == key) return slots_[i].index;
    }
  }
  void insert(uint64_t key, uint32_t index) {  // key must be absent
    if (++n_ * 2 > slots_.size()) {
      std::vector<Slot> old(slots_.size() * 2);
      std::swap(old, slots_);
      for (const Slot& slot : old) {
        if (slot.index != kNone) place(slot);
      }
    }
    place({key, index});
  }

 private:
  struct Slot {
    uint64_t key = 0;
    uint32_t index = kNone;
  };
  size_t home(uint64_t key) const { return hash_words(key, 0) & (slots_.size() - 1); }
  void place(const Slot& slot) {
    size_t i = home(slot.key);
    while (slots_[i].index != kNone) i = (i + 1) & (slots_.size() - 1);
    slots_[i] = slot;
  }
  std::vector<Slot> slots_;
  size_t n_ = 0;
};

// What a step finds on one side of the pair it merges: the neighbouring ids, how much the pairs with them
// weigh, and where those new pairs stand.
class Neighbours {
 public:
  struct Sum {
    int64_t weight = 0;
    uint32_t n = 0;
    uint32_t* positions = nullptr;
  };

  void add_id() { by_id_.emplace_back(); }
  void add(uint32_t id, uint32_t position, int64_t weight) {
    Sum& sum = by_id_[id];
    if (sum.n++ == 0) ids_.push_back(id);
    sum.weight += weight;
    found_.emplace_back(id, position);
  }
  // fn(id, sum) for each neighbour, in the order they were met.
  template <class Fn>
  void for_each(const Fn& fn) const {
    for (const uint32_t id : ids_) fn(id, by_id_[id]);
  }
  // Writes each neighbour's positions, in the order they were added, to memory from `store`.
  void write_positions(PositionStore& store) {
    for (const uint32_t id : ids_) by_id_[id].positions = store.take(by_id_[id].n) + by_id_[id].n;
    for (size_t i = found_.size(); i-- > 0;) *--by_id_[found_[i].first].positions = found_[i].second;
  }
  void clear() {
    for (const uint32_t id : ids_) by_id_[id] = {};
    ids_.clear();
    found_.clear();
  }

 private:
  std::vector<Sum> by_id_;
  std::vector<uint32_t> ids_;
  std::vector<std::pair<uint32_t, uint32_t>> found_;  // (neighbour, position of the new pair)
};

class Merger {
 public:
  explicit Merger(const PieceCounter& pieces);
  bool step(Merge& merge);  // false: no pair is left

 private:
  // One for each byte of each piece, and one boundary around pieces. A token of n bytes holds its id in the
  // first and in the last of its n cells, so that both neighbours of a token are found from the ids' lengths.
  struct Cell {
    uint32_t id, piece;
  };
  struct Pair {
    int64_t count;
    const uint32_t* positions;  // of the first token; ascending; some may have been merged away since
    uint32_t n_positions;
  };
  struct Candidate {
    int64_t count;
    uint64_t key;
    uint32_t index;
    bool operator<(const Candidate& other) const {  // the best is the largest, as heaps have it
      return count != other.count ? count < other.count : key > other.key;
    }
  };

  void add_byte_pairs();
  void add_pair(uint64_t key, const Neighbours::Sum& sum);
  void lower(uint64_t key, int64_t weight) { pairs_[index_.find(key)].count -= weight; }
  void replace(const Pair& pair, uint32_t a, uint32_t b, uint32_t c);

  std::vector<Cell> cells_;
  std::vector<int64_t> piece_count_;
  std::vector<uint32_t> length_;  // bytes of each id
  std::vector<Pair> pairs_;
  PairIndex index_;
  PositionStore store_;
  std::vector<Candidate> heap_;
  Neighbours left_, right_;
};

Merger::Merger(const PieceCounter& pieces) : length_(256, 1) {
  size_t cells = 1;
  pieces.for_each([&](std::string_view piece, int64_t) { cells += piece.size() + 1; });
  if (cells >= kInside) {
    fail_run("the distinct pieces of the training text hold {} bytes; the limit is 4 GiB (lower --max-chars)",
             cells);
  }
  cells_.reserve(cells);
  piece_count_.reserve(static_cast<size_t>(pieces.distinct()));
  cells_.push_back({kBoundary, 0});
  pieces.for_each([&](std::string_view piece, int64_t count) {
    const auto number = static_cast<uint32_t>(piece_count_.size());
    for (const char byte : piece) cells_.push_back({static_cast<unsigned char>(byte), number});
    cells_.push_back({kBoundary, 0});
    piece_count_.push_back(count);
  });
  for (int id = 0; id < 256; ++id) {
    left_.add_id();
    right_.add_id();
  }
  add_byte_pairs();
}

void Merger::add_byte_pairs() {
  std::vector<Neighbours::Sum> sums(size_t{256} * 256);
  const auto each_pair = [&](const auto& fn) {
    for (size_t i = 1; i + 1 < cells_.size(); ++i) {
      if (cells_[i].id < 256 && cells_[i + 1].id < 256) fn(i, sums[cells_[i].id * 256 + cells_[i + 1].id]);
    }
  };
  each_pair([&](size_t i, Neighbours::Sum& sum) {
    sum.weight += piece_count_[cells_[i].piece];
    ++sum.n;
  });
  std::vector<uint32_t*> starts(sums.size());
  for (Neighbours::Sum& sum : sums) {
    if (sum.n > 0) starts[static_cast<size_t>(&sum - sums.data())] = sum.positions = store_.take(sum.n);
  }
  each_pair([](size_t i, Neighbours::Sum& sum) { *sum.positions++ = static_cast<uint32_t>(i); });
  for (uint32_t pair = 0; pair < sums.size(); ++pair) {
    sums[pair].positions = starts[pair];
    if (sums[pair].n > 0) add_pair(pair_key(pair / 256, pair % 256), sums[pair]);
  }
}

void Merger::add_pair(uint64_t key, const Neighbours::Sum& sum) {
  const auto index = static_cast<uint32_t>(pairs_.size());
  pairs_.push_back({sum.weight, sum.positions, sum.n});
  index_.insert(key, index);
  heap_.push_back({sum.weight, key, index});
  std::push_heap(heap_.begin(), heap_.end());
}

bool Merger::step(Merge& merge) {
  while (!heap_.empty()) {
    std::pop_heap(heap_.begin(), heap_.end());
    Candidate& best = heap_.back();
    const int64_t count = pairs_[best.index].count;
    if (count != best.count) {  // it fell since it was pushed
      best.count = count;
      if (count > 0) {
        std::push_heap(heap_.begin(), heap_.end());
      } else {
        heap_.pop_back();
      }
      continue;
    }
    const auto a = static_cast<uint32_t>(best.key >> 32), b = static_cast<uint32_t>(best.key);
    const uint32_t index = best.index;
    heap_.pop_back();
    const auto c = static_cast<uint32_t>(length_.size());
    length_.push_back(length_[a] + length_[b]);
    left_.add_id();
    right_.add_id();
    replace(pairs_[index], a, b, c);
    // New pairs first: within one step a new pair may arise and fall again ("abab": (c,a), then (c,c)).
    left_.write_positions(store_);
    right_.write_positions(store_);
    left_.for_each([&](uint32_t l, const Neighbours::Sum& sum) { add_pair(pair_key(l, c), sum); });
    right_.for_each([&](uint32_t r, const Neighbours::Sum& sum) { add_pair(pair_key(c, r), sum); });
    left_.for_each([&](uint32_t l, const Neighbours::Sum& sum) { lower(pair_key(l, a), sum.weight); });
    right_.for_each([&](uint32_t r, const Neighbours::Sum& sum) { lower(pair_key(b, r), sum.weight); });
    left_.clear();
    right_.clear();
    pairs_[index].count = 0;
    merge = {static_cast<int32_t>(a), static_cast<int32_t>(b)};
    return true;
  }
  return false;
}

void Merger::replace(const Pair& pair, uint32_t a, uint32_t b, uint32_t c) {
  const uint32_t length_a = length_[a], length_b = length_[b];
  for (uint32_t i = 0; i < pair.n_positions; ++i) {
    const uint32_t p = pair.positions[i], q = p + length_a;
    if (cells_[p].id != a || cells_[q].id != b) continue;
    const uint32_t last = q + length_b - 1;
    const uint32_t l = cells_[p - 1].id, r = cells_[last + 1].id;
    const int64_t weight = piece_count_[cells_[p].piece];
    if (l != kBoundary) left_.add(l, p - length_[l], weight);
    if (r != kBoundary) right_.add(r, p, weight);
    cells_[q].id = kInside;
    cells_[p].id = cells_[last].id = c;
  }
}

}  // namespace

std::vector<Merge> find_merges(const PieceCounter& pieces, int64_t n_merges,
                               const std::function<void(int64_t)>& on_merge) {
  Merger merger(pieces);
  std::vector<Merge> merges;
  for (Merge merge; static_cast<int64_t>(merges.size()) < n_merges && merger.step(merge);) {
    merges.push_back(merge);
    if (on_merge) on_merge(static_cast<int64_t>(merges.size()));
  }
  return merges;
}

}  // namespace flexchat
