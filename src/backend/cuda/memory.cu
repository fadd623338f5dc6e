// Copies with conversion, fills, copies of rows and the search for NaN. All stream: every byte is read and
// written once, 16 at a time where addresses allow.
#include <algorithm>
#include <type_traits>

#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/reduce.cuh"
#include "backend/cuda/staging.h"

namespace flexchat::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kInt64Max = 0x7FFFFFFFFFFFFFFF;

double as_double(int64_t n) { return static_cast<double>(n); }

// ---- conversion: out[i] = x[i], rounded to nearest even ---------------------------------------------------

// Between f32, bf16 and f16.
template <class From, class To>
__global__ void __launch_bounds__(kThreads) convert_kernel(const From* x, To* out, int64_t n, bool vectors) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads * 8;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 8; i < n; i += step) {
    float values[8];
    if (vectors && i + 8 <= n) {
      load8(x + i, values);
      store8(out + i, values);
    } else {
      load_some(x + i, n - i, values);
      store_some(out + i, n - i, values);
    }
  }
}

__device__ double load_any(const void* x, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f64:
      return static_cast<const double*>(x)[i];
    case DType::f32:
      return static_cast<double>(static_cast<const float*>(x)[i]);
    case DType::bf16:
      return static_cast<double>(to_float(static_cast<const bf16*>(x)[i]));
    case DType::f16:
      return static_cast<double>(to_float(static_cast<const f16*>(x)[i]));
    case DType::i64:
      return static_cast<double>(static_cast<const int64_t*>(x)[i]);
    case DType::i32:
      return static_cast<double>(static_cast<const int32_t*>(x)[i]);
    default:
      return static_cast<double>(static_cast<const uint8_t*>(x)[i]);
  }
}

__device__ void store_any(void* x, DType dtype, int64_t i, double value) {  // as base/dtype.h's store_element
  switch (dtype) {
    case DType::f64:
      static_cast<double*>(x)[i] = value;
      break;
    case DType::f32:
      static_cast<float*>(x)[i] = static_cast<float>(value);
      break;
    case DType::bf16:
      static_cast<bf16*>(x)[i] = from_float<bf16>(static_cast<float>(value));
      break;
    case DType::f16:
      static_cast<f16*>(x)[i] = from_float<f16>(static_cast<float>(value));
      break;
    case DType::i64:
      static_cast<int64_t*>(x)[i] = static_cast<int64_t>(value);
      break;
    case DType::i32:
      static_cast<int32_t*>(x)[i] = static_cast<int32_t>(value);
      break;
    default:
      static_cast<uint8_t*>(x)[i] = static_cast<uint8_t>(value);
      break;
  }
}

// Between any two; nothing that repeats in training needs it.
__global__ void __launch_bounds__(kThreads)
    convert_any_kernel(const void* x, DType from, void* out, DType to, int64_t n) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step) {
    store_any(out, to, i, load_any(x, from, i));
  }
}

void convert(Context& context, const void* x, DType from, void* out, DType to, int64_t n) {
  const int64_t most = int64_t{16} * context.device().sm_count;
  const Work work = {as_double(n * (dtype_size(from) + dtype_size(to))), 0};
  const auto small = [](DType d) { return d == DType::f32 || d == DType::bf16 || d == DType::f16; };
  if (!small(from) || !small(to)) {
    for_stored_dtype(from, [](auto) {});  // throws for what cannot be converted
    for_stored_dtype(to, [](auto) {});
    return launch(context, "convert_any", work, convert_any_kernel, block_count(n, kThreads, most), kThreads,
                  0, x, from, out, to, n);
  }
  for_dtype(from, [&](auto from_tag) {
    using From = typename decltype(from_tag)::type;
    for_dtype(to, [&](auto to_tag) {
      using To = typename decltype(to_tag)::type;
      if constexpr (!std::is_same_v<From, To>) {
        launch(context, "convert", work, convert_kernel<From, To>, block_count(n, kThreads * 8, most),
               kThreads, 0, static_cast<const From*>(x), static_cast<To*>(out), n, aligned16({x, out}));
      }
    });
  });
}

// ---- fill -------------------------------------------------------------------------------------------------

struct alignas(16) Pattern {
  uint32_t word[4];  // 16 bytes of repeated elements
};

