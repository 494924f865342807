// Backpropagation through time for norm_cpu.cpp, by hand.
//
// The idea: as for plain sequences, a step's product is dL/d(W_hh·h) of the step after times W_hh; one sweep over a row
// then goes back through the LSTM's norm of c, the gates and both norms. Nothing is normalised again: the forward kept
// what came out of the norms. A chunk of steps keeps its slopes in cache until the weights' gradients, dL/dx and the
// sums over tokens that are the norms' and the biases' gradients have taken them in. Every sum has one order, whatever
// the threads.
//
// Floor: as for plain sequences, 4·gates·hidden·(inputs + hidden) flops for each step of each row.
#include <algorithm>
#include <cstring>

#include "rnn/norm_call.h"

namespace fused_ops::rnn {
namespace {

constexpr int64_t CHUNK_TOKENS = 256;             // (step, row) pairs whose slopes wait for the GEMMs
constexpr int64_t PADDING = 16;                   // floats after a token's slopes, or columns would share a cache set
constexpr int64_t SERIAL_GEMM_FLOPS = 4'000'000;  // below this a second thread costs more than it brings

thread_local Scratch packed_scratch, chunk_scratch;

// One direction of one layer. Gradients from outside are null where there are none.
struct Cell {
  int64_t index, inputs;
  bool reverse;
  Grid x, out, c, kept, grad, grad_all, grad_c_all, dx;
  const float *h0, *c0, *grad_h_n, *grad_c_n;
  float *dh0, *dc0;           // also what is carried from step to step: what bypasses the product, dL/dc
  float *d_params[4], *d_norms[4];
  Norms norms;
  const float *w_ih, *w_hh;   // packed columns
  float *slopes, *later, *product;  // a chunk's slopes; of each row dL/d(W_hh·h) of the step after, and that times W_hh
};

// Steps [begin, end), and the token each of them begins with.
struct Chunk {
  int64_t begin, end;
  std::vector<int64_t> first;
  int64_t tokens() const { return first.back(); }
};

const float* from(const float* data, int64_t offset) { return data == nullptr ? nullptr : data + offset; }

class Layer {
 public:
  Layer(const Isa& isa, const Call& call, int64_t layer, std::vector<Cell> cells, bool need_input, bool need_params)
      : isa_(isa), call_(call), rows_(call.rows), cells_(std::move(cells)), hidden_(call.hidden), gates_(call.gates),
        stride_(norm_slopes_of(call.kind) * hidden_ + PADDING), need_input_(need_input), need_params_(need_params),
        parallel_(call.flops(layer) >= SERIAL_FLOPS) {}

  void run() {
    pack();
    const std::vector<Chunk> chunks = split();
    int64_t most = 0;
    for (const Chunk& chunk : chunks) most = std::max(most, chunk.tokens());
    const int64_t of_rows = call_.batch * (gates_ + 1) * hidden_, of_cell = most * stride_ + of_rows;
    const int64_t width = 2 * gates_ * blocks_of() * isa_.block + cells_[0].inputs + hidden_ + 2 * isa_.lanes;
    float* memory = chunk_scratch.reserve(cells_.size() * of_cell + most * width);
    for (Cell& cell : cells_) {
      cell.slopes = memory, cell.later = memory + most * stride_;
      cell.product = cell.later + call_.batch * gates_ * hidden_;
      memory += of_cell;
    }
    const bool shared = parallel_ && call_.shares_panels();
    const int64_t groups = call_.groups(parallel_);
    for (const Chunk& chunk : chunks) {
      spread(parallel_ && !shared, call_.directions * groups, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task)
          walk(cells_[task / groups], chunk, task % groups, groups, shared);
      });
      for (const Cell& cell : cells_) products(cell, chunk, memory);
    }
    chunk_scratch.trim();
    packed_scratch.trim();
  }

 private:
  int64_t blocks_of() const { return (hidden_ + isa_.block - 1) / isa_.block; }

  bool worth_threads(int64_t tokens) const {
    return 2 * tokens * gates_ * hidden_ * cells_[0].inputs >= SERIAL_GEMM_FLOPS;
  }

