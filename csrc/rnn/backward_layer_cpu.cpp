// Backpropagation through time for the RNN sequences of forward_cpu.cpp, by hand.
//
// The idea: steps run backward on the forward's microkernel. A step's product is the slopes of the step after times
// W_hh; its epilogue adds the gradients from outside and makes the step's own slopes of them, so that dL/dh stays in
// registers. A chunk of steps keeps its slopes in cache; then the weights' gradients take them in as one GEMM over
// all rows and steps of the chunk, read where they lie, and dL/dx is another. A step that began with a reset passes
// nothing back.
//
// Where a recurrent mask, zoneout, a projection or a layer norm stands between dL/dh and the cell, a step is two
// kernels, the product and the cell's own (whose product is then that with W_hr), with pointwise passes over its rows
// around them. A layer norm's gradient needs sums over a row's slopes; the forward kept what came out of the norms.
//
// Threads: rows are independent within a chunk as they are forward, or share panels; the GEMMs split their outputs.
// Every sum has one order, whatever the threads, so that results repeat bitwise; dL/dx, dL/dh_0 and dL/dc_0 of a row
// do not depend on the other rows.
//
// Floor: 4·gates·hidden·(inputs + hidden) flops for each step of each row, half of them for the weights' gradients.
#include <algorithm>
#include <cstring>
#include <utility>

#include "rnn/backward.h"

namespace fused_ops::rnn {
namespace {

constexpr int64_t CHUNK_TOKENS = 256;             // (step, row) pairs whose slopes wait for the GEMMs
constexpr int64_t PADDING = 16;                   // floats after a token's slopes, or columns would share a cache set

thread_local Scratch packed_scratch, chunk_scratch, states_scratch;

// The steps whose slopes are at hand: [begin, end), from `first` on, and of step `end` in `after`.
struct Chunk {
  int64_t begin, end;
  std::vector<int64_t> first;  // where each step's slopes are, in rows
  float *slopes, *after;
  int64_t tokens() const { return first.back(); }
};

class Layer {
 public:
  Layer(const Isa& isa, const Call& call, int64_t layer, std::vector<BackCell> cells, bool need_input, bool need_params)
      : isa_(isa), call_(call), rows_(call.rows), cells_(std::move(cells)), hidden_(call.hidden), states_(call.states),
        gates_(call.gates), slopes_(call.layer_norm ? norm_slopes_of(call.kind) : slopes_of(call.kind)),
        left_slopes_(call.layer_norm ? 2 * gates_ : slopes_), wide_(std::max(hidden_, states_)),
        masked_(cells_[0].mask != nullptr), zoned_h_(cells_[0].zone_h.any()), zoned_c_(cells_[0].zone_c.any()),
        through_(masked_ || zoned_h_ || zoned_c_ || call.projected || call.layer_norm),
        dh_at_(slopes_ * hidden_), fed_at_(dh_at_ + (through_ ? states_ : 0)),
        inner_at_(fed_at_ + (masked_ ? states_ : 0)), stride_(inner_at_ + (call.projected ? hidden_ : 0) + PADDING),
        need_input_(need_input), need_params_(need_params), parallel_(call.flops(layer) >= SERIAL_FLOPS) {}

  void run() {
    const int64_t directions = call_.directions;
    int64_t most = 0;
    std::vector<Chunk> chunks = split(most);
    pack(chunks.size() == 1);
    const int64_t blocks = left_slopes_ * blocks_of(hidden_), width = cells_[0].inputs + states_ + 2 * isa_.lanes;
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
    for (const BackCell& cell : cells_)
      if (need_params_ && !cell.written) zero(cell);
    chunk_scratch.trim();
    packed_scratch.trim();
    states_scratch.trim();
  }

 private:
  int64_t blocks_of(int64_t units) const { return (units + isa_.block - 1) / isa_.block; }

