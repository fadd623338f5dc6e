// Copying rows between buffers in host memory, for the backends that live there.
#pragma once

#include <cstring>

#include "backend/backend.h"

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

}  // namespace flexchat
