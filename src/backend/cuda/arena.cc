#include "backend/cuda/arena.h"

#include <cuda.h>

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "backend/suballocator.h"
#include "base/error.h"
#include "base/strings.h"

namespace flexchat::cuda {

DeviceArena::DeviceArena(Context& context) : context_(context), poison_(switched_on("FLEXCHAT_POISON")) {}

void* DeviceArena::allocate(size_t bytes) {
  void* const block = take(bytes);
  if (poison_) context_.check(cudaMemsetAsync(block, 0xff, bytes, context_.stream()), "poisoning a block");
  return block;
}

void DeviceArena::read(const void* from, void* host_memory, size_t bytes) const {
  context_.forbid_in_capture("reading a value from the device");
  context_.check(cudaMemcpyAsync(host_memory, from, bytes, cudaMemcpyDeviceToHost, context_.stream()),
                 "reading from the device");
  context_.check(cudaStreamSynchronize(context_.stream()), "reading from the device");
}

void DeviceArena::reset_peak() {
  std::lock_guard lock(mutex_);
  stats_.peak = stats_.in_use;
}

void DeviceArena::count(size_t taken, size_t given_back) {
  stats_.in_use += taken;
  stats_.in_use -= given_back;
  stats_.peak = std::max(stats_.peak, stats_.in_use);
}

void DeviceArena::out_of_memory(size_t bytes) const {
  size_t free = 0, total = 0;
  (void)cudaGetLastError();
  (void)cudaMemGetInfo(&free, &total);
  const auto text = [](size_t n) { return format_bytes(static_cast<double>(n)); };
  fail_run(
      "out of memory on {}: asked {}, held {} in tensors and {} in all, free {} of the device's {}; less is "
      "needed with a smaller --device-batch-size or --sequence-len, or with --checkpoint-activations",
      context_.device().name, text(bytes), text(stats_.in_use), text(stats_.reserved), text(free),
      text(total));
}

namespace {

constexpr size_t kMiB = size_t{1} << 20;

// ---- expandable -------------------------------------------------------------------------------------------

// Functions of the driver, found at run time so that nothing links to it.
struct Driver {
  decltype(&cuMemAddressReserve) reserve;
  decltype(&cuMemAddressFree) free;
  decltype(&cuMemCreate) create;
  decltype(&cuMemRelease) release;
  decltype(&cuMemMap) map;
  decltype(&cuMemUnmap) unmap;
  decltype(&cuMemSetAccess) set_access;
  decltype(&cuMemGetAllocationGranularity) granularity;
  decltype(&cuGetErrorString) error_string;

  Driver() {
    find("cuMemAddressReserve", &reserve);
    find("cuMemAddressFree", &free);
    find("cuMemCreate", &create);
    find("cuMemRelease", &release);
    find("cuMemMap", &map);
    find("cuMemUnmap", &unmap);
    find("cuMemSetAccess", &set_access);
    find("cuMemGetAllocationGranularity", &granularity);
    find("cuGetErrorString", &error_string);
  }

  void check(CUresult status, const char* what) const {
    if (status == CUDA_SUCCESS) return;
    const char* text = nullptr;
    error_string(status, &text);
    fail_run("{}: {} (CUDA driver error {}); FLEXCHAT_ALLOC=malloc does without", what, text ? text : "?",
             static_cast<int>(status));
  }

 private:
  template <class F>
  static void find(const char* name, F* function) {
    void* address = nullptr;
    cudaDriverEntryPointQueryResult result{};
    check_cuda(cudaGetDriverEntryPointByVersion(name, &address, 12000, cudaEnableDefault, &result), name);
    if (result != cudaDriverEntryPointSuccess || !address) {
      fail_run("the CUDA driver has no {}; FLEXCHAT_ALLOC=malloc does without", name);
    }
    *function = reinterpret_cast<F>(address);
  }
};

using Span = Suballocator::Span;

// What a graph keeps of a range.
struct GraphMemory {
  std::vector<Span> spans;  // all it was captured with; ascending, none overlap
  std::vector<Span> free;   // those of them that no tensor holds, allocated for the graph

