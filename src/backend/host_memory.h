// Copies, random numbers and sums in host memory, for the backends that live there.
#pragma once

#include <cstring>

#include "backend/backend.h"
#include "base/parallel.h"
#include "base/rng.h"

namespace flexchat {

inline void copy_rows_on_host(int64_t batch, int64_t tokens, int64_t width, const HeadsView& from,
                              const HeadsView& to) {
  const int64_t size = dtype_size(from.dtype);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t t = 0; t < tokens; ++t) {
      std::memcpy(
          static_cast<char*>(to.data) + (b * to.batch_stride + t * to.token_stride) * size,
          static_cast<const char*>(from.data) + (b * from.batch_stride + t * from.token_stride) * size,
          static_cast<size_t>(width * size));
    }
  }
}

inline void draw_on_host(const Distribution& d, uint64_t seed, uint64_t stream, const Tensor& out) {
  constexpr int64_t kGrain = 4096;
  parallel_for(out.numel(), kGrain, [&](int64_t begin, int64_t end) {
    Rng rng(seed, stream);
    const uint64_t words = d.kind == Distribution::normal ? 4 : d.kind == Distribution::uniform ? 2 : 0;
    rng.seek(static_cast<uint64_t>(begin) * words);
    for (int64_t i = begin; i < end; ++i) {
      double x = d.a;
      if (d.kind == Distribution::normal) x = d.a + d.b * rng.normal();
      if (d.kind == Distribution::uniform) x = d.a + (d.b - d.a) * rng.uniform();
      out.set(i, x);
    }
  });
}

inline void add_sum_on_host(const Tensor& x, const Tensor& out) {
  double sum = 0;
  for (int64_t i = 0; i < x.numel(); ++i) sum += x.get(i);
  out.set(0, out.get(0) + sum);
}

}  // namespace flexchat