  void pack() {
    const int64_t rows = gates_ * hidden_, inputs = cells_[0].inputs, hh = panels_of(isa_, hidden_);
    const int64_t ih = need_input_ ? panels_of(isa_, inputs) : 0, panel = isa_.lanes * rows;
    float* memory = packed_scratch.reserve(cells_.size() * (hh + ih) * panel);
    for (Cell& cell : cells_) {
      float *const w_hh = memory, *const w_ih = memory + hh * panel;
      cell.w_hh = w_hh, cell.w_ih = w_ih;
      memory = w_ih + ih * panel;
      spread(parallel_, hh + ih, [&](int64_t begin, int64_t end) {
        isa_.pack_columns(call_.param(cell.index, 1), rows, hidden_, 0, w_hh, begin, std::min(end, hh));
        isa_.pack_columns(call_.param(cell.index, 0), rows, inputs, 0, w_ih, std::max(begin, hh) - hh, end - hh);
      });
    }
  }

  // Chunks of steps, the last first.
  std::vector<Chunk> split() const {
    std::vector<Chunk> chunks;
    int64_t end = rows_.steps();
    do {
      int64_t begin = end, tokens = 0;
      while (begin > 0 && (tokens == 0 || tokens + rows_.live[begin - 1] <= CHUNK_TOKENS))
        tokens += rows_.live[--begin];
      chunks.push_back({begin, end, {0}});
      for (int64_t s = begin; s < end; ++s) chunks.back().first.push_back(chunks.back().first.back() + rows_.live[s]);
      end = begin;
    } while (end > 0);
    return chunks;
  }

  // Every `groups`-th row from `group` on, longest first, backward through a chunk's steps and, after the first step of
  // all, into the states before it.
  void walk(const Cell& cell, const Chunk& chunk, int64_t group, int64_t groups, bool shared) const {
    std::vector<NormBackRow> rows;
    std::vector<const float*> later;
    std::vector<float*> products;
    for (int64_t s = chunk.end - 1; s >= (chunk.begin == 0 ? -1 : chunk.begin); --s) {
      rows.clear(), later.clear(), products.clear();
      const int64_t live = s < 0 ? call_.batch : rows_.live[s];
      for (int64_t place = group; place < live; place += groups) {
        const int64_t row = rows_.order[place];
        rows.push_back(from_after(cell, s, row));
        if (rows.back().product != nullptr) {
          later.push_back(cell.later + row * gates_ * hidden_);
          products.push_back(cell.product + row * hidden_);
        }
        if (s >= 0) within_step(cell, chunk, s, place, rows.back());
      }
      const int64_t count = later.size();
      const Product job{later.data(), count, gates_ * hidden_, hidden_, cell.w_hh, products.data(), false};
      spread(shared, panels_of(isa_, hidden_), [&](int64_t begin, int64_t end) { isa_.product(job, begin, end); });
      const NormBack back{rows.data(), hidden_, cell.norms};
      if (s >= 0)
        spread(shared, rows.size(), [&](int64_t begin, int64_t end) { isa_.norm->back[call_.kind](back, begin, end); });
    }
    for (int64_t i = 0, place = group; chunk.begin == 0 && place < call_.batch; ++i, place += groups)
      finish(cell, rows[i], rows_.order[place]);
  }

  // What comes to the state after step s: from the step after, or where the row ends from outside.
  NormBackRow from_after(const Cell& cell, int64_t s, int64_t row) const {
    const int64_t state = row * hidden_;
    NormBackRow found{};
    if (s + 1 == rows_.lengths[row]) {
      found.carried = from(cell.grad_h_n, state), found.dc = from(cell.grad_c_n, state);
    } else if (!rows_.reset(rows_.time_of(s + 1, row, cell.reverse), row)) {
      found.product = cell.product + state;
      found.carried = call_.kind == GRU ? cell.dh0 + state : nullptr, found.dc = from(cell.dc0, state);
    }
    return found;
  }

  void within_step(const Cell& cell, const Chunk& chunk, int64_t s, int64_t place, NormBackRow& found) const {
    const int64_t row = rows_.order[place], t = rows_.time_of(s, row, cell.reverse);
    found.grad = cell.grad.at(t, row), found.grad_all = cell.grad_all.at(t, row);
    found.grad_c = cell.grad_c_all.at(t, row), found.kept = cell.kept.at(t, row);
    found.h = cell.out.at(t, row), found.h_before = before(cell, cell.out, cell.h0, s, row);
    if (call_.kind == LSTM) found.c = cell.c.at(t, row), found.c_before = before(cell, cell.c, cell.c0, s, row);
    found.slopes = cell.slopes + (chunk.first[s - chunk.begin] + place) * stride_;
    found.later = cell.later + row * gates_ * hidden_;
    found.passed = cell.dh0 + row * hidden_, found.dc_out = cell.dc0 + row * hidden_;
  }

