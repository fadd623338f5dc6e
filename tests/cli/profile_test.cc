// flexchat profile: what it refuses, and on a GPU what it tells.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "backend/cuda_loader.h"
#include "base/options.h"
#include "support/temp_folder.h"
#include "testing/process.h"

namespace flexchat {
namespace {

using flexchat::testing::Finished;
using flexchat::testing::run_program;

TEST(Profile, RefusesWhatItCannotMeasure) {
  const Finished nothing = run_program({"profile"});
  EXPECT_EQ(nothing.code, 2);
  EXPECT_NE(nothing.out.find("Name the command after '--'"), std::string::npos) << nothing.out;
  const Finished nested = run_program({"profile", "--", "./flexchat", "profile", "--", "info"});
  EXPECT_EQ(nested.code, 2);
  EXPECT_NE(nested.out.find("a profile of a profile"), std::string::npos) << nested.out;
  const Finished unknown = run_program({"profile", "--", "benhc"});
  EXPECT_EQ(unknown.code, 2);
  EXPECT_NE(unknown.out.find("did you mean"), std::string::npos) << unknown.out;
  const TempFolder runs;
  const Finished host = run_program({"profile", "--runs", runs.path().string(), "--", "bench", "train",
                                     "--depth", "1", "--vocab-size", "64", "--sweep", "b=1 t=16", "--steps",
                                     "1", "--runs", runs.path().string()});
  EXPECT_EQ(host.code, 2);
  EXPECT_NE(host.out.find("ran no kernels on a GPU"), std::string::npos) << host.out;
}

TEST(Profile, NamesTheKernelsOfAGpu) {
  std::string why;
  if (!cuda_available(&why)) GTEST_SKIP() << why;
  const TempFolder runs;
  const Finished end = run_program({"profile",
                                    "--runs",
                                    runs.path().string(),
                                    "--run-id",
                                    "a",
                                    "--",
                                    "bench",
                                    "train",
                                    "--device",
                                    "cuda",
                                    "--dtype",
                                    "bf16",
                                    "--depth",
                                    "2",
                                    "--vocab-size",
                                    "256",
                                    "--sweep",
                                    "b=2 t=128",
                                    "--steps",
                                    "1",
                                    "--runs",
                                    runs.path().string()});
  ASSERT_EQ(end.code, 0) << end.out;
  for (const char* text : {"attention_forward", "matmul", "adamw", "peaks: copy"})
    EXPECT_NE(end.out.find(text), std::string::npos) << end.out;
}

}  // namespace
}  // namespace flexchat
