// RNN sequences on the CPU, float32: tanh, ReLU, GRU and LSTM, with a projected state, recurrent masks, zoneout and a
// layer norm.
//
// The idea: both projections run on one microkernel whose weights are packed in every call (a cache could go stale
// unseen), and whose epilogue is the whole step, so that gates never leave the registers. States are never copied: the
// output row of a step is the state the next one reads. Rows of different length sit sorted by length behind an index,
// the live ones are a prefix of it, and the padding is never touched. Projection, zoneout and masks act on a step's
// rows after it, while they are in cache.
//
// A layer norm needs all gates of a row before it can make one of them, so there the step is not its product's
// epilogue: both products go into a buffer that stays in cache, and one sweep over a row takes it through the norms.
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

thread_local Scratch packed_scratch, gates_scratch, states_scratch;

// One direction of one layer.
struct Cell {
  const Call& call;
  int64_t inputs;
  bool reverse;
  const float *w_ih, *w_hh, *w_hr, *bias_ih, *bias_hn;  // packed; w_ih, w_hh: null where each panel is used once
  const float *from_ih, *from_hh;                       // not packed
  Grid x, out, c, kept;
  const float *h0, *c0;
  float *h_n, *c_n;
  const float* mask;
  Zones zone_h, zone_c;
  Norms norms;
};

void pack_biases(const Isa& isa, const Call& call, int64_t cell, float* bias_ih, float* bias_hn) {
  const int64_t panels = panels_of(isa, call.hidden), lanes = isa.lanes, hidden = call.hidden, gates = call.gates;
  std::fill_n(bias_ih, panels * gates * lanes, 0.0f);
  std::fill_n(bias_hn, panels * lanes, 0.0f);
  if (!call.has_biases || call.layer_norm) return;  // a norm's are added after it
  const float *b_ih = call.bias(cell, 0), *b_hh = call.bias(cell, 1);
  for (int64_t unit = 0; unit < hidden; ++unit)
    for (int64_t g = 0; g < gates; ++g) {
      const bool split = call.kind == GRU && g == 2;
      const int64_t at = g * hidden + unit;
      bias_ih[(unit / lanes * gates + g) * lanes + unit % lanes] = split ? b_ih[at] : b_ih[at] + b_hh[at];
      if (split) bias_hn[unit] = b_hh[at];
    }
}

int64_t packed_floats(const Isa& isa, const Call& call, int64_t inputs) {
  const int64_t projection = call.projected ? panels_of(isa, call.states) * isa.lanes * call.hidden : 0;
  return panels_of(isa, call.hidden) * isa.lanes * (call.gates * (inputs + call.states + 1) + 1) + projection;
}

// Packs the parameters of `index` into `memory` (packed_floats), but W_ih, W_hh if each of their panels is used once.
void pack_cell(const Isa& isa, int64_t index, Cell& cell, float* memory, bool once_ih, bool once_hh) {
  const Call& call = cell.call;
  const int64_t panels = panels_of(isa, call.hidden), width = call.gates * isa.lanes;
  float* const w_hh = memory + panels * width * cell.inputs;
  float* const bias_ih = w_hh + panels * width * call.states;
  float *const bias_hn = bias_ih + panels * width, *const w_hr = bias_hn + panels * isa.lanes;
  cell.from_ih = call.param(index, 0), cell.from_hh = call.param(index, 1);
  const bool parallel = call.gates * call.hidden * (cell.inputs + call.states) >= 32 * 1024;
  spread(parallel && !(once_ih && once_hh), panels, [&](int64_t begin, int64_t end) {
    if (!once_ih) isa.pack(cell.from_ih, call.gates, call.hidden, cell.inputs, memory, begin, end);
    if (!once_hh) isa.pack(cell.from_hh, call.gates, call.hidden, call.states, w_hh, begin, end);
  });
  pack_biases(isa, call, index, bias_ih, bias_hn);
  if (call.projected)
    isa.pack(call.param(index, call.w_hr), 1, call.states, call.hidden, w_hr, 0, panels_of(isa, call.states));
  cell.w_ih = once_ih ? nullptr : memory, cell.w_hh = once_hh ? nullptr : w_hh;
  cell.w_hr = call.projected ? w_hr : nullptr;
  cell.bias_ih = bias_ih, cell.bias_hn = bias_hn;
}

