#include "verify/attention_case.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "base/error.h"
#include "base/rng.h"
#include "flex/program.h"

namespace flexchat {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

double rounded(double x, DType dtype) {
  if (dtype == DType::bf16) return static_cast<double>(to_float(to_bf16(static_cast<float>(x))));
  if (dtype == DType::f16) return static_cast<double>(to_float(to_f16(static_cast<float>(x))));
  return static_cast<double>(static_cast<float>(x));
}

int64_t length_of(const std::vector<int64_t>& lens, int64_t b, int64_t longest) {
  return lens.empty() ? longest : lens[static_cast<size_t>(b)];
}

// (B, T, width) of unit normals or numbers in [-1, 1); rows past lens[b] are NaN.
enum class Draw : bool { normal, unit };
Tensor random_rows(Rng& rng, Draw draw, const AttentionShape& s, const std::vector<int64_t>& lens,
                   int64_t longest, int64_t width, DType inputs) {
  const Tensor t(host_arena(), {s.batch, longest, width}, DType::f64);
  for (int64_t b = 0, i = 0; b < s.batch; ++b) {
    const int64_t length = length_of(lens, b, longest);
    for (int64_t row = 0; row < longest; ++row) {
      for (int64_t c = 0; c < width; ++c, ++i) {
        const double x =
            draw == Draw::normal
                ? rng.normal()
                : 2 * rng.uniform() - 1;  // drawn for pads too: lengths must not change the other numbers
        t.set(i, row < length ? rounded(x, inputs) : kNan);
      }
    }
  }
  return t;
}

struct Inputs {
  Tensor q, k, v, dout, dlse;
};

Inputs make_inputs(const AttentionCase& c, DType inputs) {
  const AttentionShape& s = c.shape;
  Rng rng(c.seed, /*stream=*/7);
  const int64_t q_width = s.n_head * s.head_dim, kv_width = s.n_kv_head * s.head_dim;
  Inputs x;
  x.q = random_rows(rng, Draw::normal, s, s.q_lens, s.q_len, q_width, inputs);
  x.k = random_rows(rng, Draw::normal, s, s.kv_lens, s.kv_len, kv_width, inputs);
  x.v = random_rows(rng, Draw::unit, s, s.kv_lens, s.kv_len, kv_width, inputs);
  x.dout = random_rows(rng, Draw::normal, s, s.q_lens, s.q_len, q_width, inputs);
  x.dlse = Tensor(host_arena(), {s.batch, s.n_head, s.q_len}, DType::f64);
  for (int64_t i = 0; i < x.dlse.numel(); ++i) {
    const int64_t b = i / (s.n_head * s.q_len), row = i % s.q_len;
    const double d = rounded(rng.normal(), DType::f32);
    x.dlse.set(i, row < length_of(s.q_lens, b, s.q_len) ? d : kNan);
  }
  return x;
}

// A tensor in the backend's memory, all NaN at first.
class Side {
 public:
  Side(Backend& backend, DType dtype) : backend_(backend), dtype_(dtype) {}

  Tensor put(const Tensor& host) const { return put(host, dtype_); }
  Tensor put(const Tensor& host, DType dtype) const {
    const Tensor t = backend_.empty(host.shape(), dtype);
    backend_.copy(host, t);
    return t;
  }
  Tensor unwritten(Shape shape) const { return unwritten(std::move(shape), dtype_); }
  Tensor unwritten(Shape shape, DType dtype) const {
    const Tensor t = backend_.empty(std::move(shape), dtype);
    backend_.fill(t, kNan);
    return t;
  }
  Backend& backend() const { return backend_; }

 private:
  Backend& backend_;
  DType dtype_;
};

// Keys and values as pools of pages in a random order; pages nobody uses, and the rest of a last page, are
// NaN.
struct Pages {
  Tensor k, v, table;
};
Pages make_pages(const AttentionCase& c, const Inputs& x) {
  const AttentionShape& s = c.shape;
  const int64_t size = c.spec.page_size, per_row = (s.kv_len + size - 1) / size,
                width = s.n_kv_head * s.head_dim;
  const int64_t pool = s.batch * per_row + 3;
  std::vector<int32_t> order(static_cast<size_t>(pool));
  std::iota(order.begin(), order.end(), 0);
  Rng rng(c.seed, /*stream=*/8);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[rng.below(i)]);
  Pages p{Tensor(host_arena(), {pool, size, width}, DType::f64),
          Tensor(host_arena(), {pool, size, width}, DType::f64),
          Tensor(host_arena(), {s.batch, per_row}, DType::i32)};
  for (int64_t i = 0; i < p.k.numel(); ++i) {
    p.k.set(i, kNan);
    p.v.set(i, kNan);
  }
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t i = 0; i < per_row; ++i)
      p.table.set(b * per_row + i, order[static_cast<size_t>(b * per_row + i)]);
    for (int64_t j = 0; j < s.kv_len; ++j) {
      const int64_t page = order[static_cast<size_t>(b * per_row + j / size)];
      for (int64_t col = 0; col < width; ++col) {
        const int64_t to = (page * size + j % size) * width + col, from = (b * s.kv_len + j) * width + col;
        p.k.set(to, x.k.get(from));
        p.v.set(to, x.v.get(from));
      }
    }
  }
  return p;
}

