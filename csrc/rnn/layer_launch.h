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

inline void check_tensor(const std::optional<Tensor>& tensor, std::initializer_list<int64_t> shape, const Tensor& like,
                         const char* name) {
  if (!tensor) return;
  check_shape(*tensor, shape, name);
  check_contiguous(*tensor, name);
  STD_TORCH_CHECK(on_device_of(*tensor, like), name, " must be on the GPU of h0");
}

// h0: (directions, batch, hidden). Checks the three tensors, whose pointers are taken within a DeviceScope.
inline Sequence sequence_of(const Tensor& h0, int64_t tokens, int64_t steps, const std::optional<Tensor>& lengths,
                            const std::optional<Tensor>& starts, const std::optional<Tensor>& resets) {
  const int64_t batch = h0.size(1), hidden = h0.size(2);
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

inline void check_not_given(const std::optional<Tensor>& mask, const std::optional<Tensor>& zone_h,
                            const std::optional<Tensor>& zone_c, double zoneout_h, double zoneout_c) {
  STD_TORCH_CHECK(!mask && !zone_h && !zone_c && zoneout_h == 0.0 && zoneout_c == 0.0,
                  "the CUDA layer serves neither mask nor zoneout");
}

// The plan for the current device; raises where there is none.
inline LayerPlan plan_here(Kind kind, Pass pass, const Sequence& sequence, int64_t element_bytes) {
  const Chip chip{multiprocessors(), shared_bytes_per_block(), capability()};
  const LayerPlan plan =
      plan_rnn_layer(kind, pass, sequence.hidden, sequence.batch, sequence.directions, element_bytes, chip);
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
template <typename T, typename Layer>
void launch_layer(const LayerPlan& plan, const Product& product,
                  void (*grid_kernel)(Layer, Partition, typename GridExchange<T>::Arguments),
                  void (*cluster_kernel)(Layer, Partition, typename ClusterExchange<T>::Arguments), const Layer& layer,
                  const Tensor& like, cudaStream_t stream) {
  if (plan.groups == 0) return;
  const dim3 block(kThreads), alone(1), cluster(static_cast<unsigned>(plan.slices));
  const auto bytes = static_cast<size_t>(plan.shared_bytes);
  Partition partition{product, static_cast<int>(plan.units), static_cast<int>(plan.rows),
                      static_cast<int>(plan.slices), static_cast<int>(plan.splits), 0,
                      plan.groups / layer.sequence.directions};
  if (plan.design == Design::cluster) {
    STD_TORCH_CHECK(plan.blocks <= INT32_MAX, "the batch is too large for one launch");
    check_room(plan.slices, co_resident_blocks(cluster_kernel, block, cluster, bytes));
    const typename ClusterExchange<T>::Arguments nothing{};
    launch(cluster_kernel, dim3(static_cast<unsigned>(plan.blocks)), block, cluster, bytes, stream, layer, partition,
           nothing);
    return;
  }
  check_room(plan.blocks, co_resident_blocks(grid_kernel, block, alone, bytes));
  Tensor values = torch::stable::new_zeros(like, {plan.groups, 2, plan.rows, product.row_elements()});
  Tensor counters = torch::stable::new_zeros(like, {plan.groups, GridExchange<T>::kCounterStride}, ScalarType::Int);
  const typename GridExchange<T>::Arguments arguments{data<T>(values),
                                                      reinterpret_cast<uint32_t*>(data<int32_t>(counters))};
  for (; partition.first_group < plan.groups; partition.first_group += plan.at_once) {
    const int64_t groups = std::min(plan.at_once, plan.groups - partition.first_group);
    launch_cooperative(grid_kernel, dim3(static_cast<unsigned>(groups * plan.slices)), block, alone, bytes, stream,
                       layer, partition, arguments);
  }
}

}  // namespace fused_ops::layers
