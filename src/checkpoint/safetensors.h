// Reading and writing .safetensors files: 8 bytes header length (little endian), a JSON header
// {"name": {"dtype", "shape", "data_offsets": [begin, end)}, ..., "__metadata__": {string: string}}, then the
// tensors' bytes without gaps.
// A reader that exists has been validated whole: header, names, dtypes, shapes, offsets. Nothing of a bad
// file is ever handed out; every error names the file and, where there is one, the tensor.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/dtype.h"
#include "base/file.h"
#include "base/tensor.h"

namespace flexchat {

using NamedTensors = std::vector<std::pair<std::string, Tensor>>;
using StringMap = std::map<std::string, std::string>;

struct SafetensorsEntry {
  std::string name;
  DType dtype = DType::f32;
  Shape shape;
  uint64_t begin = 0, end = 0;  // bytes [begin, end) of the data part
};

class SafetensorsFile {
 public:
  // Maps the file. Throws Error on anything that is not a whole, valid file.
  static SafetensorsFile open(const std::filesystem::path& path);
  // The same for bytes in memory; `name` stands for the path in errors. The bytes must stay valid while the
  // result is used: `owner`, when given, is held for that.
  static SafetensorsFile parse(std::string_view bytes, std::string name,
                               std::shared_ptr<const void> owner = nullptr);

  const std::string& name() const { return name_; }
  const StringMap& metadata() const { return metadata_; }
  const std::vector<SafetensorsEntry>& entries() const { return entries_; }  // in file order
  bool contains(const std::string& tensor) const { return index_.contains(tensor); }
  const SafetensorsEntry& entry(const std::string& tensor) const;  // Error names the nearest tensor
  std::string_view bytes(const SafetensorsEntry& entry) const;     // may be unaligned for its dtype
  std::string_view header() const;                                 // length word and JSON

  // Throws Error naming the first tensor that is missing, has another shape or is not in `expected`. Call it
  // before loading so that a foreign file leaves nothing half-loaded.
  void require(const std::vector<std::pair<std::string, Shape>>& expected) const;

  // A copy in host memory, in the file's dtype.
  Tensor load(const std::string& tensor) const;
  // A copy that must have `shape`, as `dtype`. Floats convert to floats (f64, f32, bf16, f16; round to
  // nearest even), integers to integers (a value out of range is an error); anything else must have `dtype`
  // already.
  Tensor load(const std::string& tensor, const Shape& shape, DType dtype) const;
  // The same into existing host memory.
  void copy_to(const std::string& tensor, const Tensor& target) const;

 private:
  SafetensorsFile() = default;
  std::string name_;
  std::shared_ptr<const void> owner_;
  std::string_view bytes_;
  uint64_t data_begin_ = 0;
  StringMap metadata_;
  std::vector<SafetensorsEntry> entries_;
  std::unordered_map<std::string, size_t> index_;  // name -> position in entries_
};

// Writes the whole file, or leaves what was there (see write_file_atomic). Tensors may live on a device and must
// have different names. The order in the file is that given, except that larger elements come first, so that
// every tensor is aligned. Throws Error on bad names, RunError when writing fails.
void write_safetensors(const std::filesystem::path& path, const NamedTensors& tensors,
                       const StringMap& metadata);

// The same as a stream of pieces: the header, then one piece for each tensor that has elements, in file
// order. Returns the names of the tensors whose pieces followed the header.
std::vector<std::string> write_safetensors(const ByteSink& sink, const NamedTensors& tensors,
                                           const StringMap& metadata);

// `name` on one line for an error message: control characters escaped, long names cut.
std::string printable_name(std::string_view name);

}  // namespace flexchat
