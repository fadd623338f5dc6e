// Barriers in shared memory (PTX mbarrier), 8 bytes each: a phase ends when `count` arrivals have come. Who
// arrives goes on; who waits, waits for the phase of parity 0, then 1, then 0... What was written before an
// arrival can be read after the wait.
#pragma once
#include "mma.cuh"

namespace flexchat::cuda {

ATTENTION_DEVICE void barrier_init(unsigned barrier, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
ATTENTION_DEVICE void barrier_arrive(unsigned barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(barrier) : "memory");
}
// Arrives when the copies (copy_async) that this thread has started are done.
ATTENTION_DEVICE void barrier_arrive_after_copies(unsigned barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}
#if __CUDA_ARCH__ >= 900
#define MBARRIER_WAIT "mbarrier.try_wait"  // sleeps a while
#else
#define MBARRIER_WAIT "mbarrier.test_wait"
#endif
ATTENTION_DEVICE void barrier_wait(unsigned barrier, unsigned parity) {
  asm volatile(
      "{ .reg .pred p;\n"
      "again: " MBARRIER_WAIT
      ".parity.shared.b64 p, [%0], %1;\n"
      "@!p bra again; }" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
#undef MBARRIER_WAIT

}  // namespace flexchat::cuda
