// libFuzzer target: a tokenizer file. Any bytes give an Error or a tokenizer that encodes, and that loses
// nothing of a text when its pattern is one that covers all text.
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "base/error.h"
#include "tokenizer/split.h"
#include "tokenizer/tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using flexchat::Tokenizer;
  const std::string_view json(reinterpret_cast<const char*>(data), size);
  // A whole tokenizer needs 256 tokens, which random bytes never spell: the input also stands in for the
  // members other than the single bytes.
  std::string with_bytes = "{\"ranks_hex\": {\"00\": 0";
  for (int byte = 1; byte < 256; ++byte) {
    constexpr char kHex[] = "0123456789abcdef";
    with_bytes += std::string(", \"") + kHex[byte / 16] + kHex[byte % 16] + "\": " + std::to_string(byte);
  }
  for (const std::string& file : {std::string(json), with_bytes + std::string(json)}) {
    try {
      const Tokenizer tokenizer = Tokenizer::parse(file, "fuzz");
      const std::string text =
          "Hello  w\u00F6rld, 12345 'll <|bos|>\r\n\n aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
      const std::string back = tokenizer.decode(tokenizer.encode(text));
      const bool covers =
          tokenizer.pattern() == flexchat::kNanochatPattern || tokenizer.pattern() == flexchat::kGpt4Pattern;
      if (covers && back != text) std::abort();
    } catch (const flexchat::Error&) {
    }
  }
  return 0;
}