// How many different inputs are projected together.
int64_t rows_ahead(const Isa& isa, const Call& call) {
  return std::max<int64_t>(CHUNK_BYTES / (panels_of(isa, call.hidden) * call.gates * isa.lanes * sizeof(float)), 1);
}

// Takes some rows, longest first, through all their steps. `shared`: threads split the panels of each step; otherwise
// everything happens on the calling thread, but for large projections of its inputs if it is `alone`.
class Walk {
 public:
  Walk(const Isa& isa, const Cell& cell, std::vector<int64_t> mine, bool shared, bool alone)
      : isa_(isa), cell_(cell), call_(cell.call), rows_(call_.rows), mine_(std::move(mine)),
        panels_(panels_of(isa, call_.hidden)), slot_(call_.gates * isa.lanes), shared_(shared), alone_(alone),
        plain_(!cell.w_hr && !cell.mask && !cell.zone_h.any() && !cell.zone_c.any()), inputs_(cell.inputs) {
    if (!plain_) set_aside();
  }

  void run() {
    const int64_t hidden = call_.hidden, states = call_.states;
    for (int64_t row : mine_) {
      h_.push_back(cell_.h0 + row * states);
      c_.push_back(cell_.c0 ? cell_.c0 + row * hidden : nullptr);
    }
    steps_.resize(mine_.size());
    const int64_t steps = mine_.empty() ? 0 : rows_.lengths[mine_[0]];
    const int64_t ahead = rows_ahead(isa_, call_);
    for (int64_t s = 0; s < steps;) {
      inputs_.clear();
      slots_.clear();
      int64_t last = s;
      for (; last < steps && static_cast<int64_t>(inputs_.rows().size()) < ahead; ++last)
        for (int64_t i = 0, count = live(last); i < count; ++i)
          slots_.push_back(inputs_.number(cell_.x.at(time(last, mine_[i]), mine_[i])));
      last - s == 1 && live(s) > MANY_ROWS && !call_.layer_norm ? one_step(s) : steps_ahead(s, last);
      s = last;
    }
    for (size_t i = 0; i < mine_.size(); ++i) {
      std::memcpy(cell_.h_n + mine_[i] * states, h_[i], states * sizeof(float));
      if (float* const c_n = cell_.c0 ? cell_.c_n + mine_[i] * hidden : nullptr; c_n != c_[i])
        std::memcpy(c_n, c_[i], hidden * sizeof(float));
    }
    gates_scratch.trim();
    states_scratch.trim();
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
      const float *h = reset ? call_.zeros.data() : h_[i], *c = reset ? call_.zeros.data() : c_[i];
      steps_[i] = {h, h, c, cell_.out.at(t, row), c_out, cell_.kept.at(t, row), slots[i]};
      if (plain_) continue;
      if (masked_ && !reset) steps_[i].fed = masked_ + i * call_.states;
      if (inner_) steps_[i].h_out = inner_ + i * call_.hidden;
      if (turns_) steps_[i].c_out = turns_ + (s % 2 * mine_.size() + i) * call_.hidden;
    }
    return {steps_.data(), count, call_.hidden, call_.states, cell_.w_hh, cell_.bias_hn, gates, panel_stride};
  }

  void advance(int64_t s, int64_t count) {
    if (!plain_) {
      if (inner_) project(s, count);
      settle(s, count);
    }
    for (int64_t i = 0; i < count; ++i) h_[i] = steps_[i].h_out, c_[i] = steps_[i].c_out;
  }

  // Memory for what is not a state yet, or no longer one.
  void set_aside() {
    const int64_t count = mine_.size(), hidden = call_.hidden, states = call_.states;
    const bool turns = cell_.zone_c.any() && cell_.c.data == nullptr;
    float* memory = states_scratch.reserve(count * ((cell_.mask ? states : 0) + (cell_.w_hr ? hidden : 0) +
                                                    (turns ? 2 * hidden : 0)));
    if (cell_.mask) {
      masked_ = memory;
      for (int64_t i = 0; i < count; ++i)
        isa_.times(masked_ + i * states, cell_.h0 + mine_[i] * states, cell_.mask + mine_[i] * states, states);
      memory += count * states;
    }
    if (cell_.w_hr) inner_ = memory, memory += count * hidden;
    if (turns) turns_ = memory;
  }

  // h~ = W_hr·(o·tanh(c~)).
  void project(int64_t s, int64_t count) {
    from_.resize(count), to_.resize(count);
    for (int64_t i = 0; i < count; ++i) {
      from_[i] = steps_[i].h_out;
      to_[i] = steps_[i].h_out = cell_.out.at(time(s, mine_[i]), mine_[i]);
    }
    const Product job{from_.data(), count, call_.hidden, call_.states, cell_.w_hr, to_.data(), false};
    spread(shared_, panels_of(isa_, call_.states),
           [&](int64_t begin, int64_t end) { isa_.product(job, begin, end); });
  }

  // h~ and c~ become the states after the step, and h what the next product takes.
  void settle(int64_t s, int64_t count) {
    const int64_t hidden = call_.hidden, states = call_.states;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = mine_[i], t = time(s, row);
      const StepRow& now = steps_[i];
      if (cell_.zone_h.any()) {
        if (call_.kind < GRU && now.kept) std::memcpy(now.kept, now.h_out, states * sizeof(float));
        isa_.zone(cell_.zone_h.at(t, row), now.h, now.h_out, states);
      }
      if (cell_.zone_c.any()) isa_.zone(cell_.zone_c.at(t, row), now.c, now.c_out, hidden);
      if (masked_) isa_.times(masked_ + i * states, now.h_out, cell_.mask + row * states, states);
    }
  }

  // A kernel on panels of its weights, packed here from `from` if they are not yet.
  template <typename Job>
  void run(void (*kernel)(const Job&, int64_t, int64_t), Job job, const float* from, int64_t inputs, int64_t begin,
           int64_t end) const {
    if (job.weights) return kernel(job, begin, end);
    pack_and_use(
        slot_ * inputs, begin, end,
        [&](float* weights, int64_t first, int64_t last) {
          isa_.pack(from, call_.gates, call_.hidden, inputs, weights, first, last);
        },
        [&](const float* weights, int64_t first, int64_t last) {
          job.weights = weights;
          kernel(job, first, last);
        });
  }
  void project_inputs(const Projection& job, int64_t begin, int64_t end) const {
    run(isa_.project[call_.kind], job, cell_.from_ih, cell_.inputs, begin, end);
  }
  void take(const Step& job, int64_t begin, int64_t end) const {
    run(isa_.step[call_.kind], job, cell_.from_hh, call_.states, begin, end);
  }

  // A step whose gates before their norm are `job.gates`; products: memory for W_hh·h.
  void take_normed(const Step& job, float* products) {
    from_.clear();
    for (int64_t i = 0; i < job.count; ++i) from_.push_back(job.rows[i].fed);
    const Projection product{from_.data(), job.count, call_.states, job.weights, cell_.bias_ih, products,
                             job.count * slot_};
    spread(shared_, panels_, [&](int64_t begin, int64_t end) {
      run(isa_.project[call_.kind], product, cell_.from_hh, call_.states, begin, end);
    });
    const NormStep step{job, products, product.panel_stride, cell_.norms, cell_.zone_h.any()};
    spread(shared_, job.count, [&](int64_t begin, int64_t end) { isa_.norm->step[call_.kind](step, begin, end); });
  }

  // Many rows: each panel's gates are used at once and stay in the nearest cache.
  void one_step(int64_t s) {
    const int64_t width = inputs_.rows().size() * slot_, stride = shared_ ? width : 0;
    float* const gates = gates_scratch.reserve(shared_ ? panels_ * width : width);
    const Projection first = projection(gates, stride);
    const Step second = step(s, slots_.data(), gates, stride);
    spread(shared_, panels_, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        project_inputs(first, panel, panel + 1);
        take(second, panel, panel + 1);
      }
    });
    advance(s, second.count);
  }

  // Few rows, or few different inputs: those of several steps are projected together.
  void steps_ahead(int64_t s, int64_t last) {
    const int64_t stride = inputs_.rows().size() * slot_;
    const int64_t products = call_.layer_norm ? panels_ * slot_ * live(s) : 0;
    float* const gates = gates_scratch.reserve(panels_ * stride + products);
    const Projection first = projection(gates, stride);
    const int64_t flops = 2 * inputs_.rows().size() * call_.gates * call_.hidden * cell_.inputs;
    spread(shared_ || (alone_ && flops >= SERIAL_GEMM_FLOPS), panels_,
           [&](int64_t begin, int64_t end) { project_inputs(first, begin, end); });
    const int32_t* slots = slots_.data();
    for (; s < last; ++s) {
      const Step next = step(s, slots, gates, stride);
      if (call_.layer_norm) take_normed(next, gates + panels_ * stride);
      else spread(shared_, panels_, [&](int64_t begin, int64_t end) { take(next, begin, end); });
      advance(s, next.count);
      slots += next.count;
    }
  }

  const Isa& isa_;
  const Cell& cell_;
  const Call& call_;
  const Rows& rows_;
  const std::vector<int64_t> mine_;
  const int64_t panels_, slot_;
  const bool shared_, alone_, plain_;  // plain: no projection, mask or zoneout
  int64_t live_ = 0;
  Distinct inputs_;
  std::vector<int32_t> slots_;
  std::vector<const float*> h_, c_;
  std::vector<StepRow> steps_;
  // By row: h·mask; o·tanh(c~) before its projection; c of this step and the one before, where nothing keeps it.
  float *masked_ = nullptr, *inner_ = nullptr, *turns_ = nullptr;
  std::vector<const float*> from_;
  std::vector<float*> to_;
};

