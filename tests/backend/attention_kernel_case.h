// One attention on one backend against the double-precision reference, forward and backward: any shape,
// layout, mask, score mod and dtype. Outputs and everything outside the tensors' views start as NaN.
#pragma once

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "flex/derivative.h"
#include "testing/f32_error.h"
#include "testing/kernel_check.h"
#include "testing/tensors.h"

namespace flexchat {

struct KernelCase {
  std::string name;
  AttentionShape shape;
  AttentionSpec spec;
  DType dtype = DType::f32;
  int64_t head_gap = 0, token_gap = 0;  // elements between heads, and between tokens, that nobody may touch
  bool lse_gradient = false;

  std::string label() const {
    const auto list = [](const std::vector<int64_t>& v) { return fmt::format("[{}]", fmt::join(v, " ")); };
    return fmt::format(
        "{}: B{} Tq{}{} Tk{}{} offsets{} H{} G{} D{} {} causal {} window {} scale {:.3g} dropout {} gaps {} "
        "{}"
        "{}{}",
        name, shape.batch, shape.q_len, list(shape.q_lens), shape.kv_len, list(shape.kv_lens),
        list(shape.q_offsets), shape.n_head, shape.n_kv_head, shape.head_dim, dtype_name(dtype), spec.causal,
        spec.window, spec.scale, spec.dropout, head_gap, token_gap,
        spec.mask ? "\n  mask " + flex::to_text(*spec.mask) : "",
        spec.score_mod ? "\n  mod " + flex::to_text(*spec.score_mod) : "");
  }
};

// A buffer (B, T, heads, D) with gaps, and its view.
struct HeadBuffer {
  Tensor data;
  int64_t batch, tokens, heads, d, head_stride, token_stride;

  HeadBuffer(const KernelCase& c, int64_t batch_rows, int64_t n_tokens, int64_t n_heads)
      : batch(batch_rows),
        tokens(n_tokens),
        heads(n_heads),
        d(c.shape.head_dim),
        head_stride(d + c.head_gap),
        token_stride(heads * head_stride + c.token_gap) {
    data = filled_tensor({batch, std::max<int64_t>(tokens, 1), token_stride}, c.dtype, std::nan(""));
  }
  int64_t at(int64_t b, int64_t t, int64_t h) const {
    return (b * data.dim(1) + t) * token_stride + h * head_stride;
  }
  // Values of unit scale in the first lens[b] rows of each batch row (all of them without lens): normal ones,
  // or between -1 and 1.
  enum class Values : uint8_t { normal, uniform };
  void randomize(Rng& rng, const std::vector<int64_t>& lens, Values kind) const {
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t n = lens.empty() ? tokens : lens[static_cast<size_t>(b)];
      for (int64_t i = 0; i < n * heads * d; ++i)
        data.set(at(b, i / d / heads, i / d % heads) + i % d,
                 kind == Values::normal ? rng.normal() : 2 * rng.uniform() - 1);
    }
  }
  HeadsView view(const Tensor& x) const {
    return {x.data(), x.dtype(), x.dim(1) * x.dim(2), token_stride, head_stride == d ? 0 : head_stride};
  }
  // The elements of the view, side by side; `untouched` (if given) tells whether all others are still NaN.
  Tensor inside(const Tensor& x, bool* untouched = nullptr) const {
    const Tensor result(host_arena(), {batch, tokens, heads, d}, x.dtype());
    const auto size = static_cast<int64_t>(dtype_size(x.dtype()));
    const auto* from = static_cast<const char*>(x.data());
    auto* to = static_cast<char*>(result.data());
    int64_t end = 0;  // of what has been looked at
    const auto skip_to = [&](int64_t begin) {
      for (; untouched && end < begin; ++end) *untouched = *untouched && std::isnan(x.get(end));
    };
    for (int64_t row = 0; row < batch * tokens * heads; ++row, to += d * size) {
      const int64_t begin = at(row / heads / tokens, row / heads % tokens, row % heads);
      std::memcpy(to, from + begin * size, static_cast<size_t>(d * size));
      skip_to(begin);
      end = begin + d;
    }
    skip_to(x.numel());
    return result;
  }
};

// What a forward and a backward give, in the order of kAttentionNames and then the captured tensors.
struct KernelResults {
  std::vector<std::string> names;
  std::vector<Tensor> tensors;  // in host memory, without gaps
  bool untouched = true;        // was everything outside the views left alone?
};

