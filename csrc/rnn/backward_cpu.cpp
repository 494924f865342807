// Backpropagation through time for the RNN sequences of forward_cpu.cpp, by hand.
//
// The idea: steps run backward on the forward's microkernel. A step's product is the slopes of the step after times
// W_hh; its epilogue adds the gradients from outside and makes the step's own slopes of them, so that dL/dh stays in
// registers. A chunk of steps keeps its slopes in cache; then the weights' gradients take them in as one GEMM over
// all rows and steps of the chunk, read where they lie, and dL/dx is another. A step that began with a reset passes
// nothing back.
//
// Threads: rows are independent within a chunk as they are forward, or share panels; the GEMMs split their outputs.
// Every sum has one order, whatever the threads, so that results repeat bitwise; dL/dx, dL/dh_0 and dL/dc_0 of a row
// do not depend on the other rows.
//
// Floor: 4·gates·hidden·(inputs + hidden) flops for each step of each row, half of them for the weights' gradients.
#include <algorithm>
#include <cstring>

#include "rnn/driver.h"

namespace fused_ops::rnn {
namespace {

constexpr int64_t CHUNK_TOKENS = 256;             // (step, row) pairs whose slopes wait for the GEMMs
constexpr int64_t PADDING = 16;                   // floats after a token's slopes, or columns would share a cache set
constexpr int64_t SERIAL_GEMM_FLOPS = 4'000'000;  // below this a second thread costs more than it brings

thread_local Scratch packed_scratch, chunk_scratch;

// One direction of one layer. Gradients from outside are null where there are none.
struct Cell {
  int64_t inputs;
  bool reverse;
  Grid x, out, c, kept, grad, grad_all, grad_c_all, dx;
  const float *h0, *c0, *grad_h_n, *grad_c_n;
  float *dh0, *dc0;          // also what is carried from step to step: what bypasses the product, dL/dc
  const float *w_ih, *w_hh;  // packed columns
  float* d_params[4];
};

// The steps whose slopes are at hand: [begin, end), from `first` on, and of step `end` in `after`.
struct Chunk {
  int64_t begin, end;
  std::vector<int64_t> first;  // where each step's slopes are, in rows
  float *slopes, *after;
  int64_t tokens() const { return first.back(); }
};

class Layer {
 public:
  Layer(const Isa& isa, const Call& call, int64_t layer, std::vector<Cell> cells, bool need_input, bool need_params)
      : isa_(isa), call_(call), rows_(call.rows), cells_(std::move(cells)), hidden_(call.hidden),
        gates_(call.gates), slopes_(slopes_of(call.kind)), stride_(slopes_ * hidden_ + PADDING),
        need_input_(need_input), need_params_(need_params), parallel_(call.flops(layer) >= SERIAL_FLOPS) {
    pack(layer);
  }

  void run() {
    const int64_t directions = call_.directions;
    int64_t most = 0;
    std::vector<Chunk> chunks = split(most);
    const int64_t blocks = slopes_ * blocks_of(), width = cells_[0].inputs + hidden_ + 2 * isa_.lanes;
    float* memory = chunk_scratch.reserve(directions * (most + call_.batch) * stride_ +
                                          most * (blocks * isa_.block + width));
    float* const packed = memory + directions * (most + call_.batch) * stride_;
    for (Chunk& chunk : chunks) {
      const bool shared = parallel_ && call_.shares_panels();
      const int64_t groups = call_.groups(parallel_);
      spread(parallel_ && !shared, directions * groups, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          Chunk mine = chunk;
          mine.slopes = memory + task / groups * (most + call_.batch) * stride_;
          mine.after = mine.slopes + most * stride_;
          walk(cells_[task / groups], mine, task % groups, groups, shared);
        }
      });
      for (int64_t d = 0; d < directions; ++d) {
        chunk.slopes = memory + d * (most + call_.batch) * stride_;
        products(cells_[d], chunk, packed);
      }
    }
    chunk_scratch.trim();
    packed_scratch.trim();
  }

 private:
  int64_t blocks_of() const { return (hidden_ + isa_.block - 1) / isa_.block; }

