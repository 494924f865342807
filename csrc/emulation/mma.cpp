// What common/mma.cuh's twin does.
#include <cstring>
#include <string>

#include "emulation/common/mma.cuh"

namespace fused_ops::emulation {

namespace {

constexpr unsigned kAll = 0xffffffffu;

struct Matrices {
  uint32_t* registers;
  std::byte* row;
};

void check_row(const char* kind, const void* row, Where where) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    fail(std::string(kind) + " at an address that is no multiple of 16", where);
  }
  if (!in_shared(row, 16)) fail(std::string(kind) + " at an address outside this block's shared memory", where);
}

// Where element `half` (0 or 1) of lane's register lies in an 8x8 matrix: its row and its column.
std::pair<uint32_t, uint32_t> element(uint32_t lane, uint32_t half, bool transposed) {
  const uint32_t across = lane % 4 * 2 + half;
  return transposed ? std::pair{across, lane / 4} : std::pair{lane / 4, across};
}

template <bool kStores>
void move_matrices(const char* kind, uint32_t* registers, uint32_t count, bool transposed, std::byte* row, Where where) {
  if (current->lane() < 8 * count) {
    check_row(kind, row, where);
    kStores ? check::write(row, 16, where) : check::read(row, 16, where);
  }
  Matrices mine{registers, row};
  collective(kind, kAll, mine, [&](Lanes<Matrices>& lanes) {
    for (uint32_t lane = 0; lane < 32; ++lane) {
      for (uint32_t i = 0; i < 2 * count; ++i) {
        const auto [y, x] = element(lane, i % 2, transposed);
        std::byte* memory = lanes[i / 2 * 8 + y]->row + 2 * x;
        std::byte* own = reinterpret_cast<std::byte*>(lanes[lane]->registers + i / 2) + i % 2 * 2;
        kStores ? std::memcpy(memory, own, 2) : std::memcpy(own, memory, 2);
      }
    }
  }, where);
}

float from_half(uint32_t bits) {
  uint32_t magnitude = (bits & 0x7fffu) << 13;
  if (magnitude >= 0x7c00u << 13) magnitude |= 0x7f800000u;  // infinite or NaN
  else magnitude = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
  return std::bit_cast<float>(magnitude | (bits & 0x8000u) << 16);
}

struct Fragments {
  float* d;
  const uint32_t *a, *b;
};

using Row = double __attribute__((vector_size(64)));  // of D and B: 8 columns

// d += A B, the operands spread out: a[i][k], b[k].
template <int kDepth>
void multiply_all(Lanes<Fragments>& lanes, const double (&a)[16][kDepth], const Row (&b)[kDepth]) {
  for (uint32_t i = 0; i < 16; ++i) {
    Row sum{};
    for (int k = 0; k < kDepth; ++k) sum += a[i][k] * b[k];
    for (uint32_t j = 0; j < 8; ++j) {
      float& d = lanes[i % 8 * 4 + j / 2]->d[i / 8 * 2 + j % 2];
      d = static_cast<float>(sum[j] + d);
    }
  }
}

template <Operand kOperand>
void multiply_16(Lanes<Fragments>& lanes) {
  const auto value = [](uint32_t bits) -> double {
    return kOperand == Operand::half ? from_half(bits & 0xffffu) : std::bit_cast<float>(bits << 16);
  };
  double a[16][16];
  Row b[16];
  for (uint32_t lane = 0; lane < 32; ++lane) {
    const uint32_t g = lane / 4, t = lane % 4;
    for (uint32_t i = 0; i < 8; ++i) {
      a[g + i / 2 % 2 * 8][2 * t + i % 2 + i / 4 * 8] = value(lanes[lane]->a[i / 2] >> i % 2 * 16);
    }
    for (uint32_t i = 0; i < 4; ++i) b[2 * t + i % 2 + i / 2 * 8][g] = value(lanes[lane]->b[i / 2] >> i % 2 * 16);
  }
  multiply_all(lanes, a, b);
}

void multiply_8(Lanes<Fragments>& lanes) {
  const auto value = [](uint32_t bits) -> double { return std::bit_cast<float>(bits & ~0x1fffu); };
  double a[16][8];
  Row b[8];
  for (uint32_t lane = 0; lane < 32; ++lane) {
    const uint32_t g = lane / 4, t = lane % 4;
    for (uint32_t i = 0; i < 4; ++i) a[g + i % 2 * 8][t + i / 2 * 4] = value(lanes[lane]->a[i]);
    for (uint32_t i = 0; i < 2; ++i) b[t + i * 4][g] = value(lanes[lane]->b[i]);
  }
  multiply_all(lanes, a, b);
}

}  // namespace

void load_matrices(const char* kind, uint32_t* registers, uint32_t count, bool transposed, const void* row, Where where) {
  auto* at = static_cast<std::byte*>(const_cast<void*>(row));
  move_matrices<false>(kind, registers, count, transposed, at, where);
}

void store_matrices(const char* kind, const uint32_t* registers, uint32_t count, bool transposed, void* row, Where where) {
  move_matrices<true>(kind, const_cast<uint32_t*>(registers), count, transposed, static_cast<std::byte*>(row), where);
}

void multiply(const char* kind, Operand operand, float* d, const uint32_t* a, const uint32_t* b, Where where) {
  Fragments mine{d, a, b};
  collective(kind, kAll, mine, [&](Lanes<Fragments>& lanes) {
    if (operand == Operand::half) multiply_16<Operand::half>(lanes);
    else if (operand == Operand::bfloat16) multiply_16<Operand::bfloat16>(lanes);
    else multiply_8(lanes);
  }, where);
}

}  // namespace fused_ops::emulation
