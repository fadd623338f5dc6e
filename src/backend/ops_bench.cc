#include "backend/ops_bench.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>

#include "base/error.h"
#include "base/rng.h"

namespace flexchat {
namespace {

// Bytes of all sets of an op's operands: on a device milliseconds of work a sample, on the CPU few, for there
// drawing them takes longer than the op.
constexpr int64_t kDeviceRotation = int64_t{4} << 30, kHostRotation = int64_t{32} << 20;
constexpr int64_t kMaxSets = 16;
constexpr int64_t kLogitBytes = int64_t{1} << 30;

using Tensors = std::vector<Tensor>;

// One operand: where its values come from.
struct Spec {
  Shape shape;
  DType dtype;
  enum Values { any, positive, ids } values = any;
  int64_t bound = 0;     // ids lie below
  bool changed = false;  // in place: drawn anew before every sample, lest values run off to 0 or infinity
};

class OpsBench {
 public:
  OpsBench(Backend& backend, int64_t n, int64_t c, int64_t v, DType dtype, int repeats)
      : backend_(backend), c_(c), v_(v), dtype_(dtype), repeats_(repeats) {
    t_len_ = std::min<int64_t>(n, 2048);
    batch_ = n / t_len_;
    n_ = batch_ * t_len_;
    d_ = c % 128 == 0 ? 128 : c;
  }

  std::vector<OpTiming> run() {
    // Bytes of (N, C): of activations, and of master values gathered for every token.
    const double rows = static_cast<double>(n_),
                 a = static_cast<double>(dtype_size(dtype_)) * rows * static_cast<double>(c_),
                 f = static_cast<double>(dtype_size(backend_.master_dtype())) * rows *
                     static_cast<double>(c_);
    const Spec x = act({n_, c_}), changed = {x.shape, dtype_, Spec::any, 0, true};
    time("copy", 2 * a, {x, x}, [this](const Tensors& t) { backend_.copy(t[0], t[1]); });
    time_norms(a, f, x, changed);
    time_rope(a);
    time_gates(a, f, x, changed);
    time("relu_squared", 2 * a, {x, x}, [this](const Tensors& t) { backend_.relu_squared(t[0], t[1]); });
    time("relu_squared_backward", 4 * a, {changed, changed},
         [this](const Tensors& t) { backend_.relu_squared_backward(t[0], t[1]); });
    time_mixes(a, x, changed);
    time_losses();
    return std::move(results_);
  }

 private:
  Spec act(Shape shape) const { return {std::move(shape), dtype_}; }
  Spec master(Shape shape) const { return {std::move(shape), backend_.master_dtype()}; }
  Spec positive(Shape shape) const { return {std::move(shape), backend_.master_dtype(), Spec::positive}; }
  Spec ids(int64_t bound) const { return {{n_}, DType::i32, Spec::ids, bound}; }

  void time_norms(double a, double f, const Spec& x, const Spec& changed) {
    const Spec rstd = positive({n_}), table = master({v_, c_});
    time("rms_norm", 2 * a, {x, x, rstd}, [this](const Tensors& t) { backend_.rms_norm(t[0], t[1], t[2]); });
    time("rms_norm_backward", 3 * a, {x, x, rstd, x},
         [this](const Tensors& t) { backend_.rms_norm_backward(t[0], t[1], t[2], false, t[3]); });
    time("rms_norm_backward +=", 4 * a, {x, x, rstd, changed},
         [this](const Tensors& t) { backend_.rms_norm_backward(t[0], t[1], t[2], true, t[3]); });
    // Rows of a table that tokens name count once: at most V of them.
    const double distinct = f * std::min(1.0, static_cast<double>(v_) / static_cast<double>(n_));
    time("embed_norm", a + distinct, {table, ids(v_), x, rstd},
         [this](const Tensors& t) { backend_.embed_norm(t[0], t[1], t[2], t[3]); });
    time("embed_norm_backward", a + 3 * distinct, {x, table, ids(v_), rstd, table},
         [this](const Tensors& t) { backend_.embed_norm_backward(t[0], t[1], t[2], t[3], t[4]); });
  }

