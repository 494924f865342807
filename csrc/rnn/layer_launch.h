// What the launchers of a layer's recurrence share, forward and backward: checked arguments, the plan for this chip, its
// launches.
#pragma once

#include <string>

#include "common/launch.h"
#include "common/tensor.h"
#include "rnn/exchange.cuh"

namespace fused_ops::layers {

inline Kind kind_of(const std::string& mode) {
  if (mode == "lstm") return Kind::lstm;
  if (mode == "gru") return Kind::gru;
  STD_TORCH_CHECK(mode == "rnn_tanh" || mode == "rnn_relu", "mode must be rnn_tanh, rnn_relu, gru or lstm, got ", mode);
  return Kind::rnn;
}

// visit(std::integral_constant<Kind, ...>{}).
template <typename Visitor>
void with_kind(Kind kind, Visitor visit) {
  if (kind == Kind::lstm) visit(std::integral_constant<Kind, Kind::lstm>{});
  else if (kind == Kind::gru) visit(std::integral_constant<Kind, Kind::gru>{});
  else visit(std::integral_constant<Kind, Kind::rnn>{});
}

// visit(std::integral_constant<Variant, ...>{}).
template <typename Visitor>
void with_variant(Variant variant, Visitor visit) {
  if (variant == Variant::plain) visit(std::integral_constant<Variant, Variant::plain>{});
  else if (variant == Variant::extra) visit(std::integral_constant<Variant, Variant::extra>{});
  else visit(std::integral_constant<Variant, Variant::projected>{});
}

inline void check_tensor(const std::optional<Tensor>& tensor, std::initializer_list<int64_t> shape, const Tensor& like,
                         const char* name) {
  if (!tensor) return;
  check_shape(*tensor, shape, name);
  check_contiguous(*tensor, name);
  STD_TORCH_CHECK(on_device_of(*tensor, like), name, " must be on the GPU of h0");
}

// h0: (directions, batch, features). Checks the three tensors, whose pointers are taken within a DeviceScope.
inline Sequence sequence_of(const Tensor& h0, int64_t hidden, int64_t tokens, int64_t steps,
                            const std::optional<Tensor>& lengths, const std::optional<Tensor>& starts,
                            const std::optional<Tensor>& resets) {
  const int64_t batch = h0.size(1);
  STD_TORCH_CHECK(0 <= steps && steps < (int64_t{1} << 24), "steps must be from 0 to 2^24, got ", steps);
  STD_TORCH_CHECK(0 < hidden && hidden < (int64_t{1} << 15), "hidden must be from 1 to 2^15, got ", hidden);
  STD_TORCH_CHECK(h0.size(0) == 1 || h0.size(0) == 2, "h0 must be of one direction or two");
  STD_TORCH_CHECK(!starts || lengths, "starts need lengths");
  STD_TORCH_CHECK(starts || tokens == steps * batch, "there must be steps·batch tokens, got ", tokens);
  STD_TORCH_CHECK(tokens <= INT32_MAX, "there must be fewer than 2^31 tokens, got ", tokens);
  check_tensor(lengths, {batch}, h0, "lengths");
  check_tensor(starts, {steps}, h0, "starts");
  check_tensor(resets, {steps, batch}, h0, "resets");
  Sequence sequence{};
  sequence.batch = batch, sequence.tokens = tokens, sequence.hidden = static_cast<int>(hidden);
  sequence.directions = static_cast<int>(h0.size(0)), sequence.steps = static_cast<int>(steps);
  sequence.lengths = data<const int64_t>(lengths), sequence.starts = data<const int64_t>(starts);
  sequence.resets = data<const bool>(resets);
  return sequence;
}

// A layer's extras, as the schemas name them.
struct Extras {
  std::optional<Tensor> w_hr, norm_hh, b_hh, norm_c, bias_c, mask, zone_h, zone_c;
  double zoneout_h, zoneout_c;

