// Pictures of block masks.
#include "flex/mask_picture.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "flex/mods.h"

namespace flexchat::flex {
namespace {

size_t occurrences(const std::string& text, const std::string& part) {
  size_t n = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++n;
  return n;
}

TEST(MaskPicture, DrawsTheListedBlocks) {
  const Extent extent{.n_q = 64, .n_kv = 64};
  const Expr expr = causal();
  const BlockMask mask = build_block_mask(expr, {}, extent, 16, 16);
  EXPECT_EQ(mask_text(mask, 0, 0), "+...\n#+..\n##+.\n###+\n");
  const std::string svg = mask_svg(expr, {}, extent, mask, {"kv <= q && b < 1", 0, 0});
  EXPECT_NE(svg.find("<title>kv &lt;= q &amp;&amp; b &lt; 1</title>"), std::string::npos);
  EXPECT_NE(svg.find("full 6 (37.5%)"), std::string::npos);
  EXPECT_NE(svg.find("partial 4 (25.0%)"), std::string::npos);
  EXPECT_NE(svg.find("empty 6 (37.5%)"), std::string::npos);
  // One run of full blocks in each of three rows; one run of elements in each of 64 rows.
  const auto path_of = [&](const std::string& colour) {
    const size_t begin = svg.find("<path fill=\"" + colour);
    return svg.substr(begin, svg.find("/>", begin) - begin);
  };
  EXPECT_EQ(occurrences(path_of("#2b6cb0"), "M"), 3u);
  EXPECT_EQ(occurrences(path_of("#fbd38d"), "M"), 4u);
  EXPECT_EQ(occurrences(path_of("#dd6b20"), "M"), 64u);
}

TEST(MaskPicture, LeavesOutElementsOfLargeMasks) {
  const Extent extent{.n_q = 4096, .n_kv = 4096};
  const Expr expr = causal() && window(500);
  const BlockMask mask = build_block_mask(expr, {}, extent, 128, 128);
  const std::string svg = mask_svg(expr, {}, extent, mask, {"window", 0, 0});
  EXPECT_EQ(svg.find("allowed element"), std::string::npos);
  EXPECT_LT(svg.size(), 20000u);
}

TEST(MaskPicture, DrawsMasksOfNothing) {
  const Extent extent{};
  const BlockMask mask = build_block_mask(causal(), {}, extent, 16, 16);
  EXPECT_EQ(mask.visited_share(), 0);
  EXPECT_EQ(mask_svg(causal(), {}, extent, mask, {"nothing", 0, 0}).find("nan"), std::string::npos);
  EXPECT_THROW(mask_svg(causal(), {}, extent, mask, {"nothing", 1, 0}), Error);
}

}  // namespace
}  // namespace flexchat::flex
