// Finding and compiling kernels: keys, the cache on disk under every kind of damage and company, errors that
// say what to do; emitted sections compile. What compiles needs NVRTC and no GPU, and is skipped without it;
// the last test needs a GPU.
#include "backend/jit_compiler.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>

#include "backend/cuda_loader.h"
#include "base/error.h"
#include "base/file.h"
#include "base/parallel.h"
#include "base/rng.h"
#include "flex/emit.h"
#include "flex/mods.h"
#include "support/temp_folder.h"
#include "testing/process.h"

namespace flexchat {
namespace {

namespace fs = std::filesystem;

constexpr const char* kChildCache = "FLEXCHAT_JIT_TEST_CACHE";

JitSource small_source(int n = 1) {
  return {
      .name = "small",
      .text = fmt::format("extern \"C\" __global__ void small(float* x) {{ x[threadIdx.x] += {}; }}\n", n)};
}

bool has_nvrtc() {
  try {
    Nvrtc::instance();
    return true;
  } catch (const Error&) {
    return false;
  }
}

fs::path only_file(const fs::path& folder) {
  fs::path found;
  for (const auto& entry : fs::directory_iterator(folder)) {
    EXPECT_TRUE(found.empty()) << "more than one file in " << folder;
    found = entry.path();
  }
  return found;
}

// What the counters gained while `fn` ran.
template <class Fn>
JitCounters counted(const Fn& fn) {
  const JitCounters before = jit_counters();
  fn();
  const JitCounters after = jit_counters();
  return {after.compiles - before.compiles, after.disk_hits - before.disk_hits,
          after.embedded_hits - before.embedded_hits, after.memory_hits - before.memory_hits};
}

// Runs first, in a process of its own that has not opened NVRTC yet.
TEST(JitDeathTest, WithoutNvrtcTheErrorSaysWhatToDo) {
  ::testing::FLAGS_gtest_death_test_style = "threadsafe";
  const auto run = [] {
    ::setenv("FLEXCHAT_NVRTC", "/nowhere/libnvrtc.so", 1);
    const EmbeddedCubin embedded[] = {{"key", "sm_80", "softcap", "x"}, {"key", "sm_90a", "ALiBi", "x"}};
    JitCompiler compiler(8, 6, embedded, {});
    const std::string message = message_of<Error>([&] { compiler.cubin(small_source()); });
    fmt::print(stderr, "{}", message);
    std::exit(message.find('\n') == std::string::npos ? 0 : 1);
  };
  EXPECT_EXIT(run(), ::testing::ExitedWithCode(0),
              "/nowhere/libnvrtc.so.*FLEXCHAT_NVRTC.*usable without: softcap$");
}

TEST(Jit, KeysCoverWhatDecides) {
  const JitHeader headers[] = {
      {"a.cuh", "#include \"b.cuh\"\nint a;\n"}, {"b.cuh", "int b;\n"}, {"c.cuh", "int c;\n"}};
  const JitHeader changed[] = {headers[0], {"b.cuh", "int bb;\n"}, headers[2]};
  const JitHeader unrelated[] = {headers[0], headers[1], {"c.cuh", "int cc;\n"}};
  const auto key = [](std::string text, std::span<const JitHeader> with,
                      std::vector<std::string> options = {}, const char* arch = "sm_80") {
    return jit_key({.name = "x", .text = std::move(text), .headers = with, .options = std::move(options)},
                   arch);
  };
  const std::string text = "#include \"a.cuh\"\nint x;\n", base = key(text, headers);
  EXPECT_EQ(base.size(), 32u);
  EXPECT_EQ(base, key(text, headers));
  EXPECT_EQ(base, key(text, unrelated));
  EXPECT_NE(base, key(text, changed));
  EXPECT_NE(base, key(text + " ", headers));
  EXPECT_NE(base, key(text, headers, {"-DX"}));
  EXPECT_NE(key(text, headers, {"-DX", "-DY"}), key(text, headers, {"-DX-DY"}));
  EXPECT_NE(base, key(text, headers, {}, "sm_90a"));
  EXPECT_NE(message_of<RunError>([&] { key("#include \"d.cuh\"\n", headers); }).find("d.cuh"),
            std::string::npos);
  EXPECT_EQ(expand_includes({.name = "x", .text = text + "#include \"b.cuh\"\n", .headers = headers}),
            "int b;\nint a;\nint x;\n");
}

TEST(Jit, Architectures) {
  EXPECT_EQ(jit_arch(8, 0), "sm_80");
  EXPECT_EQ(jit_arch(9, 0), "sm_90a");
  EXPECT_EQ(jit_arch(10, 3), "sm_103");
  EXPECT_TRUE(arch_runs_on("sm_80", 8, 6));
  EXPECT_FALSE(arch_runs_on("sm_86", 8, 0));
  EXPECT_FALSE(arch_runs_on("sm_80", 9, 0));
  EXPECT_TRUE(arch_runs_on("sm_90a", 9, 0));
  EXPECT_FALSE(arch_runs_on("sm_100a", 10, 3));
  EXPECT_TRUE(arch_runs_on("sm_100", 10, 3));
}

TEST(Jit, EmbeddedCubinsComeFirst) {
  const JitSource source = small_source();
  const std::string key = jit_key(source, "sm_80");
  const EmbeddedCubin embedded[] = {{"0", "sm_80", "other", "wrong"}, {key, "sm_80", "softcap", "right"}};
  JitCompiler compiler(8, 9, embedded, {});
  const JitCounters gained = counted([&] {
    EXPECT_EQ(compiler.cubin(source), "right");
    EXPECT_EQ(compiler.cubin(source), "right");
  });
  EXPECT_EQ(gained.embedded_hits, 1);
  EXPECT_EQ(gained.memory_hits, 1);
  EXPECT_EQ(gained.compiles + gained.disk_hits, 0);
}

TEST(Jit, CompilesAhead) {
  if (!has_nvrtc()) GTEST_SKIP() << "no NVRTC";
  const TempFolder folder;
  JitCompiler compiler("sm_80", folder.path());
  const JitSource source = small_source();
  std::string cubin;
  const JitCounters gained = counted([&] {
    EXPECT_FALSE(compiler.compile_ahead(source));
    EXPECT_FALSE(compiler.compile_ahead(source)) << "a second asking starts nothing";
    cubin = compiler.cubin(source);
    EXPECT_TRUE(compiler.compile_ahead(source));
  });
  EXPECT_EQ(cubin.substr(1, 3), "ELF");
  EXPECT_EQ(gained.compiles, 1);
  EXPECT_EQ(gained.disk_hits + gained.embedded_hits + gained.memory_hits, 0);
  const JitCounters again = counted([&] {
    JitCompiler other("sm_80", folder.path());
    EXPECT_TRUE(other.compile_ahead(source)) << "it is on disk";
    EXPECT_EQ(other.cubin(source), cubin);
  });
  EXPECT_EQ(again.compiles, 0);
  EXPECT_EQ(again.disk_hits, 1);
  // What does not compile says so when it is asked for.
  JitSource wrong = source;
  wrong.text += "this is no source";
  compiler.compile_ahead(wrong);
  EXPECT_THROW(compiler.cubin(wrong), RunError);
}

TEST(JitDeathTest, ExitWaitsForWhatIsCompiledAhead) {
  if (!has_nvrtc()) GTEST_SKIP() << "no NVRTC";
  ::testing::FLAGS_gtest_death_test_style = "threadsafe";
  const TempFolder folder;
  const auto run = [&] {
    auto* const compiler = new JitCompiler("sm_80", folder.path());
    compiler->compile_ahead(small_source());
    std::exit(0);
  };
  EXPECT_EXIT(run(), ::testing::ExitedWithCode(0), "");
}

TEST(Jit, TheEnvironmentNamesTheCache) {
  const auto with = [](const char* own, const char* xdg, const char* home) {
    const char* names[] = {"FLEXCHAT_CACHE", "XDG_CACHE_HOME", "HOME"};
    const char* values[] = {own, xdg, home};
    std::string old[3];
    bool had[3];
    for (int i = 0; i < 3; ++i) {
      const char* value = std::getenv(names[i]);
      had[i] = value != nullptr;
      if (had[i]) old[i] = value;
      ::setenv(names[i], values[i], 1);
    }
    const fs::path folder = JitCompiler::cache_folder();
    for (int i = 0; i < 3; ++i) had[i] ? ::setenv(names[i], old[i].c_str(), 1) : ::unsetenv(names[i]);
    return folder;
  };
  EXPECT_EQ(with("/a", "/b", "/c"), "/a");
  EXPECT_EQ(with("", "/b", "/c"), "/b/flexchat");
  EXPECT_EQ(with("", "", "/c"), "/c/.cache/flexchat");
  EXPECT_EQ(with("", "", ""), "");
}

TEST(Jit, CompilesOnceAndThenReadsTheDisk) {
  if (!has_nvrtc()) GTEST_SKIP() << "no NVRTC";
  const TempFolder folder;
  const auto compile = [&](int n) { return JitCompiler("sm_80", folder.path()).cubin(small_source(n)); };
  std::string first, second;
  JitCounters gained = counted([&] { first = compile(1); });
  EXPECT_EQ(gained.compiles, 1);
  EXPECT_EQ(first.substr(1, 3), "ELF");
  gained = counted([&] { second = compile(1); });
  EXPECT_EQ(gained.compiles, 0);
  EXPECT_EQ(gained.disk_hits, 1);
  EXPECT_EQ(first, second);
  gained = counted([&] { compile(2); });
  EXPECT_EQ(gained.compiles, 1);
}

TEST(Jit, DamagedFilesAreCompiledAnew) {
  if (!has_nvrtc()) GTEST_SKIP() << "no NVRTC";
  const TempFolder folder;
  const auto compile = [&] { return JitCompiler("sm_80", folder.path()).cubin(small_source()); };
  const std::string cubin = compile();
  const fs::path path = only_file(folder / "kernels");
  const std::string whole = read_file(path);
  std::string flipped = whole;
  flipped[whole.size() / 2] ^= 1;
  std::string other_format = whole;
  other_format[whole.find('1')] = '0';
  for (const std::string& damaged : {flipped, other_format, whole.substr(0, whole.size() - 1), whole + "x",
                                     whole.substr(0, 40), std::string(), std::string("\n\n")}) {
    write_file_atomic(path, damaged);
    std::string again;
    const JitCounters gained = counted([&] { again = compile(); });
    EXPECT_EQ(gained.compiles, 1);
    EXPECT_EQ(again, cubin);
    EXPECT_EQ(read_file(only_file(folder / "kernels")), whole);
  }
}

TEST(Jit, AFolderThatCannotBeWrittenCostsOnlyTime) {
  if (!has_nvrtc()) GTEST_SKIP() << "no NVRTC";
  const TempFolder folder;
  write_file_atomic(folder / "file", "not a folder");
  JitCompiler compiler("sm_80", folder / "file");
  EXPECT_EQ(compiler.cubin(small_source()).substr(1, 3), "ELF");
}

TEST(Jit, FailuresShowTheErrorAndKeepTheSource) {
  if (!has_nvrtc()) GTEST_SKIP() << "no NVRTC";
  const TempFolder folder;
  const JitHeader headers[] = {
      {"part.cuh", "#pragma once\n__device__ int part() { return unknown_name; }\n"}};
  JitCompiler compiler("sm_80", folder.path());
  const JitSource source = {.name = "broken", .text = "#include \"part.cuh\"\n", .headers = headers};
  const std::string message = message_of<RunError>([&] { compiler.cubin(source); });
  for (const char* part : {"broken", "sm_80", "part.cuh(2)", "unknown_name"}) {
    EXPECT_NE(message.find(part), std::string::npos) << message;
  }
  EXPECT_EQ(message.find('\n'), std::string::npos) << message;
  const fs::path kept = only_file(folder / "failed");
  EXPECT_NE(message.find(kept.string()), std::string::npos) << message;
  EXPECT_EQ(read_file(kept), "__device__ int part() { return unknown_name; }\n");
  EXPECT_FALSE(fs::exists(folder / "kernels"));
  EXPECT_NE(message_of<RunError>([&] { JitCompiler("sm_99999", folder.path()).cubin(small_source()); }), "");
}

TEST(Jit, ThreadsShareOneCompilation) {
  if (!has_nvrtc()) GTEST_SKIP() << "no NVRTC";
  const TempFolder folder;
  JitCompiler compiler("sm_80", folder.path());
  const int threads = num_threads();
  set_num_threads(4);
  const JitCounters gained = counted([&] {
    parallel_for(16, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) compiler.cubin(small_source(static_cast<int>(i % 2)));
    });
  });
  set_num_threads(threads);
  EXPECT_EQ(gained.compiles, 2);
  EXPECT_EQ(gained.memory_hits, 14);
}

