// Layer norm inside a step, forward and backward, one row at a time: the products lie in cache, three sweeps over them
// make statistics, gates and states. Included once per instruction set (isa_cpu.cpp), after gates_kernel.h.

namespace fused_ops::rnn::FUSED_OPS_ISA {

struct Moments {
  float mean, rstd;
};

FUSED_OPS_INLINE float total(Floats sum) {
  float parts[LANES];
  store(parts, sum);
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
  return parts[0];
}

template <int N>
FUSED_OPS_INLINE float total(const Floats (&sums)[N]) {
  Floats all = sums[0];
  for (int i = 1; i < N; ++i) all += sums[i];
  return total(all);
}

// `value`, but 0 in the lanes past `left`.
FUSED_OPS_INLINE Floats within(Floats value, int64_t left) {
  if (left >= LANES) return value;
  for (int lane = 0; lane < LANES; ++lane)
    if (lane >= left) value[lane] = 0.0f;
  return value;
}

// Of [panel][gate][lane] (G = 1: of `hidden` values in a row). The variance is that of the distances from the mean.
template <int G>
FUSED_OPS_INLINE Moments moments(const float* values, int64_t stride, int64_t hidden) {
  const float share = 1.0f / static_cast<float>(G * hidden);
  Floats sums[G] = {}, squares[G] = {};
  const float* from = values;
  for (int64_t unit = 0; unit < hidden; unit += LANES, from += stride)
    for (int g = 0; g < G; ++g) sums[g] += load(from + g * LANES, hidden - unit);
  const float mean = total(sums) * share;
  from = values;
  for (int64_t unit = 0; unit < hidden; unit += LANES, from += stride)
    for (int g = 0; g < G; ++g) {
      const Floats far = within(load(from + g * LANES, hidden - unit) - mean, hidden - unit);
      squares[g] += far * far;
    }
  return {mean, 1.0f / __builtin_sqrtf(total(squares) * share + NORM_EPS)};
}

// One half of the gates of a panel, normalised, scaled and shifted; stored normalised if `kept`.
template <int G>
FUSED_OPS_INLINE void normalised(const float* from, Moments of, const float* norm, const float* bias, int64_t unit,
                                 int64_t hidden, float* kept, Floats (&gates)[G]) {
  const int64_t left = hidden - unit;
  for (int g = 0; g < G; ++g) {
    const int64_t at = g * hidden + unit;
    const Floats value = (load(from + g * LANES) - of.mean) * of.rstd;
    if (kept != nullptr) store(kept + at, value, left);
    gates[g] = value * load(norm + at, left) + optional(bias, at, left);
  }
}

template <int KIND>
static void norm_step(const NormStep& job, const StepRow& row, const float* gh) {
  constexpr int G = gates_of(KIND);
  const int64_t hidden = job.step.hidden, gi_stride = job.step.panel_stride;
  const Norms& norms = job.norms;
  const float* gi = job.step.gates + row.slot * G * LANES;
  const Moments of_i = moments<G>(gi, gi_stride, hidden), of_h = moments<G>(gh, job.stride, hidden);
  float* const kept_i = row.kept == nullptr ? nullptr : row.kept + kept_of(KIND, job.zoned) * hidden;
  float* const kept_h = row.kept == nullptr ? nullptr : kept_i + G * hidden;
  for (int64_t unit = 0; unit < hidden; unit += LANES, gi += gi_stride, gh += job.stride) {
    const int64_t left = hidden - unit;
    Floats a[G], b[G], kept[4];
    normalised<G>(gi, of_i, norms.ih, norms.b_ih, unit, hidden, kept_i, a);
    normalised<G>(gh, of_h, norms.hh, norms.b_hh, unit, hidden, kept_h, b);
    if constexpr (KIND < GRU) {
      store(row.h_out + unit, activation<KIND>(a[0] + b[0]), left);
    } else if constexpr (KIND == GRU) {
      const Floats r = sigmoid(a[0] + b[0]), z = sigmoid(a[1] + b[1]), n = hyperbolic_tangent(a[2] + r * b[2]);
      store(row.h_out + unit, n + z * (load(row.h + unit, left) - n), left);
      kept[0] = b[2], kept[1] = r, kept[2] = z, kept[3] = n;
    } else {
      kept[0] = sigmoid(a[0] + b[0]), kept[1] = sigmoid(a[1] + b[1]);
      kept[2] = hyperbolic_tangent(a[2] + b[2]), kept[3] = sigmoid(a[3] + b[3]);
      store(row.c_out + unit, kept[1] * load(row.c + unit, left) + kept[0] * kept[2], left);
      store(row.h_out + unit, kept[3], left);
    }
    if (KIND >= GRU && row.kept != nullptr)
      for (int i = 0; i < 4; ++i) store(row.kept + i * hidden + unit, kept[i], left);
  }
  Moments of_c{};
  if constexpr (KIND == LSTM) {
    of_c = moments<1>(row.c_out, LANES, hidden);
    for (int64_t unit = 0; unit < hidden; unit += LANES) {
      const int64_t left = hidden - unit;
      const Floats value = (load(row.c_out + unit, left) - of_c.mean) * of_c.rstd;
      const Floats tanh_c = hyperbolic_tangent(value * load(norms.c + unit, left) + load(norms.bias_c + unit, left));
      store(row.h_out + unit, load(row.h_out + unit, left) * tanh_c, left);
    }
  }
  if (row.kept == nullptr) return;
  float* const stats = kept_h + G * hidden;
  stats[RSTD_IH] = of_i.rstd, stats[RSTD_HH] = of_h.rstd, stats[MEAN_C] = of_c.mean, stats[RSTD_C] = of_c.rstd;
}

// With d = slope·norm and x what was normalised: out = rstd·(d - mean(d) - x·mean(d·x)).
template <int G>
FUSED_OPS_INLINE void through_norm(const float* const (&slopes)[G], const float* norm, const float* x, float rstd,
                                   int64_t hidden, float* out) {
  const float share = 1.0f / static_cast<float>(G * hidden);
  Floats sums[G] = {}, dots[G] = {};
  for (int64_t unit = 0; unit < hidden; unit += LANES)
    for (int g = 0; g < G; ++g) {
      const int64_t left = hidden - unit, at = g * hidden + unit;
      const Floats d = load(slopes[g] + unit, left) * load(norm + at, left);
      store(out + at, d, left);  // rounded once and for all: d - mean(d) may cancel
      sums[g] += d;
      dots[g] += d * load(x + at, left);
    }
  const float mean = total(sums) * share, mean_x = total(dots) * share;
  for (int g = 0; g < G; ++g)
    for (int64_t unit = 0; unit < hidden; unit += LANES) {
      const int64_t left = hidden - unit, at = g * hidden + unit;
      store(out + at, rstd * (load(out + at, left) - mean - mean_x * load(x + at, left)), left);
    }
}

// The slopes of the LSTM's o and of LN(c)·norm_c + bias_c; leaves in `scratch` what comes to c from there.
static void back_from_c(const BackRow& row, const NormBack& job, const float* stats, float* slopes, float* scratch) {
  const int64_t hidden = job.hidden;
  const Norms& norms = job.norms;
  float* const values = scratch + hidden;
  for (int64_t unit = 0; unit < hidden; unit += LANES) {
    const int64_t left = hidden - unit;
    const Floats dh = load(row.carried + unit, left);
    const Floats o = load(row.kept + 3 * hidden + unit, left);
    const Floats value = (load(row.c + unit, left) - stats[MEAN_C]) * stats[RSTD_C];
    const Floats tanh_c = hyperbolic_tangent(value * load(norms.c + unit, left) + load(norms.bias_c + unit, left));
    const Floats slope = dh * o * (1.0f - tanh_c * tanh_c);
    store(slopes + 3 * hidden + unit, dh * tanh_c * o * (1.0f - o), left);
    store(slopes + 4 * hidden + unit, slope, left);
    store(slopes + 5 * hidden + unit, slope * value, left);
    store(values + unit, value, left);
    if (job.inner != 0) store(row.slopes + job.inner + unit, o * tanh_c, left);
  }
  const float* const of_c[1] = {slopes + 4 * hidden};
  through_norm<1>(of_c, norms.c, values, stats[RSTD_C], hidden, scratch);
}

// The slopes of a panel's gates before their activation. to_c: what comes to the LSTM's c from h.
template <int KIND>
FUSED_OPS_INLINE void back_from_gates(const BackRow& row, const float* to_c, int64_t unit, int64_t hidden,
                                      float* slopes) {
  const int64_t left = hidden - unit;
  const auto kept = [&](int i) { return load(row.kept + i * hidden + unit, left); };
  const auto slope = [&](int i, Floats value) { store(slopes + i * hidden + unit, value, left); };
  if constexpr (KIND == LSTM) {
    const Floats i = kept(0), f = kept(1), g = kept(2);
    const Floats dc = load(to_c + unit, left) + optional(row.dc, unit, left) + optional(row.grad_c, unit, left);
    slope(0, dc * g * i * (1.0f - i));
    slope(1, dc * load(row.c_before + unit, left) * f * (1.0f - f));
    slope(2, dc * i * (1.0f - g * g));
    store(row.dc_out + unit, dc * f, left);
    return;
  }
  const Floats dh = load(row.carried + unit, left);
  if constexpr (KIND == TANH) {
    const Floats h = load(row.h + unit, left);
    slope(0, dh * (1.0f - h * h));
  } else if constexpr (KIND == RELU) {
    slope(0, load(row.h + unit, left) <= 0.0f ? Floats{} : dh);
  } else if constexpr (KIND == GRU) {
    const Floats half = kept(0), r = kept(1), z = kept(2), n = kept(3);
    const Floats dn = dh * (1.0f - z) * (1.0f - n * n);
    slope(0, dn * half * r * (1.0f - r));
    slope(1, dh * (load(row.h_before + unit, left) - n) * z * (1.0f - z));
    slope(2, dn);
    slope(3, dn * r);
    store(row.passed + unit, dh * z, left);
  }
}

template <int KIND>
static void norm_back(const NormBack& job, const BackRow& row) {
  constexpr int G = gates_of(KIND);
  const int64_t hidden = job.hidden;
  const float* const x_ih = row.kept + kept_of(KIND, job.zoned) * hidden;
  const float *const x_hh = x_ih + G * hidden, *const stats = x_hh + G * hidden;
  float *const d_hh = row.slopes, *const d_ih = d_hh + G * hidden, *const slopes = d_ih + G * hidden;
  if constexpr (KIND == LSTM) back_from_c(row, job, stats, slopes, d_hh);
  for (int64_t unit = 0; unit < hidden; unit += LANES) back_from_gates<KIND>(row, d_hh, unit, hidden, slopes);
  const float *of_ih[G], *of_hh[G];
  for (int g = 0; g < G; ++g) of_ih[g] = of_hh[g] = slopes + g * hidden;
  if (KIND == GRU) of_hh[G - 1] = slopes + 3 * hidden;
  through_norm<G>(of_ih, job.norms.ih, x_ih, stats[RSTD_IH], hidden, d_ih);
  through_norm<G>(of_hh, job.norms.hh, x_hh, stats[RSTD_HH], hidden, d_hh);
}

template <int KIND>
static void norm_step(const NormStep& job, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    norm_step<KIND>(job, job.step.rows[row], job.products + row * gates_of(KIND) * LANES);
}

template <int KIND>
static void norm_back(const NormBack& job, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) norm_back<KIND>(job, job.rows[row]);
}

static void norm_sums(const NormSums& job, int64_t begin, int64_t end) {
  for (int64_t unit = begin * LANES; unit < job.count && unit < end * LANES; unit += LANES) {
    const int64_t left = job.count - unit;
    Floats sum = {}, dot = {};
    for (int64_t token = 0; token < job.tokens; ++token) {
      const Floats slope = load(job.slopes + token * job.stride + unit, left);
      sum += slope;
      if (job.dot != nullptr) dot += slope * load(job.factors[token] + job.offset + unit, left);
    }
    const auto into = [&](float* to, Floats value) {
      if (to != nullptr) store(to + unit, job.add ? load(to + unit, left) + value : value, left);
    };
    into(job.sum, sum);
    into(job.dot, dot);
  }
}

constexpr NormKernels norm_kernels = {
    {norm_step<TANH>, norm_step<RELU>, norm_step<GRU>, norm_step<LSTM>},
    {norm_back<TANH>, norm_back<RELU>, norm_back<GRU>, norm_back<LSTM>},
    norm_sums,
};

}  // namespace fused_ops::rnn::FUSED_OPS_ISA
