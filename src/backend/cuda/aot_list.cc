// Which kernels are compiled ahead of time: the mods that most models use, for the usual head dims.
// Everything else is compiled on first use.
#include <vector>

#include "backend/cuda/aot.h"
#include "backend/cuda/aot_source.h"
#include "flex/mods.h"

namespace flexchat::cuda {
namespace {

using flex::Axis;
using flex::Capture;
using flex::Type;

struct NamedSection {
  const char* name;
  flex::EmittedMod mod;
};

std::vector<NamedSection> sections() {
  const Capture ids("ids", {Axis::b, Axis::pos}, Type::integer), slope("slope", {Axis::h});
  return {{"plain causal or bidirectional", flex::emit_mod({}, {})},
          {"flex causal", flex::emit_mod(flex::causal(), {})},
          {"causal window", flex::emit_mod(flex::causal() && flex::window(1024), {})},  // of any width
          {"document", flex::emit_mod(flex::causal() && flex::document(ids), {})},
          {"ALiBi", flex::emit_mod(flex::causal(), flex::alibi(slope))},
          {"softcap", flex::emit_mod({}, flex::softcap(30))}};  // of any size
}

}  // namespace

std::vector<AotEntry> aot_entries() {
  std::vector<AotEntry> entries;
  for (const NamedSection& section : sections()) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      for (const int64_t head_dim : {64, 128}) {
        for (const char* pass : {"forward", "backward", "decode"}) {
          entries.push_back({section.name, attention_source({pass, dtype, head_dim}, section.mod)});
        }
      }
    }
  }
  return entries;
}

}  // namespace flexchat::cuda