// The other side of the next test.
TEST(Jit, ChildProcess) {
  const char* cache = std::getenv(kChildCache);
  if (cache == nullptr) GTEST_SKIP() << "run by ProcessesShareTheFolder";
  for (int n = 0; n < 3; ++n) {
    ASSERT_EQ(JitCompiler("sm_80", cache).cubin(small_source(n)).substr(1, 3), "ELF");
  }
}

TEST(Jit, ProcessesShareTheFolder) {
  if (!has_nvrtc()) GTEST_SKIP() << "no NVRTC";
  const TempFolder folder;
  ::setenv(kChildCache, folder.path().c_str(), 1);
  {
    const std::vector<std::string> words = {"--gtest_filter=Jit.ChildProcess"};
    const fs::path self = fs::read_symlink("/proc/self/exe");
    testing::Process a(self, words), b(self, words), c(self, words);
    for (testing::Process* child : {&a, &b, &c}) {
      const testing::Finished finished = child->wait();
      EXPECT_EQ(finished.code, 0) << finished.out;
    }
  }
  ::unsetenv(kChildCache);
  int files = 0;
  for (const auto& entry : fs::directory_iterator(folder / "kernels")) {
    EXPECT_EQ(entry.path().extension(), ".cubin");
    ++files;
  }
  EXPECT_EQ(files, 3);
  const JitCounters gained = counted([&] {
    for (int n = 0; n < 3; ++n) JitCompiler("sm_80", folder.path()).cubin(small_source(n));
  });
  EXPECT_EQ(gained.disk_hits, 3);
}

