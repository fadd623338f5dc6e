#include "backend/cpu/dnnl_matmul.h"

#include <dnnl.hpp>

#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <map>
#include <mutex>
#include <tuple>

#include "base/error.h"

namespace flexchat {
namespace {

using Key = std::tuple<bool, bool, int64_t, int64_t, int64_t, bool, DType>;

struct Primitive {
  dnnl::matmul primitive;
  dnnl::memory::desc a, b, c;
};

#if defined(__linux__) && defined(__x86_64__)
struct Cpuid {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  Cpuid(unsigned leaf, unsigned subleaf) { __get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx); }
};

bool processor_names_amx() { return (Cpuid(7, 0).edx >> 24 & 1) != 0; }

// Can this process use AMX tiles? The processor must have a palette of them (CPUID 1DH), which some
// hypervisors take away while they leave the feature bits, and Linux wants to be asked before it makes room
// for the state (arch_prctl ARCH_REQ_XCOMP_PERM of XFEATURE_XTILEDATA).
bool amx_usable() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return Cpuid(0x1D, 0).eax > 0 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Keeps oneDNN from AMX where its bf16 products die of an illegal instruction: where tiles are named but
// cannot be used, which oneDNN may not find out (its issue 5689), and in oneDNN 2, where that was seen on
// machines whose tiles work (issue 1661). A limit that the user set stands. Must come before oneDNN makes its
// first kernel.
void limit_instructions() {
  if (std::getenv("ONEDNN_MAX_CPU_ISA") || std::getenv("DNNL_MAX_CPU_ISA")) return;
  if (!processor_names_amx()) return;
  if (dnnl_version()->major >= 3 && amx_usable()) return;
  dnnl_set_max_cpu_isa(dnnl_cpu_isa_avx512_core_bf16);
}
#else
void limit_instructions() {}
#endif

// Comes before any use of oneDNN.
void prepare_library() {
  static const bool done = (limit_instructions(), true);
  static_cast<void>(done);
}

dnnl::engine& engine() {
  prepare_library();
  static dnnl::engine e(dnnl::engine::kind::cpu, 0);
  return e;
}

dnnl::memory::desc describe(int64_t rows, int64_t columns, bool transposed, dnnl::memory::data_type type) {
  return {{rows, columns}, type, transposed ? dnnl::memory::dims{1, rows} : dnnl::memory::dims{columns, 1}};
}

Primitive build(const Key& key) {
  const auto [ta, tb, m, n, k, accumulate, out_dtype] = key;
  using Type = dnnl::memory::data_type;
  Primitive p;
  p.a = describe(m, k, ta, Type::bf16);
  p.b = describe(k, n, tb, Type::bf16);
  p.c = describe(m, n, false, out_dtype == DType::f32 ? Type::f32 : Type::bf16);
  dnnl::primitive_attr attributes;
  if (accumulate) {
    dnnl::post_ops post;
    post.append_sum(1.0f);
    attributes.set_post_ops(post);
  }
#if DNNL_VERSION_MAJOR >= 3
  p.primitive = dnnl::matmul(dnnl::matmul::primitive_desc(engine(), p.a, p.b, p.c, attributes));
#else
  p.primitive =
      dnnl::matmul(dnnl::matmul::primitive_desc(dnnl::matmul::desc(p.a, p.b, p.c), attributes, engine()));
#endif
  return p;
}

// Primitives are compiled once a shape; the cache is bounded because decoding meets many lengths. A copy
// shares what it has with the cache, and outlives its place there.
Primitive cached(const Key& key) {
  static std::map<Key, Primitive> cache;
  static std::mutex mutex;
  std::lock_guard lock(mutex);
  if (auto it = cache.find(key); it != cache.end()) return it->second;
  if (cache.size() > 512) cache.clear();
  return cache.emplace(key, build(key)).first->second;
}

}  // namespace

void sgemm(Trans trans_a, Trans trans_b, int64_t m, int64_t n, int64_t k, float alpha, const float* a,
           int64_t stride_a, const float* b, int64_t stride_b, float beta, float* out, int64_t stride_out) {
  if (m == 0 || n == 0) return;
  if (k == 0) {  // oneDNN takes no empty sum
    for (int64_t i = 0; i < m; ++i) {
      float* row = out + i * stride_out;
      for (int64_t j = 0; j < n; ++j) row[j] = beta == 0 ? 0.0f : beta * row[j];
    }
    return;
  }
  prepare_library();
  const auto status = dnnl_sgemm(trans_a == Trans::yes ? 'T' : 'N', trans_b == Trans::yes ? 'T' : 'N', m, n,
                                 k, alpha, a, stride_a, b, stride_b, beta, out, stride_out);
  if (status != dnnl_success) fail_run("oneDNN refused an f32 product of ({} x {}) by ({} x {})", m, k, k, n);
}

bool bf16_matmul_supported() {
  static const bool supported = [] {
    try {
      build({false, true, 8, 8, 8, false, DType::f32});
      return true;
    } catch (const dnnl::error&) {
      return false;
    }
  }();
  return supported;
}

bool bf16_matmul(Trans trans_a, Trans trans_b, int64_t m, int64_t n, int64_t k, const void* a, const void* b,
                 bool accumulate, void* out, DType out_dtype) {
  if (!bf16_matmul_supported()) return false;
  const Primitive p = cached({trans_a == Trans::yes, trans_b == Trans::yes, m, n, k, accumulate, out_dtype});
  thread_local dnnl::stream stream(engine());
  p.primitive.execute(stream, {{DNNL_ARG_SRC, {p.a, engine(), const_cast<void*>(a)}},
                               {DNNL_ARG_WEIGHTS, {p.b, engine(), const_cast<void*>(b)}},
                               {DNNL_ARG_DST, {p.c, engine(), out}}});
  stream.wait();
  return true;
}

}  // namespace flexchat
