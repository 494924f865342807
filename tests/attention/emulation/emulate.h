// Runs a CUDA kernel's source on the CPU: each thread of a block is a fiber that runs to its next shuffle or barrier.
// Include it before the kernel's header; threadIdx, blockIdx, blockDim, __syncthreads and __shfl_xor_sync then exist.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <ucontext.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#undef __launch_bounds__
#define __launch_bounds__(...)

namespace emulation {

struct Index { unsigned x = 0, y = 0, z = 0; };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Index thread;
  bool done = false;
  int parity = 0;
  float exchange[2] = {};
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline int current = 0, arrived = 0, generation = 0;
inline Index block, block_dim;
inline const std::function<void()>* body = nullptr;

inline void yield() { swapcontext(&fibers[current].context, &scheduler); }

inline void enter() {
  (*body)();
  fibers[current].done = true;
}

inline void barrier() {
  const int mine = generation;
  if (++arrived == static_cast<int>(fibers.size())) arrived = 0, ++generation;
  while (generation == mine) yield();
}

inline float shuffle_xor(float value, int mask) {
  Fiber& self = fibers[current];
  const int slot = self.parity ^= 1, me = current;
  self.exchange[slot] = value;
  yield();  // the lanes of a warp advance one exchange at a time
  return fibers[me ^ mask].exchange[slot];
}

// Runs `kernel` for every thread of every block, blocks one after another.
inline void launch(unsigned grid, unsigned threads, const std::function<void()>& kernel) {
  constexpr size_t kStack = 256 * 1024;
  body = &kernel;
  block_dim = {threads, 1, 1};
  for (unsigned b = 0; b < grid; ++b) {
    block = {b, 0, 0};
    arrived = 0;
    fibers = std::vector<Fiber>(threads);
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& fiber = fibers[t];
      fiber.thread = {t, 0, 0};
      fiber.stack.reset(new char[kStack]);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = &scheduler;
      makecontext(&fiber.context, enter, 0);
    }
    for (bool running = true; running;) {
      running = false;
      for (current = 0; current < static_cast<int>(threads); ++current) {
        if (fibers[current].done) continue;
        swapcontext(&scheduler, &fibers[current].context);
        running = running || !fibers[current].done;
      }
    }
  }
}

}  // namespace emulation

#define threadIdx (emulation::fibers[emulation::current].thread)
#define blockIdx emulation::block
#define blockDim emulation::block_dim
#define __syncthreads emulation::barrier
#define __shfl_xor_sync(mask, value, offset) emulation::shuffle_xor(value, offset)