  // once: W_ih is used once, for the only chunk. W_hh is, in the only step.
  void pack(bool once) {
    const int64_t lanes = isa_.lanes, rows = gates_ * hidden_, inputs = cells_[0].inputs;
    const int64_t hh = rows_.steps() > 1 ? panels_of(isa_, states_) : 0;
    const int64_t ih = need_input_ && !once ? panels_of(isa_, inputs) : 0;
    const int64_t hr = call_.projected ? panels_of(isa_, hidden_) : 0;
    float* memory = packed_scratch.reserve(cells_.size() * lanes * ((hh + ih) * rows + hr * states_));
    for (BackCell& cell : cells_) {
      const float *from_ih = call_.param(cell.index, 0), *from_hh = call_.param(cell.index, 1);
      float *const w_hh = memory, *const w_ih = w_hh + hh * lanes * rows, *const w_hr = w_ih + ih * lanes * rows;
      cell.w_hh = hh > 0 ? w_hh : nullptr, cell.w_ih = ih > 0 ? w_ih : nullptr, cell.w_hr = w_hr;
      memory = w_hr + hr * lanes * states_;
      spread(parallel_, hh + ih, [&](int64_t begin, int64_t end) {
        isa_.pack_columns(from_hh, rows, states_, rotate() * hidden_, w_hh, begin, std::min(end, hh));
        isa_.pack_columns(from_ih, rows, inputs, 0, w_ih, std::max(begin, hh) - hh, end - hh);
      });
      if (hr > 0) isa_.pack_columns(call_.param(cell.index, call_.w_hr), states_, hidden_, 0, w_hr, 0, hr);
    }
  }

  // Slopes 0, 1, 2 of a GRU belong to the products n, r, z with W_hh; those from 1 on to r, z, n with W_ih. With a layer
  // norm each product has slopes of its own, in order.
  int64_t rotate() const { return call_.kind == GRU && !call_.layer_norm ? 2 : 0; }
  int64_t input_slope() const { return left_slopes_ - gates_; }

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
  void walk(const BackCell& cell, const Chunk& chunk, int64_t group, int64_t groups, bool shared) const {
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
      const int64_t inputs = all_cut ? 0 : gates_ * hidden_;
      if (through_) step_through(cell, s, group, groups, rows, inputs, shared);
      else if (cell.w_hh || inputs == 0) back(rows, cell.w_hh, inputs, shared);
      else back_once(cell, rows, inputs, shared);
    }
    if (chunk.begin == 0) {
      for (int64_t place = group; place < call_.batch; place += groups) finish_c(cell, rows_.order[place]);
    } else {
      for (int64_t place = group; place < rows_.live[chunk.begin]; place += groups)
        std::memcpy(chunk.after + place * stride_, chunk.slopes + place * stride_,
                    gates_ * hidden_ * sizeof(float));
    }
  }

  void back(const std::vector<BackRow>& rows, const float* weights, int64_t inputs, bool shared) const {
    const BackStep job{rows.data(), static_cast<int64_t>(rows.size()), hidden_, weights, inputs};
    spread(shared, panels_of(isa_, hidden_),
           [&](int64_t begin, int64_t end) { isa_.back[call_.kind](job, begin, end); });
  }

  // The same with W_hh as it comes.
  void back_once(const BackCell& cell, const std::vector<BackRow>& rows, int64_t inputs, bool shared) const {
    spread(shared, panels_of(isa_, hidden_), [&](int64_t begin, int64_t end) {
      with_columns(call_.param(cell.index, 1), states_, rotate() * hidden_, begin, end,
                   [&](const float* weights, int64_t first, int64_t last) {
                     const BackStep job{rows.data(), static_cast<int64_t>(rows.size()), hidden_, weights, inputs};
                     isa_.back[call_.kind](job, first, last);
                   });
    });
  }

  // use(weights, panel, panel + 1) for panels of a weight's columns, packed for this one use.
  template <typename Use>
  void with_columns(const float* from, int64_t columns, int64_t first_row, int64_t begin, int64_t end, Use use) const {
    const int64_t rows = gates_ * hidden_;
    pack_and_use(
        rows * isa_.lanes, begin, end,
        [&](float* weights, int64_t first, int64_t last) {
          isa_.pack_columns(from, rows, columns, first_row, weights, first, last);
        },
        use);
  }

  void product(Product job, const float* from, int64_t first_row, bool parallel) const {
    spread(parallel, panels_of(isa_, job.columns), [&](int64_t begin, int64_t end) {
      if (job.weights) return isa_.product(job, begin, end);
      with_columns(from, job.columns, first_row, begin, end, [&](const float* weights, int64_t first, int64_t last) {
        Product one = job;
        one.weights = weights;
        isa_.product(one, first, last);
      });
    });
  }

  void zero(const BackCell& cell) const {
    for (int64_t i = 0; i < call_.per_cell; ++i)
      std::fill_n(cell.d_params[i], call_.params[cell.index * call_.per_cell + i].numel(), 0.0f);
  }

