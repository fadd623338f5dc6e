// Building the lookup tables, and merging pieces that are neither tokens nor cached.
#include "tokenizer/bpe_encoder.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <utility>

#include "base/error.h"

namespace flexchat {
namespace {

constexpr size_t kCacheSlots = size_t{1} << 14;  // of 64 bytes: 1 MiB a thread
constexpr size_t kLongPiece = 64;                // bytes from which a heap beats scanning all parts
constexpr uint32_t kNone = std::numeric_limits<uint32_t>::max();

// Slots for n entries at no more than half full.
size_t table_size(size_t n) {
  size_t size = 16;
  while (size < 2 * n) size *= 2;
  return size;
}

std::string hex(std::string_view bytes) {
  std::string out;
  for (const char c : bytes.substr(0, 32)) out += fmt::format("{:02x}", static_cast<unsigned char>(c));
  return bytes.size() > 32 ? out + "..." : out;
}

}  // namespace

BpeEncoder::Scratch::Scratch() : cache_(kCacheSlots) {}

void BpeEncoder::Scratch::grow(size_t n) {
  const size_t capacity = std::max({n_ids_ + n, 2 * capacity_, size_t{1} << 12});
  auto grown = std::make_unique_for_overwrite<int32_t[]>(capacity);
  std::copy_n(ids_.get(), n_ids_, grown.get());
  ids_ = std::move(grown);
  capacity_ = capacity;
}

BpeEncoder::BpeEncoder(std::vector<std::string> tokens) : tokens_(std::move(tokens)) {
  check(tokens_.size() < static_cast<size_t>(kNoRank), "{} tokens; the limit is {}", tokens_.size(), kNoRank);
  index_tokens();
  for (int byte = 0; byte < 256; ++byte) {
    const char c = static_cast<char>(byte);
    byte_id_[byte] = find({&c, 1});
    check(byte_id_[byte] >= 0, "no token for the single byte {:02x}; all 256 bytes need one", byte);
  }
  index_pairs();
}

int32_t BpeEncoder::find(std::string_view bytes) const {
  if (bytes.size() > kMaxKeyBytes) return find_long(bytes, hash_long_piece(bytes));
  const PieceKey key = make_piece_key(bytes, bytes.data() + bytes.size());
  return find_short(key, hash_key(key));
}

int32_t BpeEncoder::find_long(std::string_view bytes, uint64_t hash) const {
  for (size_t i = hash & (long_.size() - 1);; i = (i + 1) & (long_.size() - 1)) {
    if (long_[i] < 0 || tokens_[static_cast<size_t>(long_[i])] == bytes) return long_[i];
  }
}

void BpeEncoder::index_tokens() {
  const auto n_long = std::count_if(tokens_.begin(), tokens_.end(),
                                    [](const std::string& token) { return token.size() > kMaxKeyBytes; });
  short_.resize(table_size(tokens_.size() - static_cast<size_t>(n_long)));
  long_.assign(table_size(static_cast<size_t>(n_long)), -1);
  short_mask_ = short_.size() - 1;
  for (size_t k = 0; k < tokens_.size(); ++k) {
    const std::string& token = tokens_[k];
    const auto id = static_cast<int32_t>(k);
    check(!token.empty(), "token {} is empty", id);
    check(find(token) < 0, "tokens {} and {} are the same bytes {}", find(token), id, hex(token));
    if (token.size() > kMaxKeyBytes) {
      size_t i = hash_long_piece(token) & (long_.size() - 1);
      while (long_[i] >= 0) i = (i + 1) & (long_.size() - 1);
      long_[i] = id;
    } else {
      const PieceKey key = make_piece_key(token, token.data() + token.size());
      size_t i = hash_key(key) & short_mask_;
      while (short_[i].id >= 0) i = (i + 1) & short_mask_;
      short_[i] = {key, id};
    }
  }
}

// Merging looks up bytes, so every way to cut a token into two tokens counts, not only the way it was
// trained.
void BpeEncoder::index_pairs() {
  std::vector<Pair> found;
  for (size_t id = 0; id < tokens_.size(); ++id) {
    const std::string_view token = tokens_[id];
    for (size_t cut = 1; cut < token.size(); ++cut) {
      const int32_t a = find(token.substr(0, cut));
      if (a < 0) continue;
      const int32_t b = find(token.substr(cut));
      if (b < 0) continue;
      found.push_back({static_cast<uint64_t>(a) << 32 | static_cast<uint64_t>(b), static_cast<int32_t>(id)});
    }
  }
  pairs_.resize(table_size(found.size()));
  pair_mask_ = pairs_.size() - 1;
  for (const Pair& pair : found) {
    size_t i = hash_words(pair.key, 0) & pair_mask_;
    while (pairs_[i].id >= 0) i = (i + 1) & pair_mask_;
    pairs_[i] = pair;
  }
}

size_t BpeEncoder::encode_short(std::string_view piece, const PieceKey& key, uint64_t hash, Scratch& scratch,
                                int32_t* out) const {
  Scratch::Cached& cached = scratch.cache_[(hash >> 32) & (kCacheSlots - 1)];
  if (cached.key == key) {
    std::copy_n(cached.ids, Scratch::Cached::kMaxIds, out);
    return cached.n_ids;
  }
  const size_t n = merge(piece, out);
  if (n <= Scratch::Cached::kMaxIds) {
    cached.key = key;
    cached.n_ids = static_cast<uint32_t>(n);
    std::copy_n(out, n, cached.ids);
  }
  return n;
}

size_t BpeEncoder::encode_long(std::string_view piece, Scratch& scratch, int32_t* out) const {
  const int32_t id = find_long(piece, hash_long_piece(piece));
  if (id >= 0) {
    *out = id;
    return 1;
  }
  return piece.size() < kLongPiece ? merge(piece, out) : merge_long(piece, scratch, out);
}

size_t BpeEncoder::merge(std::string_view piece, int32_t* out) const {
  int32_t ranks[kLongPiece];
  size_t n = piece.size();
  for (size_t i = 0; i < n; ++i) out[i] = byte_id_[static_cast<unsigned char>(piece[i])];
  for (size_t i = 0; i + 1 < n; ++i) ranks[i] = pair_rank(out[i], out[i + 1]);
  while (n > 1) {
    size_t best = 0;
    for (size_t i = 1; i + 1 < n; ++i) best = ranks[i] < ranks[best] ? i : best;
    if (ranks[best] == kNoRank) break;
    out[best] = ranks[best];
    --n;
    std::copy(out + best + 2, out + n + 1, out + best + 1);
    if (best + 1 < n) {
      std::copy(ranks + best + 2, ranks + n, ranks + best + 1);
      ranks[best] = pair_rank(out[best], out[best + 1]);
    }
    if (best > 0) ranks[best - 1] = pair_rank(out[best - 1], out[best]);
  }
  return n;
}

// The same with linked parts and a heap of (rank, position): O(n log n). An entry is stale unless its part
// still stands and still has that rank.
size_t BpeEncoder::merge_long(std::string_view piece, Scratch& scratch, int32_t* out) const {
  check(piece.size() < kNone, "a piece of {} bytes cannot be encoded; the limit is 4 GiB", piece.size());
  auto& parts = scratch.parts_;
  auto& heap = scratch.heap_;
  const auto n = static_cast<uint32_t>(piece.size());
  parts.resize(n);
  heap.clear();
  const auto entry = [&](uint32_t i) { return static_cast<uint64_t>(parts[i].rank) << 32 | i; };
  for (uint32_t i = 0; i < n; ++i) {
    parts[i] = {byte_id_[static_cast<unsigned char>(piece[i])], kNoRank, i > 0 ? i - 1 : kNone,
                i + 1 < n ? i + 1 : kNone};
  }
  for (uint32_t i = 0; i + 1 < n; ++i) {
    parts[i].rank = pair_rank(parts[i].id, parts[i + 1].id);
    if (parts[i].rank != kNoRank) heap.push_back(entry(i));
  }
  std::make_heap(heap.begin(), heap.end(), std::greater<>());
  const auto rank_again = [&](uint32_t i) {
    const uint32_t next = parts[i].next;
    parts[i].rank = next == kNone ? kNoRank : pair_rank(parts[i].id, parts[next].id);
    if (parts[i].rank == kNoRank) return;
    heap.push_back(entry(i));
    std::push_heap(heap.begin(), heap.end(), std::greater<>());
  };
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), std::greater<>());
    const uint64_t top = heap.back();
    heap.pop_back();
    const auto i = static_cast<uint32_t>(top);
    if (parts[i].rank == kNoRank || entry(i) != top) continue;
    const uint32_t merged = parts[i].next;
    parts[i].id = parts[i].rank;
    parts[i].next = parts[merged].next;
    if (parts[i].next != kNone) parts[parts[i].next].before = i;
    parts[merged].rank = kNoRank;
    rank_again(i);
    if (parts[i].before != kNone) rank_again(parts[i].before);
  }
  size_t n_ids = 0;
  for (uint32_t i = 0; i != kNone; i = parts[i].next) out[n_ids++] = parts[i].id;
  return n_ids;
}

}  // namespace flexchat
