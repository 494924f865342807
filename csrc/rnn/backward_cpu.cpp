// The backward op of the RNN sequences of forward_cpu.cpp: its layers one after the other, the last first.
#include "rnn/backward.h"

namespace fused_ops::rnn {
namespace {

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
  return rows ? rows_of_floats(*tensor) : compact(*tensor);
}

void check_saved(const Call& call, const Saved& saved) {
  const int64_t places = call.cells() * call.positions, rows = call.cells() * call.batch;
  const auto holds = [](const std::optional<Tensor>& tensor, int64_t count, const char* name) {
    STD_TORCH_CHECK(!tensor || tensor->numel() == count, name, " has the wrong shape");
  };
  holds(saved.output, call.area, "output");
  holds(saved.inner, (call.layers - 1) * call.area, "inner");
  holds(saved.c_all, call.kind == LSTM ? places * call.hidden : 0, "c_all");
  holds(saved.kept, places * call.kept, "kept");
  holds(saved.grad_output, call.area, "grad_output");
  holds(saved.grad_h_n, rows * call.states, "grad_h_n");
  holds(saved.grad_c_n, rows * call.hidden, "grad_c_n");
  holds(saved.grad_h_all, places * call.states, "grad_h_all");
  holds(saved.grad_c_all, places * call.hidden, "grad_c_all");
}

// The directions of one layer: x its input, y its output, grad of the latter, dx for the former; d: see `backward`.
std::vector<BackCell> cells_of(const Call& call, const Saved& saved, int64_t layer, const Grid& x, const Grid& y,
                               const Grid& grad, const Grid& dx, std::vector<Tensor>& d, bool need_params) {
  const int64_t hidden = call.hidden, states = call.states;
  const auto from = [](const float* data, int64_t offset) { return data == nullptr ? nullptr : data + offset; };
  std::vector<BackCell> cells;
  for (int64_t direction = 0; direction < call.directions; ++direction) {
    const int64_t at = layer * call.directions + direction, rows = at * call.batch, places = at * call.positions;
    BackCell cell{at, call.layer_inputs(layer), direction == 1, x, y.from(direction * states)};
    if (call.kept > 0)
      cell.kept = call.grid(saved.kept.const_data_ptr<float>() + places * call.kept, call.kept);
    cell.grad = grad.from(direction * states), cell.dx = dx;
    cell.grad_all = call.grid(from(Saved::data(saved.grad_h_all), places * states), states);
    cell.h0 = call.h0.const_data_ptr<float>() + rows * states;
    cell.grad_h_n = from(Saved::data(saved.grad_h_n), rows * states);
    cell.dh0 = d[1].mutable_data_ptr<float>() + rows * states;
    if (call.kind == LSTM) {
      cell.c = call.grid(saved.c_all.const_data_ptr<float>() + places * hidden, hidden);
      cell.grad_c_all = call.grid(from(Saved::data(saved.grad_c_all), places * hidden), hidden);
      cell.c0 = call.c0->const_data_ptr<float>() + rows * hidden;
      cell.grad_c_n = from(Saved::data(saved.grad_c_n), rows * hidden);
      cell.dc0 = d[2].mutable_data_ptr<float>() + rows * hidden;
    }
    cell.mask = call.recurrent_mask(at);
    cell.zone_h = call.zones_h(at), cell.zone_c = call.zones_c(at);
    if (call.layer_norm) cell.norms = call.norms_of(at);
    for (int64_t i = 0; need_params && i < call.per_cell; ++i)
      cell.d_params[i] = d[3 + at * call.per_cell + i].mutable_data_ptr<float>();
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

// [dL/dinput, dL/dh0, dL/dc0, dL/dparams...]; without elements where there is none or it is not needed, and no params'.
std::vector<Tensor> backward(const std::optional<Tensor>& grad_output, const std::optional<Tensor>& grad_h_n,
                             const std::optional<Tensor>& grad_c_n, const std::optional<Tensor>& grad_h_all,
                             const std::optional<Tensor>& grad_c_all, const Tensor& input, const Tensor& h0,
                             const std::optional<Tensor>& c0, const std::optional<Tensor>& lengths,
                             const std::optional<Tensor>& resets, const std::optional<Tensor>& batch_sizes,
                             const std::optional<Tensor>& masks, const std::optional<Tensor>& recurrent_masks,
                             const std::optional<Tensor>& zone_h, const std::optional<Tensor>& zone_c,
                             const std::vector<Tensor>& params, const Tensor& output, const Tensor& inner,
                             const Tensor& c_all, const Tensor& kept, const std::string& mode, bool has_biases,
                             bool bidirectional, double zoneout_h, double zoneout_c, bool layer_norm,
                             bool need_input, bool need_params) {
  const Call call({input, h0, c0, lengths, resets, batch_sizes, masks, params, mode, has_biases, bidirectional,
                   layer_norm, {recurrent_masks, zone_h, zone_c, zoneout_h, zoneout_c}});
  const Saved saved{compact(output),       compact(inner), compact(c_all),   compact(kept),
                    dense(grad_output, true), dense(grad_h_n),   dense(grad_c_n),     dense(grad_h_all),
                    dense(grad_c_all)};
  check_saved(call, saved);
  const std::vector<int64_t> given(input.sizes().begin(), input.sizes().end());
  const std::vector<int64_t> c_shape = {call.cells(), call.batch, call.hidden};
  std::vector<Tensor> found = {need_input ? input_gradient(call, given, lengths.has_value()) : call.empty({0}),
                               call.empty({call.cells(), call.batch, call.states}),
                               call.empty(call.kind == LSTM ? c_shape : std::vector<int64_t>{0})};
  for (const Tensor& param : params) {
    if (!need_params) break;
    found.push_back(call.empty({param.sizes().begin(), param.sizes().end()}));
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
    const Grid y = call.grid(output_of(layer), call.width);
    layer_backward(choose_isa(), call, layer,
                   cells_of(call, saved, layer, x, y, grad ? call.grid(*grad) : Grid{}, dx ? call.grid(*dx) : Grid{},
                            found, need_params),
                   dx.has_value(), need_params);
    if (layer > 0 && masks)
      multiply(dx->mutable_data_ptr<float>(), dx->const_data_ptr<float>(), call.mask(layer), call.area);
    grad = dx;
  }
  return found;
}

}  // namespace
}  // namespace fused_ops::rnn

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CPU, m) { m.impl("rnn_bwd_cpu", TORCH_BOX(&fused_ops::rnn::backward)); }