  // One step of the rows group, group + groups, ... where dL/dh goes through a mask, zoneout, a projection or a norm.
  void step_through(const BackCell& cell, int64_t s, int64_t group, int64_t groups, std::vector<BackRow>& rows,
                    int64_t inputs, bool shared) const {
    const int64_t count = rows.size(), each = 2 * (wide_ + hidden_);
    float* const memory = states_scratch.reserve(count * each);
    if (inputs > 0) {
      std::vector<const float*> later;
      std::vector<float*> products;
      for (int64_t i = 0; i < count; ++i) later.push_back(rows[i].later), products.push_back(memory + i * each);
      product({later.data(), count, inputs, states_, cell.w_hh, products.data(), false}, call_.param(cell.index, 1),
              rotate() * hidden_, shared);
    }
    for (int64_t i = 0; i < count; ++i) enter(cell, s, rows_.order[group + i * groups], rows[i], memory + i * each);
    if (s < 0) return;
    if (call_.layer_norm) back_normed(cell, rows, memory, each, shared);
    else back(rows, cell.w_hr, call_.projected ? states_ : 0, shared);
    const bool gru = zoned_h_ && call_.kind == GRU;
    for (int64_t i = 0; i < count && (gru || zoned_c_); ++i) {
      float* const to = gru ? rows[i].passed : rows[i].dc_out;
      const float* const kept = memory + i * each + wide_ + 2 * hidden_;
      isa_.split({nullptr, nullptr, to, kept, nullptr, {}, to, nullptr}, gru ? states_ : hidden_);
    }
  }

  // From dL/dh~ where `enter` left it, through W_hr, the norms and the gates between them. In a row's memory W_hr's
  // product takes the place of W_hh's.
  void back_normed(const BackCell& cell, std::vector<BackRow>& rows, float* memory, int64_t each, bool shared) const {
    if (call_.projected) {
      std::vector<const float*> later;
      std::vector<float*> products;
      for (BackRow& row : rows) {
        later.push_back(row.later);
        row.carried = products.emplace_back(memory + products.size() * each);
      }
      product({later.data(), static_cast<int64_t>(rows.size()), states_, hidden_, cell.w_hr, products.data(), false},
              nullptr, 0, shared);
    }
    const NormBack job{rows.data(), hidden_, cell.norms, zoned_h_, call_.projected ? inner_at_ : 0};
    spread(shared, rows.size(), [&](int64_t begin, int64_t end) { isa_.norm->back[call_.kind](job, begin, end); });
  }

  // Takes a row's dL/dh, whose product is in `memory`, to where the cell finds it. Of `memory` the rest is scratch: c~,
  // dL/dc~ and what zoneout hands to the state before and the cell's kernel must not overwrite.
  void enter(const BackCell& cell, int64_t s, int64_t place, BackRow& row, float* memory) const {
    float *const c = memory + wide_, *const dc = c + hidden_, *const kept = dc + hidden_;
    const float* const product = row.cut ? nullptr : memory;
    const float* const mask = masked_ ? cell.mask + place * states_ : nullptr;
    if (s < 0) return isa_.split({product, mask, row.carried, nullptr, nullptr, {}, row.passed, nullptr}, states_);
    const int64_t t = rows_.time_of(s, place, cell.reverse);
    float* const dh = row.slopes + dh_at_;
    float* const bypass = !zoned_h_ ? nullptr : call_.kind == GRU ? kept : row.passed;
    isa_.split({product, mask, row.carried, row.grad, row.grad_all, cell.zone_h.at(t, place), dh, bypass}, states_);
    row.cut = !call_.projected, row.later = dh;
    row.carried = call_.projected ? nullptr : dh, row.grad = nullptr, row.grad_all = nullptr;
    if (masked_ && need_params_) isa_.times(row.slopes + fed_at_, row.h_before, mask, states_);
    if (zoned_h_ && call_.kind < GRU) row.h = row.kept;
    if (zoned_c_) {
      isa_.split({nullptr, nullptr, row.dc, row.grad_c, nullptr, cell.zone_c.at(t, place), dc, kept}, hidden_);
      row.dc = dc, row.grad_c = nullptr;
    }
    const bool inner = call_.projected && !call_.layer_norm;
    if (zoned_c_ || inner) {
      isa_.recall(row.kept, row.c_before, c, inner ? row.slopes + inner_at_ : nullptr, hidden_);
      row.c = c;
    }
  }

