// How a test calls a small kernel: arrays in, arrays out, and what went wrong as text.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/launch.h"
#include "kernels/array.h"

#define FUSED_OPS_TEST extern "C" __attribute__((visibility("default"))) const char*

namespace fused_ops::test {

// Null, or why body() failed.
template <typename Body>
const char* tell(Body body) {
  static std::string said;
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    said = error.what();
    return said.c_str();
  }
}

constexpr dim3 kOne(1, 1, 1);

}  // namespace fused_ops::test