  void time_rope(double a) {
    const int64_t heads = 2 * c_ / d_;  // of queries and keys
    const Spec row = {{batch_, t_len_, 3 * c_}, dtype_, Spec::any, 0, true};
    const Spec table = master({t_len_, d_ / 2}), rstd = positive({n_, heads});
    time("rope_norm", 4 * a, {row, table, table, rstd},
         [=, this](const Tensors& t) { backend_.rope_norm(t[0], t[1], t[2], heads, 0, 1.2, t[3]); });
    time("rope_norm_backward", 6 * a, {row, table, table, rstd, row}, [=, this](const Tensors& t) {
      backend_.rope_norm_backward(t[0], t[1], t[2], heads, 0, 1.2, t[3], t[4]);
    });
  }

  void time_gates(double a, double f, const Spec& x, const Spec& changed) {
    const int64_t heads = c_ / d_, channels = std::min<int64_t>(c_, 12);
    const Spec table = master({v_, c_}), weight = master({heads, channels}), gate = positive({n_, heads});
    const Spec qkv = {{n_, 3 * c_}, dtype_, Spec::any, 0, true};
    const double distinct = f * std::min(1.0, static_cast<double>(v_) / static_cast<double>(n_));
    time("value_gate", 2 * a + distinct, {table, ids(v_), x, weight, qkv, gate},
         [this](const Tensors& t) { backend_.value_gate(t[0], t[1], t[2], t[3], t[4], t[5]); });
    time("value_gate_backward", a + 3 * distinct,
         {qkv, table, ids(v_), x, weight, gate, table, weight, changed}, [this](const Tensors& t) {
           backend_.value_gate_backward(t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8]);
         });
  }

  void time_mixes(double a, const Spec& x, const Spec& changed) {
    const Spec scalar = master({1});
    time("mix", 3 * a, {x, x, x, scalar}, [this](const Tensors& t) {
      backend_.mix({&t[3], 0, 1.0}, t[0], {nullptr, 0, 0.5}, t[1], t[2]);
    });
    time("mix_backward", 6 * a, {x, x, x, x, changed, scalar, scalar}, [this](const Tensors& t) {
      backend_.mix_backward(t[0], {&t[5], 0, 1.0}, t[1], {&t[5], 0, 0.5}, t[2], false, t[3], true, t[4],
                            &t[6], &t[6]);
    });
    const Spec e = act({batch_, t_len_, c_}), sigmoid = positive({batch_, t_len_});
    const Spec weight = master({1, std::min<int64_t>(c_, 24)});
    time("smear", 2 * a, {e, weight, scalar, e, sigmoid},
         [this](const Tensors& t) { backend_.smear(t[0], nullptr, t[1], t[2], t[3], t[4]); });
    time("smear_backward", 3 * a, {e, e, weight, scalar, sigmoid, e, weight, scalar},
         [this](const Tensors& t) {
           backend_.smear_backward(t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7]);
         });
  }

  void time_losses() {
    const int64_t size = dtype_size(backend_.master_dtype());
    const int64_t rows = std::clamp<int64_t>(kLogitBytes / (size * v_), 1, n_);
    const double logits = static_cast<double>(rows * v_ * size),
                 grad = static_cast<double>(rows * v_ * dtype_size(dtype_));
    const Spec z = master({rows, v_}), changed = {z.shape, z.dtype, Spec::any, 0, true};
    const Spec index = {{rows}, DType::i32, Spec::ids, v_}, nll = master({rows});
    time("softcap", 2 * logits, {changed}, [this](const Tensors& t) { backend_.softcap(t[0], 15); });
    time("argmax", logits, {z, index}, [this](const Tensors& t) { backend_.argmax(t[0], t[1]); });
    time("cross_entropy", logits, {changed, index, nll},
         [this](const Tensors& t) { backend_.cross_entropy(t[0], t[1], 15, 1e-3, t[2], nullptr); });
    time("cross_entropy + gradient", logits + grad, {changed, index, nll, act({rows, v_})},
         [this](const Tensors& t) { backend_.cross_entropy(t[0], t[1], 15, 1e-3, t[2], &t[3]); });
    time("cross_entropy in place", 2 * logits, {changed, index, nll},
         [this](const Tensors& t) { backend_.cross_entropy(t[0], t[1], 15, 1e-3, t[2], &t[0]); });
  }

