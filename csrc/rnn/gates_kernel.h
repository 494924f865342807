// What the four kinds of cell do between their products, forward and backward, one panel of one row at a time. Included
// once per instruction set (isa_cpu.cpp), after vector_kernel.h.

namespace fused_ops::rnn::FUSED_OPS_ISA {

template <int KIND>
FUSED_OPS_INLINE Floats activation(Floats x) {
  return KIND == RELU ? (x < 0.0f ? Floats{} : x) : hyperbolic_tangent(x);  // written so that NaN stays NaN
}

// acc: the gates before their activation; the GRU's n is W_hn·h + b_hn alone, and gi has its other half.
template <int KIND>
FUSED_OPS_INLINE void finish_step(const Floats* acc, const float* gi, const StepRow& row, int64_t unit,
                                  int64_t hidden) {
  const int64_t left = hidden - unit;
  Floats h;
  if constexpr (KIND < GRU) {
    h = activation<KIND>(acc[0]);
  } else {
    Floats kept[4];
    if constexpr (KIND == GRU) {
      const Floats r = sigmoid(acc[0]), z = sigmoid(acc[1]);
      const Floats n = hyperbolic_tangent(load(gi + 2 * LANES) + r * acc[2]);
      h = n + z * (load(row.h + unit, left) - n);
      kept[0] = acc[2], kept[1] = r, kept[2] = z, kept[3] = n;
    } else {
      const Floats i = sigmoid(acc[0]), f = sigmoid(acc[1]), g = hyperbolic_tangent(acc[2]), o = sigmoid(acc[3]);
      const Floats c = f * load(row.c + unit, left) + i * g;
      store(row.c_out + unit, c, left);
      h = o * hyperbolic_tangent(c);
      kept[0] = i, kept[1] = f, kept[2] = g, kept[3] = o;
    }
    if (row.kept != nullptr)
      for (int value = 0; value < 4; ++value) store(row.kept + value * hidden + unit, kept[value], left);
  }
  store(row.h_out + unit, h, left);
}

FUSED_OPS_INLINE Floats optional(const float* from, int64_t unit, int64_t left) {
  return from == nullptr ? Floats{} : load(from + unit, left);
}

// product: what the step after passes back through W_hh. Leaves the step's slopes.
template <int KIND>
static __attribute__((noinline)) void finish_back(const Floats* product, const BackRow& row, int64_t unit,
                                                  int64_t hidden) {
  const int64_t left = hidden - unit;
  Floats dh = row.cut ? Floats{} : *product;
  dh += optional(row.carried, unit, left);
  if (row.slopes == nullptr) return store(row.passed + unit, dh, left);
  dh += optional(row.grad, unit, left);
  dh += optional(row.grad_all, unit, left);
  const auto slope = [&](int i, Floats value) { store(row.slopes + i * hidden + unit, value, left); };
  const auto kept = [&](int i) { return load(row.kept + i * hidden + unit, left); };
  if constexpr (KIND == TANH) {
    const Floats h = load(row.h + unit, left);
    slope(0, dh * (1.0f - h * h));
  } else if constexpr (KIND == RELU) {
    slope(0, load(row.h + unit, left) <= 0.0f ? Floats{} : dh);
  } else if constexpr (KIND == GRU) {
    const Floats product_n = kept(0), r = kept(1), z = kept(2), n = kept(3);
    const Floats dn = dh * (1.0f - z) * (1.0f - n * n);
    slope(0, dn * r);
    slope(1, dn * product_n * r * (1.0f - r));
    slope(2, dh * (load(row.h_before + unit, left) - n) * z * (1.0f - z));
    slope(3, dn);
    store(row.passed + unit, dh * z, left);
  } else {
    const Floats i = kept(0), f = kept(1), g = kept(2), o = kept(3);
    const Floats tanh_c = hyperbolic_tangent(load(row.c + unit, left));
    const Floats dc = optional(row.dc, unit, left) + optional(row.grad_c, unit, left) +
                      dh * o * (1.0f - tanh_c * tanh_c);
    slope(0, dc * g * i * (1.0f - i));
    slope(1, dc * load(row.c_before + unit, left) * f * (1.0f - f));
    slope(2, dc * i * (1.0f - g * g));
    slope(3, dh * tanh_c * o * (1.0f - o));
    store(row.dc_out + unit, dc * f, left);
  }
}

typedef uint8_t Bytes __attribute__((vector_size(LANES)));

// Lanes that are all ones where `from` is true.
FUSED_OPS_INLINE Ints where(const bool* from, int64_t left) {
  Bytes bytes = {};
  if (left >= LANES) __builtin_memcpy(&bytes, from, LANES);
  else __builtin_memcpy(&bytes, from, left);
  return __builtin_convertvector(bytes, Ints) != 0;
}

static void zone(const Zone& zone, const float* before, float* state, int64_t count) {
  for (int64_t unit = 0; unit < count; unit += LANES) {
    const int64_t left = count - unit;
    const Floats old = load(before + unit, left), now = load(state + unit, left);
    const Floats then = zone.keep == nullptr ? zone.share * old + (1.0f - zone.share) * now
                                             : (where(zone.keep + unit, left) ? old : now);
    store(state + unit, then, left);
  }
}

static void split(const Split& job, int64_t count) {
  for (int64_t unit = 0; unit < count; unit += LANES) {
    const int64_t left = count - unit;
    Floats total = optional(job.product, unit, left);
    if (job.mask != nullptr) total *= load(job.mask + unit, left);
    total += optional(job.carried, unit, left);
    total += optional(job.grad, unit, left);
    total += optional(job.grad_all, unit, left);
    if (job.kept == nullptr) {
      store(job.rest + unit, total, left);
    } else if (job.zone.keep == nullptr) {
      store(job.rest + unit, (1.0f - job.zone.share) * total, left);
      store(job.kept + unit, job.zone.share * total, left);
    } else {
      const Ints keep = where(job.zone.keep + unit, left);
      store(job.rest + unit, keep ? Floats{} : total, left);
      store(job.kept + unit, keep ? total : Floats{}, left);
    }
  }
}

static void times(float* to, const float* a, const float* b, int64_t count) {
  for (int64_t unit = 0; unit < count; unit += LANES)
    store(to + unit, load(a + unit, count - unit) * load(b + unit, count - unit), count - unit);
}

// c~ = f·c + i·g of an LSTM's step and, if wanted, o·tanh(c~), from what it kept.
static void recall(const float* kept, const float* c_before, float* c, float* h, int64_t count) {
  for (int64_t unit = 0; unit < count; unit += LANES) {
    const int64_t left = count - unit;
    const auto value = [&](int i) { return load(kept + i * count + unit, left); };
    const Floats now = value(1) * load(c_before + unit, left) + value(0) * value(2);
    store(c + unit, now, left);
    if (h != nullptr) store(h + unit, value(3) * hyperbolic_tangent(now), left);
  }
}

}  // namespace fused_ops::rnn::FUSED_OPS_ISA
