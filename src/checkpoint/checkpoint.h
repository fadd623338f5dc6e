// Checkpoint folders that are whole or absent:
//   <run>/checkpoints/step_000123/{manifest.json, state.json, <group>.safetensors ...}
// A checkpoint is written beside its place, flushed to the disk, and renamed into place. The manifest holds
// the size and checksum of every other file, and of every tensor, so that damage is found and named before
// anything is used.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "base/options.h"
#include "checkpoint/safetensors.h"

namespace flexchat {

// Becomes the file <name>.safetensors ("model", "optimizer", "loader"). Host tensors, any dtypes.
struct TensorGroup {
  std::string name;
  NamedTensors tensors;
  StringMap metadata;
};

class Checkpoint {
 public:
  const std::filesystem::path& directory() const { return directory_; }
  int64_t step() const { return step_; }
  const Json& state() const { return *state_; }
  std::string state_source() const { return (directory_ / "state.json").string(); }  // for StateReader
  bool contains(const std::string& group) const { return groups_.contains(group); }
  const SafetensorsFile& group(const std::string& name) const;  // Error if the checkpoint has none

 private:
  friend Checkpoint load_checkpoint(const std::filesystem::path& directory);
  std::filesystem::path directory_;
  int64_t step_ = 0;
  std::shared_ptr<const Json> state_;
  std::map<std::string, SafetensorsFile> groups_;
};

// Saves <run_dir>/checkpoints/step_<step> and returns its path; an older checkpoint of the same step is
// replaced. Then removes all but the `keep` newest (keep <= 0: removes none), never the new one. On any
// failure the temporary folder is removed, every older checkpoint is as it was, and RunError names the path
// and the cause. Temporary folders that a killed run left behind are removed.
std::filesystem::path save_checkpoint(const std::filesystem::path& run_dir, int64_t step,
                                      const std::vector<TensorGroup>& groups, const Json& state,
                                      int64_t keep);

// Finished checkpoints of a run, oldest step first; temporary and half-removed folders are not among them.
std::vector<std::filesystem::path> list_checkpoints(const std::filesystem::path& run_dir);
std::optional<std::filesystem::path> find_latest_checkpoint(const std::filesystem::path& run_dir);

// Validates every file of a checkpoint folder against its manifest, then hands it out whole. Throws Error
// naming the file, and the tensor where damage can be placed. The tensors' bytes stay mapped; nothing is
// copied yet.
Checkpoint load_checkpoint(const std::filesystem::path& directory);

// What the manifest says about one file.
struct ManifestFile {
  std::string name;
  uint64_t bytes = 0;
  uint32_t checksum = 0;                    // CRC-32C of the whole file
  std::map<std::string, uint32_t> tensors;  // CRC-32C of each tensor's bytes; safetensors only
};
struct Manifest {
  int64_t step = 0;
  std::vector<ManifestFile> files;
};

// Throws Error naming `source` unless `text` is a manifest this version can read.
Manifest parse_manifest(std::string_view text, const std::string& source);

}  // namespace flexchat
