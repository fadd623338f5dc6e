// libFuzzer target: a parquet file in memory. Any bytes give valid UTF-8 documents or an Error, read on and
// read again from the middle.
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "base/error.h"
#include "base/strings.h"
#include "base/utf8.h"
#include "data/readers.h"

namespace {

// A few bytes can claim millions of rows (a run of nulls or of one dictionary entry); reading on shows
// nothing new.
constexpr int kMaxRows = 2000;

void read(std::string_view bytes, flexchat::FilePosition start, flexchat::FilePosition* middle) {
  int64_t replaced = 0, invalid = 0;
  try {
    const auto reader = flexchat::open_parquet_bytes(bytes, "fuzz.parquet", start);
    std::string text;
    for (int row = 0; row < kMaxRows && reader->next(&text, &replaced); ++row) {
      flexchat::replace_invalid_utf8(text, &invalid);
      if (row == 5) *middle = reader->position();
    }
  } catch (const flexchat::Error&) {
  }
  if (invalid != 0) std::abort();
}

}  // namespace

// Claimed sizes may be huge; the allocation then fails and must become an Error.
extern "C" const char* __asan_default_options() { return "allocator_may_return_null=1"; }

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  flexchat::FilePosition middle, unused;
  read(bytes, {}, &middle);
  read(bytes, middle, &unused);
  return 0;
}
