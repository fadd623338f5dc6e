// Any text: the readers of state.json and manifest.json either refuse it with Error or give values that
// survive a round trip.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <nlohmann/json.hpp>
#include <string>

#include "base/error.h"
#include "checkpoint/checkpoint.h"
#include "checkpoint/state_json.h"

using namespace flexchat;

namespace {

void expect(bool ok) {
  if (!ok) std::abort();
}

template <class Fn>
void expect_value_or_error(const Fn& fn) {
  try {
    fn();
  } catch (const Error& e) {
    expect(std::strchr(e.what(), '\n') == nullptr);  // an error is one line
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  expect_value_or_error([&] {
    const Json state = parse_state_json(text, "input");
    expect(parse_state_json(dump_state_json(state, "input"), "again") == state);
    const StateReader reader(state, "input");
    for (const auto& item : state.items()) {
      expect_value_or_error([&] { (void)reader.integer(item.key()); });
      expect_value_or_error([&] { (void)reader.word(item.key()); });
      expect_value_or_error([&] { (void)reader.number(item.key()); });
      expect_value_or_error([&] { (void)reader.text(item.key()); });
      expect_value_or_error([&] { (void)reader.object(item.key()); });
    }
  });
  expect_value_or_error([&] { (void)parse_manifest(text, "input"); });
  return 0;
}
