// How the copy engine of Hopper GPUs sees a matrix in memory.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <initializer_list>

#include "base/dtype.h"

namespace flexchat::cuda {

// A dense array of bf16 or f32, sizes innermost first (up to three), copied in boxes whose rows are 128 bytes
// and lie swizzled by 128 bytes in shared memory. What lies outside is read as 0 and not written. `data` is
// aligned to 16 bytes, and so is every row. Errors: the driver refuses (a RunError).
CUtensorMap make_tensor_map(DType dtype, const void* data, std::initializer_list<int64_t> sizes,
                            std::initializer_list<int> box);

}  // namespace flexchat::cuda