// A section with everything in it, and a kernel that calls all its functions.
TEST(Jit, EmittedSectionsCompile) {
  if (!has_nvrtc()) GTEST_SKIP() << "no NVRTC";
  const auto [score, b, h, q, kv, n_q, n_kv] = flex::variables();
  const flex::Capture kf("kf", {flex::Axis::b, flex::Axis::h, flex::Axis::kv}, flex::Type::number, true),
      table("table", {flex::Axis::h, flex::Axis::any}, flex::Type::number, true),
      ids("ids", {flex::Axis::b, flex::Axis::pos}, flex::Type::integer);
  const flex::EmittedMod mod =
      flex::emit_mod((flex::causal() && flex::document(ids)) || (q + floor_div(kv, 7)) % 8 == 0,
                     flex::softcap(30, score) + log(kf(b, h, kv) * sigmoid(score) / n_kv + 1e-6) +
                         softplus(-score) + pow(abs(score) + 0.5, 1.5) - sqrt(abs(score)) + exp(-abs(score)) +
                         table(h, max(min(q - kv, 4), 0)) + where(score < HUGE_VAL, 1, score));
  const fs::path kernels = fs::path(FLEXCHAT_TEST_DATA) / "../../src/backend/cuda/kernels";
  const std::string params = read_file(kernels / "attention_params.cuh"),
                    math = read_file(kernels / "mod_math.cuh");
  const JitHeader headers[] = {{"attention_params.cuh", params}, {"mod_math.cuh", math}};
  const TempFolder folder;
  for (const int dtype : {0, 1}) {
    JitSource source{.name = "section", .text = {}, .headers = headers};
    source.text =
        fmt::format("#define ATTENTION_DTYPE {}\n#include \"mod_math.cuh\"\n{}", dtype, mod.text) + R"(
using namespace flexchat::cuda;
extern "C" __global__ void section(const __grid_constant__ AttentionParams p, float* out) {
  const int q = threadIdx.x, kv = blockIdx.x;
  const ModContext c{p, 0, 1, p.q_len, p.kv_len};
  const ModHead mh = mod_head(c);
  const ModQ mq = mod_q(c, mh, q);
  const ModKv mk = mod_kv(c, mh, kv);
  float x = mod_mask(c, mh, mq, mk, q, kv) ? mod_score(c, mh, mq, mk, out[q], q, kv) : 0.0f;
  x += mod_score_grad(c, mh, mq, mk, out[q], q, kv);
  for (int i = 0; i < MOD_N_CAPTURE_GRADS; ++i) {
    x += mod_capture_grad(i, c, mh, mq, mk, out[q], q, kv) + out[mod_capture_index(i, c, q, kv)];
  }
  out[q] = x;
}
)";
    for (const char* arch : {"sm_80", "sm_90a", "sm_100"}) {
      EXPECT_EQ(JitCompiler(arch, folder.path()).cubin(source).substr(1, 3), "ELF");
    }
  }
}

