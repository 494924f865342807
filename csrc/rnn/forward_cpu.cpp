// RNN sequences on the CPU, float32: tanh, ReLU, GRU and LSTM.
//
// The idea: both projections run on one microkernel whose weights are packed in every call (a cache could go stale
// unseen), and whose epilogue is the whole step, so that gates never leave the registers. States are never copied: the
// output row of a step is the state the next one reads. Rows of different length sit sorted by length behind an index,
// the live ones are a prefix of it, and the padding is never touched.
//
// Inputs that are bitwise the same row (an embedding's, above all) are projected once: a hash finds them, and is given
// up where it finds none. Equal rows have equal projections, so this changes no bit of the result.
//
// Threads: rows (and directions) are independent, so each thread takes rows through all steps without waiting. Where
// there are fewer rows than threads and the weights are large, threads share the panels of each step instead.
//
// Floor: 2·gates·hidden·(inputs + hidden) flops for each step of each row; for few rows, reading W_hh (4·gates·hidden²
// bytes) from cache in every step.
#include <algorithm>
#include <cstring>
#include <tuple>

#include "rnn/distinct.h"
#include "rnn/driver.h"

namespace fused_ops::rnn {
namespace {

constexpr int64_t CHUNK_BYTES = 256 * 1024;  // of gates projected ahead, to stay in L2
constexpr int64_t MANY_ROWS = 8;             // more than a tile

thread_local Scratch packed_scratch, gates_scratch;

// One direction of one layer.
struct Cell {
  const Call& call;
  int64_t inputs;
  bool reverse;
  const float *w_ih, *w_hh, *bias_ih, *bias_hn;  // packed
  Grid x, out, c, kept;
  const float *h0, *c0;
  float *h_n, *c_n;
};

void pack_biases(const Isa& isa, const Call& call, int64_t cell, float* bias_ih, float* bias_hn) {
  const int64_t panels = panels_of(isa, call.hidden), lanes = isa.lanes, hidden = call.hidden, gates = call.gates;
  std::fill_n(bias_ih, panels * gates * lanes, 0.0f);
  std::fill_n(bias_hn, panels * lanes, 0.0f);
  if (!call.has_biases) return;
  const float *b_ih = call.param(cell, 2), *b_hh = call.param(cell, 3);
  for (int64_t unit = 0; unit < hidden; ++unit)
    for (int64_t g = 0; g < gates; ++g) {
      const bool split = call.kind == GRU && g == 2;
      const int64_t at = g * hidden + unit;
      bias_ih[(unit / lanes * gates + g) * lanes + unit % lanes] = split ? b_ih[at] : b_ih[at] + b_hh[at];
      if (split) bias_hn[unit] = b_hh[at];
    }
}

int64_t packed_floats(const Isa& isa, const Call& call, int64_t inputs) {
  return panels_of(isa, call.hidden) * isa.lanes * (call.gates * (inputs + call.hidden + 1) + 1);
}

// Packs the parameters of `index` into `memory` (packed_floats).
void pack_cell(const Isa& isa, int64_t index, Cell& cell, float* memory) {
  const Call& call = cell.call;
  const int64_t panels = panels_of(isa, call.hidden), width = call.gates * isa.lanes;
  float* const w_hh = memory + panels * width * cell.inputs;
  float* const bias_ih = w_hh + panels * width * call.hidden;
  const float *from_ih = call.param(index, 0), *from_hh = call.param(index, 1);
  const bool parallel = call.gates * call.hidden * (cell.inputs + call.hidden) >= 32 * 1024;
  spread(parallel, panels, [&](int64_t begin, int64_t end) {
    isa.pack(from_ih, call.gates, call.hidden, cell.inputs, memory, begin, end);
    isa.pack(from_hh, call.gates, call.hidden, call.hidden, w_hh, begin, end);
  });
  pack_biases(isa, call, index, bias_ih, bias_ih + panels * width);
  cell.w_ih = memory, cell.w_hh = w_hh, cell.bias_ih = bias_ih, cell.bias_hn = bias_ih + panels * width;
}

// Takes some rows, longest first, through all their steps. `shared`: threads split the panels of each step; otherwise
// everything happens on the calling thread.
class Walk {
 public:
  Walk(const Isa& isa, const Cell& cell, std::vector<int64_t> mine, bool shared)
      : isa_(isa), cell_(cell), call_(cell.call), rows_(call_.rows), mine_(std::move(mine)),
        panels_(panels_of(isa, call_.hidden)), slot_(call_.gates * isa.lanes), shared_(shared), inputs_(cell.inputs) {}

