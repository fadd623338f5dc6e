// Parity with the reference systems: runs a model from a golden file's parameters and compares everything the
// file holds, i.e. logits, loss, every gradient, logits through the KV cache (prefill, decode, chunk), the
// losses of the training trajectory and the final parameters.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "models/run_options.h"
#include "verify/check.h"

namespace flexchat {

struct GoldenOptions {
  DType compute = DType::f32;
  // Of Muon's iterations. Nothing: bf16 when computing in bf16, else f32. The classic goldens iterated in
  // bf16, whose rounding two correct implementations don't share; f32 is the stable way to compare.
  std::optional<DType> muon_dtype;
  AttentionOptions attention{};
};

// One file; check names are prefixed with its stem. Throws Error naming file and tensor when the file is not
// a golden file. `attention`, if given, gets the attention_record of what ran.
std::vector<Check> verify_golden(const std::filesystem::path& file, Backend& backend,
                                 const GoldenOptions& options, Json* attention = nullptr);

}  // namespace flexchat
