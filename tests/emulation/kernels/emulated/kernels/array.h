// A test's array as device code sees it, in the emulator: the memory itself, registered with the checker.
#pragma once

#include "emulation/check.h"

namespace fused_ops::test {

// const T: an input.
template <typename T>
class Array {
 public:
  Array(T* host, int64_t count) : host_(host) {
    emulation::check::add_range(host, static_cast<size_t>(count) * sizeof(T), sizeof(T), !std::is_const_v<T>);
  }
  ~Array() { emulation::check::drop_ranges_to(0); }
  Array(const Array&) = delete;
  operator T*() const { return host_; }

 private:
  T* host_;
};

}  // namespace fused_ops::test
