// fused_ops::rnn_project_cuda: launches the input projection of the RNN sequences.
#include "rnn/projection.cuh"

#include "common/launch.h"
#include "common/tensor.h"

namespace fused_ops::projection {
namespace {

template <typename T, int kColumns, int kBytes>
void launch_tiles(const Projection<T>& p, cudaStream_t stream) {
  const int64_t blocks = (p.rows + kRows - 1) / kRows * ((p.columns + kColumns - 1) / kColumns);
  STD_TORCH_CHECK(blocks <= INT32_MAX, "rnn_project: x·Wᵀ is too large for one launch");
  launch(rnn_project_kernel<T, kColumns, kBytes>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), dim3(1),
         Tile<kColumns>::kSharedBytes, stream, p);
}

// The widest copies that the start of every row allows; how rows are copied does not change what is computed.
template <typename T, int kColumns>
void launch_copies(const Projection<T>& p, cudaStream_t stream) {
  const uint64_t starts = reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.weight) |
                          static_cast<uint64_t>(p.depth) * sizeof(T);
  if (starts % 16 == 0) return launch_tiles<T, kColumns, 16>(p, stream);
  if (sizeof(T) == 4 || starts % 4 == 0) return launch_tiles<T, kColumns, 4>(p, stream);
  if constexpr (sizeof(T) == 2) launch_tiles<T, kColumns, 2>(p, stream);
}

Tensor rnn_project_cuda(const Tensor& x_any, const Tensor& weight_any, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(x_any.dim() == 2 && weight_any.dim() == 2, "x must be (N, I), weight (M, I)");
  const int64_t rows = x_any.size(0), depth = x_any.size(1), columns = weight_any.size(0);
  check_shape(weight_any, {columns, depth}, "weight");
  STD_TORCH_CHECK(weight_any.scalar_type() == x_any.scalar_type(), "weight must have x's dtype");
  STD_TORCH_CHECK(on_device_of(weight_any, x_any) && (!bias || on_device_of(*bias, x_any)), "all on x's device");
  if (bias) {
    check_shape(*bias, {columns}, "bias");
    check_contiguous(*bias, "bias");
  }
  const DeviceScope scope(x_any);
  const Tensor x = torch::stable::contiguous(x_any), weight = torch::stable::contiguous(weight_any);
  Tensor out = torch::stable::new_empty(x, {rows, columns}, ScalarType::Float);
  if (out.numel() == 0) return out;
  dispatch_float(x.scalar_type(), "rnn_project", [&](auto zero) {
    using T = decltype(zero);
    const Projection<T> p{data<const T>(x), data<const T>(weight), data<const float>(bias), data<float>(out),
                          rows,             columns,               depth};
    if (is_narrow(columns)) launch_copies<T, 64>(p, scope.stream());
    else launch_copies<T, 128>(p, scope.stream());
  });
  return out;
}

}  // namespace
}  // namespace fused_ops::projection

FUSED_OPS_CUDA_LIBRARY(m) { m.impl("rnn_project_cuda", TORCH_BOX(&fused_ops::projection::rnn_project_cuda)); }
