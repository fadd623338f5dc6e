// Loading the CUDA library: what a person reads when it is absent, broken or finds no device; that errors of
// the library arrive as the program's own. Needs no GPU; the last tests look at the library of a CUDA build.
#include "backend/cuda_loader.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <string>

#include "base/error.h"
#include "base/file.h"
#include "support/temp_folder.h"
#include "testing/process.h"

namespace flexchat {
namespace {

namespace fs = std::filesystem;

const fs::path& program_folder() {
  static const fs::path folder = fs::path(FLEXCHAT_PROGRAM).parent_path();
  return folder;
}

bool has_cuda_build() { return fs::exists(program_folder() / "libflexchat_cuda.so"); }

// What `flexchat info` prints with FLEXCHAT_CUDA_LIBRARY set to `path`.
std::string info_with_library(const fs::path& path) {
  ::setenv("FLEXCHAT_CUDA_LIBRARY", path.c_str(), 1);
  const testing::Finished finished = testing::run_program({"info"});
  ::unsetenv("FLEXCHAT_CUDA_LIBRARY");
  EXPECT_EQ(finished.code, 0) << finished.out;
  return finished.out;
}

void expect_unusable(const CudaLibrary& library, const std::string& why) {
  EXPECT_NE(library.why().find(why), std::string::npos) << library.why();
  EXPECT_EQ(library.why().find('\n'), std::string::npos) << library.why();
  EXPECT_EQ(library.devices(), "");
  EXPECT_EQ(message_of<Error>([&] { library.make(0); }), "no CUDA device can be used: " + library.why());
}

TEST(CudaLibrary, AbsentSaysHowToGetIt) {
  expect_unusable(
      CudaLibrary("/no/such/library.so"),
      "there is no CUDA library '/no/such/library.so': build the preset cuda, or name the library in "
      "the environment variable FLEXCHAT_CUDA_LIBRARY");
}

TEST(CudaLibrary, RubbishIsOneClearLine) {
  const TempFolder folder;
  const fs::path path = folder.path() / "rubbish.so";
  write_file_atomic(path, "not a library");
  expect_unusable(CudaLibrary(path), "the CUDA library does not load: " + path.string() + ": ");
  const std::string out = info_with_library(path);
  const size_t line = out.find("\ncuda      none: the CUDA library does not load: " + path.string() + ": ");
  EXPECT_NE(line, std::string::npos) << out;
}

TEST(CudaLibrary, AnotherLibraryIsNotTaken) {
  expect_unusable(CudaLibrary(FLEXCHAT_PLUGIN_FOLDER "/not_cuda_plugin.so"),
                  "not_cuda_plugin.so' is not the CUDA library of flexchat: it has no flexchat_cuda_probe");
}

TEST(CudaLibrary, ReasonOfTheLibraryIsPassedOn) {
  expect_unusable(CudaLibrary(FLEXCHAT_PLUGIN_FOLDER "/unusable_cuda_plugin.so"), "the driver is from 1999");
}

TEST(CudaLibrary, DevicesAndErrorsCrossTheBoundary) {
  const CudaLibrary library(FLEXCHAT_PLUGIN_FOLDER "/fake_cuda_plugin.so");
  EXPECT_EQ(library.why(), "");
  EXPECT_EQ(library.devices(), "Fake A, sm_90\nFake B, sm_100");
  EXPECT_EQ(message_of<RunError>([&] { library.make(0); }), "device 0 broke");
  EXPECT_EQ(message_of<Error>([&] { library.make(7); }), "there is no device cuda:7");
}

TEST(CudaLibrary, InfoListsItsDevices) {
  const std::string out = info_with_library(FLEXCHAT_PLUGIN_FOLDER "/fake_cuda_plugin.so");
  EXPECT_NE(out.find("\ncuda:0    Fake A, sm_90\ncuda:1    Fake B, sm_100\n"), std::string::npos) << out;
}

TEST(CudaBackend, IsMadeOrItsAbsenceExplained) {
  std::string why;
  if (cuda_available(&why)) {
    EXPECT_EQ(why, "");
    EXPECT_NE(cuda_devices().find(", sm_"), std::string::npos) << cuda_devices();
    EXPECT_EQ(make_backend("cuda")->name(), "cuda");
    EXPECT_EQ(make_backend("cuda:0")->name(), "cuda");
    EXPECT_NE(
        message_of<Error>([] { make_backend("cuda:4096"); }).find("no device cuda:4096; allowed: cuda:0"),
        std::string::npos);
    return;
  }
  EXPECT_NE(why, "");
  EXPECT_EQ(cuda_devices(), "");
  for (const char* name : {"cuda", "cuda:0", "cuda:1"}) {
    EXPECT_EQ(message_of<Error>([&] { make_backend(name); }), "no CUDA device can be used: " + why);
  }
}

TEST(CudaBackend, BadNamesAreErrors) {
  for (const std::string name : {"cuda:", "cuda:-1", "cuda:x", "cuda:1x", "cuda:99999999999", "auto"}) {
    const std::string message = message_of<Error>([&] { make_backend(name); });
    EXPECT_EQ(message.find("unknown device '" + name + "'"), 0u) << message;
    EXPECT_NE(message.find("allowed: cpu, reference, cuda, cuda:N"), std::string::npos) << message;
  }
}

// Every symbol that the library needs from the program and from CUDA is found, with or without a GPU.
TEST(CudaBuild, LibraryLoadsIntoThisProgram) {
  if (!has_cuda_build()) GTEST_SKIP() << "not a CUDA build";
  std::string why;
  cuda_available(&why);
  for (const char* sign :
       {"the CUDA library does not load", "there is no CUDA library", "is not the CUDA library"}) {
    EXPECT_EQ(why.find(sign), std::string::npos) << why;
  }
}

}  // namespace
}  // namespace flexchat