  // A row's state before step s.
  const float* before(const Cell& cell, const Grid& states, const float* initial, int64_t s, int64_t row) const {
    if (rows_.reset(rows_.time_of(s, row, cell.reverse), row)) return call_.zeros.data();
    return s == 0 ? initial + row * hidden_ : states.at(rows_.time_of(s - 1, row, cell.reverse), row);
  }

  // dL/dh_0 and dL/dc_0 of a row.
  void finish(const Cell& cell, const NormBackRow& after, int64_t row) const {
    for (int64_t unit = 0; unit < hidden_; ++unit) {
      const float through = after.product ? after.product[unit] : 0.0f;
      cell.dh0[row * hidden_ + unit] = after.carried ? through + after.carried[unit] : through;
    }
    for (int64_t unit = 0; call_.kind == LSTM && unit < hidden_; ++unit)
      cell.dc0[row * hidden_ + unit] = after.dc ? after.dc[unit] : 0.0f;
  }

  // What a chunk's slopes add to the gradients of the parameters and the input. packed: scratch.
  void products(const Cell& cell, const Chunk& chunk, float* packed) const {
    const int64_t tokens = chunk.tokens();
    if (tokens == 0 || hidden_ == 0) return;
    std::vector<const float*> slopes, x, h, kept;
    std::vector<float*> dx;
    for (int64_t s = chunk.begin; s < chunk.end; ++s)
      for (int64_t place = 0; place < rows_.live[s]; ++place) {
        const int64_t row = rows_.order[place], t = rows_.time_of(s, row, cell.reverse);
        slopes.push_back(cell.slopes + slopes.size() * stride_ + gates_ * hidden_);
        x.push_back(cell.x.at(t, row)), dx.push_back(cell.dx.at(t, row)), kept.push_back(cell.kept.at(t, row));
        h.push_back(before(cell, cell.out, cell.h0, s, row));
      }
    if (need_input_) {
      const Product job{slopes.data(), tokens, gates_ * hidden_, cell.inputs, cell.w_ih, dx.data(), cells_.size() > 1};
      spread(worth_threads(tokens), panels_of(isa_, cell.inputs),
             [&](int64_t begin, int64_t end) { isa_.product(job, begin, end); });
    }
    if (!need_params_) return;
    weight_gradients(cell, tokens, x, h, packed);
    sums(cell, tokens, kept);
  }

  void weight_gradients(const Cell& cell, int64_t tokens, const std::vector<const float*>& x_rows,
                        const std::vector<const float*>& h_rows, float* packed) const {
    const int64_t blocks = gates_ * blocks_of(), block = isa_.block * tokens, lanes = isa_.lanes * tokens;
    const int64_t ih = panels_of(isa_, cell.inputs), hh = panels_of(isa_, hidden_);
    float *const x = packed + 2 * blocks * block, *const h = x + ih * lanes;
    spread(worth_threads(tokens), 2 * blocks + ih + hh, [&](int64_t begin, int64_t end) {
      const auto part = [&](int64_t first, int64_t count) {
        return std::pair(std::clamp<int64_t>(begin - first, 0, count), std::clamp<int64_t>(end - first, 0, count));
      };
      const auto [l0, l1] = part(0, 2 * blocks);
      const auto [x0, x1] = part(2 * blocks, ih);
      const auto [h0, h1] = part(2 * blocks + ih, hh);
      isa_.pack_left(cell.slopes, stride_, tokens, hidden_, packed, l0, l1);
      isa_.pack_right(x_rows.data(), tokens, cell.inputs, x, x0, x1);
      isa_.pack_right(h_rows.data(), tokens, hidden_, h, h0, h1);
    });
    const int gates = static_cast<int>(gates_);
    const Outer w_hh{packed, h, tokens, hidden_, hidden_, gates, 0, cell.d_params[1]};
    const Outer w_ih{packed + blocks * block, x, tokens, hidden_, cell.inputs, gates, 0, cell.d_params[0]};
    spread(worth_threads(tokens), blocks, [&](int64_t begin, int64_t end) {
      isa_.outer(w_ih, begin, end);
      isa_.outer(w_hh, begin, end);
    });
  }