  Variant variant() const {
    const bool any = norm_hh || mask || zone_h || zone_c || zoneout_h > 0.0 || zoneout_c > 0.0;
    return w_hr ? Variant::projected : any ? Variant::extra : Variant::plain;
  }
  // How many values an RNN keeps: h~, where no zeros and ones say how much of it is in the output.
  int64_t kept_of(Kind kind) const {
    return kind == Kind::rnn && !zone_h && zoneout_h > 0.0 ? 1 : layers::kept_of(kind);
  }
};

inline void check_extras(Kind kind, const Extras& extras, int64_t hidden, int64_t tokens, const Tensor& h0) {
  const int64_t directions = h0.size(0), batch = h0.size(1), features = h0.size(2);
  const bool lstm = kind == Kind::lstm;
  const bool of_lstm = extras.w_hr || extras.norm_c || extras.bias_c || extras.zone_c || extras.zoneout_c != 0.0;
  STD_TORCH_CHECK(lstm || !of_lstm, "w_hr, norm_c, bias_c and zoneout of c are the LSTM's");
  STD_TORCH_CHECK(extras.w_hr || features == hidden, "h0 must have ", hidden, " features without w_hr, got ", features);
  STD_TORCH_CHECK(0 < features && features <= hidden, "h0 must have from 1 to ", hidden, " features, got ", features);
  STD_TORCH_CHECK(extras.norm_hh || (!extras.b_hh && !extras.norm_c), "a layer norm needs norm_hh");
  STD_TORCH_CHECK(extras.norm_c.has_value() == (lstm && extras.norm_hh) &&
                      extras.bias_c.has_value() == extras.norm_c.has_value(),
                  "an LSTM with norm_hh needs norm_c and bias_c");
  for (const double share : {extras.zoneout_h, extras.zoneout_c}) {
    STD_TORCH_CHECK(0.0 <= share && share <= 1.0, "zoneout must be from 0 to 1, got ", share);
  }
  check_tensor(extras.w_hr, {directions, features, hidden}, h0, "w_hr");
  check_tensor(extras.norm_hh, {directions, gates_of(kind), hidden}, h0, "norm_hh");
  check_tensor(extras.b_hh, {directions, gates_of(kind), hidden}, h0, "b_hh");
  check_tensor(extras.norm_c, {directions, hidden}, h0, "norm_c");
  check_tensor(extras.bias_c, {directions, hidden}, h0, "bias_c");
  check_tensor(extras.mask, {directions, batch, features}, h0, "mask");
  check_tensor(extras.zone_h, {directions, tokens, features}, h0, "zone_h");
  check_tensor(extras.zone_c, {directions, tokens, hidden}, h0, "zone_c");
}

// Of a DeviceScope.
template <typename T>
Noise<T> noise_of(const Extras& extras) {
  return {data<const T>(extras.mask), data<const bool>(extras.zone_h), data<const bool>(extras.zone_c),
          static_cast<float>(extras.zoneout_h), static_cast<float>(extras.zoneout_c)};
}

inline Shape shape_of(Kind kind, const Extras& extras, int64_t hidden, const Tensor& h0) {
  return {kind, hidden, h0.size(2), static_cast<int64_t>(h0.element_size()), extras.w_hr.has_value(),
          extras.norm_hh.has_value()};
}

// The plan for the current device; raises where there is none.
inline LayerPlan plan_here(const Shape& shape, Pass pass, const Sequence& sequence) {
  const Chip chip{multiprocessors(), shared_bytes_per_block(), capability()};
  const LayerPlan plan = plan_rnn_layer(shape, pass, sequence.batch, sequence.directions, chip);
  STD_TORCH_CHECK(plan.design != Design::none, "W_hh of hidden size ", sequence.hidden, " does not fit into the ",
                  chip.shared_bytes, " bytes of shared memory of ", chip.multiprocessors, " multiprocessors");
  return plan;
}

// Tells a chip that has not the room now (a partition of it, other processes' limits) from a fault.
inline void check_room(int64_t needed, int64_t room) {
  STD_TORCH_CHECK(needed <= room, "the device has no room for the layer: ", needed,
                  " blocks must be alive together, it can hold ", room);
}

// Runs `layer` by `plan`: grid_kernel and cluster_kernel are instances of one kernel template, of (layer, Partition,
// Arguments of its exchange).
template <typename T, Variant VARIANT, typename Layer>
void launch_layer(const LayerPlan& plan, const Work& work,
                  void (*grid_kernel)(Layer, Partition, typename GridExchange<T, VARIANT>::Arguments),
                  void (*cluster_kernel)(Layer, Partition, typename ClusterExchange<T, VARIANT>::Arguments),
                  const Layer& layer, const Tensor& like, cudaStream_t stream) {
  using Grid = GridExchange<T, VARIANT>;
  if (plan.groups == 0) return;
  const dim3 block(kThreads), alone(1), cluster(static_cast<unsigned>(plan.slices));
  const auto bytes = static_cast<size_t>(plan.shared_bytes);
  Partition partition{work,
                      static_cast<int>(plan.units),
                      static_cast<int>(plan.features),
                      static_cast<int>(plan.rows),
                      static_cast<int>(plan.slices),
                      static_cast<int>(plan.splits),
                      0,
                      plan.groups / layer.sequence.directions};
  if (plan.design == Design::cluster) {
    STD_TORCH_CHECK(plan.blocks <= INT32_MAX, "the batch is too large for one launch");
    check_room(plan.slices, co_resident_blocks(cluster_kernel, block, cluster, bytes));
    const typename ClusterExchange<T, VARIANT>::Arguments nothing{};
    launch(cluster_kernel, dim3(static_cast<unsigned>(plan.blocks)), block, cluster, bytes, stream, layer, partition,
           nothing);
    return;
  }
  check_room(plan.blocks, co_resident_blocks(grid_kernel, block, alone, bytes));
  const int64_t places = work.has_norm ? 2 : 0;
  Tensor values = torch::stable::new_zeros(like, {plan.groups, Grid::values_of(work, plan.rows)});
  Tensor counters = torch::stable::new_zeros(like, {plan.groups, Grid::kCounterStride}, ScalarType::Int);
  Tensor sums = torch::stable::new_empty(like, {plan.groups, places, plan.slices, plan.rows, 2}, ScalarType::Float);
  const typename Grid::Arguments arguments{data<T>(values), reinterpret_cast<uint32_t*>(data<int32_t>(counters)),
                                           reinterpret_cast<Sums*>(data<float>(sums))};
  for (; partition.first_group < plan.groups; partition.first_group += plan.at_once) {
    const int64_t groups = std::min(plan.at_once, plan.groups - partition.first_group);
    launch_cooperative(grid_kernel, dim3(static_cast<unsigned>(groups * plan.slices)), block, alone, bytes, stream,
                       layer, partition, arguments);
  }
}

}  // namespace fused_ops::layers
