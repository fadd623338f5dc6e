// libFuzzer target: one line of a JSON-lines file. Any bytes give a valid UTF-8 text or an Error.
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "base/error.h"
#include "base/strings.h"
#include "base/utf8.h"
#include "data/readers.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  int64_t replaced = 0, invalid = 0;
  try {
    const std::string text =
        flexchat::parse_jsonl_line({reinterpret_cast<const char*>(data), size}, "fuzz:1", &replaced);
    flexchat::replace_invalid_utf8(text, &invalid);
  } catch (const flexchat::Error&) {
  }
  if (invalid != 0) std::abort();
  return 0;
}
