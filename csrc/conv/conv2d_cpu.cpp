// conv2d_cpu: the 1x1 and the depthwise kernel behind one op, each compiled for AVX-512, AVX2 and whatever the compiler
// targets by default; the processor decides at run time.
#include "common/check.h"
#include "conv/depthwise_cpu.h"
#include "conv/pointwise_cpu.h"

namespace fused_ops::conv {
namespace {

#if defined(__x86_64__)
#define FUSED_OPS_AVX512 __attribute__((target("avx512f,fma"), flatten))
#define FUSED_OPS_AVX2 __attribute__((target("avx2,fma"), flatten))
FUSED_OPS_AVX512 void pointwise_512(const Pointwise& p, const PointwisePlan& plan, int64_t begin, int64_t end) {
  pointwise_tasks<16, 8>(p, plan, begin, end);
}
FUSED_OPS_AVX2 void pointwise_256(const Pointwise& p, const PointwisePlan& plan, int64_t begin, int64_t end) {
  pointwise_tasks<8, 4>(p, plan, begin, end);
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
void depthwise_128(const Depthwise& d, int64_t begin, int64_t end) { depthwise_any<4>(d, begin, end); }

struct Kernels {
  int64_t lanes;
  void (*pointwise)(const Pointwise&, const PointwisePlan&, int64_t, int64_t);
  void (*depthwise)(const Depthwise&, int64_t, int64_t);
};

// `lanes` caps the width, so that tests can run every variant this processor has.
Kernels kernels(int64_t lanes) {
#if defined(__x86_64__)
  if (lanes >= 16 && __builtin_cpu_supports("avx512f")) return {16, pointwise_512, depthwise_512};
  if (lanes >= 8 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return {8, pointwise_256, depthwise_256};
  }
#endif
  return {4, pointwise_128, depthwise_128};
}

const float* data(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr;
}

void check_float(const Tensor& tensor, const char* name) {
  check_contiguous(tensor, name);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, " must be float32");
}

// input (N, C, H, W), weight (K, C / groups, kh, kw), scale and shift (K,), residual (N, K, OH, OW); padding (y, x) on both
// sides, or (top, left, bottom, right).
Tensor conv2d_cpu(Tensor input, Tensor weight, std::optional<Tensor> scale, std::optional<Tensor> shift,
                  std::optional<Tensor> residual, std::vector<int64_t> stride, std::vector<int64_t> padding,
                  std::vector<int64_t> dilation, int64_t groups, int64_t activation, int64_t lanes) {
  check_float(input, "input");
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
  if (scale) check_float(*scale, "scale"), check_shape(*scale, {out_channels}, "scale");
  if (shift) check_float(*shift, "shift"), check_shape(*shift, {out_channels}, "shift");
  if (residual) {
    check_float(*residual, "residual");
    check_shape(*residual, {batch, out_channels, space[0], space[1]}, "residual");
  }
  Tensor output = torch::stable::new_empty(input, {batch, out_channels, space[0], space[1]});
  if (output.numel() == 0) return output;

  const auto* x = static_cast<const float*>(input.const_data_ptr());
  const auto* w = static_cast<const float*>(weight.const_data_ptr());
  auto* y = static_cast<float*>(output.mutable_data_ptr());
  const Kernels chosen = kernels(lanes);
  const bool single = weight.size(2) == 1 && weight.size(3) == 1 && stride[0] == 1 && stride[1] == 1 &&
                      padding == std::vector<int64_t>(4, 0);
  if (groups == 1 && single) {
    const Pointwise p{x, w, data(scale), data(shift), data(residual), y,
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
  const Depthwise d{x, w, data(scale), data(shift), data(residual), y,
                    output.numel(), channels, input.size(2), input.size(3), space[0], space[1],
                    {weight.size(2), weight.size(3)}, {stride[0], stride[1]}, {padding[0], padding[1]},
                    {dilation[0], dilation[1]}, activation};
  const int64_t cost = space[0] * space[1] * weight.size(2) * weight.size(3);
  torch::stable::parallel_for(0, batch * channels, std::max<int64_t>(1, (1 << 17) / cost),
                              [&](int64_t begin, int64_t end) { chosen.depthwise(d, begin, end); });
  return output;
}

}  // namespace
}  // namespace fused_ops::conv

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CPU, m) { m.impl("conv2d_cpu", TORCH_BOX(&fused_ops::conv::conv2d_cpu)); }
