// The backward kernels of layers with extras: mask, zoneout, layer norm, projection.
#include "rnn/layer_bwd_launch.h"

namespace fused_ops::layers {

#define INSTANTIATE(VARIANT, T)                                                                        \
  template void launch_backward<VARIANT>(Kind, const LayerPlan&, const Work&, const BackwardLayer<T>&, \
                                         const Tensor&, cudaStream_t)
INSTANTIATE(Variant::extra, float);
INSTANTIATE(Variant::extra, __half);
INSTANTIATE(Variant::extra, __nv_bfloat16);
INSTANTIATE(Variant::projected, float);
INSTANTIATE(Variant::projected, __half);
INSTANTIATE(Variant::projected, __nv_bfloat16);
#undef INSTANTIATE

}  // namespace fused_ops::layers
