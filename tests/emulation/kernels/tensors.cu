// Ops that copy floats, to see what data() refuses and registers.
#include "common/launch.h"
#include "common/tensor.h"

namespace fused_ops::test {
namespace {

__global__ void copy_kernel(const float* from, float* to, int64_t first, int64_t count) {
  if (threadIdx.x < count) to[first + threadIdx.x] = from[first + threadIdx.x];
}

const float* kept = nullptr;

void copy(const float* from, float* to, int64_t first, int64_t count, cudaStream_t stream) {
  launch(copy_kernel, dim3(1), dim3(32), dim3(1), 0, stream, from, to, first, count);
}

void copy_floats(Tensor input, Tensor output, int64_t first, int64_t count) {
  const DeviceScope scope(input);
  kept = data<const float>(input);
  copy(kept, data<float>(output), first, count, scope.stream());
}

// As if `input` were an output.
void copy_back(Tensor input, Tensor output, int64_t count) {
  const DeviceScope scope(input);
  copy(data<const float>(output), const_cast<float*>(data<const float>(input)), 0, count, scope.stream());
}

// From the tensor of an earlier call.
void copy_kept(Tensor output, int64_t count) {
  const DeviceScope scope(output);
  copy(kept, data<float>(output), 0, count, scope.stream());
}

int64_t without_scope(Tensor tensor) { return data<const float>(tensor) != nullptr; }

int64_t null_of_none(Tensor, std::optional<Tensor> none) { return data<float>(none) == nullptr; }

}  // namespace
}  // namespace fused_ops::test

FUSED_OPS_CUDA_LIBRARY(m) {
  m.impl("emulation_test_copy", TORCH_BOX(&fused_ops::test::copy_floats));
  m.impl("emulation_test_copy_back", TORCH_BOX(&fused_ops::test::copy_back));
  m.impl("emulation_test_copy_kept", TORCH_BOX(&fused_ops::test::copy_kept));
  m.impl("emulation_test_without_scope", TORCH_BOX(&fused_ops::test::without_scope));
  m.impl("emulation_test_null_of_none", TORCH_BOX(&fused_ops::test::null_of_none));
}