  // The gradients of the norms and the biases, gate by gate.
  void sums(const Cell& cell, int64_t tokens, const std::vector<const float*>& kept) const {
    const int64_t first = 2 * gates_ * hidden_, x_ih = norm_gates_of(call_.kind) * hidden_;
    const auto into = [&](float* to, int64_t gate) { return to == nullptr ? nullptr : to + gate * hidden_; };
    std::vector<NormSums> jobs;
    for (int64_t gate = 0; gate < gates_; ++gate) {
      const int64_t at = gate * hidden_, second = call_.kind == GRU && gate == 2 ? 3 * hidden_ : at;
      jobs.push_back({cell.slopes + first + at, stride_, tokens, hidden_, kept.data(), x_ih + at,
                      into(cell.d_params[2], gate), into(cell.d_norms[0], gate)});
      jobs.push_back({cell.slopes + first + second, stride_, tokens, hidden_, kept.data(), x_ih + gates_ * hidden_ + at,
                      into(cell.d_params[3], gate), into(cell.d_norms[1], gate)});
    }
    if (call_.kind == LSTM)
      for (int64_t i = 0; i < 2; ++i)
        jobs.push_back({cell.slopes + first + (4 + i) * hidden_, stride_, tokens, hidden_, nullptr, 0,
                        cell.d_norms[3 - i], nullptr});
    spread(worth_threads(tokens), jobs.size(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) isa_.norm->sums(jobs[i], 0, panels_of(isa_, hidden_));
    });
  }

  const Isa& isa_;
  const Call& call_;
  const Rows& rows_;
  std::vector<Cell> cells_;
  const int64_t hidden_, gates_, stride_;  // stride_: of a token's slopes
  const bool need_input_, need_params_, parallel_;
};

// What the forward left, and the gradients of its results, contiguous but for the output's.
struct Saved {
  Tensor output, inner, c_all, kept;
  std::optional<Tensor> grad_output, grad_h_n, grad_c_n, grad_h_all, grad_c_all;

  void check(const Call& call) const {
    const int64_t places = call.cells() * call.positions, state = call.cells() * call.batch * call.hidden;
    const auto holds = [](const std::optional<Tensor>& tensor, int64_t count, const char* name) {
      STD_TORCH_CHECK(!tensor || tensor->numel() == count, name, " has the wrong shape");
    };
    holds(output, call.area, "output");
    holds(inner, (call.layers - 1) * call.area, "inner");
    holds(c_all, call.kind == LSTM ? places * call.hidden : 0, "c_all");
    holds(kept, places * norm_kept_of(call.kind, call.hidden), "kept");
    holds(grad_output, call.area, "grad_output");
    holds(grad_h_n, state, "grad_h_n");
    holds(grad_c_n, state, "grad_c_n");
    holds(grad_h_all, places * call.hidden, "grad_h_all");
    holds(grad_c_all, places * call.hidden, "grad_c_all");
  }
};

std::optional<Tensor> dense(const std::optional<Tensor>& tensor, bool rows = false) {
  if (!tensor) return std::nullopt;
  check_floats(*tensor, "a gradient");
  return rows ? rows_of_floats(*tensor) : compact(*tensor);
}

// The directions of one layer: x its input, y its output, grad of the latter, dx for the former; d as `backward`
// returns it.
std::vector<Cell> cells_of(const NormCall& call, const Saved& saved, int64_t layer, const Grid& x, const Grid& y,
                           const Grid& grad, const Grid& dx, std::vector<Tensor>& d, bool need_params) {
  const int64_t hidden = call.hidden, places = call.positions * hidden, place = norm_kept_of(call.kind, hidden);
  const int64_t per_cell = call.has_biases ? 4 : 2, norms = call.norms_per_cell();
  const bool lstm = call.kind == LSTM;
  const auto data = [](const std::optional<Tensor>& t) { return t ? t->const_data_ptr<float>() : nullptr; };
  std::vector<Cell> cells;
  for (int64_t direction = 0; direction < call.directions; ++direction) {
    const int64_t at = layer * call.directions + direction, state = at * call.batch * hidden;
    Cell cell{at, call.layer_inputs(layer), direction == 1, x, y.from(direction * hidden)};
    if (lstm) cell.c = call.grid(saved.c_all.const_data_ptr<float>() + at * places, hidden);
    cell.kept = call.grid(saved.kept.const_data_ptr<float>() + at * call.positions * place, place);
    cell.grad = grad.from(direction * hidden), cell.dx = dx;
    cell.grad_all = call.grid(from(data(saved.grad_h_all), at * places), hidden);
    cell.grad_c_all = call.grid(from(data(saved.grad_c_all), at * places), hidden);
    cell.h0 = call.h0.const_data_ptr<float>() + state;
    cell.c0 = lstm ? call.c0->const_data_ptr<float>() + state : nullptr;
    cell.grad_h_n = from(data(saved.grad_h_n), state), cell.grad_c_n = from(data(saved.grad_c_n), state);
    cell.dh0 = d[1].mutable_data_ptr<float>() + state;
    cell.dc0 = lstm ? d[2].mutable_data_ptr<float>() + state : nullptr;
    for (int64_t i = 0; need_params && i < per_cell; ++i)
      cell.d_params[i] = d[3 + at * per_cell + i].mutable_data_ptr<float>();
    for (int64_t i = 0; need_params && i < norms; ++i)
      cell.d_norms[i] = d[3 + call.cells() * per_cell + at * norms + i].mutable_data_ptr<float>();
    cell.norms = call.norms(at);
    cells.push_back(cell);
  }
  return cells;
}