  void run() {
    const int64_t hidden = call_.hidden;
    for (int64_t row : mine_) {
      h_.push_back(cell_.h0 + row * hidden);
      c_.push_back(cell_.c0 ? cell_.c0 + row * hidden : nullptr);
    }
    steps_.resize(mine_.size());
    const int64_t steps = mine_.empty() ? 0 : rows_.lengths[mine_[0]];
    const int64_t ahead = std::max<int64_t>(CHUNK_BYTES / (panels_ * slot_ * sizeof(float)), 1);
    for (int64_t s = 0; s < steps;) {
      inputs_.clear();
      slots_.clear();
      int64_t last = s;
      for (; last < steps && static_cast<int64_t>(inputs_.rows().size()) < ahead; ++last)
        for (int64_t i = 0, count = live(last); i < count; ++i)
          slots_.push_back(inputs_.number(cell_.x.at(time(last, mine_[i]), mine_[i])));
      last - s == 1 && live(s) > MANY_ROWS ? one_step(s) : steps_ahead(s, last);
      s = last;
    }
    for (size_t i = 0; i < mine_.size(); ++i) {
      std::memcpy(cell_.h_n + mine_[i] * hidden, h_[i], hidden * sizeof(float));
      if (float* const c_n = cell_.c0 ? cell_.c_n + mine_[i] * hidden : nullptr; c_n != c_[i])
        std::memcpy(c_n, c_[i], hidden * sizeof(float));
    }
    gates_scratch.trim();
  }

 private:
  int64_t live(int64_t s) {
    while (live_ > 0 && rows_.lengths[mine_[live_ - 1]] <= s) --live_;
    // Asked again for an earlier step: rows still live then come back.
    while (live_ < static_cast<int64_t>(mine_.size()) && rows_.lengths[mine_[live_]] > s) ++live_;
    return live_;
  }

  int64_t time(int64_t s, int64_t row) const { return rows_.time_of(s, row, cell_.reverse); }

  Projection projection(float* gates, int64_t panel_stride) const {
    const auto& rows = inputs_.rows();
    return {rows.data(), static_cast<int64_t>(rows.size()), cell_.inputs, cell_.w_ih, cell_.bias_ih, gates,
            panel_stride};
  }

  Step step(int64_t s, const int32_t* slots, float* gates, int64_t panel_stride) {
    const int64_t count = live(s);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = mine_[i], t = time(s, row);
      float* c_out = cell_.c.at(t, row);
      if (c_out == nullptr && cell_.c0) c_out = cell_.c_n + row * call_.hidden;
      const bool reset = rows_.reset(t, row);
      steps_[i] = {reset ? call_.zeros.data() : h_[i], reset ? call_.zeros.data() : c_[i], cell_.out.at(t, row), c_out,
                   cell_.kept.at(t, row), slots[i]};
    }
    return {steps_.data(), count, call_.hidden, cell_.w_hh, cell_.bias_hn, gates, panel_stride};
  }

  void advance(int64_t count) {
    for (int64_t i = 0; i < count; ++i) h_[i] = steps_[i].h_out, c_[i] = steps_[i].c_out;
  }

  // Many rows: each panel's gates are used at once and stay in the nearest cache.
  void one_step(int64_t s) {
    const int64_t width = inputs_.rows().size() * slot_, stride = shared_ ? width : 0;
    float* const gates = gates_scratch.reserve(shared_ ? panels_ * width : width);
    const Projection first = projection(gates, stride);
    const Step second = step(s, slots_.data(), gates, stride);
    spread(shared_, panels_, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        isa_.project[call_.kind](first, panel, panel + 1);
        isa_.step[call_.kind](second, panel, panel + 1);
      }
    });
    advance(second.count);
  }

  // Few rows, or few different inputs: those of several steps are projected together.
  void steps_ahead(int64_t s, int64_t last) {
    const int64_t stride = inputs_.rows().size() * slot_;
    float* const gates = gates_scratch.reserve(panels_ * stride);
    const Projection first = projection(gates, stride);
    spread(shared_, panels_, [&](int64_t begin, int64_t end) { isa_.project[call_.kind](first, begin, end); });
    const int32_t* slots = slots_.data();
    for (; s < last; ++s) {
      const Step next = step(s, slots, gates, stride);
      spread(shared_, panels_, [&](int64_t begin, int64_t end) { isa_.step[call_.kind](next, begin, end); });
      advance(next.count);
      slots += next.count;
    }
  }

  const Isa& isa_;
  const Cell& cell_;
  const Call& call_;
  const Rows& rows_;
  const std::vector<int64_t> mine_;
  const int64_t panels_, slot_;
  const bool shared_;
  int64_t live_ = 0;
  Distinct inputs_;
  std::vector<int32_t> slots_;
  std::vector<const float*> h_, c_;
  std::vector<StepRow> steps_;
};