// New shapes, lengths and page tables compile nothing once an expression has been used. FLEXCHAT_FUZZ_CASES:
// how many.
TEST(Jit, ShapesCompileNothing) {
  if (!cuda_available()) GTEST_SKIP() << "no CUDA device";
  const auto [score, b, h, q, kv, n_q, n_kv] = flex::variables();
  const std::unique_ptr<Backend> cuda = make_cuda_backend();
  AttentionSpec spec;
  spec.scale = 0.125;
  spec.mask = flex::causal() && q % 5 != 3;
  spec.score_mod = 1.0625 * score - 0.03125 * abs(q - kv);
  Rng rng(3);
  const auto below = [&](int64_t n) { return static_cast<int64_t>(rng.below(static_cast<uint64_t>(n))); };
  const auto run = [&](int64_t batch, int64_t n, bool paged) {
    constexpr int64_t page_size = 16, heads = 4, kv_heads = 2, d = 64;
    AttentionShape shape{
        .batch = batch, .q_len = n, .kv_len = n, .n_head = heads, .n_kv_head = kv_heads, .head_dim = d};
    for (int64_t i = 0; i < batch; ++i) shape.kv_lens.push_back(1 + below(n));
    shape.q_lens = shape.kv_lens;
    AttentionSpec own = spec;
    own.page_size = paged ? page_size : 0;
    const int64_t pages = (n + page_size - 1) / page_size;
    std::vector<int64_t> order(static_cast<size_t>(batch * pages));
    for (size_t i = 0; i < order.size(); ++i) {
      const auto other = static_cast<size_t>(below(static_cast<int64_t>(i) + 1));
      order[i] = order[other];
      order[other] = static_cast<int64_t>(i);
    }
    const Tensor table = cuda->to_device(Tensor::from<int64_t>(order, {batch, pages}, DType::i32));
    const int64_t rows = paged ? batch * pages : batch, tokens = paged ? page_size : n;
    const Tensor x = cuda->zeros({batch, n, heads * d}, DType::bf16), out = cuda->zeros(x.shape(), x.dtype());
    const Tensor k = cuda->zeros({rows, tokens, kv_heads * d}, DType::bf16),
                 v = cuda->zeros(k.shape(), k.dtype());
    const Tensor lse = cuda->zeros({batch, heads, n}, DType::f32);
    const auto plan = cuda->plan_attention(shape, own);
    const AttentionTensors io{.q = heads_view(x),
                              .k = heads_view(k),
                              .v = heads_view(v),
                              .out = heads_view(out),
                              .lse = paged ? nullptr : &lse,
                              .block_table = paged ? &table : nullptr};
    cuda->attention(*plan, io);
    if (paged) return;
    const Tensor dq = cuda->zeros(x.shape(), x.dtype()), dk = cuda->zeros(k.shape(), k.dtype()),
                 dv = cuda->zeros(k.shape(), k.dtype());
    AttentionGradients grads;
    grads.dout = heads_view(x);
    grads.dq = heads_view(dq);
    grads.dk = heads_view(dk);
    grads.dv = heads_view(dv);
    cuda->attention_backward(*plan, io, grads);
  };
  const JitCounters first = counted([&] {
    run(1, 100, false);
    run(1, 100, true);
  });
  EXPECT_GE(first.compiles + first.disk_hits + first.embedded_hits + first.memory_hits, 1);
  const char* const wanted = std::getenv("FLEXCHAT_FUZZ_CASES");
  const int cases = wanted == nullptr ? 50 : std::stoi(wanted);
  const JitCounters others = counted([&] {
    for (int i = 0; i < cases; ++i) {
      const int64_t batch = 1 + below(3), longest = 1 + below(300);
      run(batch, longest, i % 3 == 0);
    }
  });
  EXPECT_EQ(others.compiles + others.disk_hits + others.embedded_hits, 0);
}

}  // namespace
}  // namespace flexchat
