// fused_ops::rnn_layer_fwd_cuda: launches a layer's forward recurrence.
#include <tuple>

#include "rnn/layer_fwd_launch.h"

namespace fused_ops::layers {

namespace {

using Optional = std::optional<Tensor>;
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // output, h_n, c_n, c_all, kept

void check_arguments(Kind kind, const Tensor& gi, const Tensor& w_hh, const Optional& b_hn, const Tensor& h0,
                     const Optional& c0) {
  STD_TORCH_CHECK(h0.dim() == 3, "h0 must be (directions, batch, features)");
  STD_TORCH_CHECK(gi.dim() == 4, "gi must be (tokens, directions, gates, hidden)");
  const int64_t directions = h0.size(0), batch = h0.size(1), features = h0.size(2), hidden = gi.size(3);
  const int64_t gates = gates_of(kind);
  check_tensor(gi, {gi.size(0), directions, gates, hidden}, h0, "gi");
  check_tensor(w_hh, {directions, gates * hidden, features}, h0, "w_hh");
  check_tensor(b_hn, {directions, hidden}, h0, "b_hn");
  check_tensor(h0, {directions, batch, features}, h0, "h0");
  check_tensor(c0, {directions, batch, hidden}, h0, "c0");
  STD_TORCH_CHECK(c0.has_value() == (kind == Kind::lstm), "c0 is the LSTM's, and it needs one");
  STD_TORCH_CHECK(!b_hn || kind == Kind::gru, "b_hn is the GRU's");
}

Results rnn_layer_fwd_cuda(Tensor gi, Tensor w_hh, Optional b_hn, Optional w_hr, Optional norm_hh, Optional b_hh,
                           Optional norm_c, Optional bias_c, Tensor h0, Optional c0, Optional lengths, Optional starts,
                           Optional resets, Optional mask, Optional zone_h, Optional zone_c, double zoneout_h,
                           double zoneout_c, std::string mode, int64_t steps, bool keep) {
  const Kind kind = kind_of(mode);
  const Extras extras{w_hr, norm_hh, b_hh, norm_c, bias_c, mask, zone_h, zone_c, zoneout_h, zoneout_c};
  check_arguments(kind, gi, w_hh, b_hn, h0, c0);
  const int64_t directions = h0.size(0), batch = h0.size(1), features = h0.size(2);
  const int64_t hidden = gi.size(3), tokens = gi.size(0), values = extras.kept_of(kind);
  check_extras(kind, extras, hidden, tokens, h0);
  const bool lstm = kind == Kind::lstm, keeps_c = keep && lstm, keeps = keep && values > 0;
  const auto empty = [&](bool there, std::initializer_list<int64_t> shape, ScalarType dtype) {
    return there ? torch::stable::new_empty(h0, shape, dtype) : torch::stable::new_empty(h0, {0}, dtype);
  };
  const ScalarType dtype = h0.scalar_type();
  const Results results{empty(true, {tokens, directions * features}, dtype),
                        empty(true, {directions, batch, features}, dtype),
                        empty(lstm, {directions, batch, hidden}, dtype),
                        empty(keeps_c, {directions, tokens, hidden}, ScalarType::Float),
                        empty(keeps, {directions, tokens, values, hidden}, dtype)};
  if (batch == 0) return results;

  const DeviceScope scope(h0);
  const Sequence sequence = sequence_of(h0, hidden, tokens, steps, lengths, starts, resets);
  const Shape shape = shape_of(kind, extras, hidden, h0);
  const LayerPlan plan = plan_here(shape, Pass::forward, sequence);
  dispatch_float(dtype, "rnn_layer_fwd", [&](auto zero) {
    using T = decltype(zero);
    ForwardLayer<T> layer{};
    layer.sequence = layer.states = sequence, layer.relu = mode == "rnn_relu";
    layer.states.hidden = static_cast<int>(features);
    layer.gi = data<const float>(gi), layer.w_hh = data<const T>(w_hh), layer.b_hn = data<const T>(b_hn);
    layer.h0 = data<const T>(h0), layer.c0 = data<const T>(c0);
    layer.output = data<T>(std::get<0>(results)), layer.h_n = data<T>(std::get<1>(results));
    if (lstm) layer.c_n = data<T>(std::get<2>(results));
    if (keeps_c) layer.c_all = data<float>(std::get<3>(results));
    if (keeps) layer.kept = data<T>(std::get<4>(results));
    layer.w_hr = data<const T>(extras.w_hr), layer.noise = noise_of<T>(extras);
    layer.norm_hh = data<const float>(norm_hh), layer.b_hh = data<const float>(b_hh);
    layer.norm_c = data<const float>(norm_c), layer.bias_c = data<const float>(bias_c);
    const Work work = work_of(shape, Pass::forward);
    const auto run = [&](auto variant) {
      launch_forward<decltype(variant)::value>(kind, plan, work, layer, h0, scope.stream());
    };
    with_variant(extras.variant(), run);
  });
  return results;
}

}  // namespace
}  // namespace fused_ops::layers

FUSED_OPS_CUDA_LIBRARY(m) {
  m.impl("rnn_layer_fwd_cuda", TORCH_BOX(&fused_ops::layers::rnn_layer_fwd_cuda));
}