// Columns [begin, begin + width) of (B, T, row) rows.
Tensor columns(const Tensor& x, int64_t begin, int64_t width) {
  const int64_t rows = x.dim(0) * x.dim(1), row = x.dim(2);
  const Tensor out(host_arena(), {x.dim(0), x.dim(1), width}, x.dtype());
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < width; ++i) out.set(r * width + i, x.get(r * row + begin + i));
  }
  return out;
}

Tensor side_by_side(const std::vector<Tensor>& parts) {
  int64_t row = 0;
  for (const Tensor& p : parts) row += p.dim(2);
  const Tensor out(host_arena(), {parts[0].dim(0), parts[0].dim(1), row}, DType::f64);
  int64_t begin = 0;
  for (const Tensor& p : parts) {
    for (int64_t i = 0; i < p.numel(); ++i) out.set(i / p.dim(2) * row + begin + i % p.dim(2), p.get(i));
    begin += p.dim(2);
  }
  return out;
}

// Gradients of a case: where a kernel writes them, and from there to host memory.
struct GradientBuffers {
  AttentionGradients grads;
  Tensor dq, dk, dv;

  GradientBuffers(const AttentionCase& c, const Side& side, DType master) {
    const AttentionShape& s = c.shape;
    const int64_t q_width = s.n_head * s.head_dim, kv_width = s.n_kv_head * s.head_dim;
    dq = side.unwritten({s.batch, s.q_len, c.fused ? q_width + 2 * kv_width : q_width});
    dk = c.fused ? dq : side.unwritten({s.batch, s.kv_len, kv_width});
    dv = c.fused ? dq : side.unwritten({s.batch, s.kv_len, kv_width});
    grads.dq = heads_view(dq);
    grads.dk = heads_view(dk, c.fused ? q_width : 0);
    grads.dv = heads_view(dv, c.fused ? q_width + kv_width : 0);
    for (const flex::Capture& capture : differentiable_captures(c.spec)) {
      grads.captures.emplace_back(capture.name(),
                                  side.unwritten(c.spec.bindings.at(capture).shape(), master));
    }
  }

  // To: AttentionResults or AttentionReference.
  template <class To>
  void fetch(const AttentionCase& c, Backend& backend, To& to) const {
    const int64_t q_width = c.shape.n_head * c.shape.head_dim,
                  kv_width = c.shape.n_kv_head * c.shape.head_dim;
    to.dq = backend.to_host(dq);
    to.dk = backend.to_host(dk);
    to.dv = backend.to_host(dv);
    if (c.fused) {
      to.dk = columns(to.dk, q_width, kv_width);
      to.dv = columns(to.dv, q_width + kv_width, kv_width);
      to.dq = columns(to.dq, 0, q_width);
    }
    for (const auto& [name, gradient] : grads.captures)
      to.captures.emplace_back(name, backend.to_host(gradient));
  }
};

// `reference`: also what is to be known of the problem; the backend is then the reference, and its backward
// is given `out` as kernels store it, in `stored`.
AttentionResults run(const AttentionCase& c, const Inputs& x, Backend& backend, DType dtype,
                     const std::string& kernel, AttentionReference* reference = nullptr,
                     DType stored = DType::f64) {
  const AttentionShape& s = c.shape;
  const Side side(backend, dtype);
  const DType master = backend.master_dtype();
  const int64_t q_width = s.n_head * s.head_dim, kv_width = s.n_kv_head * s.head_dim;
  const auto plan = backend.plan_attention(s, c.spec, kernel);
  AttentionResults r;
  r.kernel = plan->kernel();
  const auto rounded_input = [&](const Tensor& t) { return backend.to_host(side.put(t)); };
  r.q = rounded_input(x.q);
  r.k = rounded_input(x.k);
  r.v = rounded_input(x.v);
  r.dout = rounded_input(x.dout);

  AttentionTensors io;
  Tensor q, k, v, table;
  if (c.fused) {
    check(s.q_len == s.kv_len && c.spec.page_size == 0, "case {}: one buffer needs as many queries as keys",
          c.name);
    q = side.put(side_by_side({x.q, x.k, x.v}));
    io.q = heads_view(q);
    io.k = heads_view(q, q_width);
    io.v = heads_view(q, q_width + kv_width);
  } else if (c.spec.page_size > 0) {
    const Pages pages = make_pages(c, x);
    q = side.put(x.q);
    k = side.put(pages.k);
    v = side.put(pages.v);
    table = side.put(pages.table, DType::i32);
    io.q = heads_view(q);
    io.k = heads_view(k);
    io.v = heads_view(v);
    io.block_table = &table;
  } else {
    q = side.put(x.q);
    k = side.put(x.k);
    v = side.put(x.v);
    io.q = heads_view(q);
    io.k = heads_view(k);
    io.v = heads_view(v);
  }
  const Tensor out = side.unwritten({s.batch, s.q_len, q_width});
  const Tensor lse = side.unwritten({s.batch, s.n_head, s.q_len}, master);
  io.out = heads_view(out);
  io.lse = &lse;
  backend.attention(*plan, io);
  r.out = backend.to_host(out);
  r.lse = backend.to_host(lse);
  auto* const in_double = reference ? dynamic_cast<ReferenceBackend*>(&backend) : nullptr;
  if (in_double) reference->sizes = in_double->score_sizes(*plan, io);
  if (!c.backward) return r;
  if (reference && stored != DType::f64) {
    r.out = backend.clone(out);
    for (int64_t i = 0; i < out.numel(); ++i) out.set(i, rounded(r.out.get(i), stored));
  }

  const Tensor dout = side.put(x.dout), dlse = side.put(x.dlse, master);
  const auto make_buffers = [&] {
    GradientBuffers buffers(c, side, master);
    buffers.grads.dout = heads_view(dout);
    if (c.lse_gradient) buffers.grads.dlse = &dlse;
    return buffers;
  };
  const GradientBuffers buffers = make_buffers();
  backend.attention_backward(*plan, io, buffers.grads);
  buffers.fetch(c, backend, r);
  if (in_double) {
    const GradientBuffers sizes = make_buffers();
    in_double->attention_term_sizes(*plan, io, sizes.grads);
    sizes.fetch(c, backend, *reference);
  }
  return r;
}

}  // namespace

