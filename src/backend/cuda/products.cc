#include "backend/cuda/products.h"

#include <cublasLt.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "backend/cuda/cuda_backend.h"
#include "base/error.h"

namespace flexchat::cuda {
namespace {

constexpr size_t kWorkspaceBytes = size_t{64} << 20;
constexpr int kCandidates = 8;
// A product below both takes a few microseconds whatever the algorithm.
constexpr double kTuneFlops = 1e9, kTuneBytes = 8e6;
constexpr const char* kTuning = "matmul_tuning";  // in profiles
constexpr int kTuneAtUse = 2;                     // what comes only once is not worth tuning
constexpr double kWorthIt = 0.98;                 // of the first choice's time: less is noise

void check_blas(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  fail_run("{}: cuBLASLt says {} ({})", what, cublasLtGetStatusName(status), cublasLtGetStatusString(status));
}

cudaDataType_t cuda_type(DType dtype) {
  switch (dtype) {
    case DType::f64:
      return CUDA_R_64F;
    case DType::f32:
      return CUDA_R_32F;
    case DType::bf16:
      return CUDA_R_16BF;
    case DType::f16:
      return CUDA_R_16F;
    default:
      fail("no matrix product of {} (allowed: f64, f32, bf16, f16)", dtype_name(dtype));
  }
}

// Kernels choose vector widths by this; finer steps would only make more plans.
int64_t alignment(const void* p) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  if (address % 256 == 0) return 256;
  for (const int64_t n : {16, 8, 4, 2}) {
    if (address % static_cast<uintptr_t>(n) == 0) return n;
  }
  return 1;
}

double flops_of(const Product& p) {
  return 2.0 * static_cast<double>(p.batch) * static_cast<double>(p.m) * static_cast<double>(p.n) *
         static_cast<double>(p.k);
}
double out_bytes(const Product& p) { return static_cast<double>(p.batch * p.m * p.n * dtype_size(p.out)); }
double bytes_of(const Product& p) {
  return static_cast<double>(p.batch * p.k * (p.m + p.n) * dtype_size(p.in)) +
         out_bytes(p) * (p.beta == 0 ? 1 : 2);
}

// Elements from the first of a batch of (rows, columns) matrices to its last: what lies between the rows
// counts.
int64_t span_of(const Spacing& space, int64_t batch, int64_t rows, int64_t columns) {
  const int64_t row = space.row > 0 ? space.row : columns;
  const int64_t matrix = space.matrix > 0 ? space.matrix : rows * columns;
  return (batch - 1) * matrix + (rows - 1) * row + columns;
}
int64_t span_of(const Product& p) { return span_of(p.space_out, p.batch, p.m, p.n); }

// "matmul tn 20 x 1280x1280x8192": are a and b transposed, how many, M x N x K.
std::string name_of(const Product& p) {
  return fmt::format("matmul {}{} {}{}x{}x{}", p.trans_a ? 't' : 'n', p.trans_b ? 't' : 'n',
                     p.batch > 1 ? fmt::format("{} x ", p.batch) : "", p.m, p.n, p.k);
}

template <class T, cublasStatus_t (*destroy)(T)>
struct Handle {
  T value = nullptr;
  Handle() = default;
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  ~Handle() {
    if (value) destroy(value);
  }
};
using Operation = Handle<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy>;
using Layout = Handle<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy>;
using Preference = Handle<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy>;

// cuBLASLt is column-major: a row-major (rows, columns) is its (columns, rows) with a leading dimension of
// `columns`, and the row-major out = op(a) op(b) is its out^T = op(b)^T op(a)^T.
void make_layout(Layout& layout, DType dtype, int64_t batch, int64_t rows, int64_t columns,
                 const Spacing& space) {
  const char* what = "describing a matrix";
  check_blas(cublasLtMatrixLayoutCreate(&layout.value, cuda_type(dtype), static_cast<uint64_t>(columns),
                                        static_cast<uint64_t>(rows), space.row > 0 ? space.row : columns),
             what);
  if (batch == 1) return;
  const auto count = static_cast<int32_t>(batch);
  const int64_t stride = space.matrix > 0 ? space.matrix : rows * columns;
  check_blas(cublasLtMatrixLayoutSetAttribute(layout.value, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count,
                                              sizeof count),
             what);
  check_blas(cublasLtMatrixLayoutSetAttribute(layout.value, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                                              &stride, sizeof stride),
             what);
}

// Does this algorithm sum in a fixed order? The library was asked for nothing else.
bool deterministic(const cublasLtMatmulAlgo_t& algorithm) {
  uint32_t scheme = 0;
  check_blas(cublasLtMatmulAlgoConfigGetAttribute(&algorithm, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, &scheme,
                                                  sizeof scheme, nullptr),
             "reading an algorithm");
  return scheme == CUBLASLT_REDUCTION_SCHEME_NONE || scheme == CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
}

}  // namespace

