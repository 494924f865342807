// GRU sequences and cells on the CPU, float32.
//
// The idea: both projections run on one microkernel whose weights are packed in every call (a cache could go stale
// unseen), and whose epilogue is the whole step, so that gates never leave the registers. States are never copied: the
// output row of a step is the state the next one reads. Rows of different length sit sorted by length behind an index,
// the live ones are a prefix of it, and the padding is never touched.
//
// Inputs that are bitwise the same row (an embedding's, above all) are projected once: a hash finds them, and is given up
// where it finds none. Equal rows have equal projections, so this changes no bit of the result.
//
// Threads: rows (and directions) are independent, so each thread takes rows through all steps without waiting. Where
// there are fewer rows than threads and the weights are large, threads share the panels of each step instead.
//
// Floor: 6·hidden·(inputs + hidden) flops for each step of each row; for few rows, reading W_hh (12·hidden² bytes) from
// cache in every step.
#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <tuple>

#include "common/check.h"
#include "rnn/gru_isa.h"

namespace fused_ops::gru {

namespace stable = torch::stable;

constexpr int64_t CHUNK_BYTES = 256 * 1024;          // of gates projected ahead, to stay in L2
constexpr int64_t SERIAL_FLOPS = 200 * 1000;         // below this a second thread costs more than it brings
constexpr int64_t SHARED_WEIGHT_BYTES = 400 * 1024;  // W_hh above this is shared between threads when rows are few

constexpr int64_t MANY_ROWS = 8;  // more than a tile

// Where step t of row b lives: padded (strides) or packed (starts).
struct Grid {
  float* data;
  int64_t step_stride, row_stride;
  const int64_t* starts = nullptr;

  float* at(int64_t t, int64_t b) const {
    return data + (starts ? (starts[t] + b) * row_stride : t * step_stride + b * row_stride);
  }
  Grid from(int64_t feature) const { return {data + feature, step_stride, row_stride, starts}; }
};

struct Rows {
  std::vector<int64_t> lengths;
  std::vector<int64_t> order;  // longest first
  int64_t time;
};

// One direction of one layer.
struct Cell {
  const float *w_ih, *w_hh, *b_ih, *b_hh;
  int64_t inputs, hidden;
  bool reverse;
  float *packed_ih, *packed_hh, *bias_ih, *bias_hn;

  int64_t panels(const Isa& isa) const { return (hidden + isa.lanes - 1) / isa.lanes; }
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
  static constexpr int64_t KEPT = 8 << 20;
  std::unique_ptr<float[]> memory_;
  int64_t capacity_ = 0;
};

thread_local Scratch packed_scratch, gates_scratch;

void pack_biases(const Isa& isa, Cell& cell) {
  const int64_t panels = cell.panels(isa), lanes = isa.lanes, hidden = cell.hidden;
  std::fill_n(cell.bias_ih, panels * 3 * lanes, 0.0f);
  std::fill_n(cell.bias_hn, panels * lanes, 0.0f);
  if (cell.b_ih == nullptr) return;
  for (int64_t unit = 0; unit < hidden; ++unit) {
    float* to = cell.bias_ih + unit / lanes * 3 * lanes + unit % lanes;
    to[0] = cell.b_ih[unit] + cell.b_hh[unit];
    to[lanes] = cell.b_ih[hidden + unit] + cell.b_hh[hidden + unit];
    to[2 * lanes] = cell.b_ih[2 * hidden + unit];
    cell.bias_hn[unit] = cell.b_hh[2 * hidden + unit];
  }
}

int64_t packed_floats(const Isa& isa, const Cell& cell) {
  return cell.panels(isa) * isa.lanes * (3 * (cell.inputs + cell.hidden) + 4);
}

// Packs the cell's parameters into `memory` (packed_floats).
void pack_cell(const Isa& isa, Cell& cell, float* memory) {
  const int64_t panels = cell.panels(isa), width = 3 * isa.lanes;
  cell.packed_ih = memory;
  cell.packed_hh = cell.packed_ih + panels * width * cell.inputs;
  cell.bias_ih = cell.packed_hh + panels * width * cell.hidden;
  cell.bias_hn = cell.bias_ih + panels * width;
  const auto work = [&](int64_t begin, int64_t end) {
    isa.pack(cell.w_ih, cell.hidden, cell.inputs, cell.packed_ih, begin, end);
    isa.pack(cell.w_hh, cell.hidden, cell.hidden, cell.packed_hh, begin, end);
  };
  const bool serial = 3 * cell.hidden * (cell.inputs + cell.hidden) < 32 * 1024;
  stable::parallel_for(0, panels, serial ? panels : 1, work);
  pack_biases(isa, cell);
}

// Distinct rows of floats, numbered in order of appearance.
class Distinct {
 public:
  explicit Distinct(int64_t width) : width_(width) {}

