// What the forward and the backward driver of the CPU's RNNs share: a checked call, where its rows lie, packed weights.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "common/check.h"
#include "rnn/norm.h"

namespace fused_ops::rnn {

namespace stable = torch::stable;

constexpr int64_t SERIAL_FLOPS = 200 * 1000;         // below this a second thread costs more than it brings
constexpr int64_t SERIAL_GEMM_FLOPS = 1'000'000;      // the same of one product
constexpr int64_t SHARED_WEIGHT_BYTES = 400 * 1024;  // W_hh above this is shared between threads when rows are few

// Where step t of row b lives: padded (strides) or packed (starts). Null for no tensor.
template <class T>
struct Places {
  T* data = nullptr;
  int64_t step_stride = 0, row_stride = 0;
  const int64_t* starts = nullptr;

  T* at(int64_t t, int64_t b) const {
    if (data == nullptr) return nullptr;
    return data + (starts ? (starts[t] + b) * row_stride : t * step_stride + b * row_stride);
  }
  Places from(int64_t offset) const {
    return {data == nullptr ? nullptr : data + offset, step_stride, row_stride, starts};
  }
};
using Grid = Places<float>;

// The rows of a batch. Step s of a row of a reverse direction is counted from the row's end.
struct Rows {
  std::vector<int64_t> lengths;
  std::vector<int64_t> order;   // longest first
  std::vector<int64_t> live;    // (longest + 1,): how many rows have a step s; they are the first in `order`
  int64_t time = 0;
  std::vector<int64_t> starts;  // of a packed batch: where each time begins
  const bool* resets = nullptr;  // (time, batch)

  int64_t batch() const { return lengths.size(); }
  int64_t steps() const { return live.size() - 1; }
  int64_t time_of(int64_t s, int64_t row, bool reverse) const { return reverse ? lengths[row] - 1 - s : s; }
  bool reset(int64_t t, int64_t row) const { return resets != nullptr && resets[t * batch() + row]; }
};

// A thread's scratch memory, kept between calls: fresh pages cost more than packing into them.
class Scratch {
 public:
  float* reserve(int64_t floats) {
    if (floats > capacity_) {
      memory_.reset();
      memory_.reset(new float[floats]);
      capacity_ = floats;
    }
    return memory_.get();
  }
  void trim() {
    if (capacity_ > KEPT) memory_.reset(), capacity_ = 0;
  }

 private:
  static constexpr int64_t KEPT = 4 << 20;
  std::unique_ptr<float[]> memory_;
  int64_t capacity_ = 0;
};

// What a call may have beside a plain sequence's tensors.
struct Extras {
  std::optional<Tensor> recurrent_masks, zone_h, zone_c;
  double zoneout_h = 0.0, zoneout_c = 0.0;
};

// The tensors of a call as `fused_ops.rnn.reference` describes them.
struct Inputs {
  const Tensor &input, &h0;
  const std::optional<Tensor>&c0, &lengths, &resets, &batch_sizes, &masks;
  const std::vector<Tensor>& params;
  const std::string& mode;
  bool has_biases, bidirectional, layer_norm;
  Extras extras = {};
};

// The zoneout of one state of one cell.
struct Zones {
  Places<const bool> keep;
  float share = 0.0f;

  bool any() const { return keep.data != nullptr || share != 0.0f; }
  Zone at(int64_t t, int64_t row) const { return {keep.at(t, row), share}; }
};

// A checked call.
struct Call {
  Kind kind;
  int64_t layers, directions, batch, hidden, inputs, gates;
  int64_t states, width;  // h's size, `hidden` or what that is projected to, and that of a layer's output
  bool has_biases, layer_norm, projected;
  int64_t w_hr, norms, per_cell;  // where a cell's parameters of that name begin, and how many it has
  int64_t kept;                   // floats that a step keeps for its derivative
  Rows rows;
  std::vector<int64_t> shape;  // of a layer's output
  int64_t positions, area;     // steps of rows in a layer's output, padding included, and its elements
  Tensor input, h0;
  std::optional<Tensor> c0, masks, resets;
  Extras extras;
  std::vector<Tensor> params;
  std::vector<float> zeros;  // (slopes of a row,)

  explicit Call(const Inputs& given);
  int64_t cells() const { return layers * directions; }
  int64_t layer_inputs(int64_t layer) const { return layer == 0 ? inputs : width; }
  const float* param(int64_t cell, int64_t i) const { return params[cell * per_cell + i].const_data_ptr<float>(); }
  const float* bias(int64_t cell, int64_t i) const { return has_biases ? param(cell, 2 + i) : nullptr; }
  Norms norms_of(int64_t cell) const {
    const auto at = [&](int64_t i) { return norms + i < per_cell ? param(cell, norms + i) : nullptr; };
    return {at(0), at(1), bias(cell, 0), bias(cell, 1), at(2), at(3)};
  }
  const float* recurrent_mask(int64_t cell) const {  // (batch, states)
    const auto& all = extras.recurrent_masks;
    return all ? all->const_data_ptr<float>() + cell * batch * states : nullptr;
  }
  Zones zones_h(int64_t cell) const { return zones(extras.zone_h, extras.zoneout_h, cell, states); }
  Zones zones_c(int64_t cell) const { return zones(extras.zone_c, extras.zoneout_c, cell, hidden); }
  const float* mask(int64_t layer) const { return masks->const_data_ptr<float>() + (layer - 1) * area; }
  Grid grid(const Tensor& tensor) const;  // of a layer's input or output
  // Of a contiguous (padded or packed) tensor of `width` floats in each place.
  Grid grid(const float* data, int64_t width) const;
  Grid input_grid() const { return grid(input); }
  // Whether threads share each step's panels instead of taking rows of their own, and in how many groups rows go.
  bool shares_panels() const;
  int64_t groups(bool parallel) const;
  int64_t flops(int64_t layer) const;
  Tensor empty(std::vector<int64_t> shape) const { return stable::new_empty(h0, shape); }

 private:
  void check_extras();
  void check_params(const std::vector<Tensor>& given);
  Zones zones(const std::optional<Tensor>& keep, double share, int64_t cell, int64_t features) const;
};

void check_floats(const Tensor& tensor, const char* name);
// The tensor itself if it is contiguous: asking costs less than a call through the dispatcher.
inline Tensor compact(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : stable::contiguous(tensor); }
Tensor rows_of_floats(const Tensor& tensor);

// to = a·b, elementwise; a may be `to`.
void multiply(float* to, const float* a, const float* b, int64_t count);

// For each panel: pack(weights, panel, panel + 1), then use(weights, panel, panel + 1), in memory that stays in cache,
// where every panel is used once. weights: where panel 0 would begin, panels of `floats` each.
template <typename Pack, typename Use>
void pack_and_use(int64_t floats, int64_t begin, int64_t end, Pack pack, Use use) {
  thread_local Scratch scratch;
  float* const memory = scratch.reserve(floats);
  for (int64_t panel = begin; panel < end; ++panel) {
    float* const weights = memory - panel * floats;
    pack(weights, panel, panel + 1);
    use(weights, panel, panel + 1);
  }
  scratch.trim();
}

inline int64_t panels_of(const Isa& isa, int64_t columns) { return (columns + isa.lanes - 1) / isa.lanes; }

// work(begin, end) over [0, count), on torch's threads if `parallel`.
template <class Work>
void spread(bool parallel, int64_t count, const Work& work) {
  if (count == 0) return;
  if (!parallel) return work(0, count);
  const int64_t threads = stable::get_num_threads();
  stable::parallel_for(0, count, (count + threads - 1) / threads, work);
}

}  // namespace fused_ops::rnn
