// The table of attention kernels and what plans refuse must agree, on every device that is here.
#include "backend/attention_support.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "backend/cuda_loader.h"
#include "backend/cudnn_library.h"
#include "flex/mods.h"
#include "support/temp_folder.h"

namespace flexchat {
namespace {

std::vector<std::unique_ptr<Backend>> devices() {
  std::vector<std::unique_ptr<Backend>> all;
  all.push_back(make_cpu_backend());
  all.push_back(make_reference_backend());
  if (cuda_available()) all.push_back(make_cuda_backend());
  return all;
}

AttentionShape shape_of(int64_t head_dim) {
  AttentionShape s;
  s.batch = 1;
  s.q_len = s.kv_len = 5;
  s.n_head = s.n_kv_head = 2;
  s.head_dim = head_dim;
  return s;
}

bool plans(Backend& backend, const AttentionSupport& kernel, const AttentionShape& shape,
           const AttentionSpec& spec) {
  try {
    backend.plan_attention(shape, spec, kernel.kernel);
    return true;
  } catch (const Error&) {
    return false;
  }
}

TEST(AttentionSupport, ListsTheKernelsOfEveryDevice) {
  for (const auto& backend : devices()) {
    std::vector<std::string> listed;
    for (const AttentionSupport& s : attention_support()) {
      if (s.device == backend->name().substr(0, backend->name().find(':'))) listed.emplace_back(s.kernel);
    }
    EXPECT_EQ(listed, backend->attention_kernels()) << backend->name();
  }
}

TEST(AttentionSupport, PlansRefuseWhatTheTableDenies) {
  for (const auto& backend : devices()) {
    for (const AttentionSupport& s : attention_support()) {
      const auto kernels = backend->attention_kernels();
      if (std::find(kernels.begin(), kernels.end(), s.kernel) == kernels.end()) continue;
      if (s.kernel == "cudnn" && cudnn_library().handle == nullptr) continue;  // refuses everything
      for (const int64_t d : {8, 32, 64, 72, 80, 96, 128, 192, 256, 512}) {
        const bool listed =
            s.head_dims.empty() || std::find(s.head_dims.begin(), s.head_dims.end(), d) != s.head_dims.end();
        EXPECT_EQ(plans(*backend, s, shape_of(d), {}), listed) << s.kernel << " " << d;
      }
      AttentionShape grouped = shape_of(64), ragged = shape_of(64);
      grouped.n_kv_head = 1;
      ragged.kv_lens = {3};
      EXPECT_EQ(plans(*backend, s, grouped, {}), s.grouped_heads) << s.kernel;
      EXPECT_EQ(plans(*backend, s, ragged, {}), s.ragged) << s.kernel;
      AttentionSpec mask, mod, dropout, pages;
      mask.mask = flex::causal();
      mod.score_mod = flex::softcap(2);
      dropout.dropout = 0.5;
      pages.page_size = 16;
      EXPECT_EQ(plans(*backend, s, shape_of(64), mask), s.mask) << s.kernel;
      EXPECT_EQ(plans(*backend, s, shape_of(64), mod), s.score_mod) << s.kernel;
      EXPECT_EQ(plans(*backend, s, shape_of(64), dropout), s.dropout) << s.kernel;
      EXPECT_EQ(plans(*backend, s, shape_of(64), pages), s.pages) << s.kernel;
    }
  }
}

TEST(AttentionSupport, RefusalsSayWhatIsAllowed) {
  EXPECT_EQ(message_of<Error>([] { check_attention_support("cuda_mma", shape_of(100), {}); }),
            "attention kernel cuda_mma: head dim 100; allowed are 16, 32, 64, 80, 96, 128, 192, 256");
  EXPECT_NO_THROW(check_attention_support("cuda_mma", shape_of(96), {}));
  EXPECT_NO_THROW(check_attention_support("cpu", shape_of(100), {}));
}

}  // namespace
}  // namespace flexchat
