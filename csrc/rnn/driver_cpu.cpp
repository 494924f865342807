// Checks of a call to the CPU's RNNs, its rows and where they lie.
#include "rnn/driver.h"

#include <algorithm>
#include <numeric>

namespace fused_ops::rnn {
namespace {

Kind kind_of(const std::string& mode) {
  const char* const names[KINDS] = {"rnn_tanh", "rnn_relu", "gru", "lstm"};
  for (int kind = 0; kind < KINDS; ++kind)
    if (mode == names[kind]) return static_cast<Kind>(kind);
  STD_TORCH_CHECK(false, "mode must be rnn_tanh, rnn_relu, gru or lstm, got ", mode);
}

void sort_rows(Rows& rows) {
  rows.order.resize(rows.lengths.size());
  std::iota(rows.order.begin(), rows.order.end(), int64_t{0});
  std::stable_sort(rows.order.begin(), rows.order.end(),
                   [&](int64_t a, int64_t b) { return rows.lengths[a] > rows.lengths[b]; });
  rows.live.assign(rows.order.empty() ? 1 : rows.lengths[rows.order[0]] + 1, 0);
  for (const int64_t length : rows.lengths)
    if (length > 0) ++rows.live[length - 1];
  for (int64_t s = rows.steps() - 1; s > 0; --s) rows.live[s - 1] += rows.live[s];
}

Rows padded_rows(int64_t time, int64_t batch, const std::optional<Tensor>& lengths) {
  Rows rows;
  rows.lengths.assign(batch, time);
  rows.time = time;
  if (lengths) {
    STD_TORCH_CHECK(lengths->scalar_type() == ScalarType::Long, "lengths must be int64");
    check_shape(*lengths, {batch}, "lengths");
    const Tensor values = compact(*lengths);
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

// batch_sizes (time,): how many rows still run; rows are sorted by length.
Rows packed_rows(const Tensor& batch_sizes, int64_t batch, int64_t total) {
  STD_TORCH_CHECK(batch_sizes.scalar_type() == ScalarType::Long && batch_sizes.dim() == 1,
                  "batch_sizes must be int64 and 1-dimensional");
  const int64_t time = batch_sizes.size(0);
  const Tensor values = compact(batch_sizes);
  const auto* sizes = values.const_data_ptr<int64_t>();
  Rows rows;
  rows.lengths.assign(batch, 0);
  rows.time = time;
  int64_t before = batch, start = 0;
  for (int64_t t = 0; t < time; ++t) {
    STD_TORCH_CHECK(sizes[t] >= 0 && sizes[t] <= before, "batch_sizes must not grow nor pass hx's batch ", batch,
                    ", got ", sizes[t]);
    rows.starts.push_back(start);
    start += before = sizes[t];
    for (int64_t b = 0; b < sizes[t]; ++b) ++rows.lengths[b];
  }
  STD_TORCH_CHECK(start == total, "batch_sizes must add up to input's ", total, " rows, got ", start);
  sort_rows(rows);
  return rows;
}

}  // namespace

Tensor rows_of_floats(const Tensor& tensor) { return tensor.stride(-1) == 1 ? tensor : compact(tensor); }

void check_floats(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, " must be float32");
}

void multiply(float* to, const float* a, const float* b, int64_t count) {
  stable::parallel_for(0, count, 32 * 1024, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) to[i] = a[i] * b[i];
  });
}

Call::Call(const Inputs& given)
    : kind(kind_of(given.mode)), directions(given.bidirectional ? 2 : 1), gates(gates_of(kind)),
      has_biases(given.has_biases), layer_norm(given.layer_norm), input(given.input), h0(given.h0),
      extras(given.extras) {
  check_floats(input, "input");
  check_floats(h0, "h0");
  STD_TORCH_CHECK(h0.dim() == 3, "h0 must be (layers·directions, batch, hidden)");
  STD_TORCH_CHECK(given.c0.has_value() == (kind == LSTM), "c0 must be given exactly for an lstm");
  const int64_t cells = h0.size(0);
  w_hr = has_biases ? 4 : 2;
  per_cell = w_hr + (layer_norm ? kind == LSTM ? 4 : 2 : 0);
  projected = kind == LSTM && static_cast<int64_t>(given.params.size()) == cells * (per_cell + 1);
  norms = w_hr + projected, per_cell += projected;
  STD_TORCH_CHECK(input.dim() == (given.batch_sizes ? 2 : 3), "input must be (time, batch, features) or packed");
  batch = h0.size(1), states = h0.size(2), inputs = input.size(-1), width = directions * states;
  hidden = projected ? given.c0->size(-1) : states;
  layers = cells / directions;
  STD_TORCH_CHECK(static_cast<int64_t>(given.params.size()) == cells * per_cell && cells % directions == 0,
                  "params must hold ", per_cell, " tensors for each of h0's ", cells, " cells");
  STD_TORCH_CHECK(given.batch_sizes || input.size(1) == batch, "h0 must have input's batch");
  rows = given.batch_sizes ? packed_rows(*given.batch_sizes, batch, input.size(0))
                           : padded_rows(input.size(0), batch, given.lengths);
  shape.assign(input.sizes().begin(), input.sizes().end());
  shape.back() = width;
  positions = given.batch_sizes ? shape[0] : shape[0] * shape[1];
  area = positions * width;
  input = rows_of_floats(input);
  h0 = compact(h0);
  if (given.c0) {
    check_floats(*given.c0, "c0");
    check_shape(*given.c0, {cells, batch, hidden}, "c0");
    c0 = compact(*given.c0);
  }
  if (given.resets) {
    STD_TORCH_CHECK(given.resets->scalar_type() == ScalarType::Bool && !given.batch_sizes,
                    "resets must be bool and input padded");
    check_shape(*given.resets, {rows.time, batch}, "resets");
    resets = compact(*given.resets);
    rows.resets = static_cast<const bool*>(resets->const_data_ptr());
  }
  if (given.masks) {
    check_floats(*given.masks, "masks");
    STD_TORCH_CHECK(given.masks->numel() == (layers - 1) * area, "masks has the wrong shape");
    masks = compact(*given.masks);
  }
  check_params(given.params);
  check_extras();
  const bool zoned = zones_h(0).any();
  kept = layer_norm ? norm_kept_of(kind, zoned, hidden) : kept_of(kind, zoned) * hidden;
  zeros.assign(4 * std::max(hidden, states), 0.0f);
}