  void pack(int64_t layer) {
    const int64_t lanes = isa_.lanes, rows = gates_ * hidden_;
    const int64_t inputs = cells_[0].inputs, hh = panels_of(isa_, hidden_);
    const int64_t ih = need_input_ ? panels_of(isa_, inputs) : 0;
    float* memory = packed_scratch.reserve(cells_.size() * (hh + ih) * lanes * rows);
    for (size_t d = 0; d < cells_.size(); ++d) {
      const int64_t index = layer * call_.directions + d;
      const float *from_ih = call_.param(index, 0), *from_hh = call_.param(index, 1);
      float *const w_hh = memory, *const w_ih = memory + hh * lanes * rows;
      cells_[d].w_hh = w_hh, cells_[d].w_ih = w_ih;
      memory = w_ih + ih * lanes * rows;
      spread(parallel_, hh + ih, [&](int64_t begin, int64_t end) {
        isa_.pack_columns(from_hh, rows, hidden_, rotate() * hidden_, w_hh, begin, std::min(end, hh));
        isa_.pack_columns(from_ih, rows, inputs, 0, w_ih, std::max(begin, hh) - hh, end - hh);
      });
    }
  }

  // Slopes 0, 1, 2 of a GRU belong to the products n, r, z with W_hh; those from 1 on to r, z, n with W_ih.
  int64_t rotate() const { return call_.kind == GRU ? 2 : 0; }
  int64_t input_slope() const { return slopes_ - gates_; }

  bool worth_threads(int64_t tokens) const {
    return 2 * tokens * gates_ * hidden_ * cells_[0].inputs >= SERIAL_GEMM_FLOPS;
  }

  // Chunks of steps, the last first, and the tokens of the largest.
  std::vector<Chunk> split(int64_t& most) const {
    std::vector<Chunk> chunks;
    int64_t end = rows_.steps();
    do {
      int64_t begin = end, tokens = 0;
      while (begin > 0 && (tokens == 0 || tokens + rows_.live[begin - 1] <= CHUNK_TOKENS))
        tokens += rows_.live[--begin];
      Chunk chunk{begin, end, {0}, nullptr, nullptr};
      for (int64_t s = begin; s < end; ++s) chunk.first.push_back(chunk.first.back() + rows_.live[s]);
      most = std::max(most, tokens);
      chunks.push_back(std::move(chunk));
      end = begin;
    } while (end > 0);
    return chunks;
  }

  // Every `groups`-th row from `group` on, longest first, backward through a chunk's steps.
  void walk(const Cell& cell, const Chunk& chunk, int64_t group, int64_t groups, bool shared) const {
    std::vector<BackRow> rows;
    const int64_t first = chunk.begin == 0 ? -1 : chunk.begin;  // step -1 is the state before the first
    for (int64_t s = chunk.end - 1; s >= first; --s) {
      rows.clear();
      bool all_cut = true;
      const int64_t live = s < 0 ? call_.batch : rows_.live[s];
      for (int64_t place = group; place < live; place += groups) {
        rows.push_back(row_of(cell, chunk, s, place));
        all_cut = all_cut && rows.back().cut;
      }
      const BackStep job{rows.data(), static_cast<int64_t>(rows.size()), hidden_, cell.w_hh,
                         all_cut ? 0 : gates_ * hidden_};
      spread(shared, panels_of(isa_, hidden_),
             [&](int64_t begin, int64_t end) { isa_.back[call_.kind](job, begin, end); });
    }
    if (chunk.begin == 0) {
      for (int64_t place = group; place < call_.batch; place += groups) finish_c(cell, rows_.order[place]);
    } else {
      for (int64_t place = group; place < rows_.live[chunk.begin]; place += groups)
        std::memcpy(chunk.after + place * stride_, chunk.slopes + place * stride_,
                    gates_ * hidden_ * sizeof(float));
    }
  }

  BackRow row_of(const Cell& cell, const Chunk& chunk, int64_t s, int64_t place) const {
    const int64_t row = rows_.order[place], state = row * hidden_;
    const bool ends = s + 1 == rows_.lengths[row];
    const bool cut = ends || rows_.reset(rows_.time_of(s + 1, row, cell.reverse), row);
    const auto from = [](const float* data, int64_t offset) { return data == nullptr ? nullptr : data + offset; };
    BackRow found{};
    found.later = call_.zeros.data();
    if (!ends)
      found.later = s + 1 < chunk.end ? chunk.slopes + (chunk.first[s + 1 - chunk.begin] + place) * stride_
                                      : chunk.after + place * stride_;
    found.cut = cut;
    if (ends) {
      found.carried = from(cell.grad_h_n, state), found.dc = from(cell.grad_c_n, state);
    } else if (!cut) {
      found.carried = call_.kind == GRU ? cell.dh0 + state : nullptr, found.dc = from(cell.dc0, state);
    }
    found.passed = cell.dh0 + state;
    if (s < 0) return found;
    const int64_t t = rows_.time_of(s, row, cell.reverse);
    found.grad = cell.grad.at(t, row), found.grad_all = cell.grad_all.at(t, row);
    found.grad_c = cell.grad_c_all.at(t, row), found.kept = cell.kept.at(t, row);
    found.h = cell.out.at(t, row), found.h_before = before(cell, cell.out, cell.h0, s, row);
    if (call_.kind == LSTM) found.c = cell.c.at(t, row), found.c_before = before(cell, cell.c, cell.c0, s, row);
    found.slopes = chunk.slopes + (chunk.first[s - chunk.begin] + place) * stride_;
    found.dc_out = cell.dc0 + state;
    return found;
  }