  BackRow row_of(const BackCell& cell, const Chunk& chunk, int64_t s, int64_t place) const {
    const int64_t row = rows_.order[place], h = row * states_, c = row * hidden_;
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
      found.carried = from(cell.grad_h_n, h), found.dc = from(cell.grad_c_n, c);
    } else if (!cut) {
      found.carried = call_.kind == GRU || zoned_h_ ? cell.dh0 + h : nullptr, found.dc = from(cell.dc0, c);
    }
    found.passed = cell.dh0 + h;
    if (s < 0) return found;
    const int64_t t = rows_.time_of(s, row, cell.reverse);
    found.grad = cell.grad.at(t, row), found.grad_all = cell.grad_all.at(t, row);
    found.grad_c = cell.grad_c_all.at(t, row), found.kept = cell.kept.at(t, row);
    found.h = cell.out.at(t, row), found.h_before = before(cell, cell.out, cell.h0 + h, s, row);
    if (call_.kind == LSTM) found.c = cell.c.at(t, row), found.c_before = before(cell, cell.c, cell.c0 + c, s, row);
    found.slopes = chunk.slopes + (chunk.first[s - chunk.begin] + place) * stride_;
    found.dc_out = cell.dc0 + c;
    return found;
  }

  // A row's state before step s; `initial` before its first.
  const float* before(const BackCell& cell, const Grid& states, const float* initial, int64_t s, int64_t row) const {
    if (rows_.reset(rows_.time_of(s, row, cell.reverse), row)) return call_.zeros.data();
    return s == 0 ? initial : states.at(rows_.time_of(s - 1, row, cell.reverse), row);
  }

