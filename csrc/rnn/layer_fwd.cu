// fused_ops::rnn_layer_fwd_cuda: launches a layer's forward recurrence.
#include "rnn/layer_fwd.cuh"

#include <tuple>

#include "rnn/layer_launch.h"

namespace fused_ops::layers {
namespace {

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // output, h_n, c_n, c_all, kept

void check_arguments(Kind kind, const Tensor& gi, const Tensor& w_hh, const std::optional<Tensor>& b_hn,
                     const Tensor& h0, const std::optional<Tensor>& c0) {
  STD_TORCH_CHECK(h0.dim() == 3, "h0 must be (directions, batch, hidden)");
  const int64_t directions = h0.size(0), batch = h0.size(1), hidden = h0.size(2), gates = gates_of(kind);
  STD_TORCH_CHECK(gi.dim() == 4, "gi must be (tokens, directions, gates, hidden)");
  check_tensor(gi, {gi.size(0), directions, gates, hidden}, h0, "gi");
  check_tensor(w_hh, {directions, gates * hidden, hidden}, h0, "w_hh");
  check_tensor(b_hn, {directions, hidden}, h0, "b_hn");
  check_tensor(h0, {directions, batch, hidden}, h0, "h0");
  check_tensor(c0, {directions, batch, hidden}, h0, "c0");
  STD_TORCH_CHECK(c0.has_value() == (kind == Kind::lstm), "c0 is the LSTM's, and it needs one");
  STD_TORCH_CHECK(!b_hn || kind == Kind::gru, "b_hn is the GRU's");
}

Results rnn_layer_fwd_cuda(Tensor gi, Tensor w_hh, std::optional<Tensor> b_hn, Tensor h0, std::optional<Tensor> c0,
                           std::optional<Tensor> lengths, std::optional<Tensor> starts, std::optional<Tensor> resets,
                           std::optional<Tensor> mask, std::optional<Tensor> zone_h, std::optional<Tensor> zone_c,
                           double zoneout_h, double zoneout_c, std::string mode, int64_t steps, bool keep) {
  const Kind kind = kind_of(mode);
  check_not_given(mask, zone_h, zone_c, zoneout_h, zoneout_c);
  check_arguments(kind, gi, w_hh, b_hn, h0, c0);
  const int64_t directions = h0.size(0), batch = h0.size(1), hidden = h0.size(2), tokens = gi.size(0);
  const bool lstm = kind == Kind::lstm, keeps_c = keep && lstm, keeps_gates = keep && kept_of(kind) > 0;
  const auto empty = [&](bool there, std::initializer_list<int64_t> shape, ScalarType dtype) {
    return there ? torch::stable::new_empty(h0, shape, dtype) : torch::stable::new_empty(h0, {0}, dtype);
  };
  const ScalarType dtype = h0.scalar_type();
  const Results results{empty(true, {tokens, directions * hidden}, dtype), empty(true, {directions, batch, hidden}, dtype),
                        empty(lstm, {directions, batch, hidden}, dtype),
                        empty(keeps_c, {directions, tokens, hidden}, ScalarType::Float),
                        empty(keeps_gates, {directions, tokens, kept_of(kind), hidden}, dtype)};
  if (batch == 0) return results;

  const DeviceScope scope(h0);
  const Sequence sequence = sequence_of(h0, tokens, steps, lengths, starts, resets);
  const int64_t element_bytes = static_cast<int64_t>(h0.element_size());
  const LayerPlan plan = plan_here(kind, Pass::forward, sequence, element_bytes);
  const Product product = product_of(kind, Pass::forward, hidden, element_bytes);
  dispatch_float(dtype, "rnn_layer_fwd", [&](auto zero) {
    using T = decltype(zero);
    ForwardLayer<T> layer{};
    layer.sequence = sequence, layer.relu = mode == "rnn_relu";
    layer.gi = data<const float>(gi), layer.w_hh = data<const T>(w_hh), layer.b_hn = data<const T>(b_hn);
    layer.h0 = data<const T>(h0), layer.c0 = data<const T>(c0);
    layer.output = data<T>(std::get<0>(results)), layer.h_n = data<T>(std::get<1>(results));
    if (lstm) layer.c_n = data<T>(std::get<2>(results));
    if (keeps_c) layer.c_all = data<float>(std::get<3>(results));
    if (keeps_gates) layer.kept = data<T>(std::get<4>(results));
    with_kind(kind, [&](auto constant) {
      constexpr Kind kKind = decltype(constant)::value;
      launch_layer<T>(plan, product, rnn_layer_fwd_kernel<T, kKind, GridExchange<T>>,
                      rnn_layer_fwd_kernel<T, kKind, ClusterExchange<T>>, layer, h0, scope.stream());
    });
  });
  return results;
}

}  // namespace
}  // namespace fused_ops::layers

FUSED_OPS_CUDA_LIBRARY(m) {
  m.impl("rnn_layer_fwd_cuda", TORCH_BOX(&fused_ops::layers::rnn_layer_fwd_cuda));
}
