// Which loss, and how large its panels are.
#include <algorithm>

#include "base/error.h"
#include "base/strings.h"
#include "ops/loss.h"

namespace flexchat {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;
constexpr int64_t kLeastRows = 128;  // below this the weight gradient's product is starved
// Hosts: logits beside the cores. 4 to 16 MiB measured alike on two cores.
constexpr int64_t kHostLogits = 8 * kMiB, kHostCce = 2 * kMiB, kHostCceRows = 256;
constexpr int64_t kFilterRows = 128, kFilterColumns = 512;  // small enough that whole panels fall below it
// Devices. Every chunk of rows reads and writes the whole gradient of the head, 8*V*C bytes, so chunks are as
// large as an eighth of what bf16 logits would take, or half of it where the program chooses for itself. For
// 16384 x 1280 x 65536 on an H200 an eighth is 9 chunks of 1920 rows and 6 GB at 4.2 TB/s: 1.4 ms, partly
// hidden behind the 3.6 ms of arithmetic of that product; of 64 MiB it were 36 chunks and 5.8 ms.
constexpr int64_t kDeviceLeast = 64 * kMiB, kDeviceMost = 256 * kMiB, kDeviceAutomatic = 1024 * kMiB;
// A panel of f32 logits in one pass: several tiles of 128 x 256 for each of 132 multiprocessors. One tile
// each would stay in the L2, but a product of a single wave reaches 500 TFLOP/s and one of four 700, which is
// worth more than the reads of softmax.
constexpr int64_t kDevicePanel = 128 * kMiB;
// The same with its bf16 gradient and, at C = 1280, 6.3 MiB for the hidden gradient in f32: 1280 x 3328, 130
// tiles for the logits and as many for the head's gradient. Per panel four products of 15 us at best, and two
// softmax kernels of 4 us, on 260 panels: 18 ms, and 2 to 3 us of ramp for each of six launches more.
constexpr int64_t kDeviceCce = 31 * kMiB, kDeviceCceRows = 1280;
// Where softmax needs no logits in memory: 1536 x 5632 is 132 pairs of tiles, two for every two
// multiprocessors of an H200. Wider panels and fewer rows, or the reverse, measured up to 5% slower there.
constexpr int64_t kFusedCceRows = 1536, kFusedCceColumns = 5632;
constexpr int64_t kTile = 128, kTileColumns = 256;  // of products on devices
constexpr int64_t kFusedColumns = 8;                // linear_softmax_gradient takes multiples

int64_t down_to(int64_t n, int64_t multiple) { return n < multiple ? n : n / multiple * multiple; }
int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
std::string bytes_text(int64_t bytes) { return format_bytes(static_cast<double>(bytes)); }

struct Problem {
  bool host, gradients, one_pass;
  int64_t n, c, vocab, master, act;  // bytes of an element
  int64_t sums;                      // bytes a row of linear_softmax's sums; below 0: the device has none
  LossOptions options;

  bool fused() const { return sums >= 0; }
  // Gradients of logits share their memory when they have its dtype.
  int64_t logit_bytes() const { return master + (gradients && act != master ? act : 0); }
  int64_t row_bytes() const { return vocab * (one_pass ? act : logit_bytes()); }
  // A row's gradient of the hidden state in the master dtype, or the sums before.
  int64_t hidden_bytes() const { return one_pass ? std::max(c * master, sums) : 0; }