  void draw(const Spec& spec, const Tensor& out) {
    ++stream_;
    if (spec.values == Spec::ids) {
      const Tensor host(host_arena(), spec.shape, DType::i32);
      Rng rng(1, stream_);
      for (int64_t i = 0; i < host.numel(); ++i) {
        host.as<int32_t>()[i] = static_cast<int32_t>(rng.below(static_cast<uint64_t>(spec.bound)));
      }
      backend_.copy(host, out);
    } else if (spec.values == Spec::positive) {
      backend_.draw({Distribution::uniform, 0.5, 1.5}, 1, stream_, out);
    } else {
      backend_.draw({Distribution::uniform, -1.5, 1.5}, 1, stream_, out);
    }
  }

  void time(const char* op, double bytes, const std::vector<Spec>& specs,
            const std::function<void(const Tensors&)>& kernel) {
    int64_t set_bytes = 0;
    for (const Spec& s : specs) set_bytes += shape_numel(s.shape) * dtype_size(s.dtype);
    const int64_t rotation = backend_.arena().host() ? kHostRotation : kDeviceRotation;
    std::vector<Tensors> sets(static_cast<size_t>(std::clamp<int64_t>(rotation / set_bytes, 2, kMaxSets)));
    for (Tensors& set : sets) {
      for (const Spec& s : specs) draw(s, set.emplace_back(backend_.empty(s.shape, s.dtype)));
    }
    std::vector<double> seconds;
    for (int i = -1; i < repeats_; ++i) {  // the first warms up
      for (const Tensors& set : sets) {
        for (size_t k = 0; k < specs.size(); ++k) {
          if (specs[k].changed && i >= 0) draw(specs[k], set[k]);
        }
      }
      backend_.synchronize();
      const auto start = std::chrono::steady_clock::now();
      for (const Tensors& set : sets) kernel(set);
      backend_.synchronize();
      const double elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      if (i >= 0) seconds.push_back(elapsed / static_cast<double>(sets.size()));
    }
    std::nth_element(seconds.begin(), seconds.begin() + repeats_ / 2, seconds.end());
    OpTiming timing = {op, seconds[static_cast<size_t>(repeats_ / 2)], bytes};
    timing.gb_per_s = bytes / timing.seconds / 1e9;
    timing.fraction_of_copy = results_.empty() ? 1 : timing.gb_per_s / results_.front().gb_per_s;
    results_.push_back(timing);
  }

  Backend& backend_;
  int64_t n_ = 0, batch_ = 0, t_len_ = 0, c_, d_ = 0, v_;
  DType dtype_;
  int repeats_;
  uint64_t stream_ = 0;
  std::vector<OpTiming> results_;
};

}  // namespace

std::vector<OpTiming> time_ops(Backend& backend, int64_t n, int64_t c, int64_t v, DType dtype, int repeats) {
  check(n >= 1 && c >= 2 && c % 2 == 0 && v >= 1 && repeats >= 1,
        "timing ops of ({}, {}) with {} entries, {} times: sizes must be at least 1 and the width even", n, c,
        v, repeats);
  return OpsBench(backend, n, c, v, dtype, repeats).run();
}

}  // namespace flexchat