struct Products::Plan {
  Operation operation;
  Layout a, b, out;
  bool f64 = false;
  std::vector<cublasLtMatmulAlgo_t> candidates;  // best first, as the library thinks
  int chosen = 0;
  int uses = 0;  // counted up to kTuneAtUse
  Work work;
  std::string name;  // "matmul nt 8192x5120x1280", for profiles and messages
};

Products::Products(Context& context) : context_(context) {
  const char* value = std::getenv("FLEXCHAT_TUNE");
  const std::string tune = value && *value ? value : "1";
  check(tune == "0" || tune == "1" || tune == "any", "FLEXCHAT_TUNE is '{}'; allowed: 0, 1, any", tune);
  tune_ = tune == "0" ? Tune::never : tune == "1" ? Tune::same_bits : Tune::any;
  cublasLtHandle_t handle = nullptr;
  check_blas(cublasLtCreate(&handle), "starting cuBLASLt");
  handle_ = handle;
  for (cudaEvent_t& event : events_) check_cuda(cudaEventCreate(&event), "making an event");
}

Products::~Products() {
  cudaStreamSynchronize(context_.stream());
  for (const cudaEvent_t event : events_) cudaEventDestroy(event);
  cublasLtDestroy(static_cast<cublasLtHandle_t>(handle_));
}

void Products::prepare() {
  if (!workspace_.defined()) {
    workspace_ = Tensor(context_.arena(), {static_cast<int64_t>(kWorkspaceBytes)}, DType::u8);
  }
}

std::unique_ptr<Products::Plan> Products::make_plan(const Product& p, const Key& key) {
  auto plan = std::make_unique<Plan>();
  plan->f64 = p.in == DType::f64;
  plan->work = {bytes_of(p), flops_of(p)};
  plan->name = name_of(p);
  const char* what = "describing a product";
  // f32 in full: the compute type that may use TF32 is another one.
  check_blas(
      cublasLtMatmulDescCreate(&plan->operation.value, plan->f64 ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F,
                               plan->f64 ? CUDA_R_64F : CUDA_R_32F),
      what);
  // First operand: b, second: a (see make_layout).
  const cublasOperation_t first = p.trans_b ? CUBLAS_OP_T : CUBLAS_OP_N;
  const cublasOperation_t second = p.trans_a ? CUBLAS_OP_T : CUBLAS_OP_N;
  check_blas(cublasLtMatmulDescSetAttribute(plan->operation.value, CUBLASLT_MATMUL_DESC_TRANSA, &first,
                                            sizeof first),
             what);
  check_blas(cublasLtMatmulDescSetAttribute(plan->operation.value, CUBLASLT_MATMUL_DESC_TRANSB, &second,
                                            sizeof second),
             what);
  make_layout(plan->a, p.in, p.batch, p.trans_a ? p.k : p.m, p.trans_a ? p.m : p.k, p.space_a);
  make_layout(plan->b, p.in, p.batch, p.trans_b ? p.n : p.k, p.trans_b ? p.k : p.n, p.space_b);
  make_layout(plan->out, p.out, p.batch, p.m, p.n, p.space_out);

  Preference preference;
  check_blas(cublasLtMatmulPreferenceCreate(&preference.value), what);
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
    check_blas(cublasLtMatmulPreferenceSetAttribute(preference.value, attribute, &value, sizeof value), what);
  };
  prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t{kWorkspaceBytes});
  prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, uint32_t{CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE});
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, static_cast<uint32_t>(key[9]));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, static_cast<uint32_t>(key[8]));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, static_cast<uint32_t>(key[10]));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, static_cast<uint32_t>(key[10]));
  std::array<cublasLtMatmulHeuristicResult_t, kCandidates> results{};
  int found = 0;
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
      static_cast<cublasLtHandle_t>(handle_), plan->operation.value, plan->b.value, plan->a.value,
      plan->out.value, plan->out.value, preference.value, kCandidates, results.data(), &found);
  for (int i = 0; i < found; ++i) {
    const auto& result = results[static_cast<size_t>(i)];
    if (result.state == CUBLAS_STATUS_SUCCESS && deterministic(result.algo))
      plan->candidates.push_back(result.algo);
  }
  if (plan->candidates.empty()) {
    fail_run("cuBLASLt has no algorithm for {} products of ({} x {}) by ({} x {}), {} to {}: {}", p.batch,
             p.m, p.k, p.k, p.n, dtype_name(p.in), dtype_name(p.out), cublasLtGetStatusName(status));
  }
  return plan;
}