  void clear() {
    rows_.clear();
    seen_ = 0;
    std::fill(table_.begin(), table_.end(), -1);
  }

  // The number of `row`. A row equal to an earlier one gets that one's, while looking has paid off.
  int32_t number(const float* row) {
    const auto fresh = static_cast<int32_t>(rows_.size());
    ++seen_;
    if (worthwhile_ && seen_ > TRIAL && 4 * fresh > 3 * TRIAL && 4 * fresh > 3 * seen_) worthwhile_ = false;
    if (worthwhile_) {
      if (2 * rows_.size() >= table_.size()) grow();
      int32_t& place = find(row);
      if (place >= 0) return place;
      place = fresh;
    }
    rows_.push_back(row);
    return fresh;
  }

  const std::vector<const float*>& rows() const { return rows_; }

 private:
  static constexpr int64_t TRIAL = 64;

  uint64_t hash(const float* row) const {
    uint64_t lanes[4] = {1, 2, 3, 4};
    int64_t i = 0;
    for (; i + 8 <= width_; i += 8)
      for (int lane = 0; lane < 4; ++lane) {
        uint64_t word;
        std::memcpy(&word, row + i + 2 * lane, sizeof(word));
        lanes[lane] = (lanes[lane] ^ word) * 0x9e3779b97f4a7c15u;
      }
    for (; i < width_; ++i) {
      uint32_t word;
      std::memcpy(&word, row + i, sizeof(word));
      lanes[0] = (lanes[0] ^ word) * 0x9e3779b97f4a7c15u;
    }
    uint64_t all = 0;
    for (const uint64_t lane : lanes) all = (all ^ lane ^ lane >> 32) * 0x9e3779b97f4a7c15u;
    return all >> 32;
  }

  int32_t& find(const float* row) {
    for (uint64_t at = hash(row);; ++at) {
      int32_t& place = table_[at & (table_.size() - 1)];
      if (place < 0 || std::memcmp(rows_[place], row, width_ * sizeof(float)) == 0) return place;
    }
  }

  void grow() {
    table_.assign(std::max<size_t>(2 * table_.size(), 256), -1);
    for (size_t i = 0; i < rows_.size(); ++i) find(rows_[i]) = static_cast<int32_t>(i);
  }

  const int64_t width_;
  std::vector<const float*> rows_;
  std::vector<int32_t> table_;
  int64_t seen_ = 0;
  bool worthwhile_ = true;
};

// Takes some rows, longest first, through all their steps. `shared`: threads split the panels of each step; otherwise
// everything happens on the calling thread.
class Walk {
 public:
  Walk(const Isa& isa, const Cell& cell, const Rows& rows, std::vector<int64_t> mine, Grid x, Grid out, bool shared)
      : isa_(isa), cell_(cell), rows_(rows), mine_(std::move(mine)), x_(x), out_(out), panels_(cell.panels(isa)),
        grain_(shared ? (panels_ + stable::get_num_threads() - 1) / stable::get_num_threads() : panels_),
        inputs_(cell.inputs) {}

  // h0 and h_n: (batch, hidden) contiguous.
  void run(const float* h0, float* h_n) {
    for (int64_t row : mine_) states_.push_back(h0 + row * cell_.hidden);
    next_.resize(mine_.size());
    const int64_t steps = mine_.empty() ? 0 : rows_.lengths[mine_[0]];
    const int64_t gate_bytes = panels_ * 3 * isa_.lanes * static_cast<int64_t>(sizeof(float));
    const int64_t ahead = std::max<int64_t>(CHUNK_BYTES / gate_bytes, 1);
    for (int64_t s = 0; s < steps;) {
      inputs_.clear();
      slots_.clear();
      int64_t last = s;
      for (; last < steps && static_cast<int64_t>(inputs_.rows().size()) < ahead; ++last)
        for (int64_t i = 0, count = live(last); i < count; ++i)
          slots_.push_back(inputs_.number(x_.at(time(last, mine_[i]), mine_[i])));
      last - s == 1 && live(s) > MANY_ROWS ? one_step(s) : steps_ahead(s, last);
      s = last;
    }
    for (size_t i = 0; i < mine_.size(); ++i)
      std::memcpy(h_n + mine_[i] * cell_.hidden, states_[i], cell_.hidden * sizeof(float));
    gates_scratch.trim();
  }

