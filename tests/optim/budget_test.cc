// The depth dial and the budget rules against published values.
#include "optim/budget.h"

#include <gtest/gtest.h>

#include <cmath>

#include "base/error.h"

namespace flexchat {
namespace {

GptConfig modern(int64_t depth) { return config_for_depth(Arch::modern, depth, 2048, 32768); }
GptConfig classic(int64_t depth) { return config_for_depth(Arch::classic, depth, 2048, 65536); }

template <class Fn>
std::string error_of(const Fn& fn) {
  try {
    fn();
  } catch (const Error& e) {
    return e.what();
  }
  return "accepted";
}

TEST(DepthDial, Classic) {
  for (const auto& [depth, n_head] : {std::pair{1, 1}, {2, 1}, {3, 2}, {4, 2}, {12, 6}, {20, 10}, {32, 16}}) {
    const GptConfig config = classic(depth);
    EXPECT_EQ(config.n_embd, 64 * depth);
    EXPECT_EQ(config.n_head, n_head);
    EXPECT_EQ(config.n_kv_head, n_head);
    EXPECT_EQ(config.n_layer, depth);
  }
  EXPECT_EQ(error_of([] { classic(5); }), "no classic model of depth 5: n_head 3 must divide n_embd 320");
  EXPECT_THROW(classic(11), Error);
  EXPECT_THROW(classic(0), Error);
}

TEST(DepthDial, Modern) {
  for (const auto& [depth, n_embd] :
       {std::pair{1, 128}, {2, 128}, {5, 384}, {12, 768}, {20, 1280}, {24, 1536}}) {
    EXPECT_EQ(modern(depth).n_embd, n_embd);
    EXPECT_EQ(modern(depth).head_dim(), 128);
    EXPECT_EQ(modern(depth).n_kv_head, n_embd / 128);
  }
  const GptConfig narrow = config_for_depth(Arch::modern, 3, 512, 1000, {40, 32});
  EXPECT_EQ(narrow.n_embd, 128);
  EXPECT_EQ(narrow.n_head, 4);
  EXPECT_EQ(narrow.window_pattern, "SSSL");
  EXPECT_EQ(count_params(modern(5)).transformer_matrices, 8'847'468);
  EXPECT_EQ(flops_per_token(modern(5)), 154'534'680.0);
  EXPECT_THROW(config_for_depth(Arch::modern, 2, 512, 1000, {0, 128}), Error);
}

TEST(Budget, ModernRules) {
  struct Row {
    int64_t depth, batch;
    double decay;
    int64_t steps;
  };
  for (const Row& row : {Row{8, 262144, 0.519723, 1920},
                         {12, 524288, 0.28, 2520},
                         {20, 1048576, 0.100188, 4980},
                         {24, 1048576, 0.0597384, 8352}}) {
    const Budget b = make_budget(modern(row.depth), {});
    EXPECT_EQ(b.total_batch_size, row.batch);
    EXPECT_NEAR(0.28 * b.weight_decay_factor / row.decay, 1, 3e-6);
    EXPECT_EQ(b.num_iterations, row.steps);
    EXPECT_DOUBLE_EQ(b.lr_factor, std::sqrt(static_cast<double>(row.batch) / 524288));
    EXPECT_EQ(b.horizon, "target_param_data_ratio");
    EXPECT_EQ(b.tokens(), static_cast<double>(row.batch * row.steps));
  }
  const Budget small = make_budget(config_for_depth(Arch::modern, 4, 512, 4096), {});
  EXPECT_EQ(small.total_batch_size, 131072);
  EXPECT_EQ(small.num_iterations, 384);
  EXPECT_NEAR(0.28 * small.weight_decay_factor, 2.939980774145804, 1e-12);
}

TEST(Budget, ModernWithAChosenBatchOrRatio) {
  const Budget batch = make_budget(modern(12), {.total_batch_size = 262144});
  EXPECT_EQ(batch.num_iterations, 5040);
  EXPECT_DOUBLE_EQ(batch.lr_factor, std::sqrt(0.5));
  EXPECT_DOUBLE_EQ(0.28 * batch.weight_decay_factor, 0.19798989873223333);
  const Budget ratio = make_budget(modern(20), {.target_param_data_ratio = 10.5});
  EXPECT_EQ(ratio.total_batch_size, 1048576);
  EXPECT_EQ(ratio.num_iterations, 4357);
}

TEST(Budget, ClassicRules) {
  const Budget b = make_budget(classic(12), {});
  EXPECT_EQ(b.total_batch_size, 524288);
  EXPECT_EQ(b.num_iterations, 7080);
  EXPECT_EQ(b.lr_factor, 1);
  EXPECT_EQ(b.weight_decay_factor, 1);
  EXPECT_EQ(make_budget(classic(20), {}).num_iterations, 21400);
  EXPECT_EQ(make_budget(classic(32), {}).num_iterations, 71680);
  EXPECT_EQ(make_budget(classic(12), {.target_flops = 1e19}).num_iterations, 18374);
  EXPECT_EQ(make_budget(classic(32), {.target_flops = 1e19}).num_iterations, 1579);
  EXPECT_EQ(make_budget(classic(12), {.total_batch_size = 1000}).num_iterations, 3711959);
}

TEST(Budget, FirstHorizonGivenWins) {
  const Budget flops = make_budget(modern(20), {.target_flops = 1e18, .target_param_data_ratio = 12});
  EXPECT_EQ(flops.num_iterations, 330);
  EXPECT_EQ(flops.horizon, "target_flops");
  EXPECT_EQ(flops.total_batch_size, 1048576) << "the batch follows the ratio still";
  const Budget steps = make_budget(modern(20), {.num_iterations = 7, .target_flops = 1e18});
  EXPECT_EQ(steps.num_iterations, 7);
  EXPECT_EQ(steps.horizon, "num_iterations");
  EXPECT_EQ(steps.total_batch_size, 1048576);
  // Halves of a step round to even: 2.5 -> 2, 3.5 -> 4.
  const double step = flops_per_token(classic(12)) * 524288;
  EXPECT_EQ(make_budget(classic(12), {.target_flops = 2.5 * step}).num_iterations, 2);
  EXPECT_EQ(make_budget(classic(12), {.target_flops = 3.5 * step}).num_iterations, 4);
}

TEST(Budget, Refusals) {
  EXPECT_EQ(error_of([] { make_budget(classic(12), {.target_flops = 1e9}); }),
            "target_flops asks for less than one step of 524288 tokens; raise it, lower the total batch "
            "size, or set "
            "the number of iterations");
  EXPECT_THROW(make_budget(classic(12), {.num_iterations = 0}), Error);
  EXPECT_THROW(make_budget(classic(12), {.target_flops = -1}), Error);
  EXPECT_THROW(make_budget(classic(12), {.target_flops = std::nan("")}), Error);
  EXPECT_THROW(make_budget(classic(12), {.target_flops = 1e300}), Error);
  EXPECT_THROW(make_budget(modern(12), {.target_param_data_ratio = 0}), Error);
  EXPECT_THROW(make_budget(modern(12), {.target_param_data_ratio = 1e-12}), Error);
  EXPECT_THROW(make_budget(modern(12), {.total_batch_size = 0}), Error);
}

TEST(Budget, GradientAccumulation) {
  EXPECT_EQ(grad_accum_steps(524288, 32, 2048), 8);
  EXPECT_EQ(grad_accum_steps(524288, 32, 2048, 8), 1);
  EXPECT_EQ(error_of([] { grad_accum_steps(1000, 3, 64); }),
            "total batch size 1000 must be a multiple of device batch size * sequence length * world size = "
            "3 * 64 * "
            "1 = 192");
  EXPECT_THROW(grad_accum_steps(100, 2, 64), Error);
  EXPECT_THROW(grad_accum_steps(0, 2, 64), Error);
  EXPECT_THROW(grad_accum_steps(64, 0, 64), Error);
}

}  // namespace
}  // namespace flexchat
