// Fibers: one stack per CUDA thread, switched by hand, all on the OS thread that launches.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fused_ops::emulation {

constexpr size_t kStackBytes = 64 * 1024;

// A stack above a guard page: running over its end is a segmentation fault, not a neighbour's trouble.
class Stack {
 public:
  Stack();
  ~Stack();
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;
  std::byte* bottom() const { return bottom_; }
  std::byte* top() const { return bottom_ + kStackBytes; }

 private:
  std::byte* bottom_;
};

// The stack pointer from which `fused_ops_switch_stack` starts `entry`, which must never return. `colour` spreads the
// frames of many stacks over the sets of the cache.
void* prepare_stack(Stack& stack, size_t colour, void (*entry)());

}  // namespace fused_ops::emulation

// Leaves the current stack, its registers stored at *from, for the one whose stack pointer is `to`.
extern "C" void fused_ops_switch_stack(void** from, void* to);
