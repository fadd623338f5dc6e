// Slow, obvious versions of what the tokenizer does, and random text for comparing with them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/rng.h"
#include "base/utf8.h"

namespace flexchat::reference {

using Merges = std::vector<std::pair<int32_t, int32_t>>;

// Byte-pair training as it is defined: all pairs are counted again at every step.
inline Merges train(const std::map<std::string, int64_t>& pieces, int64_t n_merges) {
  std::vector<std::pair<std::vector<int32_t>, int64_t>> words;
  for (const auto& [piece, count] : pieces) {
    std::vector<int32_t> ids;
    for (const char c : piece) ids.push_back(static_cast<unsigned char>(c));
    words.emplace_back(ids, count);
  }
  Merges merges;
  while (static_cast<int64_t>(merges.size()) < n_merges) {
    std::map<std::pair<int32_t, int32_t>, int64_t>
        counts;  // sorted: the first of equals is the smallest pair
    for (const auto& [ids, count] : words) {
      for (size_t i = 0; i + 1 < ids.size(); ++i) counts[{ids[i], ids[i + 1]}] += count;
    }
    if (counts.empty()) break;
    const auto best = std::max_element(counts.begin(), counts.end(), [](const auto& a, const auto& b) {
                        return a.second < b.second;
                      })->first;
    const auto id = static_cast<int32_t>(256 + merges.size());
    merges.push_back(best);
    for (auto& [ids, count] : words) {
      std::vector<int32_t> out;
      for (size_t i = 0; i < ids.size(); ++i) {
        if (i + 1 < ids.size() && ids[i] == best.first && ids[i + 1] == best.second) {
          out.push_back(id);
          ++i;
        } else {
          out.push_back(ids[i]);
        }
      }
      ids = out;
    }
  }
  return merges;
}

// Encoding of one piece by byte strings: the whole piece, else lowest rank first, leftmost on equal ranks.
inline std::vector<int32_t> encode_piece(const std::map<std::string, int32_t, std::less<>>& ranks,
                                         std::string_view piece) {
  if (const auto whole = ranks.find(piece); whole != ranks.end()) return {whole->second};
  std::vector<std::string> parts;
  for (const char c : piece) parts.emplace_back(1, c);
  for (;;) {
    int32_t best = INT32_MAX;
    size_t at = 0;
    for (size_t i = 0; i + 1 < parts.size(); ++i) {
      const auto it = ranks.find(parts[i] + parts[i + 1]);
      if (it != ranks.end() && it->second < best) {
        best = it->second;
        at = i;
      }
    }
    if (best == INT32_MAX) break;
    parts[at] += parts[at + 1];
    parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(at) + 1);
  }
  std::vector<int32_t> ids;
  for (const std::string& part : parts) ids.push_back(ranks.find(part)->second);
  return ids;
}

inline std::map<std::string, int32_t, std::less<>> ranks_of(const std::vector<std::string>& tokens) {
  std::map<std::string, int32_t, std::less<>> ranks;
  for (const std::string& token : tokens) ranks.emplace(token, static_cast<int32_t>(ranks.size()));
  return ranks;
}

// `length` letters of the first `letters` of the alphabet.
inline std::string random_letters(Rng& rng, uint64_t length, uint64_t letters) {
  std::string out;
  for (uint64_t i = 0; i < length; ++i) out += static_cast<char>('a' + rng.below(letters));
  return out;
}

// Text made of what the split patterns treat differently.
inline std::string random_text(Rng& rng, uint64_t parts) {
  static const std::vector<std::string> kParts = {
      " ",      "  ",     "   ",        "\n",         "\r",          "\r\n",   "\t",     "\v",     "\f",
      "'",      "s",      "S",          "ll",         "Re",          "vE",     "T",      "\u017F", "\u212A",
      "x",      "Que",    "0",          "7",          "42",          "1234",   "!",      "-",      "_",
      "...",    "\u0085", "\u00A0",     "\u180E",     "\u200B",      "\u3000", "\u2028", "\u00E9", "\u0301",
      "\u4F60", "\u597D", "\u00BD",     "\u2177",     "\u0663",      "\x1C",   "\x1F",   "\u2019", "\u01C5",
      "\uFEFF", "\u202F", "\U0001F600", "\u1680",     "\u0E33",      "the",    "and ",   " of",    "(",
      "=",      "\"",     "//",         "\U0001D7D8", "\u0D15\u0D4D"};
  std::string out;
  for (uint64_t i = 0; i < parts; ++i) {
    if (rng.below(12) == 0) {
      out += static_cast<char>(rng.below(128));
    } else {
      out += kParts[rng.below(kParts.size())];
    }
  }
  return out;
}

}  // namespace flexchat::reference
