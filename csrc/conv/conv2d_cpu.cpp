// conv2d_cpu and conv_bn_act2d_cpu: the 1x1 and the depthwise kernel, and for channels_last a direct one and Winograd's, each
// compiled for AVX-512, AVX2 and whatever the compiler targets by default; the processor decides at run time.
// conv_bn_act2d_cpu folds batch norm into scale and shift itself, in every call: that is a few hundred numbers, where as
// tensors it would be five ops.
#include <torch/headeronly/core/MemoryFormat.h>

#include <cmath>

#include "common/check.h"
#include "conv/depthwise_cpu.h"
#include "conv/direct_cpu.h"
#include "conv/pointwise_cpu.h"
#include "conv/winograd_cpu.h"

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
FUSED_OPS_AVX512 void direct_512(const Direct& p, const LastPlan& plan, int64_t begin, int64_t end) {
  direct_tasks<16, 8>(p, plan, begin, end);
}
FUSED_OPS_AVX2 void direct_256(const Direct& p, const LastPlan& plan, int64_t begin, int64_t end) {
  direct_tasks<8, 4>(p, plan, begin, end);
}
FUSED_OPS_AVX512 void filters_512(const Winograd& p, int64_t first, int64_t last, int64_t begin, int64_t end, float* filters) {
  winograd_filters<16>(p, first, last, begin, end, filters);
}
FUSED_OPS_AVX2 void filters_256(const Winograd& p, int64_t first, int64_t last, int64_t begin, int64_t end, float* filters) {
  winograd_filters<8>(p, first, last, begin, end, filters);
}
FUSED_OPS_AVX512 void winograd_512(const Winograd& p, const LastPlan& plan, int64_t first, int64_t last,
                                   const float* filters, int64_t begin, int64_t end) {
  winograd_tasks<16, 8>(p, plan, first, last, filters, begin, end);
}
FUSED_OPS_AVX2 void winograd_256(const Winograd& p, const LastPlan& plan, int64_t first, int64_t last,
                                 const float* filters, int64_t begin, int64_t end) {
  winograd_tasks<8, 4>(p, plan, first, last, filters, begin, end);
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
void direct_128(const Direct& p, const LastPlan& plan, int64_t begin, int64_t end) {
  direct_tasks<4, 4>(p, plan, begin, end);
}
void filters_128(const Winograd& p, int64_t first, int64_t last, int64_t begin, int64_t end, float* filters) {
  winograd_filters<4>(p, first, last, begin, end, filters);
}
void winograd_128(const Winograd& p, const LastPlan& plan, int64_t first, int64_t last, const float* filters,
                  int64_t begin, int64_t end) {
  winograd_tasks<4, 4>(p, plan, first, last, filters, begin, end);
}
void depthwise_128(const Depthwise& d, int64_t begin, int64_t end) { depthwise_any<4>(d, begin, end); }

struct Kernels {
  int64_t lanes;
  void (*pointwise)(const Pointwise&, const PointwisePlan&, int64_t, int64_t);
  void (*direct)(const Direct&, const LastPlan&, int64_t, int64_t);
  void (*filters)(const Winograd&, int64_t, int64_t, int64_t, int64_t, float*);
  void (*winograd)(const Winograd&, const LastPlan&, int64_t, int64_t, const float*, int64_t, int64_t);
  void (*depthwise)(const Depthwise&, int64_t, int64_t);
};

// `lanes` caps the width, so that tests can run every variant this processor has.
Kernels kernels(int64_t lanes) {
#if defined(__x86_64__)
  if (lanes >= 16 && __builtin_cpu_supports("avx512f")) {
    return {16, pointwise_512, direct_512, filters_512, winograd_512, depthwise_512};
  }
  if (lanes >= 8 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return {8, pointwise_256, direct_256, filters_256, winograd_256, depthwise_256};
  }
#endif
  return {4, pointwise_128, direct_128, filters_128, winograd_128, depthwise_128};
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

int64_t threads_for(int64_t flops) { return flops < (1 << 19) ? 1 : torch::stable::get_num_threads(); }

void run(const Pointwise& p, const Kernels& chosen) {
  const int64_t threads = torch::stable::get_num_threads();
  const PointwisePlan plan = plan_pointwise(p.columns(), p.channels, p.out_channels, chosen.lanes, threads);
  const int64_t cost = std::max<int64_t>(
      plan.rows_per_chunk * p.channels * plan.group_panels * chosen.lanes * kPanelVectors, 1);
  torch::stable::parallel_for(0, plan.tasks(), std::max<int64_t>(1, (1 << 18) / cost),
                              [&](int64_t begin, int64_t end) { chosen.pointwise(p, plan, begin, end); });
}

void run(const Depthwise& d, int64_t batch, const Kernels& chosen) {
  const int64_t cost = d.out_height * d.out_width * d.kernel[0] * d.kernel[1];
  torch::stable::parallel_for(0, batch * d.channels, std::max<int64_t>(1, (1 << 17) / cost),
                              [&](int64_t begin, int64_t end) { chosen.depthwise(d, begin, end); });
}

void run(const Direct& p, const Kernels& chosen) {
  const int64_t panels = count_panels(p.out_channels, chosen.lanes);
  const int64_t threads = threads_for(p.pixels() * p.depth() * p.out_channels);
  const LastPlan plan = plan_last(panels, p.pixels(), threads);
  torch::stable::parallel_for(0, plan.tasks(), 1,
                              [&](int64_t begin, int64_t end) { chosen.direct(p, plan, begin, end); });
}

constexpr int64_t kStreamed = 1 << 22;  // floats of an output that no cache holds

struct Image {
  const float* data;
  int64_t batch, height, width, channels;
};

// The image with zeros around it, in memory of this thread's.
const float* padded(const Image& image, const std::vector<int64_t>& padding) {
  if (padding == std::vector<int64_t>(4, 0)) return image.data;
  const int64_t height = image.height + padding[0] + padding[2], row = image.width * image.channels;
  const int64_t left = padding[1] * image.channels, right = padding[3] * image.channels, pitch = left + row + right;
  float* const memory = workspace<Image>(image.batch * height * pitch);
  torch::stable::parallel_for(0, image.batch * height, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* const to = memory + i * pitch;
      const int64_t y = i % height - padding[0];
      if (y < 0 || y >= image.height) {
        std::fill_n(to, pitch, 0.0f);
        continue;
      }
      std::fill_n(to, left, 0.0f);
      std::copy_n(image.data + (i / height * image.height + y) * row, row, to + left);
      std::fill_n(to + left + row, right, 0.0f);
    }
  });
  return memory;
}

