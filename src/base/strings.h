// Small text helpers shared by options, errors and reports.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace flexchat {

// The candidate with the smallest edit distance to `word`; empty when none is reasonably near.
std::string nearest_name(std::string_view word, const std::vector<std::string>& candidates);

// " (did you mean 'x'?)" or "".
std::string did_you_mean(std::string_view word, const std::vector<std::string>& candidates);

// "a, b, c"
std::string join(const std::vector<std::string>& parts, std::string_view separator = ", ");

// 1536 -> "1.5 KiB"
std::string format_bytes(double bytes);

// 1234567 -> "1,234,567"
std::string format_count(int64_t n);

// 3723 s -> "1h02m", 75 s -> "1m15s", 4.2 s -> "4.2s"
std::string format_duration(double seconds);

}  // namespace flexchat