  bool covers(size_t offset) const {
    const auto after = std::upper_bound(spans.begin(), spans.end(), offset,
                                        [](size_t o, const Span& span) { return o < span.begin; });
    return after != spans.begin() && offset < std::prev(after)->end;
  }
};

// A range of addresses with memory behind some of them.
class Range {
 public:
  Range(const Driver& driver, int ordinal, size_t capacity, size_t growth)
      : driver_(driver), ordinal_(ordinal), growth_(growth), capacity_(round_up(capacity, growth)) {
    CUmemAllocationProp wanted = property();
    driver_.check(driver_.granularity(&page_, &wanted, CU_MEM_ALLOC_GRANULARITY_MINIMUM),
                  "asking for the size of device pages");
    capacity_ = round_up(capacity_, page_);
    growth_ = round_up(growth_, page_);
    driver_.check(driver_.reserve(&base_, capacity_, 0, 0, 0), "reserving device addresses");
    blocks_.emplace(capacity_);
  }
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;
  ~Range() {
    while (!segments_.empty()) drop(segments_.begin());
    driver_.free(base_, capacity_);
  }

  bool contains(const void* p) const { return address(p) >= base_ && address(p) - base_ < capacity_; }
  size_t mapped() const { return mapped_; }
  const Suballocator& blocks() const { return *blocks_; }

  // Null when the device has no memory left.
  void* allocate(size_t bytes) {
    const std::optional<size_t> offset = blocks_->allocate(bytes);
    if (!offset) return nullptr;
    if (!map(*offset, *offset + blocks_->rounded(bytes))) {
      blocks_->release(*offset, bytes);
      return nullptr;
    }
    if (recording_) recorded_.push_back({*offset, *offset + blocks_->rounded(bytes)});
    return reinterpret_cast<void*>(base_ + *offset);
  }
  // False when the block now belongs to a graph alone.
  bool release(const void* p, size_t bytes) {
    const size_t offset = address(p) - base_;
    for (auto& [id, memory] : graphs_) {
      if (!memory.covers(offset)) continue;
      memory.free.push_back({offset, offset + blocks_->rounded(bytes)});
      return false;
    }
    blocks_->release(offset, bytes);
    return true;
  }

  void begin_graph() {
    recording_ = true;
    recorded_.clear();
  }
  size_t end_graph(uint64_t id) {  // the bytes that are the graph's alone
    recording_ = false;
    std::sort(recorded_.begin(), recorded_.end(), [](Span a, Span b) { return a.begin < b.begin; });
    GraphMemory& memory = graphs_[id];
    for (const Span& span : recorded_) {
      const bool joins = !memory.spans.empty() && span.begin <= memory.spans.back().end;
      if (!joins) memory.spans.push_back(span);
      memory.spans.back().end = std::max(memory.spans.back().end, span.end);
    }
    for (const Span& span : memory.spans) {
      const std::vector<Span> taken = blocks_->take_free(span.begin, span.end);
      memory.free.insert(memory.free.end(), taken.begin(), taken.end());
    }
    return bytes_of(memory.free);
  }
  size_t release_graph(uint64_t id) {
    const GraphMemory memory = std::move(graphs_.at(id));
    graphs_.erase(id);
    for (const Span& span : memory.free) blocks_->release(span.begin, span.end - span.begin);
    return bytes_of(memory.free);
  }

  // Gives memory behind addresses that no block uses back to the device, which must be idle.
  void trim() {
    for (auto it = segments_.begin(); it != segments_.end();) {
      const size_t begin = it->first, end = begin + it->second.bytes;
      auto hole = blocks_->holes().upper_bound(begin);
      const bool in_hole =
          hole != blocks_->holes().begin() && std::prev(hole)->first + std::prev(hole)->second >= end;
      it = in_hole || begin >= blocks_->top() ? drop(it) : std::next(it);
    }
  }