class AttentionCheck {
 public:
  AttentionCheck(const KernelCase& c, uint64_t seed)
      : c_(c),
        q_(c, c.shape.batch, c.shape.q_len, c.shape.n_head),
        k_(c, c.shape.batch, c.shape.kv_len, c.shape.n_kv_head),
        v_(k_),
        dout_(q_) {
    Rng rng(seed);
    k_.data = duplicate(k_.data);
    v_.data = duplicate(k_.data);
    dout_.data = duplicate(q_.data);
    q_.randomize(rng, c.shape.q_lens, HeadBuffer::Values::normal);
    k_.randomize(rng, c.shape.kv_lens, HeadBuffer::Values::normal);
    v_.randomize(rng, c.shape.kv_lens, HeadBuffer::Values::uniform);
    dout_.randomize(rng, c.shape.q_lens, HeadBuffer::Values::normal);
    const Shape rows = {c.shape.batch, c.shape.n_head, c.shape.q_len};
    if (c.lse_gradient) dlse_ = random_tensor(rng, rows, DType::f32);
    const auto reference = make_reference_backend();
    expected_ = forward(*reference, "auto", DType::f64);
    // The backward starts from the same rounded results everywhere.
    out_ = HeadBuffer(q_);
    out_->data = filled_tensor(q_.data.shape(), c.dtype, 0);
    for (int64_t i = 0; i < expected_.tensors[0].numel(); ++i) {
      const int64_t d = q_.d, h = i / d % q_.heads, t = i / d / q_.heads % c.shape.q_len,
                    b = i / d / q_.heads / c.shape.q_len;
      out_->data.set(out_->at(b, t, h) + i % d, expected_.tensors[0].get(i));
    }
    lse_ = converted(expected_.tensors[1], DType::f32);
    const KernelResults backward_results = backward(*reference, "auto", DType::f64);
    expected_.names.insert(expected_.names.end(), backward_results.names.begin(),
                           backward_results.names.end());
    expected_.tensors.insert(expected_.tensors.end(), backward_results.tensors.begin(),
                             backward_results.tensors.end());
  }

  // All results of a kernel of a backend.
  KernelResults run(Backend& backend, const std::string& kernel = "auto") const {
    KernelResults all = forward(backend, kernel, c_.dtype);
    const KernelResults more = backward(backend, kernel, c_.dtype);
    all.names.insert(all.names.end(), more.names.begin(), more.names.end());
    all.tensors.insert(all.tensors.end(), more.tensors.begin(), more.tensors.end());
    all.untouched = all.untouched && more.untouched;
    return all;
  }

  // `roundings` of what is between inputs and results to the dtype: matrix units take weights and dS in it.
  void expect_right(const KernelResults& got, const std::string& where, int roundings = 1) const {
    const std::string label = where + " " + c_.label();
    EXPECT_TRUE(got.untouched) << label << ": wrote outside its output";
    for (size_t i = 0; i < expected_.tensors.size(); ++i) {
      Tolerance t = tolerance(i);
      if (c_.dtype != DType::f32) t.of_scale += (roundings - 1) * unit_roundoff(c_.dtype);
      expect_near(got.tensors[i], expected_.tensors[i], t, label + ", " + expected_.names[i]);
    }
  }

  // The largest error of the output, and its bound.
  double out_error(const KernelResults& got) const {
    return max_difference(got.tensors[0], expected_.tensors[0]);
  }

  static void expect_same_bits(const KernelResults& a, const KernelResults& b, const std::string& where) {
    for (size_t i = 0; i < a.tensors.size(); ++i)
      EXPECT_TRUE(same_bits(a.tensors[i], b.tensors[i])) << where << ": other bits in " << a.names[i];
  }

  // The forward with its keys in pages of `page_size` placed by `permutation` seed, through a block table.
  Tensor paged_out(Backend& backend, int64_t page_size, uint64_t seed) const {
    const AttentionShape& s = c_.shape;
    const int64_t per_row = (s.kv_len + page_size - 1) / page_size, n_pages = s.batch * per_row + 2;
    Rng rng(seed);
    std::vector<int32_t> place(static_cast<size_t>(n_pages));
    for (size_t i = 0; i < place.size(); ++i) place[i] = static_cast<int32_t>(i);
    for (size_t i = place.size() - 1; i > 0; --i) std::swap(place[i], place[rng.below(i + 1)]);
    const Tensor table(host_arena(), {s.batch, std::max<int64_t>(per_row, 1)}, DType::i32);
    backend_fill(table);
    HeadBuffer kp(c_, n_pages, page_size, s.n_kv_head), vp(c_, n_pages, page_size, s.n_kv_head);
    for (int64_t i = 0; i < s.batch * per_row; ++i) table.set(i, place[static_cast<size_t>(i)]);
    for (int64_t b = 0; b < s.batch; ++b) {
      for (int64_t j = 0; j < s.extent().kv_len(b); ++j) {
        const auto page = static_cast<int64_t>(table.get(b * table.dim(1) + j / page_size));
        for (int64_t i = 0; i < s.n_kv_head * k_.d; ++i) {
          const int64_t to = kp.at(page, j % page_size, i / k_.d) + i % k_.d,
                        from = k_.at(b, j, i / k_.d) + i % k_.d;
          kp.data.set(to, k_.data.get(from));
          vp.data.set(to, v_.data.get(from));
        }
      }
    }
    AttentionSpec spec = c_.spec;
    spec.page_size = page_size;
    const auto plan = backend.plan_attention(s, spec);
    const Tensor q = backend.to_device(q_.data), k = backend.to_device(kp.data),
                 v = backend.to_device(vp.data), o = backend.to_device(poisoned(q_.data, c_.dtype)),
                 t = backend.to_device(table);
    backend.attention(*plan, {q_.view(q), kp.view(k), vp.view(v), q_.view(o), nullptr, &t});
    return q_.inside(backend.to_host(o));
  }

