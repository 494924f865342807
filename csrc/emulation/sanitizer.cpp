// The entry points that g++'s thread and undefined-behaviour instrumentation calls: g++ documents neither, both are
// fixed by its sanitizers' ABI (compiler-rt: tsan_interface.h, ubsan_handlers.h). This file itself is not instrumented.
#include <cstddef>
#include <cstdint>
#include <string>

#include "emulation/check.h"
#include "emulation/runtime.h"

using namespace fused_ops::emulation;
using check::Kind;

#define FUSED_OPS_ENTRY extern "C" __attribute__((visibility("hidden")))
#define FUSED_OPS_HERE __builtin_return_address(0)

#define FUSED_OPS_ACCESS(name, bytes, kind) \
  FUSED_OPS_ENTRY void name(void* address) { check::access(address, bytes, kind, FUSED_OPS_HERE); }
FUSED_OPS_ACCESS(__tsan_read1, 1, Kind::read)
FUSED_OPS_ACCESS(__tsan_read2, 2, Kind::read)
FUSED_OPS_ACCESS(__tsan_read4, 4, Kind::read)
FUSED_OPS_ACCESS(__tsan_read8, 8, Kind::read)
FUSED_OPS_ACCESS(__tsan_read16, 16, Kind::read)
FUSED_OPS_ACCESS(__tsan_write1, 1, Kind::write)
FUSED_OPS_ACCESS(__tsan_write2, 2, Kind::write)
FUSED_OPS_ACCESS(__tsan_write4, 4, Kind::write)
FUSED_OPS_ACCESS(__tsan_write8, 8, Kind::write)
FUSED_OPS_ACCESS(__tsan_write16, 16, Kind::write)
FUSED_OPS_ACCESS(__tsan_unaligned_read2, 2, Kind::read)
FUSED_OPS_ACCESS(__tsan_unaligned_read4, 4, Kind::read)
FUSED_OPS_ACCESS(__tsan_unaligned_read8, 8, Kind::read)
FUSED_OPS_ACCESS(__tsan_unaligned_read16, 16, Kind::read)
FUSED_OPS_ACCESS(__tsan_unaligned_write2, 2, Kind::write)
FUSED_OPS_ACCESS(__tsan_unaligned_write4, 4, Kind::write)
FUSED_OPS_ACCESS(__tsan_unaligned_write8, 8, Kind::write)
FUSED_OPS_ACCESS(__tsan_unaligned_write16, 16, Kind::write)

FUSED_OPS_ENTRY void __tsan_read_range(void* address, unsigned long bytes) {
  check::access(address, bytes, Kind::read, FUSED_OPS_HERE);
}
FUSED_OPS_ENTRY void __tsan_write_range(void* address, unsigned long bytes) {
  check::access(address, bytes, Kind::write, FUSED_OPS_HERE);
}
FUSED_OPS_ENTRY void __tsan_vptr_update(void**, void*) {}
FUSED_OPS_ENTRY void __tsan_vptr_read(void**) {}
FUSED_OPS_ENTRY void __tsan_init() {}
FUSED_OPS_ENTRY void __tsan_func_entry(void*) {}
FUSED_OPS_ENTRY void __tsan_func_exit() {}
FUSED_OPS_ENTRY void __tsan_atomic_thread_fence(int) {}
FUSED_OPS_ENTRY void __tsan_atomic_signal_fence(int) {}

