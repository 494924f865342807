// conv2d_cpu and conv_bn_act2d_cpu: the 1x1 kernels and the depthwise one, each compiled for AVX-512, AVX2 and whatever the
// compiler targets by default; the processor decides at run time. conv_bn_act2d_cpu folds batch norm into scale and shift
// itself, in every call: that is a few hundred numbers, where as tensors it would be five ops.
#include <torch/headeronly/core/MemoryFormat.h>

#include <cmath>

#include "common/check.h"
#include "conv/depthwise_cpu.h"
#include "conv/pointwise_cpu.h"
#include "conv/pointwise_last_cpu.h"

namespace fused_ops::conv {
namespace {

using torch::headeronly::MemoryFormat;

#if defined(__x86_64__)
#define FUSED_OPS_AVX512 __attribute__((target("avx512f,fma"), flatten))
#define FUSED_OPS_AVX2 __attribute__((target("avx2,fma"), flatten))
FUSED_OPS_AVX512 void pointwise_512(const Pointwise& p, const PointwisePlan& plan, int64_t begin, int64_t end) {
  pointwise_tasks<16, 8>(p, plan, begin, end);
}
FUSED_OPS_AVX2 void pointwise_256(const Pointwise& p, const PointwisePlan& plan, int64_t begin, int64_t end) {
  pointwise_tasks<8, 4>(p, plan, begin, end);
}
FUSED_OPS_AVX512 void last_512(const PointwiseLast& p, const LastPlan& plan, int64_t begin, int64_t end) {
  last_tasks<16, 8>(p, plan, begin, end);
}
FUSED_OPS_AVX2 void last_256(const PointwiseLast& p, const LastPlan& plan, int64_t begin, int64_t end) {
  last_tasks<8, 4>(p, plan, begin, end);
}
FUSED_OPS_AVX2 void depthwise_256(const Depthwise& d, int64_t begin, int64_t end) { depthwise_any<8>(d, begin, end); }
FUSED_OPS_AVX512 void depthwise_512(const Depthwise& d, int64_t begin, int64_t end) {
  if (d.out_width <= 8) return depthwise_256(d, begin, end);  // a 16-wide vector would be more than half empty
  depthwise_any<16>(d, begin, end);
}
#endif

void pointwise_128(const Pointwise& p, const PointwisePlan& plan, int64_t begin, int64_t end) {
  pointwise_tasks<4, 4>(p, plan, begin, end);
}
void last_128(const PointwiseLast& p, const LastPlan& plan, int64_t begin, int64_t end) {
  last_tasks<4, 4>(p, plan, begin, end);
}
void depthwise_128(const Depthwise& d, int64_t begin, int64_t end) { depthwise_any<4>(d, begin, end); }

struct Kernels {
  int64_t lanes;
  void (*pointwise)(const Pointwise&, const PointwisePlan&, int64_t, int64_t);
  void (*last)(const PointwiseLast&, const LastPlan&, int64_t, int64_t);
  void (*depthwise)(const Depthwise&, int64_t, int64_t);
};

// `lanes` caps the width, so that tests can run every variant this processor has.
Kernels kernels(int64_t lanes) {
#if defined(__x86_64__)
  if (lanes >= 16 && __builtin_cpu_supports("avx512f")) return {16, pointwise_512, last_512, depthwise_512};
  if (lanes >= 8 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return {8, pointwise_256, last_256, depthwise_256};
  }
#endif
  return {4, pointwise_128, last_128, depthwise_128};
}

const float* data(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr;
}

// Whether a pixel's channels lie together; of what is laid out both ways, no.
bool is_channels_last(const Tensor& tensor) {
  if (tensor.dim() != 4) return false;
  const int64_t channels = tensor.size(1), row = tensor.size(3) * channels;
  return tensor.stride(1) == 1 && tensor.stride(3) == channels && tensor.stride(2) == row &&
         tensor.stride(0) == tensor.size(2) * row && !(channels == 1 && row == 1 && tensor.size(2) == 1);
}

void check_float(const Tensor& tensor, const char* name, bool channels_last = false) {
  bool fits = channels_last || tensor.is_contiguous();
  int64_t stride = 1;
  for (const int64_t dim : {1, 3, 2, 0}) {  // a dimension of one element may have any stride
    if (!channels_last) break;
    fits = fits && (tensor.size(dim) == 1 || tensor.stride(dim) == stride), stride *= tensor.size(dim);
  }
  STD_TORCH_CHECK(fits, name, " must be ", channels_last ? "channels_last" : "contiguous");
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, " must be float32");
}

using Ints = std::vector<int64_t>;
using Optional = std::optional<Tensor>;

// act((weight * input) scale + shift + residual), laid out as input is. input (N, C, H, W), weight (K, C / groups, kh, kw), scale and shift K
// floats or null, residual (N, K, OH, OW); padding (y, x) on both sides, or (top, left, bottom, right).
Tensor convolve(const Tensor& input, const Tensor& weight, const float* scale, const float* shift,
                const Optional& residual, const Ints& stride, Ints padding, const Ints& dilation, int64_t groups,
                int64_t activation, int64_t lanes) {
  const bool last = is_channels_last(input);
  check_float(input, "input", last);
  check_float(weight, "weight");
  STD_TORCH_CHECK(input.dim() == 4 && weight.dim() == 4, "input and weight must be 4-dimensional");
  STD_TORCH_CHECK(stride.size() == 2 && dilation.size() == 2, "one stride per dimension");
  STD_TORCH_CHECK(padding.size() == 2 || padding.size() == 4, "padding must be given per dimension or per side");
  if (padding.size() == 2) padding.insert(padding.end(), {padding[0], padding[1]});
  STD_TORCH_CHECK(activation <= kRelu6 || activation == kHardswish || activation == kLeakyRelu,
                  "activation has no vector form here");
  const int64_t batch = input.size(0), channels = input.size(1), out_channels = weight.size(0);
  STD_TORCH_CHECK(weight.size(1) * groups == channels, "weight must have channels / groups");
  int64_t space[2];
  for (int i = 0; i < 2; ++i) {
    const int64_t padded = input.size(i + 2) + padding[i] + padding[i + 2];
    const int64_t spare = padded - dilation[i] * (weight.size(i + 2) - 1) - 1;
    STD_TORCH_CHECK(spare >= 0 && stride[i] > 0 && padding[i] >= 0 && padding[i + 2] >= 0,
                    "the kernel must fit the padded input");
    space[i] = spare / stride[i] + 1;
  }
  if (residual) {
    check_float(*residual, "residual", last);
    check_shape(*residual, {batch, out_channels, space[0], space[1]}, "residual");
  }
  Tensor output = torch::stable::empty({batch, out_channels, space[0], space[1]}, ScalarType::Float, {}, {}, {},
                                       last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  if (output.numel() == 0) return output;

  const auto* x = static_cast<const float*>(input.const_data_ptr());
  const auto* w = static_cast<const float*>(weight.const_data_ptr());
  auto* y = static_cast<float*>(output.mutable_data_ptr());
  const Kernels chosen = kernels(lanes);
  const bool single = weight.size(2) == 1 && weight.size(3) == 1 && padding == std::vector<int64_t>(4, 0);
  if (last) {
    STD_TORCH_CHECK(groups == 1 && single, "conv2d_cpu takes 1x1 weights where input is channels_last");
    const PointwiseLast p{x, w, scale, shift, data(residual), y,
                          batch, input.size(2), input.size(3), channels, space[0], space[1], out_channels,
                          {stride[0], stride[1]}, activation};
    const int64_t width = chosen.lanes * kLastVectors, flops = p.pixels() * channels * out_channels;
    const int64_t threads = flops < (1 << 19) ? 1 : torch::stable::get_num_threads();
    const LastPlan plan = plan_pointwise_last((out_channels + width - 1) / width, p.pixels(), threads);
    torch::stable::parallel_for(0, plan.tasks(), 1,
                                [&](int64_t begin, int64_t end) { chosen.last(p, plan, begin, end); });
    return output;
  }
  if (groups == 1 && single && stride[0] == 1 && stride[1] == 1) {
    const Pointwise p{x, w, scale, shift, data(residual), y,
                      batch, channels, out_channels, space[0] * space[1], activation};
    const int64_t threads = torch::stable::get_num_threads();
    const PointwisePlan plan = plan_pointwise(p.columns(), channels, out_channels, chosen.lanes, threads);
    const int64_t cost = std::max<int64_t>(
        plan.rows_per_chunk * channels * plan.group_panels * chosen.lanes * kPanelVectors, 1);
    torch::stable::parallel_for(0, plan.tasks(), std::max<int64_t>(1, (1 << 18) / cost),
                                [&](int64_t begin, int64_t end) { chosen.pointwise(p, plan, begin, end); });
    return output;
  }
  STD_TORCH_CHECK(weight.size(1) == 1 && groups == out_channels, "conv2d_cpu takes 1x1 or depthwise weights");
  const Depthwise d{x, w, scale, shift, data(residual), y,
                    output.numel(), channels, input.size(2), input.size(3), space[0], space[1],
                    {weight.size(2), weight.size(3)}, {stride[0], stride[1]}, {padding[0], padding[1]},
                    {dilation[0], dilation[1]}, activation};
  const int64_t cost = space[0] * space[1] * weight.size(2) * weight.size(3);
  torch::stable::parallel_for(0, batch * channels, std::max<int64_t>(1, (1 << 17) / cost),
                              [&](int64_t begin, int64_t end) { chosen.depthwise(d, begin, end); });
  return output;
}

// `tensor`'s numbers as float32, one for each channel; null if it is absent. It is replaced where they must be converted.
const float* per_channel(Optional& tensor, int64_t channels, const char* name) {
  if (!tensor) return nullptr;
  check_shape(*tensor, {channels}, name);
  if (tensor->scalar_type() != ScalarType::Float) tensor = torch::stable::to(*tensor, ScalarType::Float);
  if (!tensor->is_contiguous()) tensor = torch::stable::contiguous(*tensor);
  return data(tensor);
}

Tensor conv2d_cpu(Tensor input, Tensor weight, Optional scale, Optional shift, Optional residual, Ints stride,
                  Ints padding, Ints dilation, int64_t groups, int64_t activation, int64_t lanes) {
  const int64_t channels = weight.dim() > 0 ? weight.size(0) : 0;
  if (scale) check_float(*scale, "scale");
  if (shift) check_float(*shift, "shift");
  return convolve(input, weight, per_channel(scale, channels, "scale"), per_channel(shift, channels, "shift"), residual,
                  stride, std::move(padding), dilation, groups, activation, lanes);
}

// scale = bn_weight / sqrt(running_var + eps), shift = bn_bias + (bias - running_mean) scale, in float32 whatever they
// come in; an absent weight is 1, an absent bias 0.
Tensor conv_bn_act2d_cpu(Tensor input, Tensor weight, Optional bias, Tensor running_mean, Tensor running_var,
                         Optional bn_weight, Optional bn_bias, double eps, Optional residual, Ints stride,
                         Ints padding, Ints dilation, int64_t groups, int64_t activation, int64_t lanes) {
  const int64_t channels = weight.dim() > 0 ? weight.size(0) : 0;
  Optional centre = running_mean, spread = running_var;
  const float* mean = per_channel(centre, channels, "running_mean");
  const float* variance = per_channel(spread, channels, "running_var");
  const float* factor = per_channel(bn_weight, channels, "bn_weight");
  const float* offset = per_channel(bn_bias, channels, "bn_bias");
  const float* before = per_channel(bias, channels, "bias");
  const auto epsilon = static_cast<float>(eps);
  std::vector<float> scale(channels), shift(channels);
  for (int64_t k = 0; k < channels; ++k) scale[k] = (factor ? factor[k] : 1.0f) / std::sqrt(variance[k] + epsilon);
  for (int64_t k = 0; k < channels; ++k) {
    shift[k] = (offset ? offset[k] : 0.0f) + ((before ? before[k] : 0.0f) - mean[k]) * scale[k];
  }
  return convolve(input, weight, scale.data(), shift.data(), residual, stride, std::move(padding), dilation, groups,
                  activation, lanes);
}

}  // namespace
}  // namespace fused_ops::conv

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CPU, m) {
  m.impl("conv2d_cpu", TORCH_BOX(&fused_ops::conv::conv2d_cpu));
  m.impl("conv_bn_act2d_cpu", TORCH_BOX(&fused_ops::conv::conv_bn_act2d_cpu));
}
