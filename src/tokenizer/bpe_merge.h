// The merge loop of byte-pair training, over distinct pieces with their counts.
//
// Pieces start as bytes (ids 0..255). Repeatedly the adjacent pair with the largest total count, on equal
// counts the smallest (first, second), becomes the next id and replaces its occurrences, left to right
// without overlap, in every piece. Counts are those of overlapping windows ("aaa" holds (a,a) twice) and stay
// exact.
//
// A pair's occurrences can only arise in the step that creates the newer of its two ids, after which its
// count only falls. Hence each pair's list of positions is written once, in ascending order, and a heap whose
// entries are corrected when they surface yields the exact maximum.
#pragma once

#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "tokenizer/piece_counter.h"

namespace flexchat {

using Merge = std::pair<int32_t, int32_t>;  // the k-th merge makes id 256 + k

// At most n_merges merges; fewer when no adjacent pair is left. `on_merge(k)` is called after the k-th.
std::vector<Merge> find_merges(const PieceCounter& pieces, int64_t n_merges,
                               const std::function<void(int64_t)>& on_merge);

}  // namespace flexchat
