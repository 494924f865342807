// One layer's sequences as its recurrent kernels see them: kinds of cell, sizes, and which token a row's step is. Plain
// functions, for host and device.
#pragma once

#include <cstdint>

namespace fused_ops::layers {

// The four modes; `rnn` is tanh or relu.
enum class Kind : uint8_t { rnn, gru, lstm };

// G, the products of W_hh per unit; K, the values a step keeps for the backward; S, the slopes of a unit.
constexpr int gates_of(Kind kind) { return kind == Kind::lstm ? 4 : kind == Kind::gru ? 3 : 1; }
constexpr int kept_of(Kind kind) { return kind == Kind::rnn ? 0 : 4; }
constexpr int slopes_of(Kind kind) { return kind == Kind::rnn ? 1 : 4; }

// Rows b of a batch, each with its own number of steps. Padded: token(t, b) = t·batch + b. Packed (`starts` is there):
// token(t, b) = starts[t] + b. Step s of direction 1 is counted from the row's end.
struct Sequence {
  int64_t batch, tokens;
  int hidden, directions, steps;
  const int64_t* lengths;  // (batch,), or null: all of `steps`
  const int64_t* starts;   // (steps,), or null: padded
  const bool* resets;      // (steps, batch), or null

  constexpr int length(int64_t b) const {
    if (lengths == nullptr) return steps;
    const int64_t length = lengths[b];
    return static_cast<int>(length < 0 ? 0 : length > steps ? steps : length);
  }
  static constexpr int time(int direction, int step, int length) {
    return direction == 0 ? step : length - 1 - step;
  }
  constexpr int64_t token(int64_t t, int64_t b) const {
    return starts == nullptr ? t * batch + b : starts[t] + b;
  }
  constexpr bool reset(int64_t t, int64_t b) const { return resets != nullptr && resets[t * batch + b]; }

  // Where unit u's value p of P is, in a (tokens, directions, P, hidden) tensor and in a (directions, tokens, P, hidden).
  constexpr int64_t by_token(int64_t token, int direction, int P, int p, int unit) const {
    return (token * directions + direction) * (P * hidden) + p * hidden + unit;
  }
  constexpr int64_t by_direction(int64_t token, int direction, int P, int p, int unit) const {
    return (direction * tokens + token) * (P * hidden) + p * hidden + unit;
  }
  // In a (directions, batch, hidden) tensor of states.
  constexpr int64_t state(int direction, int64_t b, int unit) const {
    return (direction * batch + b) * hidden + unit;
  }
};

// What a call draws: a mask on h where it enters W_hh (Gal & Ghahramani 2016) and zoneout (Krueger et al. 2016, eq. 3
// and 4), drawn or expected. What is null is not there. P: features of h.
template <typename T>
struct Noise {
  const T* mask;                  // (directions, batch, P)
  const bool *zone_h, *zone_c;    // (directions, tokens, P), (directions, tokens, hidden)
  float zoneout_h, zoneout_c;     // where there is no zone: the share of the old state that is expected to stay

  constexpr bool expects_h() const { return zone_h == nullptr && zoneout_h > 0.0f; }
  constexpr bool expects_c() const { return zone_c == nullptr && zoneout_c > 0.0f; }

  // The state after zoneout; `zone` is this step's.
  constexpr float h(bool zone, float fresh, float old) const { return zoned(zone, expects_h(), zoneout_h, fresh, old); }
  constexpr float c(bool zone, float fresh, float old) const { return zoned(zone, expects_c(), zoneout_c, fresh, old); }

 private:
  static constexpr float zoned(bool zone, bool expects, float share, float fresh, float old) {
    if (expects) return share * old + (1.0f - share) * fresh;
    return zone ? old : fresh;
  }
};

}  // namespace fused_ops::layers
