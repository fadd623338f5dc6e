// Files that are either whole or absent.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <string_view>

namespace flexchat {

// Whole file as bytes. Errors name the path and the cause.
std::string read_file(const std::filesystem::path& path);

// Writes path.tmp-<pid>, fsyncs it, renames it over `path`, fsyncs the directory. On any failure the
// temporary file is removed, an older `path` stays as it was, and RunError names path and cause (disk full
// included).
void write_file_atomic(const std::filesystem::path& path, std::string_view bytes);

// The same for content produced in pieces: `produce` calls its argument once for each piece.
using ByteSink = std::function<void(const void* data, size_t bytes)>;
void write_file_atomic(const std::filesystem::path& path,
                       const std::function<void(const ByteSink&)>& produce);

}  // namespace flexchat
