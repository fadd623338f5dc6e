// Temporary folders, files and streams for the tests of src/data.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

#include "base/error.h"
#include "data/source.h"

namespace flexchat {

class TempDir {
 public:
  TempDir() {
    std::string name = (std::filesystem::temp_directory_path() / "flexchat-data-XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) throw RunError("mkdtemp failed");
    path_ = name;
  }
  ~TempDir() { std::filesystem::remove_all(path_); }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;

  std::string path(const std::string& name = "") const { return name.empty() ? path_ : path_ + "/" + name; }
  // Writes a file, making its folders; returns its path.
  std::string write(const std::string& name, const std::string& bytes) const {
    std::filesystem::create_directories(std::filesystem::path(path(name)).parent_path());
    std::ofstream(path(name), std::ios::binary) << bytes;
    return path(name);
  }
  // A JSON-lines file of `n` documents "<prefix>0", "<prefix>1", ...
  std::string write_jsonl(const std::string& name, const std::string& prefix, int n) const {
    std::string lines;
    for (int i = 0; i < n; ++i) lines += "{\"text\": \"" + prefix + std::to_string(i) + "\"}\n";
    return write(name, lines);
  }
  std::string copy_fixture(const std::string& fixture, const std::string& name) const {
    std::filesystem::copy_file(std::string(FLEXCHAT_TEST_DATA) + "/sources/" + fixture, path(name));
    return path(name);
  }

 private:
  std::string path_;
};

inline std::string fixture_path(const std::string& name) {
  return std::string(FLEXCHAT_TEST_DATA) + "/sources/" + name;
}

// The rest of the present pass.
inline std::vector<std::string> drain(DocumentStream& stream) {
  std::vector<std::string> out;
  for (std::string text; stream.next(text);) out.push_back(text);
  return out;
}

// The message of the Error fn throws; fails the test when it throws none.
inline std::string error_of(const std::function<void()>& fn) {
  try {
    fn();
  } catch (const Error& e) {
    return e.what();
  }
  ADD_FAILURE() << "no Error was thrown";
  return "";
}

inline void expect_contains(const std::string& text, const std::string& part) {
  EXPECT_NE(text.find(part), std::string::npos) << "'" << part << "' is not in '" << text << "'";
}

}  // namespace flexchat