  // A row's state before step s.
  const float* before(const Cell& cell, const Grid& states, const float* initial, int64_t s, int64_t row) const {
    if (rows_.reset(rows_.time_of(s, row, cell.reverse), row)) return call_.zeros.data();
    return s == 0 ? initial + row * hidden_ : states.at(rows_.time_of(s - 1, row, cell.reverse), row);
  }

  // dL/dc_0 where the first step did not leave it.
  void finish_c(const Cell& cell, int64_t row) const {
    if (call_.kind != LSTM) return;
    float* const to = cell.dc0 + row * hidden_;
    if (rows_.lengths[row] == 0) {
      if (cell.grad_c_n) std::memcpy(to, cell.grad_c_n + row * hidden_, hidden_ * sizeof(float));
      else std::memset(to, 0, hidden_ * sizeof(float));
    } else if (rows_.reset(rows_.time_of(0, row, cell.reverse), row)) {
      std::memset(to, 0, hidden_ * sizeof(float));
    }
  }

  // What a chunk's slopes add to the gradients of the parameters and the input. packed: scratch.
  void products(const Cell& cell, const Chunk& chunk, float* packed) {
    const int64_t tokens = chunk.tokens();
    if (tokens == 0 || hidden_ == 0) return;
    slope_rows_.clear(), x_rows_.clear(), h_rows_.clear(), dx_rows_.clear();
    for (int64_t s = chunk.begin; s < chunk.end; ++s)
      for (int64_t place = 0; place < rows_.live[s]; ++place) {
        const int64_t row = rows_.order[place], t = rows_.time_of(s, row, cell.reverse);
        slope_rows_.push_back(chunk.slopes + slope_rows_.size() * stride_ + input_slope() * hidden_);
        x_rows_.push_back(cell.x.at(t, row));
        h_rows_.push_back(before(cell, cell.out, cell.h0, s, row));
        dx_rows_.push_back(cell.dx.at(t, row));
      }
    if (need_input_) {
      const Product job{slope_rows_.data(), tokens, gates_ * hidden_, cell.inputs, cell.w_ih, dx_rows_.data(),
                        call_.directions > 1};
      spread(worth_threads(tokens), panels_of(isa_, cell.inputs),
             [&](int64_t begin, int64_t end) { isa_.product(job, begin, end); });
    }
    if (need_params_) weight_gradients(cell, chunk, packed);
  }

  void weight_gradients(const Cell& cell, const Chunk& chunk, float* packed) const {
    const int64_t tokens = chunk.tokens(), per_slope = blocks_of(), block = isa_.block * tokens;
    const int64_t ih = panels_of(isa_, cell.inputs), hh = panels_of(isa_, hidden_), lanes = isa_.lanes * tokens;
    float *const x = packed + slopes_ * per_slope * block, *const h = x + ih * lanes;
    const int64_t left = slopes_ * per_slope;
    spread(worth_threads(tokens), left + ih + hh, [&](int64_t begin, int64_t end) {
      const auto part = [&](int64_t first, int64_t count) {
        return std::pair(std::clamp<int64_t>(begin - first, 0, count), std::clamp<int64_t>(end - first, 0, count));
      };
      const auto [l0, l1] = part(0, left);
      const auto [x0, x1] = part(left, ih);
      const auto [h0, h1] = part(left + ih, hh);
      isa_.pack_left(chunk.slopes, stride_, tokens, hidden_, packed, l0, l1);
      isa_.pack_right(x_rows_.data(), tokens, cell.inputs, x, x0, x1);
      isa_.pack_right(h_rows_.data(), tokens, hidden_, h, h0, h1);
    });
    const int gates = static_cast<int>(gates_), turn = static_cast<int>(rotate());
    const float* const inputs_left = packed + input_slope() * per_slope * block;
    const Outer w_ih{inputs_left, x, tokens, hidden_, cell.inputs, gates, 0, cell.d_params[0]};
    const Outer w_hh{packed, h, tokens, hidden_, hidden_, gates, turn, cell.d_params[1]};
    const Outer b_ih{inputs_left, nullptr, tokens, hidden_, 1, gates, 0, cell.d_params[2]};
    const Outer b_hh{packed, nullptr, tokens, hidden_, 1, gates, turn, cell.d_params[3]};
    spread(worth_threads(tokens), gates_ * per_slope, [&](int64_t begin, int64_t end) {
      isa_.outer(w_ih, begin, end);
      isa_.outer(w_hh, begin, end);
      if (!call_.has_biases) return;
      isa_.sums(b_ih, begin, end);
      isa_.sums(b_hh, begin, end);
    });
  }