std::vector<flex::Capture> differentiable_captures(const AttentionSpec& spec) {
  std::vector<flex::Capture> out;
  if (!spec.score_mod) return out;
  for (const flex::Capture& capture : flex::Program({*spec.score_mod}).captures) {
    if (capture.differentiable()) out.push_back(capture);
  }
  return out;
}

AttentionResults run_attention(const AttentionCase& c, Backend& backend, DType dtype,
                               const std::string& kernel) {
  return run(c, make_inputs(c, dtype), backend, dtype, kernel);
}

AttentionReference reference_attention(const AttentionCase& c, DType dtype) {
  const auto backend = make_reference_backend();
  AttentionReference reference;
  reference.results = run(c, make_inputs(c, dtype), *backend, DType::f64, "reference", &reference, dtype);
  return reference;
}

AttentionLimits attention_limits(DType dtype) {
  switch (dtype) {
    case DType::bf16:  // 8 bits: weights and results are rounded to 2^-9 each
      return {1.6e-2, 1e-3, 1.2e-2};
    case DType::f16:
      return {2e-3, 1e-3, 1.5e-3};
    case DType::f64:
      return {1e-14, 1e-13, 1e-13};
    default:
      return {5e-7, 2e-6, 2e-6};
  }
}

std::vector<Check> check_attention(const AttentionCase& c, Backend& backend, DType dtype,
                                   const std::string& kernel) {
  const AttentionReference reference = reference_attention(c, dtype);
  const AttentionResults& want = reference.results;
  const AttentionResults got = run_attention(c, backend, dtype, kernel);
  const AttentionLimits limits = attention_limits(dtype);
  const double rounding = dtype == DType::f64 ? 0x1p-53 : 0x1p-24,  // of scores, in every other dtype f32
      of_scores = 2 * rounding * reference.sizes.score, on_the_way = rounding * reference.sizes.rounded;
  std::vector<Check> checks;
  const auto add = [&](const std::string& what, const Tensor& a, const Tensor& b, double limit) {
    checks.push_back(compare(c.name + " " + what, a, b, "max_abs", limit));
  };
  const auto add_gradient = [&](const std::string& what, const Tensor& a, const Tensor& b,
                                const Tensor& terms) {
    const double size = norm(b), defined = kCancelled * norm(terms),
                 limit = std::max(limits.gradient, on_the_way);
    // Of what is exactly 0, max_rel is the norm of the error itself.
    const double allowed = size > 0      ? limit * std::max(1.0, defined / size)
                           : defined > 0 ? limit * defined
                                         : limit;
    checks.push_back(compare(c.name + " " + what, a, b, "max_rel", allowed));
  };
  add("out", got.out, want.out, std::max(limits.out, of_scores));
  add("lse", got.lse, want.lse, std::max(limits.lse, on_the_way));
  if (!c.backward) return checks;
  add_gradient("dq", got.dq, want.dq, reference.dq);
  add_gradient("dk", got.dk, want.dk, reference.dk);
  add_gradient("dv", got.dv, want.dv, reference.dv);
  for (size_t i = 0; i < want.captures.size(); ++i) {
    add_gradient("d" + want.captures[i].first, got.captures[i].second, want.captures[i].second,
                 reference.captures[i].second);
  }
  return checks;
}

}  // namespace flexchat
