// Kernels compiled ahead of time. The build runs flexchat_emit_aot (aot_emit.cc), which takes the sources of
// aot_entries(), compiles each for every architecture as Jit would, and embeds the cubins under their keys.
// Nothing else distinguishes them: a source that is found here needs no NVRTC.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "backend/jit_compiler.h"

namespace flexchat::cuda {

struct AotEntry {
  std::string mod;  // what users call it: "causal", "softcap"
  JitSource source;
};

// The list (attention_aot.cc).
std::vector<AotEntry> aot_entries();

// What the build embedded (generated).
std::span<const EmbeddedCubin> embedded_cubins();

}  // namespace flexchat::cuda