 private:
  struct Segment {
    size_t bytes;
    CUmemGenericAllocationHandle memory;
  };
  using Segments = std::map<size_t, Segment>;  // by offset

  static size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }
  static size_t bytes_of(const std::vector<Span>& spans) {
    size_t sum = 0;
    for (const Span& span : spans) sum += span.end - span.begin;
    return sum;
  }
  static CUdeviceptr address(const void* p) { return reinterpret_cast<CUdeviceptr>(p); }
  CUmemAllocationProp property() const {
    CUmemAllocationProp p{};
    p.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    p.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = ordinal_};
    return p;
  }

  // Puts memory behind [begin, end) where there is none.
  bool map(size_t begin, size_t end) {
    begin = begin / page_ * page_;
    end = round_up(end, page_);
    auto next = segments_.upper_bound(begin);
    if (next != segments_.begin()) {
      const auto& [offset, segment] = *std::prev(next);
      begin = std::max(begin, offset + segment.bytes);
    }
    while (begin < end) {
      if (next == segments_.end()) {  // the end of all that is mapped: grow by more, if there is more
        const size_t ample = std::min(std::max(end - begin, growth_), capacity_ - begin);
        return add(begin, ample) || (ample > end - begin && add(begin, end - begin));
      }
      if (begin < next->first && !add(begin, std::min(end, next->first) - begin)) return false;
      begin = next->first + next->second.bytes;
      ++next;
    }
    return true;
  }

  bool add(size_t offset, size_t bytes) {
    const CUmemAllocationProp wanted = property();
    CUmemGenericAllocationHandle memory{};
    const CUresult status = driver_.create(&memory, bytes, &wanted, 0);
    if (status == CUDA_ERROR_OUT_OF_MEMORY) return false;
    driver_.check(status, "taking device memory");
    const CUresult mapped = driver_.map(base_ + offset, bytes, 0, memory, 0);
    if (mapped != CUDA_SUCCESS) driver_.release(memory);
    driver_.check(mapped, "mapping device memory");
    segments_.emplace(offset, Segment{bytes, memory});
    mapped_ += bytes;
    const CUmemAccessDesc access = {wanted.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    driver_.check(driver_.set_access(base_ + offset, bytes, &access, 1), "opening device memory");
    return true;
  }

  Segments::iterator drop(Segments::iterator it) {
    driver_.unmap(base_ + it->first, it->second.bytes);
    driver_.release(it->second.memory);
    mapped_ -= it->second.bytes;
    return segments_.erase(it);
  }

  const Driver& driver_;
  int ordinal_;
  size_t growth_, capacity_, page_ = 0, mapped_ = 0;
  CUdeviceptr base_ = 0;
  std::optional<Suballocator> blocks_;
  Segments segments_;
  bool recording_ = false;
  std::vector<Span> recorded_;  // allocated since begin_graph()
  std::map<uint64_t, GraphMemory> graphs_;
};

// Small blocks have a range of their own, so that one that lives long cannot split the space of large ones.
class ExpandableArena final : public DeviceArena {
 public:
  explicit ExpandableArena(Context& context)
      : DeviceArena(context),
        small_(driver_, context.device().ordinal, context.device().memory, 2 * kMiB),
        // Addresses cost nothing: room for holes that gave their memory back.
        large_(driver_, context.device().ordinal, 4 * context.device().memory, 32 * kMiB) {}

  void* take(size_t bytes) override {
    std::lock_guard lock(mutex_);
    Range& range = bytes < kMiB ? small_ : large_;
    void* block = range.allocate(bytes);
    if (!block && may_return_memory()) {
      context_.synchronize();
      small_.trim();
      large_.trim();
      block = range.allocate(bytes);
    }
    stats_.reserved = small_.mapped() + large_.mapped();
    if (!block) out_of_memory(bytes);
    count(range.blocks().rounded(bytes), 0);
    return block;
  }

