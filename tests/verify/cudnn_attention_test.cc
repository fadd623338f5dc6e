// The vendor's attention as a kernel among ours: what it refuses, and, where a GPU and cuDNN are, that it is
// right, can be recorded in a graph, and repeats to the bit when it shall.
#include <gtest/gtest.h>

#include <cstdlib>
#include <nlohmann/json.hpp>

#include "backend/cuda_loader.h"
#include "backend/cudnn_library.h"
#include "base/error.h"
#include "flex/mods.h"
#include "support/temp_folder.h"
#include "testing/process.h"
#include "testing/tensors.h"
#include "verify/attention_suite.h"

namespace flexchat {
namespace {

AttentionCase square_case(int64_t length, int64_t n_kv_head = 4) {
  AttentionCase c;
  c.name = "square";
  c.shape = {
      .batch = 2, .q_len = length, .kv_len = length, .n_head = 4, .n_kv_head = n_kv_head, .head_dim = 64};
  c.spec.scale = 0.125;
  c.spec.causal = true;
  return c;
}

TEST(CudnnAttention, TheTableSaysWhatItDoes) {
  const AttentionSupport& can = attention_support("cudnn");
  EXPECT_TRUE(can.takes(DType::bf16) && can.takes(DType::f16));
  EXPECT_FALSE(can.takes(DType::f32) || can.takes(DType::f64));
  EXPECT_TRUE(attention_support("cuda_mma").takes(DType::f32));
  EXPECT_FALSE(attention_support("reference").takes(DType::f16));

  const auto refusal = [](const auto& change) {
    AttentionCase c = square_case(8);
    change(c.shape, c.spec);
    return attention_refusal("cudnn", c.shape, c.spec);
  };
  EXPECT_EQ(refusal([](auto&, auto&) {}), "");
  EXPECT_EQ(refusal([](auto& shape, auto&) { shape.n_kv_head = 1; }), "");
  EXPECT_EQ(refusal([](auto&, auto& spec) { spec.window = 3; }), "");
  EXPECT_EQ(refusal([](auto& shape, auto&) { shape.head_dim = 24; }),
            "attention kernel cudnn: head dim 24; allowed are 16, 32, 64, 80, 96, 128, 192, 256");
  EXPECT_EQ(refusal([](auto&, auto& spec) { spec.mask = flex::causal(); }),
            "attention kernel cudnn does not do masks by expression");
  EXPECT_EQ(refusal([](auto&, auto& spec) { spec.score_mod = flex::softcap(2); }),
            "attention kernel cudnn does not do score mods");
  EXPECT_EQ(refusal([](auto&, auto& spec) { spec.dropout = 0.1; }),
            "attention kernel cudnn does not do dropout");
  EXPECT_EQ(refusal([](auto&, auto& spec) { spec.page_size = 16; }),
            "attention kernel cudnn does not do pages");
  // Rows may all begin at 0, or all end with their last key, and nothing else.
  const auto offsets = [&](int64_t q_len, std::vector<int64_t> at) {
    return refusal([&](auto& shape, auto&) {
      shape.q_len = q_len;
      shape.q_offsets = at;
    });
  };
  EXPECT_EQ(offsets(8, {0, 0}), "");
  EXPECT_EQ(offsets(3, {0, 0}), "");
  EXPECT_EQ(offsets(3, {}), "");
  EXPECT_EQ(offsets(3, {5, 5}), "");
  const std::string by_row = "attention kernel cudnn does not do lengths or offsets by row";
  EXPECT_EQ(offsets(3, {5, 4}), by_row);
  EXPECT_EQ(offsets(3, {4, 4}), by_row);
  EXPECT_EQ(refusal([](auto& shape, auto&) { shape.kv_lens = {8, 8}; }), by_row);

  AttentionCase with_lse_gradient = square_case(8);
  EXPECT_TRUE(does_case(can, with_lse_gradient));
  with_lse_gradient.lse_gradient = true;
  EXPECT_FALSE(does_case(can, with_lse_gradient));
}

TEST(CudnnAttention, AProgramWithoutItRunsAndSaysWhatIsMissing) {
  cudnn_library();  // looks for its own before the variable changes
  const char* const before = std::getenv("FLEXCHAT_CUDNN");
  const std::string mine = before != nullptr ? before : "";
  ::setenv("FLEXCHAT_CUDNN", "/nowhere/libcudnn.so.9", 1);
  const testing::Finished info = testing::Process(FLEXCHAT_PROGRAM, {"info", "--json"}).wait();
  ::setenv("FLEXCHAT_CUDNN", mine.c_str(), 1);
  ASSERT_EQ(info.code, 0) << info.out;
  const std::string said = Json::parse(info.out).at("cudnn");
  EXPECT_NE(said.find("scripts/setup.sh --cuda"), std::string::npos) << said;
  EXPECT_EQ(said.find('\n'), std::string::npos) << said;
}

class CudnnOnGpu : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string why;
    if (!cuda_available(&why)) GTEST_SKIP() << why;
    if (cudnn_library().handle == nullptr) GTEST_SKIP() << cudnn_library().why;
    cuda_ = make_cuda_backend();
  }
  std::unique_ptr<Backend> cuda_;
};