 private:
  int64_t live(int64_t s) {
    while (live_ > 0 && rows_.lengths[mine_[live_ - 1]] <= s) --live_;
    // Asked again for an earlier step: rows still live then come back.
    while (live_ < static_cast<int64_t>(mine_.size()) && rows_.lengths[mine_[live_]] > s) ++live_;
    return live_;
  }

  int64_t time(int64_t s, int64_t row) const { return cell_.reverse ? rows_.lengths[row] - 1 - s : s; }

  Projection projection(float* gates, int64_t panel_stride) const {
    const auto& rows = inputs_.rows();
    return {{rows.data(), static_cast<int64_t>(rows.size()), cell_.packed_ih, cell_.bias_ih, gates, panel_stride},
            cell_.inputs};
  }

  Recurrence recurrence(int64_t s, const int32_t* slots, float* gates, int64_t panel_stride) {
    const int64_t count = live(s);
    for (int64_t i = 0; i < count; ++i) next_[i] = out_.at(time(s, mine_[i]), mine_[i]);
    return {{states_.data(), count, cell_.packed_hh, cell_.bias_hn, gates, panel_stride}, cell_.hidden, slots,
            next_.data()};
  }

  void advance(int64_t count) { std::copy_n(next_.begin(), count, states_.begin()); }

  // Many rows: each panel's gates are used at once and stay in the nearest cache.
  void one_step(int64_t s) {
    const int64_t width = inputs_.rows().size() * 3 * isa_.lanes, stride = grain_ == panels_ ? 0 : width;
    float* const gates = gates_scratch.reserve(grain_ == panels_ ? width : panels_ * width);
    const Projection project = projection(gates, stride);
    const Recurrence step = recurrence(s, slots_.data(), gates, stride);
    split([&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        isa_.project(project, panel, panel + 1);
        isa_.step(step, panel, panel + 1);
      }
    });
    advance(step.count);
  }

  // Few rows, or few different inputs: those of several steps are projected together.
  void steps_ahead(int64_t s, int64_t last) {
    const int64_t stride = inputs_.rows().size() * 3 * isa_.lanes;
    float* const gates = gates_scratch.reserve(panels_ * stride);
    const Projection project = projection(gates, stride);
    split([&](int64_t begin, int64_t end) { isa_.project(project, begin, end); });
    const int32_t* slots = slots_.data();
    for (; s < last; ++s) {
      const Recurrence step = recurrence(s, slots, gates, stride);
      split([&](int64_t begin, int64_t end) { isa_.step(step, begin, end); });
      advance(step.count);
      slots += step.count;
    }
  }

  template <class Work>
  void split(const Work& work) const {
    if (grain_ == panels_) return work(0, panels_);
    stable::parallel_for(0, panels_, grain_, work);
  }

  const Isa& isa_;
  const Cell& cell_;
  const Rows& rows_;
  const std::vector<int64_t> mine_;
  const Grid x_, out_;
  const int64_t panels_, grain_;
  int64_t live_ = 0;
  Distinct inputs_;
  std::vector<int32_t> slots_;
  std::vector<const float*> states_;
  std::vector<float*> next_;
};