// All directions of one layer.
void run_layer(const Isa& isa, const Call& call, int64_t layer, std::vector<Cell>& cells) {
  const int64_t floats = packed_floats(isa, call, cells[0].inputs);
  float* const packed = packed_scratch.reserve(call.directions * floats);
  const bool shared = call.shares_panels(), parallel = call.flops(layer) >= SERIAL_FLOPS;
  const int64_t groups = call.groups(parallel), steps = call.rows.steps();
  const bool at_once = groups == 1 && steps * call.batch <= rows_ahead(isa, call);
  for (int64_t d = 0; d < call.directions; ++d)
    pack_cell(isa, layer * call.directions + d, cells[d], packed + d * floats, at_once || steps <= 1, steps <= 1);
  spread(parallel && !shared, call.directions * groups, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      std::vector<int64_t> mine;
      for (int64_t i = task % groups; i < call.batch; i += groups) mine.push_back(call.rows.order[i]);
      const bool alone = parallel && call.directions * groups == 1;
      Walk(isa, cells[task / groups], std::move(mine), shared && parallel, alone).run();
    }
  });
}

void zero_padding(const Call& call, Grid grid, int64_t features) {
  for (int64_t b = 0; b < call.batch; ++b)
    for (int64_t t = call.rows.lengths[b]; t < call.rows.time; ++t)
      std::memset(grid.at(t, b), 0, features * sizeof(float));
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The directions of one layer, x its input and y its output. c_all and kept may be empty.
std::vector<Cell> cells_of(const Call& call, int64_t layer, const Grid& x, const Grid& y, const Outputs& all) {
  const auto& [output, h_n, c_n, inner, c_all, kept] = all;
  const auto at = [](const Tensor& tensor, int64_t offset) {
    return tensor.numel() == 0 ? nullptr : const_cast<float*>(tensor.const_data_ptr<float>()) + offset;
  };
  std::vector<Cell> cells;
  for (int64_t d = 0; d < call.directions; ++d) {
    const int64_t index = layer * call.directions + d, rows = index * call.batch, places = index * call.positions;
    Cell cell{call, call.layer_inputs(layer), d == 1};
    cell.x = x;
    cell.out = y.from(d * call.states);
    cell.c = call.grid(at(c_all, places * call.hidden), call.hidden);
    cell.kept = call.grid(at(kept, places * call.kept), call.kept);
    cell.h0 = call.h0.const_data_ptr<float>() + rows * call.states;
    cell.c0 = call.c0 ? call.c0->const_data_ptr<float>() + rows * call.hidden : nullptr;
    cell.h_n = at(h_n, rows * call.states), cell.c_n = at(c_n, rows * call.hidden);
    cell.mask = call.recurrent_mask(index);
    cell.zone_h = call.zones_h(index), cell.zone_c = call.zones_c(index);
    if (call.layer_norm) cell.norms = call.norms_of(index);
    cells.push_back(cell);
  }
  return cells;
}

// (output, h_n, c_n, inner: the outputs of all layers but the last, c_all and what each step keeps for the backward).
Outputs forward(const Tensor& input, const Tensor& h0, const std::optional<Tensor>& c0,
                const std::optional<Tensor>& lengths, const std::optional<Tensor>& resets,
                const std::optional<Tensor>& batch_sizes, const std::optional<Tensor>& masks,
                const std::optional<Tensor>& recurrent_masks, const std::optional<Tensor>& zone_h,
                const std::optional<Tensor>& zone_c, const std::vector<Tensor>& params, const std::string& mode,
                bool has_biases, bool bidirectional, double zoneout_h, double zoneout_c, bool layer_norm,
                bool keep_states, bool keep_steps) {
  const Call call({input, h0, c0, lengths, resets, batch_sizes, masks, params, mode, has_biases, bidirectional,
                   layer_norm, {recurrent_masks, zone_h, zone_c, zoneout_h, zoneout_c}});
  const int64_t hidden = call.hidden, cells = call.cells();
  const auto places = [&](bool wanted, int64_t first, std::initializer_list<int64_t> last) {
    if (!wanted) return call.empty({0});
    std::vector<int64_t> shape = {first};
    shape.insert(shape.end(), call.shape.begin(), call.shape.end() - 1);
    shape.insert(shape.end(), last);
    return call.empty(shape);
  };
  const bool lstm = call.kind == LSTM;
  const Outputs found = {call.empty(call.shape), call.empty({cells, call.batch, call.states}),
                         call.empty(lstm ? std::vector{cells, call.batch, hidden} : std::vector{int64_t{0}}),
                         places(keep_states, call.layers - 1, {call.width}),
                         places(lstm && keep_states, cells, {hidden}),
                         places(keep_steps && call.kept > 0, cells, {call.kept})};
  Tensor x = call.input;
  for (int64_t layer = 0; layer < call.layers; ++layer) {
    const bool last = layer + 1 == call.layers;
    Tensor y = last ? std::get<0>(found)
                    : keep_states ? stable::select(std::get<3>(found), 0, layer) : call.empty(call.shape);
    std::vector<Cell> directions = cells_of(call, layer, call.grid(x), call.grid(y), found);
    run_layer(choose_isa(), call, layer, directions);
    if (lengths && (last || keep_states)) zero_padding(call, call.grid(y), call.width);
    for (const Cell& cell : directions) {
      if (lengths && cell.c.data) zero_padding(call, cell.c, hidden);
      if (lengths && cell.kept.data) zero_padding(call, cell.kept, call.kept);
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

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CPU, m) { m.impl("rnn_fwd_cpu", TORCH_BOX(&fused_ops::rnn::forward)); }