TEST_F(CudnnOnGpu, PassesWhatItDoesOfTheSuite) {
  const AttentionSupport& can = attention_support("cudnn");
  int64_t done = 0;
  for (const AttentionCase& c : attention_suite()) {
    if (!does_case(can, c)) continue;
    ++done;
    for (const Check& check : check_attention(c, *cuda_, DType::bf16, "cudnn")) {
      EXPECT_TRUE(check.pass) << check.name << ": max_abs " << check.max_abs << ", max_rel " << check.max_rel
                              << ", limit " << check.limit;
    }
  }
  EXPECT_GE(done, 20);
}

TEST_F(CudnnOnGpu, RefusesAtTheCall) {
  AttentionCase c = square_case(64);
  EXPECT_EQ(message_of<Error>([&] { run_attention(c, *cuda_, DType::f32, "cudnn"); }),
            "attention kernel cudnn: tensors of f32; allowed are bf16 and f16");
  c.lse_gradient = true;
  EXPECT_EQ(message_of<Error>([&] { run_attention(c, *cuda_, DType::bf16, "cudnn"); }),
            "attention kernel cudnn does not do gradients of the LSE");
  c = square_case(0);
  EXPECT_NE(message_of<Error>([&] { run_attention(c, *cuda_, DType::bf16, "cudnn"); }).find("empty"),
            std::string::npos);
  // Rows at odd multiples of two bytes.
  const AttentionShape& s = square_case(64).shape;
  const auto plan = cuda_->plan_attention(s, square_case(64).spec, "cudnn");
  const Tensor rows = cuda_->empty({s.batch, s.q_len, s.n_head * s.head_dim + 1}, DType::bf16);
  HeadsView odd = heads_view(rows);
  EXPECT_EQ(message_of<Error>([&] {
              cuda_->attention(*plan, {odd, odd, odd, odd});
            }),
            "attention kernel cudnn: rows of q must start at multiples of 16 bytes");
}

TEST_F(CudnnOnGpu, RunsInAGraph) {
  const AttentionCase c = square_case(300, 2);
  const AttentionShape& s = c.shape;
  const auto plan = cuda_->plan_attention(s, c.spec, "cudnn");
  EXPECT_EQ(plan->kernel(), "cudnn");
  EXPECT_EQ(plan->reason().find("asked for: the baseline, cuDNN 9."), 0u) << plan->reason();
  Rng rng(3);
  const auto random = [&](int64_t heads) {
    return cuda_->to_device(random_tensor(rng, {s.batch, s.q_len, heads * s.head_dim}, DType::bf16));
  };
  const Tensor q = random(4), k = random(2), v = random(2), dout = random(4), out = random(4), dq = random(4),
               dk = random(2), dv = random(2), lse = cuda_->empty({s.batch, 4, s.q_len}, DType::f32);
  const AttentionTensors x{heads_view(q), heads_view(k), heads_view(v), heads_view(out), &lse};
  const AttentionGradients grads{heads_view(dout), nullptr,        heads_view(dq),
                                 heads_view(dk),   heads_view(dv), {}};
  const auto step = [&] {
    cuda_->attention(*plan, x);
    cuda_->attention_backward(*plan, x, grads);
  };
  EXPECT_NE(message_of<RunError>([&] { cuda_->capture(step); }).find("inside a captured step"),
            std::string::npos)
      << "nothing was prepared";
  step();
  std::vector<Tensor> want;
  const auto results = {&out, &lse, &dq, &dk, &dv};
  for (const Tensor* t : results) want.push_back(duplicate(cuda_->to_host(*t)));
  const auto graph = cuda_->capture(step);
  for (const Tensor* t : results) cuda_->fill(*t, 7);
  graph->replay();
  graph->replay();
  size_t i = 0;
  for (const Tensor* t : results) {
    EXPECT_TRUE(same_bits(cuda_->to_host(*t), want[i])) << "result " << i;
    ++i;
  }
}

TEST_F(CudnnOnGpu, RepeatsToTheBitUnlessTold) {
  ASSERT_EQ(std::getenv("FLEXCHAT_CUDNN_DETERMINISTIC"), nullptr);
  const AttentionCase c = square_case(900, 2);
  const AttentionResults first = run_attention(c, *cuda_, DType::bf16, "cudnn");
  for (int i = 0; i < 20; ++i) {
    const AttentionResults again = run_attention(c, *cuda_, DType::bf16, "cudnn");
    EXPECT_TRUE(same_bits(first.dq, again.dq) && same_bits(first.dk, again.dk) &&
                same_bits(first.dv, again.dv));
  }
  ::setenv("FLEXCHAT_CUDNN_DETERMINISTIC", "0", 1);
  const auto plan = cuda_->plan_attention(c.shape, c.spec, "cudnn");
  EXPECT_NE(plan->reason().find("sums in any order"), std::string_view::npos) << plan->reason();
  for (const Check& check : check_attention(c, *cuda_, DType::bf16, "cudnn"))
    EXPECT_TRUE(check.pass) << check.name;
  ::setenv("FLEXCHAT_CUDNN_DETERMINISTIC", "yes", 1);
  EXPECT_EQ(message_of<Error>([&] { run_attention(c, *cuda_, DType::bf16, "cudnn"); }),
            "FLEXCHAT_CUDNN_DETERMINISTIC is 'yes'; allowed: 0, 1");
  ::unsetenv("FLEXCHAT_CUDNN_DETERMINISTIC");
}

}  // namespace
}  // namespace flexchat