void Call::check_params(const std::vector<Tensor>& given) {
  for (int64_t i = 0; i < static_cast<int64_t>(given.size()); ++i) {
    const int64_t cell = i / per_cell, role = i % per_cell;
    check_floats(given[i], "params");
    if (projected && role == w_hr) {
      check_shape(given[i], {states, hidden}, "params' projection");
    } else if (role >= norms) {
      check_shape(given[i], {(role < norms + 2 ? gates : 1) * hidden}, "params' norm");
    } else if (role < 2) {
      const int64_t columns = role == 0 ? layer_inputs(cell / directions) : states;
      check_shape(given[i], {gates * hidden, columns}, "params' weight");
    } else {
      check_shape(given[i], {gates * hidden}, "params' bias");
    }
    params.push_back(compact(given[i]));
  }
}

void Call::check_extras() {
  const auto check = [&](std::optional<Tensor>& tensor, ScalarType dtype, int64_t features, const char* name) {
    if (!tensor) return;
    STD_TORCH_CHECK(tensor->scalar_type() == dtype, name, " must be ", torch::headeronly::toString(dtype));
    STD_TORCH_CHECK(tensor->numel() == cells() * features, name, " has the wrong shape");
    tensor = compact(*tensor);
  };
  check(extras.recurrent_masks, ScalarType::Float, batch * states, "recurrent_masks");
  check(extras.zone_h, ScalarType::Bool, positions * states, "zone_h");
  check(extras.zone_c, ScalarType::Bool, positions * hidden, "zone_c");
  STD_TORCH_CHECK(kind == LSTM || (!extras.zone_c && extras.zoneout_c == 0.0), "only an lstm has a c to zone");
  for (const double share : {extras.zoneout_h, extras.zoneout_c})
    STD_TORCH_CHECK(share >= 0.0 && share <= 1.0, "zoneout must be between 0 and 1, got ", share);
}

Grid Call::grid(const Tensor& tensor) const {
  auto* data = const_cast<float*>(tensor.const_data_ptr<float>());
  if (tensor.dim() == 2) return {data, 0, tensor.stride(0), rows.starts.data()};
  return {data, tensor.stride(0), tensor.stride(1), nullptr};
}

Grid Call::grid(const float* data, int64_t features) const {
  return {const_cast<float*>(data), batch * features, features, shape.size() == 2 ? rows.starts.data() : nullptr};
}

Zones Call::zones(const std::optional<Tensor>& keep, double share, int64_t cell, int64_t features) const {
  if (!keep) return {{}, static_cast<float>(share)};
  const auto* data = static_cast<const bool*>(keep->const_data_ptr()) + cell * positions * features;
  return {{data, batch * features, features, shape.size() == 2 ? rows.starts.data() : nullptr}};
}

bool Call::shares_panels() const {
  const int64_t threads = stable::get_num_threads();
  if (rows.steps() <= 1) return threads > 1;  // they wait for each other once
  return threads > 1 && directions == 1 && batch < 2 * threads && 4 * gates * hidden * states > SHARED_WEIGHT_BYTES;
}

int64_t Call::flops(int64_t layer) const {
  const int64_t steps = std::accumulate(rows.lengths.begin(), rows.lengths.end(), int64_t{0});
  const int64_t projection = projected ? hidden * states : 0;
  return directions * steps * 2 * (gates * hidden * (states + layer_inputs(layer)) + projection);
}

int64_t Call::groups(bool parallel) const {
  if (!parallel || shares_panels()) return 1;
  const int64_t threads = stable::get_num_threads();
  return std::max<int64_t>(std::min(batch, (threads + directions - 1) / directions), 1);
}

}  // namespace fused_ops::rnn
