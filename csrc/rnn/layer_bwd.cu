// fused_ops::rnn_layer_bwd_cuda: launches the backward of a layer's recurrence.
#include <tuple>

#include "rnn/layer_bwd_launch.h"

namespace fused_ops::layers {

namespace {

using Optional = std::optional<Tensor>;
// slopes, through, slopes_c, grad_states, dh0, dc0
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// What the forward left, and the gradients of its results; as the schema names them.
struct Given {
  Optional grad_output, grad_h_n, grad_c_n, grad_c_all;
  Tensor w_hh;
  Optional hat_hh, rstd_hh, hat_c, rstd_c;
  Tensor h0;
  Optional c0;
  Tensor output, c_all, kept;

  int64_t hidden(Kind kind) const { return w_hh.size(1) / gates_of(kind); }
};

void check_arguments(Kind kind, const Given& given, const Extras& extras) {
  const Tensor& h0 = given.h0;
  STD_TORCH_CHECK(h0.dim() == 3, "h0 must be (directions, batch, features)");
  STD_TORCH_CHECK(given.w_hh.dim() == 3, "w_hh must be (directions, gates·hidden, features)");
  STD_TORCH_CHECK(given.output.dim() == 2, "output must be (tokens, directions·features)");
  const int64_t directions = h0.size(0), batch = h0.size(1), features = h0.size(2), tokens = given.output.size(0);
  const int64_t hidden = given.hidden(kind), values = extras.kept_of(kind);
  check_tensor(given.w_hh, {directions, gates_of(kind) * hidden, features}, h0, "w_hh");
  check_extras(kind, extras, hidden, tokens, h0);
  check_tensor(h0, {directions, batch, features}, h0, "h0");
  check_tensor(given.output, {tokens, directions * features}, h0, "output");
  check_tensor(given.grad_output, {tokens, directions * features}, h0, "grad_output");
  check_tensor(given.grad_h_n, {directions, batch, features}, h0, "grad_h_n");
  if (values > 0) check_tensor(given.kept, {directions, tokens, values, hidden}, h0, "kept");
  STD_TORCH_CHECK(given.c0.has_value() == (kind == Kind::lstm), "c0 is the LSTM's, and it needs one");
  if (kind == Kind::lstm) {
    check_tensor(given.c0, {directions, batch, hidden}, h0, "c0");
    check_tensor(given.c_all, {directions, tokens, hidden}, h0, "c_all");
    check_tensor(given.grad_c_n, {directions, batch, hidden}, h0, "grad_c_n");
    check_tensor(given.grad_c_all, {directions, tokens, hidden}, h0, "grad_c_all");
  } else {
    STD_TORCH_CHECK(!given.grad_c_n && !given.grad_c_all, "only an LSTM has gradients of c");
  }
  const bool has_norm = extras.norm_hh.has_value(), has_norm_c = extras.norm_c.has_value();
  STD_TORCH_CHECK(given.hat_hh.has_value() == has_norm && given.rstd_hh.has_value() == has_norm &&
                      given.hat_c.has_value() == has_norm_c && given.rstd_c.has_value() == has_norm_c,
                  "norm_hh goes with hat_hh and rstd_hh, norm_c with hat_c and rstd_c");
  check_tensor(given.hat_hh, {directions, tokens, gates_of(kind), hidden}, h0, "hat_hh");
  check_tensor(given.rstd_hh, {directions, tokens}, h0, "rstd_hh");
  check_tensor(given.hat_c, {directions, tokens, hidden}, h0, "hat_c");
  check_tensor(given.rstd_c, {directions, tokens}, h0, "rstd_c");
}

template <typename T>
BackwardLayer<T> layer_of(Kind kind, const Given& given, const Extras& extras, const Sequence& sequence) {
  BackwardLayer<T> layer{};
  layer.sequence = layer.states = sequence;
  layer.states.hidden = static_cast<int>(given.h0.size(2));
  layer.grad_output = data<const T>(given.grad_output), layer.grad_h_n = data<const T>(given.grad_h_n);
  layer.w_hh = data<const T>(given.w_hh), layer.h0 = data<const T>(given.h0);
  layer.output = data<const T>(given.output);
  if (extras.kept_of(kind) > 0) layer.kept = data<const T>(given.kept);
  if (kind == Kind::lstm) {
    layer.grad_c_n = data<const T>(given.grad_c_n), layer.grad_c_all = data<const T>(given.grad_c_all);
    layer.c0 = data<const T>(given.c0), layer.c_all = data<const float>(given.c_all);
  }
  layer.w_hr = data<const T>(extras.w_hr), layer.norm_hh = data<const float>(extras.norm_hh);
  layer.norm_c = data<const float>(extras.norm_c), layer.bias_c = data<const float>(extras.bias_c);
  layer.hat_hh = data<const float>(given.hat_hh), layer.rstd_hh = data<const float>(given.rstd_hh);
  layer.hat_c = data<const float>(given.hat_c), layer.rstd_c = data<const float>(given.rstd_c);
  layer.noise = noise_of<T>(extras);
  return layer;
}

Results rnn_layer_bwd_cuda(Optional grad_output, Optional grad_h_n, Optional grad_c_n, Optional grad_c_all, Tensor w_hh,
                           Optional w_hr, Optional norm_hh, Optional norm_c, Optional bias_c, Optional hat_hh,
                           Optional rstd_hh, Optional hat_c, Optional rstd_c, Tensor h0, Optional c0, Optional lengths,
                           Optional starts, Optional resets, Optional mask, Optional zone_h, Optional zone_c,
                           double zoneout_h, double zoneout_c, Tensor output, Tensor c_all, Tensor kept,
                           std::string mode, int64_t steps) {
  const Kind kind = kind_of(mode);
  const Given given{grad_output, grad_h_n, grad_c_n, grad_c_all, w_hh,   hat_hh, rstd_hh,
                    hat_c,       rstd_c,   h0,       c0,         output, c_all,  kept};
  const Extras extras{w_hr, norm_hh, std::nullopt, norm_c, bias_c, mask, zone_h, zone_c, zoneout_h, zoneout_c};
  check_arguments(kind, given, extras);
  const int64_t directions = h0.size(0), batch = h0.size(1), features = h0.size(2);
  const int64_t hidden = given.hidden(kind), tokens = output.size(0);
  const bool lstm = kind == Kind::lstm, has_norm = norm_hh.has_value();
  const auto empty = [&](bool there, std::initializer_list<int64_t> shape) {
    return there ? torch::stable::new_empty(h0, shape) : torch::stable::new_empty(h0, {0});
  };
  Tensor slopes = empty(true, {tokens, directions, slopes_of(kind), hidden});
  Tensor through = empty(has_norm, {tokens, directions, gates_of(kind), hidden});
  Tensor slopes_c = empty(has_norm && lstm, {tokens, directions, hidden});
  Tensor grad_states = empty(w_hr.has_value(), {tokens, directions, features});
  Tensor dh0 = empty(true, {directions, batch, features}), dc0 = empty(lstm, {directions, batch, hidden});
  const Results results{slopes, through, slopes_c, grad_states, dh0, dc0};
  if (batch == 0) return results;

  const DeviceScope scope(h0);
  const Sequence sequence = sequence_of(h0, hidden, tokens, steps, lengths, starts, resets);
  const Shape shape = shape_of(kind, extras, hidden, h0);
  const LayerPlan plan = plan_here(shape, Pass::backward, sequence);
  dispatch_float(h0.scalar_type(), "rnn_layer_bwd", [&](auto zero) {
    using T = decltype(zero);
    BackwardLayer<T> layer = layer_of<T>(kind, given, extras, sequence);
    layer.relu = mode == "rnn_relu";
    layer.slopes = data<T>(slopes), layer.dh0 = data<T>(dh0), layer.dc0 = lstm ? data<T>(dc0) : nullptr;
    layer.through = data<T>(through), layer.slopes_c = data<T>(slopes_c), layer.grad_states = data<T>(grad_states);
    const Work work = work_of(shape, Pass::backward);
    const auto run = [&](auto variant) {
      launch_backward<decltype(variant)::value>(kind, plan, work, layer, h0, scope.stream());
    };
    with_variant(extras.variant(), run);
  });
  return results;
}

}  // namespace
}  // namespace fused_ops::layers

FUSED_OPS_CUDA_LIBRARY(m) { m.impl("rnn_layer_bwd_cuda", TORCH_BOX(&fused_ops::layers::rnn_layer_bwd_cuda)); }