// Elements of sizeof(T) bytes; the first `head` and what does not fill 16 bytes at the end go one by one.
template <class T>
__global__ void __launch_bounds__(kThreads) fill_kernel(T* out, int64_t n, int64_t head, Pattern pattern) {
  constexpr int64_t kLanes = 16 / sizeof(T);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads, vectors = (n - head) / kLanes;
  const T value = *reinterpret_cast<const T*>(pattern.word);
  if (thread < head) out[thread] = value;
  const uint4 whole = make_uint4(pattern.word[0], pattern.word[1], pattern.word[2], pattern.word[3]);
  for (int64_t i = thread; i < vectors; i += step) reinterpret_cast<uint4*>(out + head)[i] = whole;
  const int64_t tail = head + vectors * kLanes + thread;
  if (tail < n) out[tail] = value;
}

template <class T>
void fill_elements(Context& context, void* out, int64_t n, const Pattern& pattern) {
  const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % 16);
  const int64_t head = std::min<int64_t>(n, past == 0 ? 0 : (16 - past) / static_cast<int64_t>(sizeof(T)));
  const int64_t most = int64_t{16} * context.device().sm_count;
  launch(context, "fill", {as_double(n * static_cast<int64_t>(sizeof(T))), 0}, fill_kernel<T>,
         block_count(n, kThreads * 16 / static_cast<int64_t>(sizeof(T)), most), kThreads, 0,
         static_cast<T*>(out), n, head, pattern);
}

// ---- rows -------------------------------------------------------------------------------------------------

struct Rows {
  int64_t batch_stride, token_stride;  // in units
};

// Each row of threads copies rows of `width` units; Unit is the largest that all addresses are multiples of.
template <class Unit>
__global__ void __launch_bounds__(kThreads)
    copy_rows_kernel(const Unit* from, Rows from_rows, Unit* to, Rows to_rows, int64_t rows, int64_t tokens,
                     int64_t width) {
  const int64_t row_step = static_cast<int64_t>(gridDim.y) * blockDim.y;
  const int64_t column_step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t row = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; row < rows;
       row += row_step) {
    const int64_t b = row / tokens, t = row % tokens;
    const Unit* source = from + b * from_rows.batch_stride + t * from_rows.token_stride;
    Unit* out = to + b * to_rows.batch_stride + t * to_rows.token_stride;
    for (int64_t i = first; i < width; i += column_step) out[i] = source[i];
  }
}

// ---- the first NaN or infinity ----------------------------------------------------------------------------

template <class T>
__device__ bool not_finite(T x) {
  if constexpr (std::is_same_v<T, double>) return !isfinite(x);
  return !isfinite(to_float(x));
}

template <class T>
__global__ void __launch_bounds__(kThreads) first_nonfinite_kernel(const T* x, int64_t n, int64_t* partial) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t first = kInt64Max;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step) {
    if (not_finite(x[i])) {
      first = i;
      break;  // this thread's later ones are further on
    }
  }
  first = block_reduce<kThreads>(first, Min{});
  if (threadIdx.x == 0) partial[blockIdx.x] = first;
}

}  // namespace

void CudaBackend::copy(const Tensor& source, const Tensor& out) {
  const int64_t n = out.numel();
  if (n == 0) return;
  const bool from_host = source.arena().host(), to_host = out.arena().host();
  const bool same = source.dtype() == out.dtype();
  if (from_host && to_host) return copy_on_host(source, out);
  if (!from_host && !to_host) {
    if (!same) return convert(context_, source.data(), source.dtype(), out.data(), out.dtype(), n);
    context_.begin_launch("copy", {2 * as_double(out.bytes()), 0});
    context_.check(cudaMemcpyAsync(out.data(), source.data(), static_cast<size_t>(out.bytes()),
                                   cudaMemcpyDeviceToDevice, context_.stream()),
                   "copying on the device");
    return context_.end_launch("copy");
  }
  context_.forbid_in_capture("a copy between host and device");
  if (same && from_host) {
    return staging().upload(source.data(), out.data(), static_cast<size_t>(out.bytes()));
  }
  if (same) return staging().download(source.data(), out.data(), static_cast<size_t>(out.bytes()));
  // The device converts, piece by piece so that the temporary stays small.
  const int64_t piece = std::min<int64_t>(n, int64_t{4} << 20);
  const Tensor raw = empty({piece}, from_host ? source.dtype() : out.dtype());
  const auto at = [](const Tensor& t, int64_t i) { return t.as<char>() + i * dtype_size(t.dtype()); };
  for (int64_t begin = 0; begin < n; begin += piece) {
    const int64_t count = std::min(piece, n - begin);
    const auto bytes = static_cast<size_t>(count * dtype_size(raw.dtype()));
    if (from_host) {
      staging().upload(at(source, begin), raw.data(), bytes);
      convert(context_, raw.data(), raw.dtype(), at(out, begin), out.dtype(), count);
    } else {
      convert(context_, at(source, begin), source.dtype(), raw.data(), raw.dtype(), count);
      staging().download(raw.data(), at(out, begin), bytes);
    }
  }
}