void run(const Winograd& p, const Kernels& chosen) {
  const int64_t panels = count_panels(p.out_channels, chosen.lanes), floats = p.floats(chosen.lanes);
  const int64_t together = std::min(panels, std::max<int64_t>(1, kWinogradFilters / std::max<int64_t>(floats, 1)));
  const int64_t threads = threads_for(p.tiles() * p.channels * p.out_channels * 16);
  float* const filters = workspace<Winograd>(together * floats);
  for (int64_t first = 0; first < panels; first += together) {
    const int64_t last = std::min(first + together, panels);
    const LastPlan plan = plan_last(last - first, p.tiles(), threads);
    const int64_t begin = Panel(first, p.out_channels, chosen.lanes).begin / chosen.lanes;
    const Panel past(last - 1, p.out_channels, chosen.lanes);
    const int64_t end = past.begin / chosen.lanes + past.vectors;
    torch::stable::parallel_for(begin, end, threads == 1 ? end - begin : 1, [&](int64_t begin, int64_t end) {
      chosen.filters(p, first, last, begin, end, filters);
    });
    torch::stable::parallel_for(0, plan.tasks(), 1, [&](int64_t begin, int64_t end) {
      chosen.winograd(p, plan, first, last, filters, begin, end);
    });
  }
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

// act((weight * input) scale + shift + residual), laid out as input is. input (N, C, H, W), weight (K, C / groups, kh, kw),
// scale and shift K floats or null, residual (N, K, OH, OW); padding (y, x) on both sides, or (top, left, bottom, right).
Tensor convolve(const Tensor& input, const Tensor& weight, const float* scale, const float* shift,
                const Optional& residual, const Ints& stride, Ints padding, const Ints& dilation, int64_t groups,
                int64_t activation, int64_t lanes) {
  const bool last = is_channels_last(input);
  check_float(input, "input", last);
  check_float(weight, "weight", last && !weight.is_contiguous());
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
  const bool single = weight.size(2) == 1 && weight.size(3) == 1 && padding == Ints(4, 0);
  if (last) {
    STD_TORCH_CHECK(groups == 1, "conv2d_cpu takes no groups where input is channels_last");
    const bool taps_last = weight.is_contiguous() && channels > 1 && weight.size(2) * weight.size(3) > 1;
    if (weight.size(2) == 3 && weight.size(3) == 3 && stride == Ints{1, 1} && dilation == Ints{1, 1}) {
      run(Winograd{x, w, scale, shift, data(residual), y,
                   batch, input.size(2), input.size(3), channels, space[0], space[1], out_channels,
                   padding[0], padding[1], taps_last, activation}, chosen);
      return output;
    }
    STD_TORCH_CHECK(!taps_last, "weight must be channels_last where input is");
    const Image image{x, batch, input.size(2), input.size(3), channels};
    run(Direct{padded(image, padding), w, scale, shift, data(residual), y,
               batch, image.height + padding[0] + padding[2], image.width + padding[1] + padding[3], channels,
               space[0], space[1], out_channels,
               {weight.size(2), weight.size(3)}, {stride[0], stride[1]}, {dilation[0], dilation[1]}, activation,
               output.numel() >= kStreamed && out_channels % chosen.lanes == 0 && reinterpret_cast<uintptr_t>(y) % 64 == 0},
        chosen);
    return output;
  }
  if (groups == 1 && single && stride == Ints{1, 1}) {
    run(Pointwise{x, w, scale, shift, data(residual), y,
                  batch, channels, out_channels, space[0] * space[1], activation}, chosen);
    return output;
  }
  STD_TORCH_CHECK(weight.size(1) == 1 && groups == out_channels, "conv2d_cpu takes 1x1 or depthwise weights");
  run(Depthwise{x, w, scale, shift, data(residual), y,
                output.numel(), channels, input.size(2), input.size(3), space[0], space[1],
                {weight.size(2), weight.size(3)}, {stride[0], stride[1]}, {padding[0], padding[1]},
                {dilation[0], dilation[1]}, activation}, batch, chosen);
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
