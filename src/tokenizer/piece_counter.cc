// Two open-addressing tables: short pieces by value, long ones by position in one string.
#include "tokenizer/piece_counter.h"

#include <limits>
#include <utility>

#include "base/error.h"

namespace flexchat {
namespace {

// Slots are taken from the high bits: the low bits of a folded product are the weaker ones.
size_t home(uint64_t hash, size_t slots) { return (hash >> 20) & (slots - 1); }

}  // namespace

PieceCounter::PieceCounter() : short_(size_t{1} << 12), long_slots_(size_t{1} << 8) {}

void PieceCounter::add(std::string_view piece, const char* end, int64_t count) {
  if (piece.size() <= kMaxKeyBytes) {
    add_short(make_piece_key(piece, end), count);
  } else {
    add_long(piece, count);
  }
}

void PieceCounter::add_all(const PieceCounter& other) {
  for (const Short& slot : other.short_) {
    if (slot.count > 0) add_short(slot.key, slot.count);
  }
  for (const Long& entry : other.long_) add_long(other.long_piece(entry), entry.count);
}

void PieceCounter::add_short(const PieceKey& key, int64_t count) {
  for (size_t i = home(hash_key(key), short_.size());; i = (i + 1) & (short_.size() - 1)) {
    Short& slot = short_[i];
    if (slot.count == 0) {
      slot = {key, count};
      if (++n_short_ * 2 > short_.size()) grow_short();
      return;
    }
    if (slot.key == key) {
      slot.count += count;
      return;
    }
  }
}

void PieceCounter::grow_short() {
  std::vector<Short> old(short_.size() * 2);
  std::swap(old, short_);
  for (const Short& from : old) {
    if (from.count == 0) continue;
    size_t i = home(hash_key(from.key), short_.size());
    while (short_[i].count != 0) i = (i + 1) & (short_.size() - 1);
    short_[i] = from;
  }
}

void PieceCounter::add_long(std::string_view piece, int64_t count) {
  const uint64_t hash = hash_long_piece(piece);
  for (size_t i = home(hash, long_slots_.size());; i = (i + 1) & (long_slots_.size() - 1)) {
    if (long_slots_[i] == 0) {
      if (long_.size() >= std::numeric_limits<uint32_t>::max() - 1)
        fail_run("more than 2^32 distinct long pieces");
      long_.push_back({hash, text_.size(), piece.size(), count});
      text_.append(piece);
      long_slots_[i] = static_cast<uint32_t>(long_.size());
      if (long_.size() * 2 > long_slots_.size()) grow_long();
      return;
    }
    Long& entry = long_[long_slots_[i] - 1];
    if (entry.hash == hash && long_piece(entry) == piece) {
      entry.count += count;
      return;
    }
  }
}

void PieceCounter::grow_long() {
  long_slots_.assign(long_slots_.size() * 2, 0);
  for (size_t k = 0; k < long_.size(); ++k) {
    size_t i = home(long_[k].hash, long_slots_.size());
    while (long_slots_[i] != 0) i = (i + 1) & (long_slots_.size() - 1);
    long_slots_[i] = static_cast<uint32_t>(k + 1);
  }
}

}  // namespace flexchat
