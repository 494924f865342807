// Launchers of the RNN cells' pointwise kernels.
#include <tuple>
#include <type_traits>

#include "common/launch.h"
#include "common/tensor.h"
#include "rnn/cells.cuh"

namespace fused_ops::cells {

constexpr int THREADS = 128;

// What a launch needs of a (batch, gates·hidden) tensor beside the state's (batch, hidden).
Tensor checked(const Tensor& gates, const Tensor& state, int64_t count, const char* name) {
  STD_TORCH_CHECK(state.dim() == 2, "the state must be (batch, hidden)");
  check_shape(gates, {state.size(0), count * state.size(1)}, name);
  STD_TORCH_CHECK(gates.scalar_type() == state.scalar_type(), name, " must be of the state's dtype");
  STD_TORCH_CHECK(on_device_of(gates, state), name, " must be on the state's GPU");
  return torch::stable::contiguous(gates);
}

// visit(N as a constant): 16 bytes' worth of units where size and alignment allow, otherwise 1.
template <typename T, typename Visitor>
void with_width(int64_t hidden, bool is_aligned, Visitor visit) {
  constexpr int WIDE = 16 / sizeof(T);
  if (is_aligned && hidden % WIDE == 0) {
    visit(std::integral_constant<int, WIDE>{});
  } else {
    visit(std::integral_constant<int, 1>{});
  }
}

dim3 grid(int64_t rows, int64_t hidden, int width) {
  const int64_t blocks = (rows * (hidden / width) + THREADS - 1) / THREADS;
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), "batch·hidden is too large for one launch");
  return dim3(static_cast<unsigned>(blocks));
}

Tensor rnn(const Tensor& gi_any, const Tensor& gh_any, bool relu) {
  const Tensor gi = checked(gi_any, gi_any, 1, "gi"), gh = checked(gh_any, gi_any, 1, "gh");
  const DeviceScope device(gi);
  const int64_t rows = gi.size(0), hidden = gi.size(1);
  Tensor h = torch::stable::new_empty(gi, {rows, hidden});
  dispatch_float(gi.scalar_type(), "rnn_cell_fwd", [&](auto type) {
    using T = decltype(type);
    with_width<T>(hidden, aligned({gi, gh, h}), [&](auto width) {
      constexpr int N = decltype(width)::value;
      const auto kernel = relu ? rnn_cell_fwd_kernel<T, N, true> : rnn_cell_fwd_kernel<T, N, false>;
      launch(kernel, grid(rows, hidden, N), THREADS, 1, 0, device.stream(), data<const T>(gi), data<const T>(gh),
             data<T>(h), rows, hidden);
    });
  });
  return h;
}

Tensor gru(const Tensor& gi_any, const Tensor& gh_any, const Tensor& h_any) {
  const Tensor gi = checked(gi_any, h_any, 3, "gi"), gh = checked(gh_any, h_any, 3, "gh");
  const Tensor h = checked(h_any, h_any, 1, "h");
  const DeviceScope device(h);
  const int64_t rows = h.size(0), hidden = h.size(1);
  Tensor h_new = torch::stable::new_empty(h, {rows, hidden});
  dispatch_float(h.scalar_type(), "gru_cell_fwd", [&](auto type) {
    using T = decltype(type);
    with_width<T>(hidden, aligned({gi, gh, h, h_new}), [&](auto width) {
      constexpr int N = decltype(width)::value;
      launch(gru_cell_fwd_kernel<T, N>, grid(rows, hidden, N), THREADS, 1, 0, device.stream(), data<const T>(gi),
             data<const T>(gh), data<const T>(h), data<T>(h_new), rows, hidden);
    });
  });
  return h_new;
}

std::tuple<Tensor, Tensor> lstm(const Tensor& gi_any, const Tensor& gh_any, const Tensor& c_any) {
  const Tensor gi = checked(gi_any, c_any, 4, "gi"), gh = checked(gh_any, c_any, 4, "gh");
  const Tensor c = checked(c_any, c_any, 1, "c");
  const DeviceScope device(c);
  const int64_t rows = c.size(0), hidden = c.size(1);
  Tensor h = torch::stable::new_empty(c, {rows, hidden}), c_new = torch::stable::new_empty(c, {rows, hidden});
  dispatch_float(c.scalar_type(), "lstm_cell_fwd", [&](auto type) {
    using T = decltype(type);
    with_width<T>(hidden, aligned({gi, gh, c, h, c_new}), [&](auto width) {
      constexpr int N = decltype(width)::value;
      launch(lstm_cell_fwd_kernel<T, N>, grid(rows, hidden, N), THREADS, 1, 0, device.stream(), data<const T>(gi),
             data<const T>(gh), data<const T>(c), data<T>(h), data<T>(c_new), rows, hidden);
    });
  });
  return {h, c_new};
}

}  // namespace fused_ops::cells

FUSED_OPS_CUDA_LIBRARY(m) {
  m.impl("rnn_cell_fwd_cuda", TORCH_BOX(&fused_ops::cells::rnn));
  m.impl("gru_cell_fwd_cuda", TORCH_BOX(&fused_ops::cells::gru));
  m.impl("lstm_cell_fwd_cuda", TORCH_BOX(&fused_ops::cells::lstm));
}