  const Isa& isa_;
  const Call& call_;
  const Rows& rows_;
  std::vector<Cell> cells_;
  const int64_t hidden_, gates_, slopes_, stride_;  // stride_: of a token's slopes
  const bool need_input_, need_params_, parallel_;
  std::vector<const float*> slope_rows_, x_rows_, h_rows_;
  std::vector<float*> dx_rows_;
};

// What the forward left, and the gradients of its results, contiguous but for the output's.
struct Saved {
  Tensor output, inner, c_all, kept;
  std::optional<Tensor> grad_output, grad_h_n, grad_c_n, grad_h_all, grad_c_all;

  static const float* data(const std::optional<Tensor>& tensor) {
    return tensor ? tensor->const_data_ptr<float>() : nullptr;
  }
};

std::optional<Tensor> dense(const std::optional<Tensor>& tensor, bool rows = false) {
  if (!tensor) return std::nullopt;
  check_floats(*tensor, "a gradient");
  return rows ? rows_of_floats(*tensor) : stable::contiguous(*tensor);
}

void check_saved(const Call& call, const Saved& saved) {
  const int64_t places = call.cells() * call.positions * call.hidden, state = call.cells() * call.batch * call.hidden;
  const auto holds = [](const std::optional<Tensor>& tensor, int64_t count, const char* name) {
    STD_TORCH_CHECK(!tensor || tensor->numel() == count, name, " has the wrong shape");
  };
  holds(saved.output, call.area, "output");
  holds(saved.inner, (call.layers - 1) * call.area, "inner");
  holds(saved.c_all, call.kind == LSTM ? places : 0, "c_all");
  holds(saved.kept, places * kept_of(call.kind), "kept");
  holds(saved.grad_output, call.area, "grad_output");
  holds(saved.grad_h_n, state, "grad_h_n");
  holds(saved.grad_c_n, state, "grad_c_n");
  holds(saved.grad_h_all, places, "grad_h_all");
  holds(saved.grad_c_all, places, "grad_c_all");
}

// One layer: x its input, y its output, grad of the latter, dx for the former; d as `backward` returns it.
void layer_backward(const Call& call, const Saved& saved, int64_t layer, const Grid& x, const Grid& y, const Grid& grad,
                    const Grid& dx, std::vector<Tensor>& d, bool need_params) {
  const int64_t hidden = call.hidden, places = call.positions * hidden, kept = kept_of(call.kind);
  const bool lstm = call.kind == LSTM;
  const auto from = [](const float* data, int64_t offset) { return data == nullptr ? nullptr : data + offset; };
  std::vector<Cell> cells;
  for (int64_t direction = 0; direction < call.directions; ++direction) {
    const int64_t at = layer * call.directions + direction, state = at * call.batch * hidden;
    Cell cell{call.layer_inputs(layer), direction == 1, x, y.from(direction * hidden)};
    if (lstm) cell.c = call.grid(saved.c_all.const_data_ptr<float>() + at * places, hidden);
    if (kept > 0) cell.kept = call.grid(saved.kept.const_data_ptr<float>() + at * places * kept, kept * hidden);
    cell.grad = grad.from(direction * hidden), cell.dx = dx;
    cell.grad_all = call.grid(from(Saved::data(saved.grad_h_all), at * places), hidden);
    cell.grad_c_all = call.grid(from(Saved::data(saved.grad_c_all), at * places), hidden);
    cell.h0 = call.h0.const_data_ptr<float>() + state;
    cell.c0 = lstm ? call.c0->const_data_ptr<float>() + state : nullptr;
    cell.grad_h_n = from(Saved::data(saved.grad_h_n), state);
    cell.grad_c_n = from(Saved::data(saved.grad_c_n), state);
    cell.dh0 = d[1].mutable_data_ptr<float>() + state;
    cell.dc0 = lstm ? d[2].mutable_data_ptr<float>() + state : nullptr;
    const int64_t per_cell = call.has_biases ? 4 : 2;
    for (int64_t i = 0; need_params && i < per_cell; ++i)
      cell.d_params[i] = d[3 + at * per_cell + i].mutable_data_ptr<float>();
    cells.push_back(cell);
  }
  Layer(choose_isa(), call, layer, std::move(cells), dx.data != nullptr, need_params).run();
}