Products::Plan& Products::plan(const Product& p, const Operands& x) {
  const Key key = {p.batch,
                   p.m,
                   p.n,
                   p.k,
                   2 * p.trans_a + p.trans_b,
                   static_cast<int64_t>(p.in),
                   static_cast<int64_t>(p.out),
                   p.beta != 0,
                   alignment(x.a),
                   alignment(x.b),
                   std::min(alignment(x.out), alignment(x.c)),
                   x.c == x.out,
                   p.space_a.row,
                   p.space_a.matrix,
                   p.space_b.row,
                   p.space_b.matrix,
                   p.space_out.row,
                   p.space_out.matrix};
  std::unique_ptr<Plan>& plan = plans_[key];
  if (!plan) plan = make_plan(p, key);
  return *plan;
}

void Products::run(const char* name, const Plan& plan, int candidate, const Product& p, const Operands& x) {
  const float alpha32 = static_cast<float>(p.alpha), beta32 = static_cast<float>(p.beta);
  const void* alpha = plan.f64 ? static_cast<const void*>(&p.alpha) : &alpha32;
  const void* beta = plan.f64 ? static_cast<const void*>(&p.beta) : &beta32;
  context_.begin_launch(name, plan.work);
  const cublasStatus_t status =
      cublasLtMatmul(static_cast<cublasLtHandle_t>(handle_), plan.operation.value, alpha, x.b, plan.b.value,
                     x.a, plan.a.value, beta, x.c, plan.out.value, x.out, plan.out.value,
                     &plan.candidates[static_cast<size_t>(candidate)], workspace_.data(), kWorkspaceBytes,
                     context_.stream());
  context_.end_launch(name);
  check_blas(status, plan.name.c_str());
}

void Products::multiply(const Product& p, const void* a, const void* b, const void* c, void* out) {
  prepare();
  const Operands x = {a, b, c, out};
  Plan& chosen = plan(p, x);
  if (chosen.uses < kTuneAtUse && ++chosen.uses == kTuneAtUse && tune_ != Tune::never &&
      (flops_of(p) >= kTuneFlops || bytes_of(p) >= kTuneBytes) && chosen.candidates.size() > 1) {
    if (context_.capturing()) {
      --chosen.uses;  // later: nothing runs now
    } else {
      tune(chosen, p, x);
    }
  }
  run(chosen.name.c_str(), chosen, chosen.chosen, p, x);
}

// ---- tuning -----------------------------------------------------------------------------------------------