// The host's own atomics (reference counts): device code has its atomics from builtins.h.
#define FUSED_OPS_ATOMIC(bits)                                                                                       \
  using Word##bits = uint##bits##_t;                                                                                 \
  FUSED_OPS_ENTRY Word##bits __tsan_atomic##bits##_load(const volatile Word##bits* a, int) {                         \
    return __atomic_load_n(a, __ATOMIC_SEQ_CST);                                                                     \
  }                                                                                                                  \
  FUSED_OPS_ENTRY void __tsan_atomic##bits##_store(volatile Word##bits* a, Word##bits v, int) {                      \
    __atomic_store_n(a, v, __ATOMIC_SEQ_CST);                                                                        \
  }                                                                                                                  \
  FUSED_OPS_ENTRY Word##bits __tsan_atomic##bits##_exchange(volatile Word##bits* a, Word##bits v, int) {             \
    return __atomic_exchange_n(a, v, __ATOMIC_SEQ_CST);                                                              \
  }                                                                                                                  \
  FUSED_OPS_ENTRY Word##bits __tsan_atomic##bits##_fetch_add(volatile Word##bits* a, Word##bits v, int) {            \
    return __atomic_fetch_add(a, v, __ATOMIC_SEQ_CST);                                                               \
  }                                                                                                                  \
  FUSED_OPS_ENTRY Word##bits __tsan_atomic##bits##_fetch_sub(volatile Word##bits* a, Word##bits v, int) {            \
    return __atomic_fetch_sub(a, v, __ATOMIC_SEQ_CST);                                                               \
  }                                                                                                                  \
  FUSED_OPS_ENTRY Word##bits __tsan_atomic##bits##_fetch_or(volatile Word##bits* a, Word##bits v, int) {             \
    return __atomic_fetch_or(a, v, __ATOMIC_SEQ_CST);                                                                \
  }                                                                                                                  \
  FUSED_OPS_ENTRY Word##bits __tsan_atomic##bits##_fetch_and(volatile Word##bits* a, Word##bits v, int) {            \
    return __atomic_fetch_and(a, v, __ATOMIC_SEQ_CST);                                                               \
  }                                                                                                                  \
  FUSED_OPS_ENTRY int __tsan_atomic##bits##_compare_exchange_strong(volatile Word##bits* a, Word##bits* e,           \
                                                                   Word##bits v, int, int) {                         \
    return __atomic_compare_exchange_n(a, e, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                          \
  }                                                                                                                  \
  FUSED_OPS_ENTRY int __tsan_atomic##bits##_compare_exchange_weak(volatile Word##bits* a, Word##bits* e,             \
                                                                 Word##bits v, int, int) {                           \
    return __atomic_compare_exchange_n(a, e, v, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                           \
  }
FUSED_OPS_ATOMIC(8)
FUSED_OPS_ATOMIC(16)
FUSED_OPS_ATOMIC(32)
FUSED_OPS_ATOMIC(64)

// Every undefined-behaviour handler's first argument begins with where it happened.
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

static void undefined(const char* what, const SourceLocation* at) {
  if (current == nullptr || current->block == nullptr || suspended) return;
  fail(std::string("undefined behaviour: ") + what + " (" + at->file + ":" + std::to_string(at->line) + ")", Where());
}

#define FUSED_OPS_UNDEFINED(name, what)                                                                          \
  FUSED_OPS_ENTRY void __ubsan_handle_##name(const SourceLocation* at, void*, void*) { undefined(what, at); }     \
  FUSED_OPS_ENTRY void __ubsan_handle_##name##_abort(const SourceLocation* at, void*, void*) { undefined(what, at); }
FUSED_OPS_UNDEFINED(add_overflow, "signed addition overflows")
FUSED_OPS_UNDEFINED(sub_overflow, "signed subtraction overflows")
FUSED_OPS_UNDEFINED(mul_overflow, "signed multiplication overflows")
FUSED_OPS_UNDEFINED(negate_overflow, "negation overflows")
FUSED_OPS_UNDEFINED(divrem_overflow, "division by zero or overflow")
FUSED_OPS_UNDEFINED(shift_out_of_bounds, "a shift by more bits than there are, or of a negative number")
FUSED_OPS_UNDEFINED(out_of_bounds, "an index past the end of its array")
FUSED_OPS_UNDEFINED(pointer_overflow, "pointer arithmetic overflows")
FUSED_OPS_UNDEFINED(load_invalid_value, "a bool or enum that is none")
FUSED_OPS_UNDEFINED(builtin_unreachable, "reaches what was declared unreachable")
FUSED_OPS_UNDEFINED(missing_return, "a function ends without its result")
FUSED_OPS_UNDEFINED(vla_bound_not_positive, "an array of no positive size")
FUSED_OPS_UNDEFINED(float_cast_overflow, "a float that does not fit its integer")
FUSED_OPS_UNDEFINED(nonnull_arg, "a null pointer where none may be")
FUSED_OPS_UNDEFINED(nonnull_return_v1, "a null pointer where none may be")
FUSED_OPS_UNDEFINED(invalid_builtin, "an argument a builtin does not take")
FUSED_OPS_UNDEFINED(nullability_arg, "a null pointer where none may be")

struct TypeMismatch {
  SourceLocation at;
  const void* type;
  unsigned char alignment_bits, access;
};
FUSED_OPS_ENTRY void __ubsan_handle_type_mismatch_v1(const TypeMismatch* data, uintptr_t pointer) {
  const uintptr_t alignment = uintptr_t{1} << data->alignment_bits;
  if (pointer == 0) return undefined("an access through a null pointer", &data->at);
  if (pointer % alignment != 0) {
    const std::string what = "an access at an address that is no multiple of " + std::to_string(alignment);
    return undefined(what.c_str(), &data->at);
  }
  undefined("an access to an object too small for it", &data->at);
}
FUSED_OPS_ENTRY void __ubsan_handle_type_mismatch_v1_abort(const TypeMismatch* data, uintptr_t pointer) {
  __ubsan_handle_type_mismatch_v1(data, pointer);
}