void CudaBackend::fill(const Tensor& out, double value) {
  const int64_t n = out.numel();
  if (n == 0) return;
  if (out.arena().host()) {
    for (int64_t i = 0; i < n; ++i) out.set(i, value);
    return;
  }
  if (value == 0) {
    context_.begin_launch("fill", {as_double(out.bytes()), 0});
    context_.check(cudaMemsetAsync(out.data(), 0, static_cast<size_t>(out.bytes()), context_.stream()),
                   "filling with zeros");
    return context_.end_launch("fill");
  }
  const int64_t size = dtype_size(out.dtype());
  Pattern pattern;
  for (int64_t i = 0; i < 16 / size; ++i) store_element(pattern.word, out.dtype(), i, value);
  switch (size) {
    case 1:
      return fill_elements<uint8_t>(context_, out.data(), n, pattern);
    case 2:
      return fill_elements<uint16_t>(context_, out.data(), n, pattern);
    case 4:
      return fill_elements<uint32_t>(context_, out.data(), n, pattern);
    default:
      return fill_elements<uint64_t>(context_, out.data(), n, pattern);
  }
}

void CudaBackend::copy_rows(int64_t batch, int64_t tokens, int64_t width, const HeadsView& from,
                            const HeadsView& to) {
  const int64_t rows = batch * tokens, size = dtype_size(from.dtype);
  if (rows == 0 || width == 0) return;
  uint64_t all = reinterpret_cast<uintptr_t>(from.data) | reinterpret_cast<uintptr_t>(to.data) | 16;
  for (const int64_t n : {width, from.batch_stride, from.token_stride, to.batch_stride, to.token_stride}) {
    all |= static_cast<uint64_t>(n * size);
  }
  const auto unit = static_cast<int64_t>(all & (~all + 1));  // the lowest bit set, at most 16
  const auto run = [&](auto tag) {
    using Unit = typename decltype(tag)::type;
    const auto units = [&](int64_t elements) { return elements * size / static_cast<int64_t>(sizeof(Unit)); };
    const int64_t n = units(width);
    const unsigned x = n <= 32 ? 32 : n <= 64 ? 64 : n <= 128 ? 128 : 256;
    const dim3 block(x, kThreads / x);
    const dim3 grid(block_count(n, x, 64), block_count(rows, block.y, 65535));
    launch(context_, "copy_rows", {2 * as_double(rows * width * size), 0}, copy_rows_kernel<Unit>, grid,
           block, 0, static_cast<const Unit*>(from.data),
           Rows{units(from.batch_stride), units(from.token_stride)}, static_cast<Unit*>(to.data),
           Rows{units(to.batch_stride), units(to.token_stride)}, rows, tokens, n);
  };
  switch (unit) {
    case 16:
      return run(Tag<uint4>{});
    case 8:
      return run(Tag<uint2>{});
    case 4:
      return run(Tag<uint32_t>{});
    case 2:
      return run(Tag<uint16_t>{});
    default:
      return run(Tag<uint8_t>{});
  }
}

int64_t CudaBackend::first_nonfinite(const Tensor& x) {
  const int64_t n = x.numel();
  if (n == 0 || !is_float(x.dtype())) return -1;
  const unsigned blocks = block_count(n, kThreads * 8, int64_t{8} * context_.device().sm_count);
  const Tensor partial = empty({blocks}, DType::i64);
  const auto run = [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(context_, "first_nonfinite", {as_double(x.bytes()), 0}, first_nonfinite_kernel<T>, blocks,
           kThreads, 0, x.as<T>(), n, partial.as<int64_t>());
  };
  x.dtype() == DType::f64 ? run(Tag<double>{}) : for_dtype(x.dtype(), run);
  const Tensor found(host_arena(), partial.shape(), DType::i64);
  copy(partial, found);
  const int64_t first = *std::min_element(found.as<int64_t>(), found.as<int64_t>() + blocks);
  return first == kInt64Max ? -1 : first;
}

}  // namespace flexchat::cuda
