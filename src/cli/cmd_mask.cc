// flexchat mask: what a mask expression makes attention visit, as counts and as a picture.
#include <fmt/core.h>

#include <chrono>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/file.h"
#include "base/options.h"
#include "base/strings.h"
#include "cli/command.h"
#include "flex/mask_picture.h"
#include "flex/parse.h"
#include "flex/tensor_text.h"

namespace flexchat {
namespace {

constexpr int64_t max_blocks = int64_t{1} << 28;  // more would fill memory, not a picture

struct MaskOptions {
  std::string mask = "causal";
  std::vector<std::string> tensors;
  int64_t q_len = 1024;
  std::optional<int64_t> kv_len;
  int64_t q_offset = 0, n_batch = 1, n_head = 1, block_q = 128, block_kv = 128, row = 0, head = 0;
  std::optional<int64_t> block;
  std::optional<std::string> out;

  void declare(Options& o) {
    o.add("--mask", &mask, "the mask, e.g. \"kv <= q && q - kv < 256\" or \"causal && window(256)\"");
    o.add("--tensor", &tensors, "a captured tensor, e.g. \"doc[b,pos]=0*600,1*424\"; may repeat");
    o.add("--q-len", &q_len, "queries of each row").at_least(0).at_most(1 << 24);
    o.add("--kv-len", &kv_len, "keys of each row (default: as far as the queries reach)")
        .at_least(0)
        .at_most(1 << 24);
    o.add("--q-offset", &q_offset, "logical position of the first query").at_least(0).at_most(1 << 24);
    o.add("--n-batch", &n_batch, "batch rows").at_least(1).at_most(4096);
    o.add("--n-head", &n_head, "query heads").at_least(1).at_most(4096);
    o.add("--block-q", &block_q, "queries in a block").at_least(1);
    o.add("--block-kv", &block_kv, "keys in a block").at_least(1);
    o.add("--block", &block, "both block sizes at once").at_least(1);
    o.add("--row", &row, "batch row to draw").at_least(0);
    o.add("--head", &head, "head to draw").at_least(0);
    o.add("--out", &out, "write the picture to this SVG file").not_recorded();
  }
};

flex::Expr parse_option(const std::string& mask, const std::vector<flex::Capture>& captures) {
  try {
    return flex::parse_mask(mask, captures);
  } catch (const flex::ParseError& e) {
    fail("--mask: {}", e.what());
  }
}

void print_counts(const flex::BlockMask& mask, double milliseconds) {
  const int64_t all = mask.n_blocks(), full = mask.full.count(), partial = mask.partial.count();
  const auto line = [&](const char* name, int64_t n) {
    const double share = all == 0 ? 0 : 100 * static_cast<double>(n) / static_cast<double>(all);
    fmt::print("{:<9}{:>14}  {:6.2f}%\n", name, format_count(n), share);
  };
  line("full", full);
  line("partial", partial);
  line("empty", all - full - partial);
  line("visited", full + partial);
  fmt::print("{} x {} blocks of {} x {} positions", mask.n_q_blocks, mask.n_kv_blocks, mask.block_q,
             mask.block_kv);
  if (mask.n_batch > 1 || mask.n_head > 1)
    fmt::print(", {} batch rows x {} heads", mask.n_batch, mask.n_head);
  fmt::print("; built in {:.3f} ms\n", milliseconds);
}

}  // namespace

int cmd_mask(const Words& words) {
  MaskOptions o;
  Options options("flexchat mask", "what a mask expression makes attention visit, as counts and a picture");
  o.declare(options);
  if (!options.parse(words)) return 0;
  check(o.row < o.n_batch, "--row {} must be less than --n-batch {}", o.row, o.n_batch);
  check(o.head < o.n_head, "--head {} must be less than --n-head {}", o.head, o.n_head);

  flex::Extent extent{.n_batch = o.n_batch,
                      .n_head = o.n_head,
                      .n_q = o.q_len,
                      .n_kv = o.kv_len.value_or(o.q_offset + o.q_len)};
  if (o.q_offset > 0) extent.q_offsets.assign(static_cast<size_t>(o.n_batch), o.q_offset);
  flex::Bindings bindings;
  std::vector<flex::Capture> captures;
  for (const std::string& text : o.tensors)
    captures.push_back(flex::bind_tensor_text(text, extent, bindings));
  const flex::Expr expr = parse_option(o.mask, captures);

  const int64_t block_q = o.block.value_or(o.block_q), block_kv = o.block.value_or(o.block_kv);
  const int64_t n_blocks = (extent.n_q / block_q + 1) * (extent.n_kv / block_kv + 1);
  check(n_blocks <= max_blocks / (o.n_batch * o.n_head),
        "{} blocks for each of {} rows and heads; raise --block (at most {} in all)", format_count(n_blocks),
        o.n_batch * o.n_head, format_count(max_blocks));

  const auto start = std::chrono::steady_clock::now();
  const flex::BlockMask mask = flex::build_block_mask(expr, bindings, extent, o.block.value_or(o.block_q),
                                                      o.block.value_or(o.block_kv));
  const std::chrono::duration<double, std::milli> elapsed = std::chrono::steady_clock::now() - start;

  fmt::print("{}\n\n", flex::to_text(expr));
  if (mask.n_q_blocks <= 64 && mask.n_kv_blocks <= 100) {
    fmt::print("{}# full   + partial   . empty\n\n", flex::mask_text(mask, o.row, o.head));
  }
  print_counts(mask, elapsed.count());
  if (o.out) {
    write_file_atomic(*o.out, flex::mask_svg(expr, bindings, extent, mask, {o.mask, o.row, o.head}));
    fmt::print("picture: {}\n", *o.out);
  }
  return 0;
}

}  // namespace flexchat
