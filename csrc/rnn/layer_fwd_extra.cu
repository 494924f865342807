// The forward kernels of layers with extras: mask, zoneout, layer norm, projection.
#include "rnn/layer_fwd_launch.h"

namespace fused_ops::layers {

#define INSTANTIATE(VARIANT, T)                                                                      \
  template void launch_forward<VARIANT>(Kind, const LayerPlan&, const Work&, const ForwardLayer<T>&, \
                                        const Tensor&, cudaStream_t)
INSTANTIATE(Variant::extra, float);
INSTANTIATE(Variant::extra, __half);
INSTANTIATE(Variant::extra, __nv_bfloat16);
INSTANTIATE(Variant::projected, float);
INSTANTIATE(Variant::projected, __half);
INSTANTIATE(Variant::projected, __nv_bfloat16);
#undef INSTANTIATE

}  // namespace fused_ops::layers
