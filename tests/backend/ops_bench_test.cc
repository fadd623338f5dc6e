// The timing of kernels: every op is there once, with bytes and rates that fit each other.
#include "backend/ops_bench.h"

#include <gtest/gtest.h>

#include <set>

#include "support/temp_folder.h"

namespace flexchat {
namespace {

TEST(OpsBench, TimesEveryOpOnce) {
  const auto cpu = make_cpu_backend();
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const std::vector<OpTiming> timings = time_ops(*cpu, 50, 64, 100, dtype, 1);
    std::set<std::string> ops;
    for (const OpTiming& t : timings) {
      EXPECT_TRUE(ops.insert(t.op).second) << t.op << " twice";
      EXPECT_GT(t.seconds, 0) << t.op;
      EXPECT_NEAR(t.gb_per_s, t.bytes / t.seconds / 1e9, 1e-9 * t.gb_per_s) << t.op;
      EXPECT_NEAR(t.fraction_of_copy * timings[0].gb_per_s, t.gb_per_s, 1e-9 * t.gb_per_s) << t.op;
    }
    EXPECT_EQ(timings[0].op, "copy");
    EXPECT_EQ(timings[0].bytes, 2 * 50 * 64 * static_cast<double>(dtype_size(dtype)));
    for (const char* op : {"rms_norm", "embed_norm_backward", "rope_norm", "value_gate_backward",
                           "mix_backward", "smear", "argmax", "cross_entropy + gradient"}) {
      EXPECT_EQ(ops.count(op), 1u) << op;
    }
  }
}

TEST(OpsBench, BadSizesAreErrors) {
  const auto cpu = make_cpu_backend();
  EXPECT_EQ(message_of<Error>([&] { time_ops(*cpu, 1, 3, 1, DType::f32, 1); }),
            "timing ops of (1, 3) with 1 entries, 1 times: sizes must be at least 1 and the width even");
  EXPECT_THROW(time_ops(*cpu, 0, 2, 1, DType::f32, 1), Error);
  EXPECT_THROW(time_ops(*cpu, 1, 2, 1, DType::f32, 0), Error);
}

}  // namespace
}  // namespace flexchat