  void release(void* block, size_t bytes) override {
    std::lock_guard lock(mutex_);
    Range& range = small_.contains(block) ? small_ : large_;
    if (range.release(block, bytes)) count(0, range.blocks().rounded(bytes));
  }

  void begin_graph() override {
    std::lock_guard lock(mutex_);
    small_.begin_graph();
    large_.begin_graph();
  }
  uint64_t end_graph() override {
    std::lock_guard lock(mutex_);
    ++last_graph_;
    count(small_.end_graph(last_graph_) + large_.end_graph(last_graph_), 0);
    return last_graph_;
  }
  void release_graph(uint64_t id) override {
    std::lock_guard lock(mutex_);
    count(0, small_.release_graph(id) + large_.release_graph(id));
  }

  Stats stats() const override {
    std::lock_guard lock(mutex_);
    Stats s = stats_;
    // What no block uses: holes, and what is mapped past the last block.
    const auto tail = [](const Range& r) { return r.mapped() - std::min(r.mapped(), r.blocks().top()); };
    const size_t largest = std::max(
        {small_.blocks().largest_hole(), large_.blocks().largest_hole(), tail(small_), tail(large_)});
    const size_t free = s.reserved - std::min(s.reserved, s.in_use);
    if (free > 0) {
      s.fragmentation = 1 - std::min(1.0, static_cast<double>(largest) / static_cast<double>(free));
    }
    return s;
  }

 private:
  Driver driver_;
  Range small_, large_;
  uint64_t last_graph_ = 0;
};

// ---- malloc -----------------------------------------------------------------------------------------------

class MallocArena final : public DeviceArena {
 public:
  using DeviceArena::DeviceArena;
  ~MallocArena() override { free_cached(); }

  void* take(size_t bytes) override {
    std::lock_guard lock(mutex_);
    const size_t size = rounded(bytes);
    auto& cached = cached_[size];
    void* block = nullptr;
    if (!cached.empty()) {
      block = *cached.begin();
      cached.erase(cached.begin());
    } else {
      block = fresh(size);
      if (!block && may_return_memory()) {
        context_.synchronize();
        free_cached();
        block = fresh(size);
      }
      if (!block) out_of_memory(bytes);
      stats_.reserved += size;
    }
    count(size, 0);
    if (recording_) recorded_.insert(block);
    return block;
  }

  void release(void* block, size_t bytes) override {
    std::lock_guard lock(mutex_);
    const size_t size = rounded(bytes);
    for (auto& [id, memory] : graphs_) {
      if (!memory.blocks.contains(block)) continue;
      memory.free.emplace_back(block, size);
      return;
    }
    cached_[size].insert(block);
    count(0, size);
  }

  void begin_graph() override {
    std::lock_guard lock(mutex_);
    recording_ = true;
    recorded_.clear();
  }
  uint64_t end_graph() override {
    std::lock_guard lock(mutex_);
    recording_ = false;
    Memory& memory = graphs_[++last_graph_];
    memory.blocks = std::move(recorded_);
    for (auto& [size, blocks] : cached_) {
      for (void* block : memory.blocks) {
        if (blocks.erase(block) == 0) continue;
        memory.free.emplace_back(block, size);
        count(size, 0);
      }
    }
    return last_graph_;
  }
  void release_graph(uint64_t id) override {
    std::lock_guard lock(mutex_);
    for (const auto& [block, size] : graphs_.at(id).free) {
      cached_[size].insert(block);
      count(0, size);
    }
    graphs_.erase(id);
  }

  Stats stats() const override {
    std::lock_guard lock(mutex_);
    Stats s = stats_;
    for (const auto& [size, blocks] : cached_) {
      if (!blocks.empty()) s.fragmentation = 1 - static_cast<double>(size) / cached_bytes();
    }
    return s;
  }

