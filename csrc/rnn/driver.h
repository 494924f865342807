// What the forward and the backward driver of the CPU's RNNs share: a checked call, where its rows lie, packed weights.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "common/check.h"
#include "rnn/isa.h"

namespace fused_ops::rnn {

namespace stable = torch::stable;

constexpr int64_t SERIAL_FLOPS = 200 * 1000;         // below this a second thread costs more than it brings
constexpr int64_t SHARED_WEIGHT_BYTES = 400 * 1024;  // W_hh above this is shared between threads when rows are few

// Where step t of row b lives: padded (strides) or packed (starts). Null for no tensor.
struct Grid {
  float* data = nullptr;
  int64_t step_stride = 0, row_stride = 0;
  const int64_t* starts = nullptr;

  float* at(int64_t t, int64_t b) const {
    if (data == nullptr) return nullptr;
    return data + (starts ? (starts[t] + b) * row_stride : t * step_stride + b * row_stride);
  }
  Grid from(int64_t offset) const {
    return {data == nullptr ? nullptr : data + offset, step_stride, row_stride, starts};
  }
};

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

// The tensors of a call as `fused_ops.rnn.reference` describes them.
struct Inputs {
  const Tensor &input, &h0;
  const std::optional<Tensor>&c0, &lengths, &resets, &batch_sizes, &masks;
  const std::vector<Tensor>& params;
  const std::string& mode;
  bool has_biases, bidirectional;
};

// A checked call.
struct Call {
  Kind kind;
  int64_t layers, directions, batch, hidden, inputs, width, gates;  // width: of a layer's output
  bool has_biases;
  Rows rows;
  std::vector<int64_t> shape;  // of a layer's output
  int64_t positions, area;     // steps of rows in a layer's output, padding included, and its elements
  Tensor input, h0;
  std::optional<Tensor> c0, masks, resets;
  std::vector<Tensor> params;
  std::vector<float> zeros;  // (slopes of a row,)

  explicit Call(const Inputs& given);
  int64_t cells() const { return layers * directions; }
  int64_t layer_inputs(int64_t layer) const { return layer == 0 ? inputs : width; }
  const float* param(int64_t cell, int64_t i) const {
    return i < 2 || has_biases ? params[cell * (has_biases ? 4 : 2) + i].const_data_ptr<float>() : nullptr;
  }
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
};

void check_floats(const Tensor& tensor, const char* name);
Tensor rows_of_floats(const Tensor& tensor);

// to = a·b, elementwise; a may be `to`.
void multiply(float* to, const float* a, const float* b, int64_t count);

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