  const KernelResults& expected() const { return expected_; }

 private:
  static Tensor poisoned(const Tensor& like, DType dtype) {
    return filled_tensor(like.shape(), dtype, std::nan(""));
  }
  static void backend_fill(const Tensor& table) {
    for (int64_t i = 0; i < table.numel(); ++i) table.set(i, 0);
  }
  static Tensor moved(Backend& backend, const Tensor& x, DType dtype) {
    return backend.to_device(x.dtype() == dtype ? duplicate(x) : converted(x, dtype));
  }

  KernelResults forward(Backend& backend, const std::string& kernel, DType dtype) const {
    const auto plan = backend.plan_attention(c_.shape, c_.spec, kernel);
    const Tensor q = moved(backend, q_.data, dtype), k = moved(backend, k_.data, dtype),
                 v = moved(backend, v_.data, dtype), o = moved(backend, poisoned(q_.data, dtype), dtype);
    const Tensor lse = backend.to_device(filled_tensor({c_.shape.batch, c_.shape.n_head, c_.shape.q_len},
                                                       backend.master_dtype(), std::nan("")));
    backend.attention(*plan, {q_.view(q), k_.view(k), v_.view(v), q_.view(o), &lse});
    KernelResults results{{"out", "lse"}, {}, true};
    results.tensors = {q_.inside(backend.to_host(o), &results.untouched), backend.to_host(lse)};
    return results;
  }

  KernelResults backward(Backend& backend, const std::string& kernel, DType dtype) const {
    const auto plan = backend.plan_attention(c_.shape, c_.spec, kernel);
    const DType master = backend.master_dtype();
    const Tensor q = moved(backend, q_.data, dtype), k = moved(backend, k_.data, dtype),
                 v = moved(backend, v_.data, dtype), o = moved(backend, out_->data, dtype),
                 dout = moved(backend, dout_.data, dtype), lse = moved(backend, lse_, master);
    const Tensor dq = moved(backend, poisoned(q_.data, dtype), dtype),
                 dk = moved(backend, poisoned(k_.data, dtype), dtype),
                 dv = moved(backend, poisoned(k_.data, dtype), dtype);
    const Tensor dlse = dlse_.defined() ? moved(backend, dlse_, master) : Tensor();
    AttentionGradients grads{
        q_.view(dout), dlse_.defined() ? &dlse : nullptr, q_.view(dq), k_.view(dk), k_.view(dv), {}};
    for (const flex::Capture& capture : differentiable()) {
      const Tensor& values = c_.spec.bindings.at(capture);
      grads.captures.emplace_back(capture.name(),
                                  backend.to_device(filled_tensor(values.shape(), master, std::nan(""))));
    }
    backend.attention_backward(*plan, {q_.view(q), k_.view(k), v_.view(v), q_.view(o), &lse}, grads);
    KernelResults results{{"dq", "dk", "dv"}, {}, true};
    results.tensors = {q_.inside(backend.to_host(dq), &results.untouched),
                       k_.inside(backend.to_host(dk), &results.untouched),
                       k_.inside(backend.to_host(dv), &results.untouched)};
    for (const auto& [name, grad] : grads.captures) {
      results.names.push_back("d " + name);
      results.tensors.push_back(backend.to_host(grad));
    }
    return results;
  }

  std::vector<flex::Capture> differentiable() const {
    std::vector<flex::Capture> result;
    if (!c_.spec.score_mod) return result;
    for (const flex::Capture& capture : flex::Program({*c_.spec.score_mod}).captures) {
      if (capture.differentiable()) result.push_back(capture);
    }
    return result;
  }

  // f32: 5e-7 of a unit-scale output, more for the sums of gradients; what rounding inside the score mod and
  // its derivatives may add, by running error analysis.
  Tolerance tolerance(size_t result) const {
    const F32Error error = mod_error();
    Tolerance t{1, 0, 5e-7 + 2 * error.value, 1};
    if (result == 1) t.of_scale = 5e-7 + error.value;
    if (result > 1) t.of_scale = 4e-6 + 8 * error.value + 4 * error.derivative;
    return t;
  }
  const F32Error& mod_error() const {
    if (!error_) error_ = c_.spec.score_mod ? f32_error(c_.shape, c_.spec) : F32Error{};
    return *error_;
  }

  KernelCase c_;
  HeadBuffer q_, k_, v_, dout_;
  std::optional<HeadBuffer> out_;
  Tensor lse_, dlse_;
  KernelResults expected_;
  mutable std::optional<F32Error> error_;
};

}  // namespace flexchat
