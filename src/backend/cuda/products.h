// Matrix products by cuBLASLt. A plan for each kind of product (shapes, dtypes, transposes, alignments) is
// made once and kept, so the same process gives the same bits.
//
// Only algorithms whose sums have a fixed order are taken: no split over K, or one whose parts are summed in
// the compute type by a second kernel. The first choice is the library's. A plan of a large product is tuned
// at its second use: the candidates run on the real operands, and the fastest of those that give the very
// same bits as the first choice takes its place. So tuning changes the time of a run and not its result.
//   FLEXCHAT_TUNE=0    never tune
//   FLEXCHAT_TUNE=1    (default) as said
//   FLEXCHAT_TUNE=any  take the fastest whatever its bits: two runs may then differ in rounding
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>

#include "backend/backend.h"
#include "backend/cuda/runtime.h"

namespace flexchat::cuda {

// One of the matrices of a Product as it lies in memory, row-major: elements between its rows and between the
// matrices of a batch; 0: they follow each other without a gap.
struct Spacing {
  int64_t row = 0, matrix = 0;
};

// out = alpha * op(a) * op(b) + beta * c, `batch` of them. c is spaced like out, and is out or apart from it.
struct Product {
  int64_t batch = 1, m = 0, n = 0, k = 0;
  bool trans_a = false, trans_b = false;
  DType in = DType::f32;   // of a and b: f32, bf16, f16 or f64
  DType out = DType::f32;  // `in`, or f32 for bf16 and f16
  double alpha = 1, beta = 0;
  Spacing space_a = {}, space_b = {}, space_out = {};
};

class Products {
 public:
  explicit Products(Context& context);
  ~Products();
  Products(const Products&) = delete;
  Products& operator=(const Products&) = delete;

  void prepare();  // takes the workspace, which later calls keep
  void multiply(const Product& product, const void* a, const void* b, const void* c, void* out);

 private:
  struct Plan;
  using Key = std::array<int64_t, 18>;
  struct Operands {
    const void *a, *b, *c;
    void* out;
  };
  enum class Tune { never, same_bits, any };

  Plan& plan(const Product& product, const Operands& x);
  std::unique_ptr<Plan> make_plan(const Product& product, const Key& key);
  void run(const char* name, const Plan& plan, int candidate, const Product& product, const Operands& x);
  void tune(Plan& plan, const Product& product, const Operands& x);
  double seconds_of(const Plan& plan, int candidate, const Product& product, const Operands& x, double best);

  Context& context_;
  void* handle_ = nullptr;  // cublasLtHandle_t
  Tune tune_;
  Tensor workspace_;  // (bytes) u8
  std::map<Key, std::unique_ptr<Plan>> plans_;
  std::array<cudaEvent_t, 2> events_{};
};

// Completes symmetric matrices (n, side, side) of 16-bit elements whose blocks on and below the diagonal are
// there: out[i][r][c] becomes out[i][c][r] wherever c / block > r / block, and `diagonal` is added on the
// diagonal. `block` is a multiple of 64 or the side itself. (symmetric.cu)
void finish_symmetric(Context& context, const Tensor& out, int64_t block, double diagonal);

// Adds a hash of the bits of x to *sum, in device memory. Buffers compared must be equally aligned. (hash.cu)
void hash_bits(Context& context, const void* x, int64_t bytes, uint64_t* sum);
// Numbers in [-1, 1), of any kernel dtype, the same every time.
void fill_noise(Context& context, const Tensor& x);

}  // namespace flexchat::cuda
