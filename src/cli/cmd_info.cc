// flexchat info: the build, this machine, and which kernels can run on it.
#include <fmt/core.h>

#include <nlohmann/json.hpp>

#include "backend/cuda_loader.h"
#include "base/options.h"
#include "base/parallel.h"
#include "base/strings.h"
#include "cli/command.h"
#include "report/devices.h"
#include "report/environment.h"
#include "report/table.h"

namespace flexchat {
namespace {

// Columns of the matrix of attention kernels.
struct Feature {
  const char *key, *title;
  bool AttentionSupport::*has;
};
constexpr Feature kFeatures[] = {
    {"grouped_heads", "GQA", &AttentionSupport::grouped_heads},
    {"mask", "mask", &AttentionSupport::mask},
    {"score_mod", "score mod", &AttentionSupport::score_mod},
    {"ragged", "ragged", &AttentionSupport::ragged},
    {"dropout", "dropout", &AttentionSupport::dropout},
    {"pages", "pages", &AttentionSupport::pages},
    {"backward", "backward", &AttentionSupport::backward},
    {"capture_gradients", "d tensors", &AttentionSupport::capture_gradients},
    {"lse_gradient", "d LSE", &AttentionSupport::lse_gradient},
    {"splits_keys", "split KV", &AttentionSupport::splits_keys},
    {"deterministic", "same bits", &AttentionSupport::deterministic},
};

Json info_json() {
  Json info = capture_environment(cuda_accelerators());
  info["threads"] = num_threads();
  const OneDnn dnnl = onednn_info();
  info["onednn"] = Json{{"version", dnnl.version}, {"isa", dnnl.isa}};
  info["highway_target"] = highway_target();
  std::string why;
  info["cuda_unavailable"] = cuda_available(&why) ? Json() : Json(why);
  info["kernels"] = Json::array();
  for (const KernelRow& row : kernel_table()) {
    info["kernels"].push_back(Json{{"device", row.device},
                                   {"kernel", row.kernel},
                                   {"dtype", row.dtype},
                                   {"needs", row.needs},
                                   {"runs", row.runs},
                                   {"how", row.how}});
  }
  info["attention"] = Json::array();
  for (const AttentionSupport& s : attention_support()) {
    Json row = {{"device", s.device},
                {"kernel", s.kernel},
                {"runs", runs_here(s)},
                {"dtypes", s.dtypes},
                {"head_dims", s.head_dims_text()}};
    for (const Feature& f : kFeatures) row[f.key] = s.*f.has;
    info["attention"].push_back(row);
  }
  const RuntimeCompiler compiler = runtime_compiler();
  info["runtime_compiler"] = Json{{"available", compiler.available}, {"how", compiler.how}};
  info["cudnn"] = cudnn_line();
  return info;
}

void print_attention() {
  std::vector<std::string> columns = {"attention", "device", "runs", "dtypes", "head dims"};
  for (const Feature& f : kFeatures) columns.emplace_back(f.title);
  Table table(columns);
  for (const AttentionSupport& s : attention_support()) {
    std::vector<std::string> cells = {std::string(s.kernel), std::string(s.device),
                                      runs_here(s) ? "yes" : "no", std::string(s.dtypes), s.head_dims_text()};
    for (const Feature& f : kFeatures) cells.emplace_back(s.*f.has ? "yes" : "no");
    table.row(cells);
  }
  fmt::print("\n{}\nGPU kernels: {}\ncuDNN: {}\n", table.text(), runtime_compiler().how, cudnn_line());
}

std::string memory_line() {
  const MemoryInfo memory = memory_info();
  std::string line = fmt::format("{}, {} available", format_bytes(static_cast<double>(memory.total)),
                                 format_bytes(static_cast<double>(memory.available)));
  if (memory.limit) line += fmt::format(", limited to {}", format_bytes(static_cast<double>(*memory.limit)));
  return line;
}

std::string commit_line() {
  const GitState git = git_state(source_root());
  return git.commit + (git.dirty.value_or(false) ? " with local changes" : "");
}

void print_info() {
  const CpuInfo cpu = cpu_info();
  const OneDnn dnnl = onednn_info();
  const auto line = [](const char* label, const std::string& value) {
    fmt::print("{:<10}{}\n", label, value);
  };
  fmt::print("flexchat {}\n\n", program_version());
  line("build", fmt::format("{}; {}", compiler_name(), build_flags()));
  line("commit", commit_line());
  line("cpu", fmt::format("{}, {} core{}", cpu.name, cpu.cores, cpu.cores == 1 ? "" : "s"));
  line("simd", cpu.features.empty() ? "none of those the kernels use" : join(cpu.features, " "));
  line("threads", std::to_string(num_threads()));
  line("memory", memory_line());
  line("oneDNN", fmt::format("{}, instruction set {}", dnnl.version, dnnl.isa));
  line("Highway", "target " + highway_target());
  std::string why;
  if (!cuda_available(&why)) line("cuda", "none: " + why);
  for (const Json& device : cuda_accelerators()) {
    line(device["device"].get<std::string>().c_str(), device["description"].get<std::string>());
  }

  Table kernels({"device", "kernel", "dtype", "needs", "runs", "how"});
  for (const KernelRow& row : kernel_table()) {
    kernels.row({row.device, row.kernel, row.dtype, row.needs, row.runs ? "yes" : "no", row.how});
  }
  fmt::print("\n{}", kernels.text());
  print_attention();
}

}  // namespace

int cmd_info(const Words& words) {
  bool json = false;
  Options options("flexchat info", "the build, this machine, and which kernels can run on it");
  options.add("--json", &json, "print JSON").not_recorded();
  if (!options.parse(words)) return 0;
  if (json) {
    fmt::print("{}\n", info_json().dump(2, ' ', false, Json::error_handler_t::replace));
  } else {
    print_info();
  }
  return 0;
}

}  // namespace flexchat
