// RNN sequences with a layer norm inside the step, on the CPU, float32: forward.
//
// The idea: a norm needs all gates of a row before it can make one of them, so the step cannot be its product's
// epilogue. Both products run on the plain sequences' microkernel (`project`, without bias) into a buffer that stays in
// cache; one sweep over a row then takes it through both norms, the gates and the LSTM's third norm, and keeps what
// the derivative needs. Several steps' inputs are projected together; rows are independent, as are threads.
//
// Floor: as for plain sequences, 2·gates·hidden·(inputs + hidden) flops for each step of each row.
#include <algorithm>
#include <cstring>
#include <tuple>

#include "rnn/norm_call.h"

namespace fused_ops::rnn {
namespace {

constexpr int64_t CHUNK_BYTES = 256 * 1024;  // of inputs projected ahead, to stay in L2

thread_local Scratch packed_scratch, gates_scratch;

// One direction of one layer.
struct Cell {
  const Call& call;
  int64_t inputs;
  bool reverse;
  const float *w_ih, *w_hh, *zeros;  // packed; a projection's bias
  Norms norms;
  Grid x, out, c, kept;
  const float *h0, *c0;
  float *h_n, *c_n;
};

// Takes some rows, longest first, through all their steps. `shared`: threads split each product's panels, then rows.
class Walk {
 public:
  Walk(const Isa& isa, const Cell& cell, std::vector<int64_t> mine, bool shared)
      : isa_(isa), cell_(cell), call_(cell.call), rows_(call_.rows), mine_(std::move(mine)),
        panels_(panels_of(isa, call_.hidden)), slot_(call_.gates * isa.lanes), shared_(shared) {}

  void run() {
    const int64_t hidden = call_.hidden, count = mine_.size();
    for (int64_t row : mine_) {
      h_.push_back(cell_.h0 + row * hidden);
      c_.push_back(cell_.c0 ? cell_.c0 + row * hidden : nullptr);
    }
    const int64_t steps = mine_.empty() ? 0 : rows_.lengths[mine_[0]];
    const int64_t ahead = std::max<int64_t>(CHUNK_BYTES / (panels_ * slot_ * sizeof(float) + 1), 1);
    for (int64_t s = 0; s < steps;) {
      std::vector<const float*> inputs;
      int64_t last = s;
      for (; last < steps && (last == s || static_cast<int64_t>(inputs.size()) < ahead); ++last)
        for (int64_t i = 0; i < count && rows_.lengths[mine_[i]] > last; ++i)
          inputs.push_back(cell_.x.at(time(last, mine_[i]), mine_[i]));
      const int64_t tokens = inputs.size();
      float* const gi = gates_scratch.reserve(panels_ * slot_ * (tokens + count));
      float* const gh = gi + panels_ * slot_ * tokens;
      project(inputs, cell_.inputs, cell_.w_ih, gi);
      for (int64_t first = 0; s < last; ++s) first += step(s, gi + first * slot_, tokens, gh);
    }
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(cell_.h_n + mine_[i] * hidden, h_[i], hidden * sizeof(float));
      if (float* const c_n = cell_.c0 ? cell_.c_n + mine_[i] * hidden : nullptr; c_n != c_[i])
        std::memcpy(c_n, c_[i], hidden * sizeof(float));
    }
    gates_scratch.trim();
  }

 private:
  int64_t time(int64_t s, int64_t row) const { return rows_.time_of(s, row, cell_.reverse); }

  void project(const std::vector<const float*>& rows, int64_t inputs, const float* weights, float* to) const {
    const int64_t count = rows.size();
    const Projection job{rows.data(), count, inputs, weights, cell_.zeros, to, count * slot_};
    spread(shared_, panels_, [&](int64_t begin, int64_t end) { isa_.project[call_.kind](job, begin, end); });
  }

  // Step s, whose inputs' gates begin at gi, a panel `tokens` slots long; returns how many rows it has.
  int64_t step(int64_t s, const float* gi, int64_t tokens, float* gh) {
    fed_.clear(), steps_.clear();
    for (size_t i = 0; i < mine_.size() && rows_.lengths[mine_[i]] > s; ++i) {
      const int64_t row = mine_[i], t = time(s, row);
      const bool reset = rows_.reset(t, row);
      float* c_out = cell_.c.at(t, row);
      if (c_out == nullptr && cell_.c0) c_out = cell_.c_n + row * call_.hidden;
      fed_.push_back(reset ? call_.zeros.data() : h_[i]);
      const float* const c = reset ? call_.zeros.data() : c_[i];
      const int64_t offset = i * slot_;
      steps_.push_back({gi + offset, gh + offset, fed_[i], c, cell_.out.at(t, row), c_out, cell_.kept.at(t, row)});
    }
    const int64_t count = steps_.size();
    project(fed_, call_.hidden, cell_.w_hh, gh);
    const NormStep job{steps_.data(), call_.hidden, tokens * slot_, count * slot_, cell_.norms};
    spread(shared_, count, [&](int64_t begin, int64_t end) { isa_.norm->step[call_.kind](job, begin, end); });
    for (int64_t i = 0; i < count; ++i) h_[i] = steps_[i].h_out, c_[i] = steps_[i].c_out;
    return count;
  }

