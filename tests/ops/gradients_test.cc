// Every differentiable op against finite differences, at awkward sizes and in every way the GPT combines
// them: in place, with inputs that several ops read, with learned and constant factors.
#include <gtest/gtest.h>

#include "testing/gradient_check.h"

namespace flexchat {
namespace {

class Gradients : public testing::Test {
 protected:
  Tensor random(Shape shape) { return random_tensor(rng, std::move(shape), DType::f64); }
  Rng rng{11};
};

TEST_F(Gradients, EmbedNorm) {
  for (const auto& [n, v, c] :
       {std::tuple<int64_t, int64_t, int64_t>{1, 1, 1}, {5, 2, 3}, {7, 9, 7}, {3, 4, 17}}) {
    Weight table = random_weight(rng, {v, c});
    const Tensor ids = random_ids(rng, {n}, v);
    check_gradients(fmt::format("{} ids of {}, {} columns", n, v, c), {}, {&table},
                    [&](Tape& tape, const std::vector<Var>&) {
                      return weighted_sum(tape, embed_norm(tape, table, ids, DType::f64));
                    });
  }
}

TEST_F(Gradients, RmsNorm) {
  for (const auto& [n, c] : {std::pair<int64_t, int64_t>{1, 1}, {3, 2}, {2, 7}, {5, 33}}) {
    check_gradients(
        fmt::format("({}, {})", n, c), {random({n, c})}, {},
        [](Tape& tape, const std::vector<Var>& v) { return weighted_sum(tape, rms_norm(tape, v[0])); });
    check_gradients("read twice", {random({n, c})}, {}, [](Tape& tape, const std::vector<Var>& v) {
      const Var a = rms_norm(tape, v[0]), b = rms_norm(tape, v[0]);
      return weighted_sum(tape, a, 1) + weighted_sum(tape, b, 2);
    });
  }
}

TEST_F(Gradients, Linear) {
  for (const auto& [n, in, out] :
       {std::tuple<int64_t, int64_t, int64_t>{1, 1, 1}, {3, 7, 2}, {5, 3, 17}, {33, 2, 3}}) {
    Weight w = random_weight(rng, {out, in}), other = random_weight(rng, {3, in});
    check_gradients(
        fmt::format("({}, {}) to {}", n, in, out), {random({n, in})}, {&w},
        [&](Tape& tape, const std::vector<Var>& v) { return weighted_sum(tape, linear(tape, v[0], w)); });
    check_gradients("read by two", {random({n, in})}, {&w, &other},
                    [&](Tape& tape, const std::vector<Var>& v) {
                      const Var a = linear(tape, v[0], w), b = linear(tape, v[0], other);
                      return weighted_sum(tape, a, 1) + weighted_sum(tape, b, 2);
                    });
    check_gradients("one weight twice", {random({n, in}), random({n, in})}, {&w},
                    [&](Tape& tape, const std::vector<Var>& v) {
                      const Var a = linear(tape, v[0], w), b = linear(tape, v[1], w);
                      return weighted_sum(tape, a, 1) + weighted_sum(tape, b, 2);
                    });
  }
}

TEST_F(Gradients, LinearAdd) {
  for (const auto& [n, in, out] : {std::tuple<int64_t, int64_t, int64_t>{1, 1, 1}, {3, 7, 2}, {5, 3, 17}}) {
    Weight w = random_weight(rng, {out, in});
    check_gradients(fmt::format("({}, {}) to {}", n, in, out), {random({n, out}), random({n, in})}, {&w},
                    [&](Tape& tape, const std::vector<Var>& v) {
                      linear_add(tape, v[0], v[1], w);
                      return weighted_sum(tape, v[0]);
                    });
  }
}

TEST_F(Gradients, MlpAdd) {
  // The last has more rows than a chunk.
  for (const auto& [n, c, hidden] :
       {std::tuple<int64_t, int64_t, int64_t>{1, 1, 1}, {3, 7, 2}, {5, 3, 17}, {1030, 2, 3}}) {
    Weight fc = random_weight(rng, {hidden, c}), proj = random_weight(rng, {c, hidden}),
           other = random_weight(rng, {2, c});
    const std::vector<Tensor> inputs = {random({n, c}), random({n, c})};
    check_gradients(
        fmt::format("({}, {}) through {}", n, c, hidden), inputs, {&fc, &proj},
        [&](Tape& tape, const std::vector<Var>& v) {
          mlp_add(tape, v[0], v[1], fc, proj);
          return weighted_sum(tape, v[0]);
        },
        100);
    check_gradients(
        "h read by another", inputs, {&fc, &proj, &other},
        [&](Tape& tape, const std::vector<Var>& v) {
          mlp_add(tape, v[0], v[1], fc, proj);
          return weighted_sum(tape, v[0], 1) + weighted_sum(tape, linear(tape, v[1], other), 2);
        },
        100);
  }
}

// The residual stream as a block uses it: normed, read, and changed in place after.
TEST_F(Gradients, ResidualStreamInPlace) {
  Weight up = random_weight(rng, {9, 7}, 0.5), down = random_weight(rng, {7, 9}, 0.5),
         proj = random_weight(rng, {7, 7}, 0.5);
  check_gradients("block", {random({5, 7})}, {&up, &down, &proj}, [&](Tape& tape, const std::vector<Var>& v) {
    linear_add(tape, v[0], rms_norm(tape, v[0]), proj);
    mlp_add(tape, v[0], rms_norm(tape, v[0]), up, down);
    return weighted_sum(tape, rms_norm(tape, v[0]));
  });
}

RopeTables random_tables(Rng& rng, int64_t length, int64_t half) {
  RopeTables tables{Tensor(host_arena(), {length, half}, DType::f64),
                    Tensor(host_arena(), {length, half}, DType::f64)};
  for (int64_t i = 0; i < length * half; ++i) {
    const double angle = 6.3 * rng.uniform();
    tables.cos.set(i, std::cos(angle));
    tables.sin.set(i, std::sin(angle));
  }
  return tables;
}

TEST_F(Gradients, RopeNorm) {
  struct Case {
    int64_t batch, t_len, heads, d, extra, offset;
    double scale;
  };
  for (const Case& k : {Case{1, 1, 1, 2, 0, 0, 1.0}, {2, 3, 2, 6, 5, 0, 1.2}, {1, 5, 3, 8, 8, 4, 1.2}}) {
    const RopeTables tables = random_tables(rng, k.offset + k.t_len, k.d / 2);
    check_gradients(fmt::format("{} heads of {}", k.heads, k.d),
                    {random({k.batch * k.t_len, k.heads * k.d + k.extra})}, {},
                    [&](Tape& tape, const std::vector<Var>& v) {
                      rope_norm(tape, v[0], tables, k.batch, k.heads, k.offset, k.scale);
                      return weighted_sum(tape, v[0]);
                    });
  }
}

TEST_F(Gradients, ValueGate) {
  struct Case {
    int64_t n, vocab, heads, d, c, channels, q_width;
  };
  for (const Case& k : {Case{1, 1, 1, 2, 3, 3, 2}, {5, 3, 2, 6, 13, 12, 12}, {7, 4, 4, 2, 5, 1, 3}}) {
    const int64_t kv = k.heads * k.d;
    Weight table = random_weight(rng, {k.vocab, kv}), gate = random_weight(rng, {k.heads, k.channels}),
           other = random_weight(rng, {2, k.c});
    const Tensor ids = random_ids(rng, {k.n}, k.vocab);
    const std::vector<Tensor> inputs = {random({k.n, k.q_width + 2 * kv}), random({k.n, k.c})};
    check_gradients(fmt::format("{} heads of {}", k.heads, k.d), inputs, {&table, &gate},
                    [&](Tape& tape, const std::vector<Var>& v) {
                      value_gate(tape, v[0], v[1], table, gate, ids);
                      return weighted_sum(tape, v[0]);
                    });
    check_gradients("h read by another", inputs, {&table, &gate, &other},
                    [&](Tape& tape, const std::vector<Var>& v) {
                      value_gate(tape, v[0], v[1], table, gate, ids);
                      return weighted_sum(tape, v[0], 1) + weighted_sum(tape, linear(tape, v[1], other), 2);
                    });
  }
}

TEST_F(Gradients, Mix) {
  for (const auto& [n, c] : {std::pair<int64_t, int64_t>{1, 1}, {3, 7}, {2, 33}}) {
    Weight a = random_weight(rng, {3}), b = random_weight(rng, {1});
    const std::vector<Tensor> two = {random({n, c}), random({n, c})};
    check_gradients("learned", two, {&a, &b}, [&](Tape& tape, const std::vector<Var>& v) {
      return weighted_sum(tape, mix(tape, {&a, 2, 1.5}, v[0], {&b, 0, -1.0}, v[1]));
    });
    check_gradients("constants", two, {}, [&](Tape& tape, const std::vector<Var>& v) {
      return weighted_sum(tape, mix(tape, {}, v[0], {nullptr, 0, 0.25}, v[1]));
    });
    check_gradients("one variable twice", {two[0]}, {&a, &b}, [&](Tape& tape, const std::vector<Var>& v) {
      return weighted_sum(tape, mix(tape, {&a, 1}, v[0], {&b, 0}, v[0]));
    });
    check_gradients("one weight for both", two, {&a}, [&](Tape& tape, const std::vector<Var>& v) {
      return weighted_sum(tape, mix(tape, {&a, 0}, v[0], {&a, 0, 2.0}, v[1]));
    });
    // x0 is read by every block, the output of one by the backout.
    check_gradients("chain", two, {&a, &b}, [&](Tape& tape, const std::vector<Var>& v) {
      const Var first = mix(tape, {&a, 0}, v[0], {&a, 1}, v[1]),
                second = mix(tape, {&a, 2}, first, {&b, 0}, v[1]);
      return weighted_sum(tape, mix(tape, {}, second, {&b, 0, -1.0}, first));
    });
  }
}

TEST_F(Gradients, Smear) {
  struct Case {
    int64_t batch, t_len, c, channels;
  };
  for (const Case& k : {Case{1, 1, 2, 2}, {1, 2, 3, 1}, {2, 5, 7, 7}, {3, 3, 17, 12}}) {
    Weight gate = random_weight(rng, {1, k.channels}), lambda = random_weight(rng, {1});
    check_gradients(fmt::format("({}, {}, {})", k.batch, k.t_len, k.c), {random({k.batch * k.t_len, k.c})},
                    {&gate, &lambda}, [&](Tape& tape, const std::vector<Var>& v) {
                      return weighted_sum(tape, smear(tape, v[0], k.batch, nullptr, gate, lambda));
                    });
  }
}

TEST_F(Gradients, LinearCrossEntropy) {
  for (const auto& [n, c, v] :
       {std::tuple<int64_t, int64_t, int64_t>{1, 1, 1}, {3, 7, 2}, {7, 3, 33}, {17, 5, 63}}) {
    for (const double cap : {0.0, 2.0, 15.0}) {
      Weight head = random_weight(rng, {(v + 63) / 64 * 64, c});
      const Tensor targets = random_ids(rng, {n}, v);
      for (int64_t i = 1; i < n; i += 3) targets.set(i, -1);
      check_gradients(fmt::format("({}, {}) to {}, cap {}", n, c, v, cap), {random({n, c})}, {&head},
                      [&, vocab = v](Tape& tape, const std::vector<Var>& h) {
                        const Tensor nll = linear_cross_entropy(tape, h[0], head, targets, vocab, cap, 0.7);
                        double sum = 0;
                        for (int64_t i = 0; i < nll.numel(); ++i) sum += 0.7 * nll.get(i);
                        return sum;
                      });
    }
  }
}

}  // namespace
}  // namespace flexchat
