// Launches the kernels of a layer's forward recurrence.
#pragma once

#include "rnn/layer_fwd.cuh"
#include "rnn/layer_launch.h"

namespace fused_ops::layers {

template <Variant VARIANT, typename T>
void launch_forward(Kind kind, const LayerPlan& plan, const Work& work, const ForwardLayer<T>& layer,
                    const Tensor& like, cudaStream_t stream) {
  const auto launch_kind = [&](auto constant) {
    constexpr Kind kKind = decltype(constant)::value;
    launch_layer<T, VARIANT>(plan, work, rnn_layer_fwd_kernel<T, kKind, GridExchange<T, VARIANT>>,
                             rnn_layer_fwd_kernel<T, kKind, ClusterExchange<T, VARIANT>>, layer, like, stream);
  };
  if constexpr (VARIANT == Variant::projected) launch_kind(std::integral_constant<Kind, Kind::lstm>{});
  else with_kind(kind, launch_kind);
}

// Compiled in layer_fwd_extra.cu.
#define FUSED_OPS_ELSEWHERE(VARIANT, T)                                                                     \
  extern template void launch_forward<VARIANT>(Kind, const LayerPlan&, const Work&, const ForwardLayer<T>&, \
                                               const Tensor&, cudaStream_t)
FUSED_OPS_ELSEWHERE(Variant::extra, float);
FUSED_OPS_ELSEWHERE(Variant::extra, __half);
FUSED_OPS_ELSEWHERE(Variant::extra, __nv_bfloat16);
FUSED_OPS_ELSEWHERE(Variant::projected, float);
FUSED_OPS_ELSEWHERE(Variant::projected, __half);
FUSED_OPS_ELSEWHERE(Variant::projected, __nv_bfloat16);
#undef FUSED_OPS_ELSEWHERE

}  // namespace fused_ops::layers
