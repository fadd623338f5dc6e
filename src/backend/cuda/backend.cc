// The backend object and CUDA graphs of whole steps.
#include <exception>
#include <utility>

#include "backend/cuda/arena.h"
#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/products.h"
#include "backend/cuda/staging.h"
#include "backend/profile.h"

namespace flexchat::cuda {
namespace {

class Graph final : public StepGraph {
 public:
  // Owns `executable` and the memory that the arena keeps for it.
  Graph(Context& context, cudaGraphExec_t executable, uint64_t memory, const Work& work)
      : context_(context), executable_(executable), memory_(memory), work_(work) {}
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  ~Graph() override {
    cudaStreamSynchronize(context_.stream());  // the last replay may still run
    cudaGraphExecDestroy(executable_);
    context_.device_arena().release_graph(memory_);
  }
  void replay() override {
    context_.forbid_in_capture("replaying a graph");
    context_.begin_launch("step_graph", work_);
    context_.check(cudaGraphLaunch(executable_, context_.stream()), "launching a graph");
    context_.end_launch("step_graph");
  }

 private:
  Context& context_;
  cudaGraphExec_t executable_;
  uint64_t memory_;
  Work work_;
};

}  // namespace

CudaBackend::CudaBackend(int ordinal) : context_(ordinal), products_(std::make_unique<Products>(context_)) {
  if (profiling()) start_profile();
}

CudaBackend::~CudaBackend() {
  try {
    stop_profile();
  } catch (const std::exception&) {
    // What broke on the device was reported to who asked for it; there is no profile of it then.
  }
}

Staging& CudaBackend::staging() {
  if (!staging_) staging_ = std::make_unique<Staging>(context_);
  return *staging_;
}

std::unique_ptr<StepGraph> CudaBackend::capture(std::function<void()> step) {
  products_->prepare();
  if (context_.logging()) return Backend::capture(std::move(step));  // a profile wants every launch by itself
  context_.begin_capture();
  DeviceArena& arena = context_.device_arena();
  bool recording = false;
  Work work;
  cudaGraph_t graph = nullptr;
  try {
    arena.begin_graph();
    recording = true;
    step();
    graph = context_.end_capture(&work);
  } catch (...) {
    context_.abort_capture();
    if (recording) arena.release_graph(arena.end_graph());
    throw;
  }
  const uint64_t memory = arena.end_graph();
  cudaGraphExec_t executable = nullptr;
  const cudaError_t status = cudaGraphInstantiate(&executable, graph, 0);
  cudaGraphDestroy(graph);
  if (status != cudaSuccess) arena.release_graph(memory);
  context_.check(status, "making a CUDA graph ready");
  return std::make_unique<Graph>(context_, executable, memory, work);
}

}  // namespace flexchat::cuda
