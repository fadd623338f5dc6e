// A file mapped read-only into memory. The bytes stay valid as long as the object lives.
#pragma once

#include <filesystem>
#include <memory>
#include <string_view>

namespace flexchat {

class MappedFile {
 public:
  // Errors name the path and the cause: missing, unreadable, not a regular file.
  static std::shared_ptr<const MappedFile> open(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::string_view bytes() const { return {static_cast<const char*>(data_), size_}; }

 private:
  MappedFile(const void* data, size_t size) : data_(data), size_(size) {}
  const void* data_;
  size_t size_;
};

}  // namespace flexchat
