// The CUDA depthwise kernel's body, thread by thread on the host: what the GPU would do, without one.
#include "conv/depthwise.cuh"

using namespace fused_ops::conv;

template <int V, int K, int STRIDE>
static void run(const DepthwiseShape& s, const DepthwiseTensors<float>& t, int activation) {
  const int64_t threads = s.batch * s.out_height * depthwise_strips(s) * (s.channels / V);
  for (int64_t index = 0; index < threads; ++index) depthwise_strip<float, V, K, STRIDE>(s, t, activation, index);
}

// `sizes`: batch, channels, height, width, out_height, out_width; `geometry`: kernel, stride, padding, dilation (h, w).
extern "C" int depthwise(const float* input, const float* weight, const float* scale, const float* shift,
                         const float* residual, float* output, const int64_t* sizes, const int* geometry,
                         int activation, int vector, int window) {
  const DepthwiseShape s{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], geometry[0], geometry[1],
                         geometry[2], geometry[3], geometry[4], geometry[5], geometry[6], geometry[7]};
  const DepthwiseTensors<float> t{input, weight, scale, shift, residual, output};
  const int variant = vector * 100 + window * 10 + (window ? s.stride_w : 1);
  switch (variant) {
    case 101: run<1, 0, 1>(s, t, activation); return 0;
    case 401: run<4, 0, 1>(s, t, activation); return 0;
    case 431: run<4, 3, 1>(s, t, activation); return 0;
    case 432: run<4, 3, 2>(s, t, activation); return 0;
    case 451: run<4, 5, 1>(s, t, activation); return 0;
    case 452: run<4, 5, 2>(s, t, activation); return 0;
    case 471: run<4, 7, 1>(s, t, activation); return 0;
    case 472: run<4, 7, 2>(s, t, activation); return 0;
    default: return 1;
  }
}
