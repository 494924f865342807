#include "emulation/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>

// Only what the calling conventions preserve is stored: System V x86-64 psABI 3.2.1, AAPCS64 6.1.
#if defined(__x86_64__)
asm(R"(
.text
.globl fused_ops_switch_stack
.hidden fused_ops_switch_stack
.type fused_ops_switch_stack, @function
fused_ops_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fused_ops_switch_stack, .-fused_ops_switch_stack
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl fused_ops_switch_stack
.hidden fused_ops_switch_stack
.type fused_ops_switch_stack, %function
fused_ops_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size fused_ops_switch_stack, .-fused_ops_switch_stack
)");
#else
#error "the emulator's stack switch is written for x86-64 and aarch64"
#endif

namespace fused_ops::emulation {

Stack::Stack() {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, page + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                      -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) throw std::bad_alloc();
  bottom_ = static_cast<std::byte*>(memory) + page;
}

Stack::~Stack() {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  munmap(bottom_ - page, page + kStackBytes);
}

void* prepare_stack(Stack& stack, size_t colour, void (*entry)()) {
  uintptr_t top = reinterpret_cast<uintptr_t>(stack.top()) - colour % 32 * 128;
  void** frame = reinterpret_cast<void**>(top & ~uintptr_t{15});
#if defined(__x86_64__)
  *--frame = nullptr;  // where entry would return to; at its first instruction the stack is 8 off 16, as after a call
  *--frame = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--frame = nullptr;
#else
  for (int saved = 0; saved < 20; ++saved) *--frame = nullptr;
  frame[11] = reinterpret_cast<void*>(entry);  // x30
#endif
  return frame;
}

}  // namespace fused_ops::emulation