// All directions of one layer.
void run_layer(const Isa& isa, std::vector<Cell>& cells, const Rows& rows, Grid x, Grid out, const float* h0,
               float* h_n) {
  const int64_t batch = rows.order.size(), hidden = cells[0].hidden, directions = cells.size();
  const int64_t threads = stable::get_num_threads();
  const int64_t floats = packed_floats(isa, cells[0]);
  float* const packed = packed_scratch.reserve(directions * floats);
  for (int64_t direction = 0; direction < directions; ++direction)
    pack_cell(isa, cells[direction], packed + direction * floats);
  const int64_t steps = std::accumulate(rows.lengths.begin(), rows.lengths.end(), int64_t{0});
  const int64_t flops = directions * steps * 6 * hidden * (hidden + cells[0].inputs);
  const bool shared = threads > 1 && directions == 1 && batch < 2 * threads &&
                      12 * hidden * hidden > SHARED_WEIGHT_BYTES;
  int64_t groups = std::min(batch, (threads + directions - 1) / directions);
  if (shared || flops < SERIAL_FLOPS) groups = 1;
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t direction = task / groups, group = task % groups;
      std::vector<int64_t> mine;
      for (int64_t i = group; i < batch; i += groups) mine.push_back(rows.order[i]);
      const int64_t state = direction * batch * hidden;
      Walk(isa, cells[direction], rows, std::move(mine), x, out.from(direction * hidden), shared)
          .run(h0 + state, h_n + state);
    }
  };
  const int64_t tasks = batch == 0 ? 0 : directions * groups;
  if (shared || flops < SERIAL_FLOPS) {
    work(0, tasks);
  } else {
    stable::parallel_for(0, tasks, 1, work);
  }
}

void zero_padding(const Rows& rows, Grid out, int64_t features) {
  for (size_t b = 0; b < rows.lengths.size(); ++b)
    for (int64_t t = rows.lengths[b]; t < rows.time; ++t) std::memset(out.at(t, b), 0, features * sizeof(float));
}

void sort_rows(Rows& rows) {
  rows.order.resize(rows.lengths.size());
  std::iota(rows.order.begin(), rows.order.end(), int64_t{0});
  std::stable_sort(rows.order.begin(), rows.order.end(),
                   [&](int64_t a, int64_t b) { return rows.lengths[a] > rows.lengths[b]; });
}

Rows padded_rows(int64_t time, int64_t batch, const std::optional<Tensor>& lengths) {
  Rows rows{std::vector<int64_t>(batch, time), {}, time};
  if (lengths) {
    STD_TORCH_CHECK(lengths->scalar_type() == ScalarType::Long, "lengths must be int64");
    check_shape(*lengths, {batch}, "lengths");
    const Tensor values = stable::contiguous(*lengths);
    const auto* data = values.const_data_ptr<int64_t>();
    for (int64_t b = 0; b < batch; ++b) {
      STD_TORCH_CHECK(data[b] >= 0 && data[b] <= time, "lengths must be between 0 and input's ", time, " steps, got ",
                      data[b]);
      rows.lengths[b] = data[b];
    }
  }
  sort_rows(rows);
  return rows;
}

// batch_sizes (time,): how many rows still run; rows are sorted by length. `starts` gets where each step begins.
Rows packed_rows(const Tensor& batch_sizes, int64_t batch, int64_t total, std::vector<int64_t>& starts) {
  STD_TORCH_CHECK(batch_sizes.scalar_type() == ScalarType::Long && batch_sizes.dim() == 1,
                  "batch_sizes must be int64 and 1-dimensional");
  const int64_t time = batch_sizes.size(0);
  const Tensor values = stable::contiguous(batch_sizes);
  const auto* sizes = values.const_data_ptr<int64_t>();
  Rows rows{std::vector<int64_t>(batch, 0), {}, time};
  int64_t before = batch, start = 0;
  for (int64_t t = 0; t < time; ++t) {
    STD_TORCH_CHECK(sizes[t] >= 0 && sizes[t] <= before, "batch_sizes must not grow nor pass hx's batch ", batch,
                    ", got ", sizes[t]);
    starts.push_back(start);
    start += before = sizes[t];
    for (int64_t b = 0; b < sizes[t]; ++b) ++rows.lengths[b];
  }
  STD_TORCH_CHECK(start == total, "batch_sizes must add up to input's ", total, " rows, got ", start);
  sort_rows(rows);
  return rows;
}

Tensor rows_of_floats(const Tensor& tensor) { return tensor.stride(-1) == 1 ? tensor : stable::contiguous(tensor); }

Grid grid(const Tensor& tensor, const std::vector<int64_t>& starts) {
  auto* data = const_cast<float*>(tensor.const_data_ptr<float>());
  if (tensor.dim() == 2) return {data, 0, tensor.stride(0), starts.data()};
  return {data, tensor.stride(0), tensor.stride(1)};
}

void check_floats(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, " must be float32");
}