 private:
  // Steps of 512 bytes, then of 1/8 of a power of two, so that near sizes share blocks.
  static size_t rounded(size_t bytes) {
    size_t step = 512;
    while (step * 16 < bytes) step *= 2;
    return std::max<size_t>((bytes + step - 1) / step * step, step);
  }
  static void* fresh(size_t size) {
    void* block = nullptr;
    const cudaError_t status = cudaMalloc(&block, size);
    if (status == cudaErrorMemoryAllocation) return nullptr;
    check_cuda(status, "taking device memory");
    return block;
  }
  double cached_bytes() const {
    double sum = 0;
    for (const auto& [size, blocks] : cached_) {
      sum += static_cast<double>(size) * static_cast<double>(blocks.size());
    }
    return sum;
  }
  void free_cached() {
    for (auto& [size, blocks] : cached_) {
      for (void* block : blocks) cudaFree(block);
      stats_.reserved -= size * blocks.size();
      blocks.clear();
    }
  }

  // By size. The lowest address goes first, so that a step that starts with the same blocks takes the same.
  std::map<size_t, std::set<void*>> cached_;

  struct Memory {
    std::set<void*> blocks;                      // all that a graph was captured with
    std::vector<std::pair<void*, size_t>> free;  // those of them that no tensor holds
  };
  bool recording_ = false;
  std::set<void*> recorded_;
  std::map<uint64_t, Memory> graphs_;
  uint64_t last_graph_ = 0;
};

// ---- async ------------------------------------------------------------------------------------------------

class AsyncArena final : public DeviceArena {
 public:
  explicit AsyncArena(Context& context) : DeviceArena(context) {
    check_cuda(cudaDeviceGetDefaultMemPool(&pool_, context.device().ordinal), "finding the memory pool");
    uint64_t keep_all = ~uint64_t{0};
    check_cuda(cudaMemPoolSetAttribute(pool_, cudaMemPoolAttrReleaseThreshold, &keep_all),
               "setting up the memory pool");
  }
  void begin_graph() override {
    fail("a step cannot be captured in a CUDA graph with FLEXCHAT_ALLOC=async; allowed: expandable, malloc");
  }
  uint64_t end_graph() override { return 0; }
  void release_graph(uint64_t) override {}

  void* take(size_t bytes) override {
    std::lock_guard lock(mutex_);
    void* block = nullptr;
    const cudaError_t status = cudaMallocAsync(&block, std::max<size_t>(bytes, 1), context_.stream());
    if (status == cudaErrorMemoryAllocation) out_of_memory(bytes);
    context_.check(status, "taking device memory");
    count(bytes, 0);
    return block;
  }
  void release(void* block, size_t bytes) override {
    std::lock_guard lock(mutex_);
    cudaFreeAsync(block, context_.stream());
    count(0, bytes);
  }
  Stats stats() const override {
    std::lock_guard lock(mutex_);
    Stats s = stats_;
    uint64_t reserved = 0;
    (void)cudaMemPoolGetAttribute(pool_, cudaMemPoolAttrReservedMemCurrent, &reserved);
    s.reserved = reserved;
    return s;
  }

 private:
  cudaMemPool_t pool_ = nullptr;
};

}  // namespace

std::unique_ptr<DeviceArena> make_device_arena(Context& context) {
  const char* value = std::getenv("FLEXCHAT_ALLOC");
  const std::string kind = value && *value ? value : "expandable";
  if (kind == "malloc") return std::make_unique<MallocArena>(context);
  if (kind == "async") return std::make_unique<AsyncArena>(context);
  if (kind != "expandable") {
    fail("FLEXCHAT_ALLOC is '{}'{}; allowed: expandable, malloc, async", kind,
         did_you_mean(kind, {"expandable", "malloc", "async"}));
  }
  return std::make_unique<ExpandableArena>(context);
}

}  // namespace flexchat::cuda
