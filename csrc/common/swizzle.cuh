// How tiles lie in shared memory for bulk tensor copies and wgmma. PTX ISA, "Tensors: Swizzling modes".
#pragma once

#include <cstdint>

namespace fused_ops {

// Rows of 32, 64 or 128 bytes whose chunks of 16 bytes are exclusive-ored with the number of the 128 bytes they lie in,
// modulo 2, 4 or 8. Such a tile starts at a multiple of 256, 512 or 1024 bytes, where its pattern begins.
enum class Swizzle : uint8_t { none, bytes32, bytes64, bytes128 };

__host__ __device__ constexpr uint32_t swizzle_rows(Swizzle swizzle) {
  return swizzle == Swizzle::none ? 1 : 1u << static_cast<uint32_t>(swizzle);
}
__host__ __device__ constexpr uint32_t swizzle_bytes(Swizzle swizzle) { return 16 * swizzle_rows(swizzle); }

// Where byte `offset` of a tile lies, from its start.
__host__ __device__ constexpr uint32_t swizzled(uint32_t offset, Swizzle swizzle) {
  return offset ^ ((offset >> 7 & (swizzle_rows(swizzle) - 1)) << 4);
}

}  // namespace fused_ops
