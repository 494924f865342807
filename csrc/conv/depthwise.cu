#include "conv/depthwise.cuh"

#include "common/launch.h"
#include "common/tensor.h"

namespace fused_ops::conv {
namespace {

template <typename T, int V, int K, int STRIDE>
void launch_strips(const DepthwiseShape& shape, const DepthwiseTensors<T>& tensors, int activation,
                   cudaStream_t stream) {
  const int64_t strips = (shape.out_width + kStrip - 1) / kStrip;
  const int64_t threads = shape.batch * shape.out_height * strips * (shape.channels / V);
  const int64_t blocks = (threads + kDepthwiseThreads - 1) / kDepthwiseThreads;
  STD_TORCH_CHECK(blocks <= INT32_MAX, "conv2d_cuda: the output is too large for one launch");
  launch(depthwise_fwd_kernel<T, V, K, STRIDE>, dim3(static_cast<unsigned>(blocks)), dim3(kDepthwiseThreads), dim3(1),
         0, stream, shape, tensors, activation, threads);
}

template <typename T, int V>
void launch_kernel(const DepthwiseShape& shape, const DepthwiseTensors<T>& tensors, int activation,
                   cudaStream_t stream) {
  const int k = shape.dilation_w == 1 ? shape.kernel_w : 0, stride = shape.stride_w;
  constexpr int kFewer = V > 4 ? 4 : V;  // a wide window of 8 channels does not fit the registers
  if constexpr (V > 1) {
    if (k == 3 && stride == 1) return launch_strips<T, V, 3, 1>(shape, tensors, activation, stream);
    if (k == 3 && stride == 2) return launch_strips<T, V, 3, 2>(shape, tensors, activation, stream);
    if (k == 5 && stride == 1) return launch_strips<T, V, 5, 1>(shape, tensors, activation, stream);
    if (k == 5 && stride == 2) return launch_strips<T, kFewer, 5, 2>(shape, tensors, activation, stream);
    if (k == 7 && stride == 1) return launch_strips<T, V, 7, 1>(shape, tensors, activation, stream);
    if (k == 7 && stride == 2) return launch_strips<T, kFewer, 7, 2>(shape, tensors, activation, stream);
  }
  return launch_strips<T, V, 0, 1>(shape, tensors, activation, stream);
}

void check_channels_last(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4, name, " must be 4-dimensional");
  int64_t stride = 1;
  bool dense = true;
  for (int dim : {1, 3, 2, 0}) {
    dense = dense && (t.size(dim) == 1 || t.stride(dim) == stride);
    stride *= t.size(dim);
  }
  STD_TORCH_CHECK(dense, name, " must be contiguous in channels_last");
}

void check_vector(const std::optional<Tensor>& tensor, int64_t channels, const char* name) {
  if (!tensor) return;
  STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Float, name, " must be float32");
  check_contiguous(*tensor, name);
  check_shape(*tensor, {channels}, name);
}

// input (N, C, H, W) channels_last, weight (C, 1, kh, kw), scale and shift (C,), residual (N, C, OH, OW) channels_last.
Tensor conv2d_cuda(Tensor input, Tensor weight, std::optional<Tensor> scale, std::optional<Tensor> shift,
                   std::optional<Tensor> residual, std::vector<int64_t> stride, std::vector<int64_t> padding,
                   std::vector<int64_t> dilation, int64_t groups, int64_t activation) {
  check_channels_last(input, "input");
  const int64_t batch = input.size(0), channels = input.size(1);
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) == channels && weight.size(1) == 1 && groups == channels,
                  "conv2d_cuda takes depthwise weights, (channels, 1, kernel_height, kernel_width)");
  STD_TORCH_CHECK(weight.scalar_type() == input.scalar_type(), "weight must have input's dtype");
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, "one stride per dimension");
  int64_t space[2];
  for (int i = 0; i < 2; ++i) {
    const int64_t spare = input.size(i + 2) + 2 * padding[i] - dilation[i] * (weight.size(i + 2) - 1) - 1;
    STD_TORCH_CHECK(spare >= 0 && stride[i] > 0 && padding[i] >= 0, "the kernel must fit the padded input");
    space[i] = spare / stride[i] + 1;
  }
  const DeviceScope scope(input);
  Tensor flat = torch::stable::reshape(weight, {channels, weight.size(2) * weight.size(3)});
  const Tensor taps = torch::stable::contiguous(torch::stable::transpose(flat, 0, 1));
  Tensor rows = torch::stable::new_empty(input, {batch, space[0], space[1], channels});
  Tensor output = torch::stable::transpose(torch::stable::transpose(rows, 1, 3), 2, 3);
  check_vector(scale, channels, "scale");
  check_vector(shift, channels, "shift");
  if (residual) {
    STD_TORCH_CHECK(residual->scalar_type() == input.scalar_type(), "residual must have input's dtype");
    check_shape(*residual, {batch, channels, space[0], space[1]}, "residual");
    check_channels_last(*residual, "residual");
  }
  if (output.numel() == 0) return output;

  const auto narrow = [](int64_t value) { return static_cast<int>(value); };
  const DepthwiseShape shape{batch, channels, input.size(2), input.size(3), space[0], space[1],
                             narrow(weight.size(2)), narrow(weight.size(3)), narrow(stride[0]), narrow(stride[1]),
                             narrow(padding[0]), narrow(padding[1]), narrow(dilation[0]), narrow(dilation[1])};
  dispatch_float(input.scalar_type(), "conv2d_cuda", [&](auto zero) {
    using T = decltype(zero);
    const DepthwiseTensors<T> tensors{data<const T>(input),     data<const T>(taps),     data<const float>(scale),
                                      data<const float>(shift), data<const T>(residual), data<T>(output)};
    constexpr int kVector = 16 / sizeof(T);
    const bool vectors = channels % kVector == 0 && aligned({input, taps, output, residual});
    if (vectors) launch_kernel<T, kVector>(shape, tensors, narrow(activation), scope.stream());
    else launch_kernel<T, 1>(shape, tensors, narrow(activation), scope.stream());
  });
  return output;
}

}  // namespace
}  // namespace fused_ops::conv

FUSED_OPS_CUDA_LIBRARY(m) { m.impl("conv2d_cuda", TORCH_BOX(&fused_ops::conv::conv2d_cuda)); }