  const Isa& isa_;
  const Cell& cell_;
  const Call& call_;
  const Rows& rows_;
  const std::vector<int64_t> mine_;
  const int64_t panels_, slot_;
  const bool shared_;
  std::vector<const float*> h_, c_, fed_;
  std::vector<NormRow> steps_;
};

// All directions of one layer.
void run_layer(const Isa& isa, const Call& call, int64_t layer, std::vector<Cell>& cells) {
  const int64_t panels = panels_of(isa, call.hidden), width = call.gates * isa.lanes, inputs = cells[0].inputs;
  const std::vector<float> zeros(panels * width, 0.0f);
  float* packed = packed_scratch.reserve(call.directions * panels * width * (inputs + call.hidden));
  const bool shared = call.shares_panels(), parallel = call.flops(layer) >= SERIAL_FLOPS;
  for (int64_t d = 0; d < call.directions; ++d) {
    const int64_t index = layer * call.directions + d;
    float *const w_ih = packed, *const w_hh = w_ih + panels * width * inputs;
    spread(parallel, panels, [&](int64_t begin, int64_t end) {
      isa.pack(call.param(index, 0), call.gates, call.hidden, inputs, w_ih, begin, end);
      isa.pack(call.param(index, 1), call.gates, call.hidden, call.hidden, w_hh, begin, end);
    });
    cells[d].w_ih = w_ih, cells[d].w_hh = w_hh, cells[d].zeros = zeros.data();
    packed = w_hh + panels * width * call.hidden;
  }
  const int64_t groups = call.groups(parallel);
  spread(parallel && !shared, call.directions * groups, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      std::vector<int64_t> mine;
      for (int64_t i = task % groups; i < call.batch; i += groups) mine.push_back(call.rows.order[i]);
      Walk(isa, cells[task / groups], std::move(mine), shared && parallel).run();
    }
  });
}

void zero_padding(const Call& call, Grid grid, int64_t features) {
  if (grid.data == nullptr) return;
  for (int64_t b = 0; b < call.batch; ++b)
    for (int64_t t = call.rows.lengths[b]; t < call.rows.time; ++t)
      std::memset(grid.at(t, b), 0, features * sizeof(float));
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The directions of one layer, x its input and y its output. c_all and kept may be empty.
std::vector<Cell> cells_of(const NormCall& call, int64_t layer, const Grid& x, const Grid& y, const Outputs& all) {
  const auto& [output, h_n, c_n, inner, c_all, kept] = all;
  const auto at = [](const Tensor& tensor, int64_t offset) {
    return tensor.numel() == 0 ? nullptr : const_cast<float*>(tensor.const_data_ptr<float>()) + offset;
  };
  const int64_t hidden = call.hidden, place = norm_kept_of(call.kind, hidden);
  std::vector<Cell> cells;
  for (int64_t d = 0; d < call.directions; ++d) {
    const int64_t index = layer * call.directions + d, state = index * call.batch * hidden;
    Cell cell{call, call.layer_inputs(layer), d == 1, nullptr, nullptr, nullptr, call.norms(index), x};
    cell.out = y.from(d * hidden);
    cell.c = call.grid(at(c_all, index * call.positions * hidden), hidden);
    cell.kept = call.grid(at(kept, index * call.positions * place), place);
    cell.h0 = call.h0.const_data_ptr<float>() + state;
    cell.c0 = call.c0 ? call.c0->const_data_ptr<float>() + state : nullptr;
    cell.h_n = at(h_n, state), cell.c_n = at(c_n, state);
    cells.push_back(cell);
  }
  return cells;
}

// (output, h_n, c_n, inner: the outputs of all layers but the last, c_all and what each step keeps for the backward).
Outputs forward(const Tensor& input, const Tensor& h0, const std::optional<Tensor>& c0,
                const std::optional<Tensor>& lengths, const std::optional<Tensor>& resets,
                const std::optional<Tensor>& batch_sizes, const std::optional<Tensor>& masks,
                const std::vector<Tensor>& params, const std::vector<Tensor>& norms, const std::string& mode,
                bool has_biases, bool bidirectional, bool keep_states, bool keep_steps) {
  const NormCall call({input, h0, c0, lengths, resets, batch_sizes, masks, params, mode, has_biases, bidirectional},
                      norms);
  const bool lstm = call.kind == LSTM;
  const int64_t cells = call.cells();
  const auto places = [&](bool wanted, int64_t first, int64_t last) {
    if (!wanted) return call.empty({0});
    std::vector<int64_t> shape = {first};
    shape.insert(shape.end(), call.shape.begin(), call.shape.end() - 1);
    shape.push_back(last);
    return call.empty(shape);
  };
  const std::vector<int64_t> states = {cells, call.batch, call.hidden};
  const Outputs found = {call.empty(call.shape), call.empty(states),
                         call.empty(lstm ? states : std::vector<int64_t>{0}),
                         places(keep_states, call.layers - 1, call.width),
                         places(lstm && keep_states, cells, call.hidden),
                         places(keep_steps, cells, norm_kept_of(call.kind, call.hidden))};
  Tensor x = call.input;
  for (int64_t layer = 0; layer < call.layers; ++layer) {
    const bool last = layer + 1 == call.layers;
    Tensor y = last ? std::get<0>(found)
                    : keep_states ? stable::select(std::get<3>(found), 0, layer) : call.empty(call.shape);
    std::vector<Cell> directions = cells_of(call, layer, call.grid(x), call.grid(y), found);
    run_layer(choose_isa(), call, layer, directions);
    if (lengths) zero_padding(call, call.grid(y), call.width);
    for (const Cell& cell : directions) {
      if (!lengths) break;
      zero_padding(call, cell.c, call.hidden);
      zero_padding(call, cell.kept, norm_kept_of(call.kind, call.hidden));
    }
    x = y;
    if (!last && masks) {
      x = call.empty(call.shape);
      multiply(x.mutable_data_ptr<float>(), y.const_data_ptr<float>(), call.mask(layer + 1), call.area);
    }
  }
  packed_scratch.trim();
  return found;
}

}  // namespace
}  // namespace fused_ops::rnn

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CPU, m) { m.impl("rnn_norm_fwd_cpu", TORCH_BOX(&fused_ops::rnn::forward)); }
