#include "backend/cuda/tensor_map.h"

#include "backend/cuda/runtime.h"
#include "base/error.h"

namespace flexchat::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encode() {
  const char* name = "cuTensorMapEncodeTiled";
  void* address = nullptr;
  cudaDriverEntryPointQueryResult result{};
  check_cuda(cudaGetDriverEntryPointByVersion(name, &address, 12000, cudaEnableDefault, &result), name);
  if (result != cudaDriverEntryPointSuccess || !address) fail_run("the CUDA driver has no {}", name);
  return reinterpret_cast<Encode>(address);
}

}  // namespace

CUtensorMap make_tensor_map(DType dtype, const void* data, std::initializer_list<int64_t> sizes,
                            std::initializer_list<int> box) {
  static const Encode encode = find_encode();
  constexpr cuuint32_t kOne[3] = {1, 1, 1};
  cuuint64_t size[3] = {}, stride[3] = {};
  cuuint32_t boxes[3] = {}, rank = 0;
  auto bytes = static_cast<cuuint64_t>(dtype_size(dtype));
  for (const int64_t n : sizes) {
    size[rank] = static_cast<cuuint64_t>(n);
    boxes[rank] = static_cast<cuuint32_t>(box.begin()[rank]);
    bytes *= size[rank];
    stride[rank++] = bytes;  // of the next dimension
  }
  CUtensorMap map;
  const CUresult status = encode(
      &map, dtype == DType::f32 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, rank,
      const_cast<void*>(data), size, stride, boxes, kOne, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    fail_run("describing a matrix to the copy engine: CUDA driver error {}", static_cast<int>(status));
  }
  return map;
}

}  // namespace flexchat::cuda
