// The captured environment: present, truthful where a test can know, and safe for odd words.
#include "report/environment.h"

#include <gtest/gtest.h>

#include <array>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <thread>

#include "base/file.h"
#include "report/devices.h"
#include "support/temp_folder.h"

namespace flexchat {
namespace {

namespace fs = std::filesystem;

// Output of a command line run by a shell, which reads quoting the way a person's shell would.
std::string shell(const std::string& command) {
  std::string out;
  std::unique_ptr<FILE, int (*)(FILE*)> pipe(::popen(command.c_str(), "r"), ::pclose);
  std::array<char, 256> buffer;
  while (pipe && std::fgets(buffer.data(), buffer.size(), pipe.get())) out += buffer.data();
  return out;
}

TEST(Environment, HasEveryField) {
  const Json e = capture_environment();
  for (const char* key : {"command", "program", "directory", "date", "version", "commit", "dirty", "build",
                          "compiler", "cpu", "memory", "os", "kernel", "libraries", "devices"}) {
    EXPECT_TRUE(e.contains(key)) << key;
  }
  EXPECT_NE(e["command"].get<std::string>().find("test"), std::string::npos);
  EXPECT_TRUE(fs::path(e["program"].get<std::string>()).is_absolute());
  EXPECT_TRUE(fs::exists(e["program"].get<std::string>()));
  EXPECT_GE(e["cpu"]["cores"].get<int64_t>(), 1);
  EXPECT_GT(e["memory"]["total_bytes"].get<int64_t>(), int64_t{64} << 20);
  EXPECT_TRUE(e["libraries"].contains("oneDNN"));
  ASSERT_EQ(e["devices"].size(), 1u);
  EXPECT_EQ(e["devices"][0]["device"], "cpu");
  EXPECT_NO_THROW((void)e.dump());
}

TEST(Environment, OtherDevicesAreAppended) {
  const Json gpu = {{"device", "cuda:0"}, {"name", "test"}};
  const Json e = capture_environment({gpu});
  ASSERT_EQ(e["devices"].size(), 2u);
  EXPECT_EQ(e["devices"][1], gpu);
}

TEST(Environment, DateIsUtcIso) {
  const std::string before = shell("date -u +%Y-%m-%dT%H:%M:%SZ"), date = utc_time(),
                    after = shell("date -u +%Y-%m-%dT%H:%M:%SZ");
  ASSERT_EQ(date.size(), 20u);
  EXPECT_EQ(date[10], 'T');
  EXPECT_EQ(date.back(), 'Z');
  EXPECT_LE(before.substr(0, 20), date);
  EXPECT_GE(after.substr(0, 20), date);
}

TEST(ShellQuote, AShellReadsTheSameWordBack) {
  for (const std::string word :
       {"plain", "--data", "a b", "", "it's", "$HOME `id` \"x\" \\", "*", "a;b|c&d", "ünï"}) {
    EXPECT_EQ(shell("printf '[%s]' " + shell_quote(word)), "[" + word + "]");
  }
  EXPECT_EQ(shell_quote("--threads=2"), "--threads=2");
}

TEST(GitState, UnknownWithoutARepository) {
  const TempFolder folder;
  for (const fs::path& root : {fs::path(), folder.path(), fs::path("/no/such/folder")}) {
    const GitState state = git_state(root);
    EXPECT_EQ(state.commit, "unknown");
    EXPECT_FALSE(state.dirty.has_value());
  }
}

TEST(GitState, CommitAndChanges) {
  const TempFolder folder;
  const std::string where = shell_quote(folder.path().string());
  const std::string git = "git -C " + where + " -c user.name=t -c user.email=t@t -c commit.gpgsign=false ";
  write_file_atomic(folder / "a.txt", "1");
  const std::string head = shell(git + "init -q 2>/dev/null && " + git + "add . && " + git +
                                 "commit -qm one && " + git + "rev-parse HEAD");
  if (head.empty()) {  // no git on this machine: the answer must be "unknown", not a crash
    EXPECT_EQ(git_state(folder.path()).commit, "unknown");
    return;
  }
  GitState state = git_state(folder.path());
  EXPECT_EQ(state.commit + "\n", head);
  EXPECT_EQ(state.dirty, std::optional<bool>(false));
  write_file_atomic(folder / "a.txt", "2");
  EXPECT_EQ(git_state(folder.path()).dirty, std::optional<bool>(true));
  write_file_atomic(folder / "a.txt", "1");
  write_file_atomic(folder / "new file.txt", "");
  EXPECT_EQ(git_state(folder.path()).dirty, std::optional<bool>(true));
}

TEST(Environment, LibrariesAndTargetsHaveNames) {
  const OneDnn dnnl = onednn_info();
  EXPECT_NE(dnnl.version.find('.'), std::string::npos);
  EXPECT_FALSE(dnnl.isa.empty());
  EXPECT_NE(highway_target(), "unknown");
  EXPECT_FALSE(compiler_name().empty());
}

TEST(KernelTable, SaysWhatRunsAndHow) {
  const auto rows = kernel_table();
  const auto row = [&](const std::string& device, const std::string& dtype) {
    for (const auto& r : rows) {
      if (r.device == device && r.dtype == dtype) return r;
    }
    return KernelRow{};
  };
  EXPECT_TRUE(row("cpu", "f32").runs);
  EXPECT_NE(row("cpu", "f32").how.find("oneDNN"), std::string::npos);
  EXPECT_TRUE(row("cpu", "f16").runs);
  EXPECT_TRUE(row("reference", "f64").runs);
  for (const auto& r : rows) {
    EXPECT_FALSE(r.how.empty());
    EXPECT_FALSE(r.needs.empty());
  }
}

}  // namespace
}  // namespace flexchat