// A layer's dL/dx: zeros where directions add up, or where padding is.
Tensor input_gradient(const Call& call, std::vector<int64_t> shape, bool padded) {
  Tensor found = call.empty(std::move(shape));
  if (padded || call.directions > 1) stable::zero_(found);
  return found;
}

// [dL/dinput, dL/dh0, dL/dc0, dL/dparams...]; without elements where there is none or it is not needed, and no params'.
std::vector<Tensor> backward(const std::optional<Tensor>& grad_output, const std::optional<Tensor>& grad_h_n,
                             const std::optional<Tensor>& grad_c_n, const std::optional<Tensor>& grad_h_all,
                             const std::optional<Tensor>& grad_c_all, const Tensor& input, const Tensor& h0,
                             const std::optional<Tensor>& c0, const std::optional<Tensor>& lengths,
                             const std::optional<Tensor>& resets, const std::optional<Tensor>& batch_sizes,
                             const std::optional<Tensor>& masks, const std::vector<Tensor>& params,
                             const Tensor& output, const Tensor& inner, const Tensor& c_all, const Tensor& kept,
                             const std::string& mode, bool has_biases, bool bidirectional, bool need_input, bool need_params) {
  const Call call({input, h0, c0, lengths, resets, batch_sizes, masks, params, mode, has_biases, bidirectional});
  const Saved saved{stable::contiguous(output), stable::contiguous(inner), stable::contiguous(c_all),
                    stable::contiguous(kept),   dense(grad_output, true),  dense(grad_h_n),
                    dense(grad_c_n),            dense(grad_h_all),         dense(grad_c_all)};
  check_saved(call, saved);
  const std::vector<int64_t> given(input.sizes().begin(), input.sizes().end());
  const std::vector<int64_t> states = {call.cells(), call.batch, call.hidden};
  std::vector<Tensor> found = {need_input ? input_gradient(call, given, lengths.has_value()) : call.empty({0}),
                               call.empty(states), call.empty(call.kind == LSTM ? states : std::vector<int64_t>{0})};
  for (const Tensor& param : params) {
    if (!need_params) break;
    found.push_back(call.empty({param.sizes().begin(), param.sizes().end()}));
    stable::zero_(found.back());
  }
  std::optional<Tensor> grad = saved.grad_output;
  Tensor masked = call.empty(masks ? call.shape : std::vector<int64_t>{0});
  for (int64_t layer = call.layers - 1; layer >= 0; --layer) {
    const float* const inner_data = saved.inner.const_data_ptr<float>();
    const auto output_of = [&](int64_t l) {
      return l + 1 == call.layers ? saved.output.const_data_ptr<float>() : inner_data + l * call.area;
    };
    Grid x = layer == 0 ? call.input_grid() : call.grid(output_of(layer - 1), call.width);
    if (layer > 0 && masks) {
      multiply(masked.mutable_data_ptr<float>(), x.data, call.mask(layer), call.area);
      x = call.grid(masked.const_data_ptr<float>(), call.width);
    }
    std::optional<Tensor> dx;
    if (layer > 0) dx = input_gradient(call, call.shape, false);
    else if (need_input) dx = found[0];
    layer_backward(call, saved, layer, x, call.grid(output_of(layer), call.width),
                   grad ? call.grid(*grad) : Grid{}, dx ? call.grid(*dx) : Grid{}, found, need_params);
    if (layer > 0 && masks)
      multiply(dx->mutable_data_ptr<float>(), dx->const_data_ptr<float>(), call.mask(layer), call.area);
    grad = dx;
  }
  return found;
}

}  // namespace
}  // namespace fused_ops::rnn

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CPU, m) { m.impl("rnn_bwd_cpu", TORCH_BOX(&fused_ops::rnn::backward)); }