// All directions of one layer.
void run_layer(const Isa& isa, const Call& call, int64_t layer, std::vector<Cell>& cells) {
  const int64_t floats = packed_floats(isa, call, cells[0].inputs);
  float* const packed = packed_scratch.reserve(call.directions * floats);
  for (int64_t d = 0; d < call.directions; ++d)
    pack_cell(isa, layer * call.directions + d, cells[d], packed + d * floats);
  const bool shared = call.shares_panels(), parallel = call.flops(layer) >= SERIAL_FLOPS;
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
  for (int64_t b = 0; b < call.batch; ++b)
    for (int64_t t = call.rows.lengths[b]; t < call.rows.time; ++t)
      std::memset(grid.at(t, b), 0, features * sizeof(float));
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// (output, h_n, c_n, inner: the outputs of all layers but the last, c_all and what each step keeps for the backward).
Outputs forward(const Tensor& input, const Tensor& h0, const std::optional<Tensor>& c0,
                const std::optional<Tensor>& lengths, const std::optional<Tensor>& resets,
                const std::optional<Tensor>& batch_sizes, const std::optional<Tensor>& masks,
                const std::vector<Tensor>& params, const std::string& mode, bool has_biases, bool bidirectional,
                bool keep_states, bool keep_gates) {
  const Call call({input, h0, c0, lengths, resets, batch_sizes, masks, params, mode, has_biases, bidirectional});
  const int64_t hidden = call.hidden, state = call.batch * hidden, kept = kept_of(call.kind);
  const bool lstm = call.kind == LSTM, keeps_c = lstm && keep_states, keeps = keep_gates && kept > 0;
  const auto places = [&](int64_t first, std::initializer_list<int64_t> last) {
    std::vector<int64_t> shape = {first};
    shape.insert(shape.end(), call.shape.begin(), call.shape.end() - 1);
    shape.insert(shape.end(), last);
    return shape;
  };
  Tensor output = call.empty(call.shape), h_n = call.empty({call.cells(), call.batch, hidden});
  Tensor c_n = lstm ? call.empty({call.cells(), call.batch, hidden}) : call.empty({0});
  Tensor inner = keep_states ? call.empty(places(call.layers - 1, {call.width})) : call.empty({0});
  Tensor c_all = keeps_c ? call.empty(places(call.cells(), {hidden})) : call.empty({0});
  Tensor gates = keeps ? call.empty(places(call.cells(), {kept, hidden})) : call.empty({0});
  Tensor x = call.input;
  for (int64_t layer = 0; layer < call.layers; ++layer) {
    const bool last = layer + 1 == call.layers;
    Tensor y = last ? output : keep_states ? stable::select(inner, 0, layer) : call.empty(call.shape);
    std::vector<Cell> cells;
    for (int64_t d = 0; d < call.directions; ++d) {
      const int64_t at = layer * call.directions + d;
      Cell cell{call, call.layer_inputs(layer), d == 1, nullptr, nullptr, nullptr, nullptr, call.grid(x)};
      cell.out = call.grid(y).from(d * hidden);
      if (keeps_c) cell.c = call.grid(c_all.const_data_ptr<float>() + at * call.positions * hidden, hidden);
      const int64_t place = kept * hidden;
      if (keeps) cell.kept = call.grid(gates.const_data_ptr<float>() + at * call.positions * place, place);
      cell.h0 = call.h0.const_data_ptr<float>() + at * state;
      cell.c0 = lstm ? call.c0->const_data_ptr<float>() + at * state : nullptr;
      cell.h_n = h_n.mutable_data_ptr<float>() + at * state;
      cell.c_n = lstm ? c_n.mutable_data_ptr<float>() + at * state : nullptr;
      cells.push_back(cell);
    }
    run_layer(choose_isa(), call, layer, cells);
    if (lengths && (last || keep_states)) zero_padding(call, call.grid(y), call.width);
    for (const Cell& cell : cells) {
      if (lengths && keeps_c) zero_padding(call, cell.c, hidden);
      if (lengths && keeps) zero_padding(call, cell.kept, kept * hidden);
    }
    x = y;
    if (!last && masks) {
      x = call.empty(call.shape);
      multiply(x.mutable_data_ptr<float>(), y.const_data_ptr<float>(), call.mask(layer + 1), call.area);
    }
  }
  packed_scratch.trim();
  return {output, h_n, c_n, inner, c_all, gates};
}

}  // namespace
}  // namespace fused_ops::rnn

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CPU, m) { m.impl("rnn_fwd_cpu", TORCH_BOX(&fused_ops::rnn::forward)); }
