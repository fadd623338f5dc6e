// Any bytes: the reader either refuses them with Error or hands out tensors that survive a round trip.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#include "base/error.h"
#include "checkpoint/safetensors.h"

using namespace flexchat;

namespace {

void expect(bool ok) {
  if (!ok) std::abort();
}

void load_everything(const SafetensorsFile& file) {
  NamedTensors tensors;
  for (const SafetensorsEntry& e : file.entries()) {
    const Tensor t = file.load(e.name);
    expect(t.bytes() == static_cast<int64_t>(file.bytes(e).size()));
    expect(t.bytes() == 0 || std::memcmp(t.data(), file.bytes(e).data(), file.bytes(e).size()) == 0);
    tensors.emplace_back(e.name, t);
    for (DType to : {DType::f32, DType::bf16, DType::i32}) {
      try {
        (void)file.load(e.name, e.shape, to);
      } catch (const Error&) {  // a conversion that is not allowed
      }
    }
  }
  std::string written;
  write_safetensors([&](const void* p, size_t n) { written.append(static_cast<const char*>(p), n); }, tensors,
                    file.metadata());
  const SafetensorsFile back = SafetensorsFile::parse(written, "written");
  expect(back.metadata() == file.metadata() && back.entries().size() == tensors.size());
  for (const auto& [name, tensor] : tensors) {
    expect(back.entry(name).shape == tensor.shape() && back.entry(name).dtype == tensor.dtype());
    expect(back.bytes(back.entry(name)) == file.bytes(file.entry(name)));
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  try {
    load_everything(SafetensorsFile::parse(bytes, "input"));
  } catch (const Error& e) {
    expect(std::strchr(e.what(), '\n') == nullptr);  // an error is one line
  }
  return 0;
}