  int64_t chunk_budget() const {
    if (options.memory_budget > 0) return options.memory_budget;
    if (host) return std::max(kLeastRows, kHostLogits / (vocab * master)) * row_bytes();
    if (options.backend == LossBackend::automatic)
      return std::clamp(n * vocab, kDeviceLeast, kDeviceAutomatic);
    return std::clamp(n * vocab / 4, kDeviceLeast, kDeviceMost);
  }
  int64_t cce_budget() const {
    if (options.memory_budget > 0) return options.memory_budget;
    return host ? kHostCce : kDeviceCce;
  }
};

LossPlan plan_full(const Problem& p) {
  const int64_t n = std::max<int64_t>(p.n, 1);
  const bool fused = p.one_pass && p.fused();
  const int64_t row = fused ? p.row_bytes() + p.hidden_bytes() : p.vocab * p.logit_bytes();
  return {LossBackend::full, "", n, p.vocab, fused, fused, n * row};
}

// Chunks of about equal size, whole tiles of rows where that costs nothing, or halves where one chunk less
// comes of it.
int64_t even_rows(const Problem& p, int64_t most) {
  if (most >= p.n) return std::max<int64_t>(p.n, 1);
  if (p.host) return most;
  const auto chunks = [&](int64_t tile) { return up_to(p.n, down_to(most, tile)) / down_to(most, tile); };
  const int64_t tile = chunks(kTile / 2) < chunks(kTile) ? kTile / 2 : kTile;
  return std::min(down_to(most, tile), up_to((p.n + chunks(tile) - 1) / chunks(tile), tile));
}

LossPlan plan_chunked(const Problem& p) {
  const bool fused = p.one_pass && p.fused(), in_panels = p.one_pass && !fused;
  LossPlan plan{LossBackend::chunked, "", 0, p.vocab, p.one_pass, fused, 0};
  const int64_t budget = p.chunk_budget(), panel = in_panels ? std::min(kDevicePanel, budget / 4) : 0;
  const int64_t row = p.row_bytes() + p.hidden_bytes();
  const int64_t most = (budget - panel) / row;
  check(most > 0, "the chunked loss needs {} for one row of {} logits, more than its budget of {}",
        bytes_text(row), p.vocab, bytes_text(budget));
  plan.rows = even_rows(p, most);
  if (in_panels) {
    const int64_t columns = panel / (plan.rows * p.master);
    plan.columns = std::clamp<int64_t>(down_to(columns, kTileColumns), 1, p.vocab);
  }
  plan.bytes = plan.rows * (row + (in_panels ? plan.columns * p.master : 0));
  return plan;
}

LossPlan plan_cce(const Problem& p) {
  LossPlan plan{LossBackend::cce, "", 0, 0, false, p.fused(), 0};
  const int64_t budget = p.cce_budget();
  // The gradient of the hidden state grows over the panels in the master dtype.
  const int64_t hidden =
      (p.gradients && p.act != p.master ? p.c * p.master : 0) + std::max<int64_t>(p.sums, 0);
  const int64_t logit = plan.fused ? (p.gradients ? p.act : 0) : p.logit_bytes();
  plan.rows = std::clamp<int64_t>(p.n, 1,
                                  p.host       ? kHostCceRows
                                  : plan.fused ? kFusedCceRows
                                               : kDeviceCceRows);
  if (p.options.filter > 0) plan.rows = std::min(plan.rows, kFilterRows);
  while (plan.rows > 1 && plan.rows * hidden > budget / (plan.fused ? 2 : 3)) plan.rows = (plan.rows + 1) / 2;
  plan.columns = logit == 0 ? p.vocab : (budget - plan.rows * hidden) / (plan.rows * logit);
  if (p.options.filter > 0) plan.columns = std::min(plan.columns, kFilterColumns);
  plan.columns = std::min(down_to(plan.columns, kTileColumns), p.vocab);
  if (plan.fused && p.gradients) {
    plan.columns = std::min(plan.columns, kFusedCceColumns) / kFusedColumns * kFusedColumns;
  }
  check(plan.columns > 0, "the cce loss needs {} for one row, more than its budget of {}",
        bytes_text(hidden + logit * (plan.fused ? kFusedColumns : 1)), bytes_text(budget));
  plan.bytes = plan.rows * (hidden + plan.columns * logit);
  return plan;
}

LossPlan choose(const Problem& p) {
  if (p.options.filter > 0) {
    LossPlan plan = plan_cce(p);
    plan.reason = "a filter was asked for, which only cce has";
    return plan;
  }
  if (p.fused() && !p.gradients) {
    LossPlan plan = plan_cce(p);
    plan.reason = "the device takes the softmax of logits as it multiplies";
    return plan;
  }
  const int64_t whole = plan_full(p).bytes, budget = p.chunk_budget();
  LossPlan plan;
  if (whole <= budget) {
    plan = plan_full(p);
    plan.reason =
        fmt::format("all logits take {}, within the budget of {}", bytes_text(whole), bytes_text(budget));
  } else if (const int64_t rows = budget / (p.row_bytes() + p.hidden_bytes()); rows >= kLeastRows) {
    plan = plan_chunked(p);
    plan.reason = fmt::format("all logits would take {}, {} rows at a time {} of the budget of {}",
                              bytes_text(whole), plan.rows, bytes_text(plan.bytes), bytes_text(budget));
  } else {
    plan = plan_cce(p);
    plan.reason = fmt::format("the budget of {} holds the logits of only {} rows", bytes_text(budget), rows);
  }
  return plan;
}

}  // namespace

LossBackend parse_loss_backend(std::string_view name) {
  if (name == "auto") return LossBackend::automatic;
  if (name == "full" || name == "current") return LossBackend::full;
  if (name == "chunked" || name == "liger") return LossBackend::chunked;
  if (name == "cce") return LossBackend::cce;
  fail("unknown loss '{}' (allowed: auto, full or current, chunked or liger, cce){}", name,
       did_you_mean(name, {"auto", "full", "current", "chunked", "liger", "cce"}));
}

std::string_view loss_backend_name(LossBackend backend) {
  switch (backend) {
    case LossBackend::full:
      return "full";
    case LossBackend::chunked:
      return "chunked";
    case LossBackend::cce:
      return "cce";
    default:
      return "auto";
  }
}

LossPlan plan_loss(Backend& backend, int64_t n, int64_t c, int64_t vocab, DType dtype, bool gradients,
                   double cap, const LossOptions& options) {
  check(options.memory_budget >= 0, "the loss's memory budget is {}; allowed: at least 0",
        options.memory_budget);
  check(options.filter >= 0 && options.filter < 1, "the loss's filter is {}; allowed: 0 to below 1",
        options.filter);
  const bool host = backend.arena().host();
  if (options.filter > 0) {
    check(options.backend == LossBackend::cce || options.backend == LossBackend::automatic,
          "the {} loss has no filter; cce has", loss_backend_name(options.backend));
    check(host, "the cce loss filters on hosts only: on {} the host would have to wait for every panel",
          backend.name());
  }
  const Problem p{.host = host,
                  .gradients = gradients,
                  .one_pass = !host && gradients && dtype == DType::bf16 && cap > 0 && cap <= kShiftCap,
                  .n = n,
                  .c = c,
                  .vocab = vocab,
                  .master = dtype_size(backend.master_dtype()),
                  .act = dtype_size(dtype),
                  .sums = options.argmax ? -1 : backend.linear_softmax_bytes(dtype, c, vocab, cap),
                  .options = options};
  LossPlan plan;
  switch (options.backend) {
    case LossBackend::full:
      plan = plan_full(p);
      break;
    case LossBackend::chunked:
      plan = plan_chunked(p);
      break;
    case LossBackend::cce:
      plan = plan_cce(p);
      break;
    case LossBackend::automatic:
      return choose(p);
  }
  plan.reason = "asked for";
  return plan;
}

}  // namespace flexchat