// input (time, batch, features) of any strides, or packed (total, features) with batch_sizes; h0 (cells, batch, hidden).
std::tuple<Tensor, Tensor> forward(const Tensor& input, const Tensor& h0, const std::optional<Tensor>& lengths,
                                   const std::optional<Tensor>& batch_sizes, const std::vector<Tensor>& params,
                                   bool has_biases, bool bidirectional) {
  check_floats(input, "input");
  check_floats(h0, "h0");
  STD_TORCH_CHECK(h0.dim() == 3, "h0 must be (layers·directions, batch, hidden)");
  STD_TORCH_CHECK(input.dim() == (batch_sizes ? 2 : 3), "input must be (time, batch, features) or packed");
  const int64_t directions = bidirectional ? 2 : 1, per_cell = has_biases ? 4 : 2;
  const int64_t cells = h0.size(0), batch = h0.size(1), hidden = h0.size(2), width = directions * hidden;
  STD_TORCH_CHECK(static_cast<int64_t>(params.size()) == cells * per_cell && cells % directions == 0,
                  "params must hold ", per_cell, " tensors for each of h0's ", cells, " cells");
  STD_TORCH_CHECK(batch_sizes || input.size(1) == batch, "h0 must have input's batch");
  std::vector<int64_t> starts;
  const Rows rows = batch_sizes ? packed_rows(*batch_sizes, batch, input.size(0), starts)
                                : padded_rows(input.size(0), batch, lengths);
  std::vector<int64_t> shape(input.sizes().begin(), input.sizes().end());
  shape.back() = width;
  Tensor output = stable::new_empty(input, shape);
  Tensor h_n = stable::new_empty(h0, {cells, batch, hidden});
  const Tensor first = stable::contiguous(h0);
  const Isa& isa = choose_isa();
  std::vector<Tensor> alive;  // what the raw pointers below point into
  Tensor x = rows_of_floats(input);
  for (int64_t layer = 0; layer < cells / directions; ++layer) {
    const bool last = (layer + 1) * directions == cells;
    const int64_t inputs = layer == 0 ? input.size(-1) : width;
    std::vector<Cell> layer_cells(directions);
    for (int64_t direction = 0; direction < directions; ++direction) {
      const float* data[4] = {};
      for (int64_t i = 0; i < per_cell; ++i) {
        const Tensor& param = params[(layer * directions + direction) * per_cell + i];
        check_floats(param, "params");
        if (i < 2) check_shape(param, {3 * hidden, i == 0 ? inputs : hidden}, "params' weight");
        else check_shape(param, {3 * hidden}, "params' bias");
        alive.push_back(stable::contiguous(param));
        data[i] = alive.back().const_data_ptr<float>();
      }
      layer_cells[direction] = {data[0], data[1], data[2], data[3], inputs, hidden, direction == 1};
    }
    Tensor y = last ? output : stable::new_empty(input, shape);
    const int64_t state = layer * directions * batch * hidden;
    run_layer(isa, layer_cells, rows, grid(x, starts), grid(y, starts), first.const_data_ptr<float>() + state,
              h_n.mutable_data_ptr<float>() + state);
    x = y;
  }
  packed_scratch.trim();
  if (lengths) zero_padding(rows, grid(output, starts), width);
  return {output, h_n};
}

// One step: input (batch, features), h (batch, hidden).
Tensor cell_forward(const Tensor& input, const Tensor& h, const Tensor& w_ih, const Tensor& w_hh,
                    const std::optional<Tensor>& b_ih, const std::optional<Tensor>& b_hh) {
  STD_TORCH_CHECK(input.dim() == 2 && h.dim() == 2, "input and h must be 2-dimensional");
  std::vector<Tensor> params = {w_ih, w_hh};
  if (b_ih && b_hh) params.insert(params.end(), {*b_ih, *b_hh});
  const auto found = forward(stable::unsqueeze(input, 0), stable::unsqueeze(h, 0), {}, {}, params,
                             params.size() == 4, false);
  return stable::squeeze(std::get<0>(found), 0);
}

}  // namespace fused_ops::gru

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CPU, m) {
  m.impl("gru_fwd_cpu", TORCH_BOX(&fused_ops::gru::forward));
  m.impl("gru_cell_fwd_cpu", TORCH_BOX(&fused_ops::gru::cell_forward));
}