  // dL/dc_0 where the first step did not leave it.
  void finish_c(const BackCell& cell, int64_t row) const {
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
  void products(BackCell& cell, const Chunk& chunk, float* packed) {
    const int64_t tokens = chunk.tokens();
    if (tokens == 0 || hidden_ == 0) return;
    slope_rows_.clear(), x_rows_.clear(), h_rows_.clear(), dx_rows_.clear(), kept_rows_.clear();
    for (int64_t s = chunk.begin; s < chunk.end; ++s)
      for (int64_t place = 0; place < rows_.live[s]; ++place) {
        const int64_t row = rows_.order[place], t = rows_.time_of(s, row, cell.reverse);
        slope_rows_.push_back(chunk.slopes + slope_rows_.size() * stride_ + input_slope() * hidden_);
        x_rows_.push_back(cell.x.at(t, row));
        h_rows_.push_back(masked_ ? chunk.slopes + h_rows_.size() * stride_ + fed_at_
                                  : before(cell, cell.out, cell.h0 + row * states_, s, row));
        dx_rows_.push_back(cell.dx.at(t, row));
        if (call_.layer_norm) kept_rows_.push_back(cell.kept.at(t, row));
      }
    if (need_input_) {
      product({slope_rows_.data(), tokens, gates_ * hidden_, cell.inputs, cell.w_ih, dx_rows_.data(),
               call_.directions > 1},
              call_.param(cell.index, 0), 0, worth_threads(tokens));
    }
    if (need_params_) weight_gradients(cell, chunk, packed);
    if (need_params_ && call_.projected) projection_gradient(cell, chunk, packed);
    if (need_params_ && call_.layer_norm) norm_gradients(cell, chunk);
    cell.written = true;
  }

  void weight_gradients(const BackCell& cell, const Chunk& chunk, float* packed) const {
    const int64_t tokens = chunk.tokens(), per_slope = blocks_of(hidden_), block = isa_.block * tokens;
    const int64_t ih = panels_of(isa_, cell.inputs), hh = panels_of(isa_, states_), lanes = isa_.lanes * tokens;
    const int64_t left = left_slopes_ * per_slope;
    float *const x = packed + left * block, *const h = x + ih * lanes;
    spread(worth_threads(tokens), left + ih + hh, [&](int64_t begin, int64_t end) {
      const auto part = [&](int64_t first, int64_t count) {
        return std::pair(std::clamp<int64_t>(begin - first, 0, count), std::clamp<int64_t>(end - first, 0, count));
      };
      const auto [l0, l1] = part(0, left);
      const auto [x0, x1] = part(left, ih);
      const auto [h0, h1] = part(left + ih, hh);
      isa_.pack_left(chunk.slopes, stride_, tokens, hidden_, packed, l0, l1);
      isa_.pack_right(x_rows_.data(), tokens, cell.inputs, x, x0, x1);
      isa_.pack_right(h_rows_.data(), tokens, states_, h, h0, h1);
    });
    const int gates = static_cast<int>(gates_), turn = static_cast<int>(rotate());
    const float* const inputs_left = packed + input_slope() * per_slope * block;
    const Outer w_ih{inputs_left, x, tokens, hidden_, cell.inputs, gates, 0, cell.d_params[0], cell.written};
    const Outer w_hh{packed, h, tokens, hidden_, states_, gates, turn, cell.d_params[1], cell.written};
    const Outer b_ih{inputs_left, nullptr, tokens, hidden_, 1, gates, 0, cell.d_params[2], cell.written};
    const Outer b_hh{packed, nullptr, tokens, hidden_, 1, gates, turn, cell.d_params[3], cell.written};
    spread(worth_threads(tokens), gates_ * per_slope, [&](int64_t begin, int64_t end) {
      isa_.outer(w_ih, begin, end);
      isa_.outer(w_hh, begin, end);
      if (!call_.has_biases || call_.layer_norm) return;
      isa_.sums(b_ih, begin, end);
      isa_.sums(b_hh, begin, end);
    });
  }

  // dW_hr: dL/dh~ times o·tanh(c~).
  void projection_gradient(const BackCell& cell, const Chunk& chunk, float* packed) {
    const int64_t tokens = chunk.tokens(), left = blocks_of(states_), right = panels_of(isa_, hidden_);
    float* const inner = packed + left * isa_.block * tokens;
    for (int64_t i = 0; i < tokens; ++i) h_rows_[i] = chunk.slopes + i * stride_ + inner_at_;
    isa_.pack_left(chunk.slopes + dh_at_, stride_, tokens, states_, packed, 0, left);
    isa_.pack_right(h_rows_.data(), tokens, hidden_, inner, 0, right);
    const Outer job{packed, inner, tokens, states_, hidden_, 1, 0, cell.d_params[call_.w_hr], cell.written};
    spread(worth_threads(tokens), left, [&](int64_t begin, int64_t end) { isa_.outer(job, begin, end); });
  }

  // The norms' gradients and the biases behind them, gate by gate.
  void norm_gradients(const BackCell& cell, const Chunk& chunk) const {
    const int64_t x_ih = kept_of(call_.kind, zoned_h_) * hidden_, x_hh = x_ih + gates_ * hidden_;
    const float* const slopes = chunk.slopes + 2 * gates_ * hidden_;
    const auto into = [&](int64_t param, int64_t at) { return param < 0 ? nullptr : cell.d_params[param] + at; };
    const int64_t b_ih = call_.has_biases ? 2 : -1, b_hh = call_.has_biases ? 3 : -1;
    std::vector<NormSums> jobs;
    const auto job = [&](int64_t slope, int64_t factor, float* sum, float* dot) {
      jobs.push_back({slopes + slope * hidden_, stride_, chunk.tokens(), hidden_, kept_rows_.data(), factor, sum, dot,
                      cell.written});
    };
    for (int64_t gate = 0; gate < gates_; ++gate) {
      const int64_t at = gate * hidden_, second = call_.kind == GRU && gate == 2 ? 3 : gate;
      job(gate, x_ih + at, into(b_ih, at), into(call_.norms, at));
      job(second, x_hh + at, into(b_hh, at), into(call_.norms + 1, at));
    }
    if (call_.kind == LSTM) {
      job(4, 0, into(call_.norms + 3, 0), nullptr);
      job(5, 0, into(call_.norms + 2, 0), nullptr);
    }
    spread(worth_threads(chunk.tokens()), jobs.size(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) isa_.norm->sums(jobs[i], 0, panels_of(isa_, hidden_));
    });
  }

  const Isa& isa_;
  const Call& call_;
  const Rows& rows_;
  std::vector<BackCell> cells_;
  const int64_t hidden_, states_, gates_, slopes_;
  const int64_t left_slopes_, wide_;  // slopes of the weights' gradients; the larger of h's and c's sizes
  const bool masked_, zoned_h_, zoned_c_, through_;
  // After a token's slopes, where there are such: dL/dh~, h·mask before the step, o·tanh(c~). stride_: to the next
  // token.
  const int64_t dh_at_, fed_at_, inner_at_, stride_;
  const bool need_input_, need_params_, parallel_;
  std::vector<const float*> slope_rows_, x_rows_, h_rows_, kept_rows_;
  std::vector<float*> dx_rows_;
};

}  // namespace

void layer_backward(const Isa& isa, const Call& call, int64_t layer, std::vector<BackCell> cells, bool need_input,
                    bool need_params) {
  Layer(isa, call, layer, std::move(cells), need_input, need_params).run();
}

}  // namespace fused_ops::rnn
