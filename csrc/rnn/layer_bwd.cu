// fused_ops::rnn_layer_bwd_cuda: launches the backward of a layer's recurrence.
#include "rnn/layer_bwd.cuh"

#include <tuple>

#include "rnn/layer_launch.h"

namespace fused_ops::layers {
namespace {

using Optional = std::optional<Tensor>;

// What the forward left, and the gradients of its results; as the schema names them.
struct Given {
  Optional grad_output, grad_h_n, grad_c_n, grad_c_all;
  Tensor w_hh, h0;
  Optional c0;
  Tensor output, c_all, kept;
};

void check_arguments(Kind kind, const Given& given) {
  const Tensor& h0 = given.h0;
  STD_TORCH_CHECK(h0.dim() == 3, "h0 must be (directions, batch, hidden)");
  STD_TORCH_CHECK(given.output.dim() == 2, "output must be (tokens, directions·hidden)");
  const int64_t directions = h0.size(0), batch = h0.size(1), hidden = h0.size(2), tokens = given.output.size(0);
  check_tensor(given.w_hh, {directions, gates_of(kind) * hidden, hidden}, h0, "w_hh");
  check_tensor(h0, {directions, batch, hidden}, h0, "h0");
  check_tensor(given.output, {tokens, directions * hidden}, h0, "output");
  check_tensor(given.grad_output, {tokens, directions * hidden}, h0, "grad_output");
  check_tensor(given.grad_h_n, {directions, batch, hidden}, h0, "grad_h_n");
  if (kind != Kind::rnn) check_tensor(given.kept, {directions, tokens, kept_of(kind), hidden}, h0, "kept");
  STD_TORCH_CHECK(given.c0.has_value() == (kind == Kind::lstm), "c0 is the LSTM's, and it needs one");
  if (kind == Kind::lstm) {
    check_tensor(given.c0, {directions, batch, hidden}, h0, "c0");
    check_tensor(given.c_all, {directions, tokens, hidden}, h0, "c_all");
    check_tensor(given.grad_c_n, {directions, batch, hidden}, h0, "grad_c_n");
    check_tensor(given.grad_c_all, {directions, tokens, hidden}, h0, "grad_c_all");
  } else {
    STD_TORCH_CHECK(!given.grad_c_n && !given.grad_c_all, "only an LSTM has gradients of c");
  }
}

template <typename T>
BackwardLayer<T> layer_of(Kind kind, const Given& given, const Sequence& sequence) {
  BackwardLayer<T> layer{};
  layer.sequence = sequence;
  layer.grad_output = data<const T>(given.grad_output), layer.grad_h_n = data<const T>(given.grad_h_n);
  layer.w_hh = data<const T>(given.w_hh), layer.h0 = data<const T>(given.h0);
  layer.output = data<const T>(given.output);
  if (kind != Kind::rnn) layer.kept = data<const T>(given.kept);
  if (kind == Kind::lstm) {
    layer.grad_c_n = data<const T>(given.grad_c_n), layer.grad_c_all = data<const T>(given.grad_c_all);
    layer.c0 = data<const T>(given.c0), layer.c_all = data<const float>(given.c_all);
  }
  return layer;
}

std::tuple<Tensor, Tensor, Tensor> rnn_layer_bwd_cuda(
    Optional grad_output, Optional grad_h_n, Optional grad_c_n, Optional grad_c_all, Tensor w_hh, Tensor h0,
    Optional c0, Optional lengths, Optional starts, Optional resets, Optional mask, Optional zone_h, Optional zone_c,
    double zoneout_h, double zoneout_c, Tensor output, Tensor c_all, Tensor kept, std::string mode, int64_t steps) {
  const Kind kind = kind_of(mode);
  check_not_given(mask, zone_h, zone_c, zoneout_h, zoneout_c);
  const Given given{grad_output, grad_h_n, grad_c_n, grad_c_all, w_hh, h0, c0, output, c_all, kept};
  check_arguments(kind, given);
  const int64_t directions = h0.size(0), batch = h0.size(1), hidden = h0.size(2), tokens = output.size(0);
  const bool lstm = kind == Kind::lstm;
  Tensor slopes = torch::stable::new_empty(h0, {tokens, directions, slopes_of(kind), hidden});
  Tensor dh0 = torch::stable::new_empty(h0, {directions, batch, hidden});
  Tensor dc0 = lstm ? torch::stable::new_empty(h0, {directions, batch, hidden}) : torch::stable::new_empty(h0, {0});
  if (batch == 0) return {slopes, dh0, dc0};

  const DeviceScope scope(h0);
  const Sequence sequence = sequence_of(h0, tokens, steps, lengths, starts, resets);
  const int64_t element_bytes = static_cast<int64_t>(h0.element_size());
  const LayerPlan plan = plan_here(kind, Pass::backward, sequence, element_bytes);
  const Product product = product_of(kind, Pass::backward, hidden, element_bytes);
  dispatch_float(h0.scalar_type(), "rnn_layer_bwd", [&](auto zero) {
    using T = decltype(zero);
    BackwardLayer<T> layer = layer_of<T>(kind, given, sequence);
    layer.relu = mode == "rnn_relu";
    layer.slopes = data<T>(slopes), layer.dh0 = data<T>(dh0), layer.dc0 = lstm ? data<T>(dc0) : nullptr;
    with_kind(kind, [&](auto constant) {
      constexpr Kind KIND = decltype(constant)::value;
      launch_layer<T>(plan, product, rnn_layer_bwd_kernel<T, KIND, GridExchange<T>>,
                      rnn_layer_bwd_kernel<T, KIND, ClusterExchange<T>>, layer, h0, scope.stream());
    });
  });
  return {slopes, dh0, dc0};
}

}  // namespace
}  // namespace fused_ops::layers

FUSED_OPS_CUDA_LIBRARY(m) { m.impl("rnn_layer_bwd_cuda", TORCH_BOX(&fused_ops::layers::rnn_layer_bwd_cuda)); }
