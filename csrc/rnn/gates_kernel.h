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

}  // namespace fused_ops::rnn::FUSED_OPS_ISA