// The median of three runs, or one run of what takes long; the first, with its start-up costs, does not
// count. A candidate far behind `best` is not run again.
double Products::seconds_of(const Plan& plan, int candidate, const Product& p, const Operands& x,
                            double best) {
  run(kTuning, plan, candidate, p, x);
  std::vector<double> times;
  do {
    check_cuda(cudaEventRecord(events_[0], context_.stream()), "timing a product");
    run(kTuning, plan, candidate, p, x);
    check_cuda(cudaEventRecord(events_[1], context_.stream()), "timing a product");
    context_.check(cudaEventSynchronize(events_[1]), "timing a product");
    float ms = 0;
    check_cuda(cudaEventElapsedTime(&ms, events_[0], events_[1]), "timing a product");
    times.push_back(static_cast<double>(ms) * 1e-3);
  } while (times.size() < 3 && times[0] < 1e-3 && times[0] < 1.5 * best);
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

void Products::tune(Plan& plan, const Product& p, const Operands& x) {
  if (p.in == DType::f64) return;
  // The candidates may write to `out`, which is overwritten anyway, unless its sum is to be kept. They
  // multiply noise: of real operands many are zero at the start of a training run, which every algorithm gets
  // right to the bit, and which run faster.
  const bool keeps = p.beta != 0 && x.c == x.out;
  Tensor a, b, scratch;
  try {
    a = Tensor(context_.arena(), {span_of(p.space_a, p.batch, p.trans_a ? p.k : p.m, p.trans_a ? p.m : p.k)},
               p.in);
    b = Tensor(context_.arena(), {span_of(p.space_b, p.batch, p.trans_b ? p.n : p.k, p.trans_b ? p.k : p.n)},
               p.in);
    if (keeps) scratch = Tensor(context_.arena(), {span_of(p)}, p.out);
  } catch (const RunError&) {
    return;  // no room to try others: the first choice it is
  }
  fill_noise(context_, a);
  fill_noise(context_, b);
  const Operands trial = {a.data(), b.data(), x.c, keeps ? scratch.data() : x.out};
  const auto n = static_cast<int>(plan.candidates.size());
  const Tensor sums(context_.arena(), {n}, DType::i64);
  check_cuda(cudaMemsetAsync(sums.data(), 0, static_cast<size_t>(sums.bytes()), context_.stream()),
             "preparing to tune a product");
  std::vector<double> seconds;
  double best = HUGE_VAL;
  for (int i = 0; i < n; ++i) {
    seconds.push_back(seconds_of(plan, i, p, trial, best));
    best = std::min(best, seconds.back());
    hash_bits(context_, trial.out, span_of(p) * dtype_size(p.out), sums.as<uint64_t>() + i);
  }
  std::vector<uint64_t> hashes(static_cast<size_t>(n));
  context_.arena().read(sums.data(), hashes.data(), static_cast<size_t>(sums.bytes()));
  double to_beat = seconds[0] * kWorthIt;
  for (size_t i = 1; i < seconds.size(); ++i) {
    if (seconds[i] < to_beat && (tune_ == Tune::any || hashes[i] == hashes[0])) {
      to_beat = seconds[i];
      plan.chosen = static_cast<int>(i);
    }
  }
}

// ---- the backend's products -------------------------------------------------------------------------------

namespace {

// The dtype that a and b are multiplied in: their own if they agree, else the one that holds both exactly.
DType product_dtype(DType a, DType b) {
  if (a == b && (a == DType::f64 || a == DType::bf16 || a == DType::f16)) return a;
  return a == DType::f64 || b == DType::f64 ? DType::f64 : DType::f32;
}

void multiply(CudaBackend& backend, Products& products, Product p, const Tensor& a, const Tensor& b,
              const Tensor& out) {
  for (const Tensor* t : {&a, &b, &out}) {
    check(!t->arena().host(), "matmul on cuda: a tensor of shape {} is in host memory",
          shape_string(t->shape()));
  }
  if (out.numel() == 0) return;
  if (p.k == 0) return p.beta == 0 ? backend.fill(out, 0) : backend.axpby(0, out, p.beta, out);
  p.in = product_dtype(a.dtype(), b.dtype());
  const bool own_dtype = p.in == out.dtype() || (p.in != DType::f64 && out.dtype() == DType::f32);
  p.out = own_dtype ? out.dtype() : p.in == DType::f64 ? DType::f64 : DType::f32;
  const auto as = [&](const Tensor& t, DType dtype, bool load) {
    if (t.dtype() == dtype) return t;
    const Tensor other = backend.empty(t.shape(), dtype);
    if (load) backend.copy(t, other);
    return other;
  };
  const Tensor x = as(a, p.in, true), y = as(b, p.in, true), z = as(out, p.out, p.beta != 0);
  products.multiply(p, x.data(), y.data(), z.data(), z.data());
  if (p.out != out.dtype()) backend.copy(z, out);
}

}  // namespace

void CudaBackend::matmul(const Tensor& a, Trans trans_a, const Tensor& b, Trans trans_b, double beta,
                         const Tensor& out) {
  Product p;
  p.m = out.dim(0), p.n = out.dim(1), p.k = a.dim(trans_a == Trans::no ? 1 : 0);
  p.trans_a = trans_a == Trans::yes, p.trans_b = trans_b == Trans::yes, p.beta = beta;
  multiply(*this, *products_, p, a, b, out);
}

void CudaBackend::matmul_batched(const Tensor& a, Trans trans_a, const Tensor& b, Trans trans_b, double beta,
                                 const Tensor& out) {
  Product p;
  p.batch = out.dim(0), p.m = out.dim(1), p.n = out.dim(2), p.k = a.dim(trans_a == Trans::no ? 2 : 1);
  p.trans_a = trans_a == Trans::yes, p.trans_b = trans_b == Trans::yes, p.beta = beta;
  multiply(*this, *products_, p, a, b, out);
}

namespace {

// Rows of a block that a symmetric result of this side is computed in; side: whole, where the arithmetic
// saved would not pay for the smaller products and for mirroring.
int64_t symmetric_block(int64_t side) {
  const int64_t block = side % 512 == 0 ? 512 : 256;
  return side >= 1024 && side % block == 0 ? block : side;
}

// A symmetric result in rows of blocks, each from the left edge to the diagonal; what lies above is mirrored.
// With b blocks that is (b + 1) / 2b of the arithmetic. Then adds `diagonal` times the unit matrix.
void multiply_symmetric(Context& context, Products& products, Product p, const Tensor& a, const Tensor& b,
                        const Tensor* c, double diagonal, const Tensor& out) {
  const int64_t side = p.m, block = symmetric_block(side);
  p.space_a.matrix = p.space_b.matrix = side * p.k;
  p.space_a.row = p.trans_a ? side : p.k;
  p.space_b.row = p.trans_b ? p.k : side;
  p.space_out = {side, side * side};
  p.m = block;
  const auto at = [](const Tensor& t, int64_t elements) {
    return static_cast<char*>(t.data()) + elements * dtype_size(t.dtype());
  };
  for (int64_t first = 0; first < side; first += block) {
    p.n = first + block;
    char* rows = at(out, first * side);
    products.multiply(p, at(a, p.trans_a ? first : first * p.k), b.data(), c ? at(*c, first * side) : rows,
                      rows);
  }
  finish_symmetric(context, out, block, diagonal);
}

}  // namespace

// In 16 bits with a I + b A + c A A in one: its product with x needs no sum.
void CudaBackend::muon_step(const Quintic& q, const Tensor& x, const Tensor& gram, const Tensor& polynomial,
                            const Tensor& out) {
  if (dtype_size(x.dtype()) != 2) return Backend::muon_step(q, x, gram, polynomial, out);
  const bool tall = x.dim(1) > x.dim(2);
  const int64_t side = gram.dim(1);
  Product p;
  p.batch = x.dim(0), p.m = p.n = side, p.k = std::max(x.dim(1), x.dim(2));
  p.trans_a = tall, p.trans_b = !tall;
  p.in = p.out = x.dtype();
  multiply_symmetric(context_, *products_, p, x, x, nullptr, 0, gram);
  p.k = side, p.trans_a = p.trans_b = false;
  p.alpha = q.c, p.beta = q.b;
  multiply_symmetric(context_, *products_, p, gram, gram, &gram, q.a, polynomial);
  if (tall) {
    matmul_batched(x, Trans::no, polynomial, Trans::no, 0, out);
  } else {
    matmul_batched(polynomial, Trans::no, x, Trans::no, 0, out);
  }
}

}  // namespace flexchat::cuda