// A layer's dL/dx: zeros where directions add up, or where padding is.
Tensor input_gradient(const Call& call, std::vector<int64_t> shape, bool padded) {
  Tensor found = call.empty(std::move(shape));
  if (padded || call.directions > 1) stable::zero_(found);
  return found;
}

// [dL/dinput, dL/dh0, dL/dc0, dL/dparams..., dL/dnorms...]; without elements where there is none or it is not needed,
// and no params' and norms'.
std::vector<Tensor> backward(const std::optional<Tensor>& grad_output, const std::optional<Tensor>& grad_h_n,
                             const std::optional<Tensor>& grad_c_n, const std::optional<Tensor>& grad_h_all,
                             const std::optional<Tensor>& grad_c_all, const Tensor& input, const Tensor& h0,
                             const std::optional<Tensor>& c0, const std::optional<Tensor>& lengths,
                             const std::optional<Tensor>& resets, const std::optional<Tensor>& batch_sizes,
                             const std::optional<Tensor>& masks, const std::vector<Tensor>& params,
                             const std::vector<Tensor>& norms, const Tensor& output, const Tensor& inner,
                             const Tensor& c_all, const Tensor& kept, const std::string& mode, bool has_biases,
                             bool bidirectional, bool need_input, bool need_params) {
  const NormCall call({input, h0, c0, lengths, resets, batch_sizes, masks, params, mode, has_biases, bidirectional},
                      norms);
  const Saved saved{compact(output),       compact(inner), compact(c_all),   compact(kept),
                    dense(grad_output, true), dense(grad_h_n),   dense(grad_c_n),     dense(grad_h_all),
                    dense(grad_c_all)};
  saved.check(call);
  const std::vector<int64_t> given(input.sizes().begin(), input.sizes().end());
  const std::vector<int64_t> states = {call.cells(), call.batch, call.hidden};
  std::vector<Tensor> found = {need_input ? input_gradient(call, given, lengths.has_value()) : call.empty({0}),
                               call.empty(states), call.empty(call.kind == LSTM ? states : std::vector<int64_t>{0})};
  for (const auto* group : {&params, &norms})
    for (size_t i = 0; need_params && i < group->size(); ++i) {
      found.push_back(call.empty({(*group)[i].sizes().begin(), (*group)[i].sizes().end()}));
      stable::zero_(found.back());
    }
  std::optional<Tensor> grad = saved.grad_output;
  Tensor masked = call.empty(masks ? call.shape : std::vector<int64_t>{0});
  for (int64_t layer = call.layers - 1; layer >= 0; --layer) {
    const auto output_of = [&](int64_t l) {
      return l + 1 == call.layers ? saved.output.const_data_ptr<float>()
                                  : saved.inner.const_data_ptr<float>() + l * call.area;
    };
    Grid x = layer == 0 ? call.input_grid() : call.grid(output_of(layer - 1), call.width);
    if (layer > 0 && masks) {
      multiply(masked.mutable_data_ptr<float>(), x.data, call.mask(layer), call.area);
      x = call.grid(masked.const_data_ptr<float>(), call.width);
    }
    std::optional<Tensor> dx;
    if (layer > 0) dx = input_gradient(call, call.shape, false);
    else if (need_input) dx = found[0];
    const Grid y = call.grid(output_of(layer), call.width);
    std::vector<Cell> cells = cells_of(call, saved, layer, x, y, grad ? call.grid(*grad) : Grid{},
                                       dx ? call.grid(*dx) : Grid{}, found, need_params);
    Layer(choose_isa(), call, layer, std::move(cells), dx.has_value(), need_params).run();
    if (layer > 0 && masks)
      multiply(dx->mutable_data_ptr<float>(), dx->const_data_ptr<float>(), call.mask(layer), call.area);
    grad = dx;
  }
  return found;
}

}  // namespace
}  // namespace fused_ops::rnn

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CPU, m) { m.impl("rnn_norm_bwd_cpu", TORCH_BOX(&fused_ops::rnn::backward)); }
