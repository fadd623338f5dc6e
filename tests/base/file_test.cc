// Atomic files: the content arrives whole, and a failed write leaves the old file and nothing else.
#include "base/file.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <csignal>
#include <fstream>

#include "base/error.h"

namespace flexchat {
namespace {

namespace fs = std::filesystem;

class File : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "flexchat-file-XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::vector<std::string> names() const {
    std::vector<std::string> out;
    for (const auto& entry : fs::directory_iterator(folder_)) out.push_back(entry.path().filename().string());
    return out;
  }
  fs::path folder_;
};

// Files of this process can grow to `bytes` only, and passing that is an error instead of a signal: what a
// full disk looks like to write().
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) : handler_(std::signal(SIGXFSZ, SIG_IGN)) {
    ::getrlimit(RLIMIT_FSIZE, &old_);
    const rlimit limit{bytes, old_.rlim_max};
    EXPECT_EQ(::setrlimit(RLIMIT_FSIZE, &limit), 0);
  }
  ~FileSizeLimit() {
    ::setrlimit(RLIMIT_FSIZE, &old_);
    std::signal(SIGXFSZ, handler_);
  }

 private:
  void (*handler_)(int);
  rlimit old_{};
};

template <class Fn>
std::string run_error(const Fn& fn) {
  try {
    fn();
  } catch (const RunError& e) {
    return e.what();
  }
  return "no error";
}

TEST_F(File, WrittenBytesComeBack) {
  std::string bytes(300'000, '\0');
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<char>(i * 2654435761u >> 13);
  for (const std::string& content : {bytes, std::string(), std::string("\0\r\n\xFF", 4)}) {
    write_file_atomic(folder_ / "x", content);
    EXPECT_EQ(read_file(folder_ / "x"), content);
  }
  EXPECT_EQ(names(), std::vector<std::string>{"x"});
}

TEST_F(File, PiecesAreJoined) {
  write_file_atomic(folder_ / "x", [](const ByteSink& sink) {
    for (const char* piece : {"one ", "", "two ", "three"}) sink(piece, std::strlen(piece));
  });
  EXPECT_EQ(read_file(folder_ / "x"), "one two three");
}

TEST_F(File, ReadErrorsNamePathAndCause) {
  const auto error = [](const fs::path& path) -> std::string {
    try {
      read_file(path);
    } catch (const Error& e) {
      return e.what();
    }
    return "no error";
  };
  EXPECT_EQ(error(folder_ / "gone"),
            "cannot read " + (folder_ / "gone").string() + ": No such file or directory");
  EXPECT_EQ(error(folder_), "cannot read " + folder_.string() + ": Is a directory");
}

TEST_F(File, AFullDiskKeepsTheOldFileAndLeavesNoTemporary) {
  write_file_atomic(folder_ / "x", "old");
  std::string error;
  {
    const FileSizeLimit limit(100'000);
    error = run_error([&] { write_file_atomic(folder_ / "x", std::string(500'000, 'n')); });
  }
  EXPECT_NE(error.find((folder_ / "x").string() + ": write: File too large"), std::string::npos) << error;
  EXPECT_EQ(read_file(folder_ / "x"), "old");
  EXPECT_EQ(names(), std::vector<std::string>{"x"});
  write_file_atomic(folder_ / "x", std::string(500'000, 'n'));  // and once there is room again, it works
  EXPECT_EQ(fs::file_size(folder_ / "x"), 500'000u);
}

TEST_F(File, AFullDiskWithoutAnOldFileLeavesNothing) {
  {
    const FileSizeLimit limit(1000);
    EXPECT_THROW(write_file_atomic(folder_ / "x",
                                   [](const ByteSink& sink) {
                                     const std::string piece(300, 'p');
                                     for (int i = 0; i < 10; ++i) sink(piece.data(), piece.size());
                                   }),
                 RunError);
  }
  EXPECT_TRUE(names().empty());
}

TEST_F(File, AProducerThatThrowsKeepsTheOldFile) {
  write_file_atomic(folder_ / "x", "old");
  EXPECT_THROW(write_file_atomic(folder_ / "x",
                                 [](const ByteSink& sink) {
                                   sink("half", 4);
                                   throw std::runtime_error("the producer broke");
                                 }),
               std::runtime_error);
  EXPECT_EQ(read_file(folder_ / "x"), "old");
  EXPECT_EQ(names(), std::vector<std::string>{"x"});
}

TEST_F(File, MissingFolderIsARunErrorThatNamesThePath) {
  const fs::path path = folder_ / "no" / "x";
  const std::string error = run_error([&] { write_file_atomic(path, "text"); });
  EXPECT_NE(error.find(path.string() + ": open: No such file or directory"), std::string::npos) << error;
}

TEST_F(File, ARenameThatFailsLeavesNoTemporary) {
  fs::create_directory(folder_ / "x");
  EXPECT_THROW(write_file_atomic(folder_ / "x", "text"), RunError);
  EXPECT_EQ(names(), std::vector<std::string>{"x"});
  EXPECT_TRUE(fs::is_directory(folder_ / "x"));
}

TEST_F(File, ARelativePathWorks) {
  const fs::path before = fs::current_path();
  fs::current_path(folder_);
  write_file_atomic("x", "text");
  fs::current_path(before);
  EXPECT_EQ(read_file(folder_ / "x"), "text");
}

}  // namespace
}  // namespace flexchat
