"""What the Triton kernels of cells and layers share: the gates' maths, and where a step's values are.

Names as in layers.py: tokens N, directions D, gates G, kept K, slopes S. Tiles are (rows, units); what a gate, a kept
value or a slope has one of is a tuple of tiles. An argument that is None is not compiled in.
"""

import triton
import triton.language as tl

from fused_ops.rnn.reference import EPS

_EPS = tl.constexpr(EPS)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """An odd polynomial near 0 (Cephes' tanhf), 1 - 2/(e^2|x| + 1) beyond."""
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    z = x * x
    p = ((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1
    near = (p * z - 3.33332819422e-1) * z * x + x
    return tl.where(size < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def relu(x):
    return tl.where(x < 0.0, 0.0, x)  # written so that NaN stays NaN


@triton.jit
def gates_fwd(b_x, b_p, b_hn, b_h, b_c, MODE: tl.constexpr):
    """(h', c', kept) of x = W_ih·x + b and p = W_hh·h, a tile for each gate.

    RNN: h' = f(x + p), Elman 1990. GRU, [r, z, n]: q = p_n + b_hn, n = tanh(x_n + r·q), h' = (1 - z)·n + z·h, keeps
    [q, r, z, n]; Cho et al. 2014, reset after the product. LSTM, keeps [i, f, g, o]: c' = f·c + i·g, h' = o·tanh(c');
    Gers et al. 2000. The RNN's kept is h'.
    """
    if MODE == "lstm":
        b_i, b_f = sigmoid(b_x[0] + b_p[0]), sigmoid(b_x[1] + b_p[1])
        b_g, b_o = tanh(b_x[2] + b_p[2]), sigmoid(b_x[3] + b_p[3])
        b_new = b_f * b_c + b_i * b_g
        return b_o * tanh(b_new), b_new, (b_i, b_f, b_g, b_o)
    elif MODE == "gru":
        b_r, b_z = sigmoid(b_x[0] + b_p[0]), sigmoid(b_x[1] + b_p[1])
        b_q = b_p[2] + b_hn
        b_n = tanh(b_x[2] + b_r * b_q)
        return b_n + b_z * (b_h - b_n), b_c, (b_q, b_r, b_z, b_n)
    elif MODE == "rnn_relu":
        b_new = relu(b_x[0] + b_p[0])
        return b_new, b_c, (b_new,)
    else:
        b_new = tanh(b_x[0] + b_p[0])
        return b_new, b_c, (b_new,)


@triton.jit
def gates_bwd(b_dh, b_dc, b_kept, b_h_before, b_t, b_c_before, MODE: tl.constexpr):
    """(slopes, dL/dh that bypasses the product, dL/dc of the step before) of dL/dh' and, for the LSTM, dL/dc' with
    h' = o·t.

    Slopes are dL/d(gates before their activation): RNN [s], LSTM [i, f, g, o], GRU [q, r, z, n].
    """
    if MODE == "lstm":
        b_i, b_f, b_g, b_o = b_kept
        b_si, b_sf = b_dc * b_g * b_i * (1.0 - b_i), b_dc * b_c_before * b_f * (1.0 - b_f)
        b_sg, b_so = b_dc * b_i * (1.0 - b_g * b_g), b_dh * b_t * b_o * (1.0 - b_o)
        return (b_si, b_sf, b_sg, b_so), tl.zeros_like(b_dh), b_dc * b_f
    elif MODE == "gru":
        b_q, b_r, b_z, b_n = b_kept
        b_sn = b_dh * (1.0 - b_z) * (1.0 - b_n * b_n)
        b_sz = b_dh * (b_h_before - b_n) * b_z * (1.0 - b_z)
        return (b_sn * b_r, b_sn * b_q * b_r * (1.0 - b_r), b_sz, b_sn), b_dh * b_z, b_dc
    elif MODE == "rnn_relu":
        return (tl.where(b_kept[0] <= 0.0, 0.0, b_dh),), tl.zeros_like(b_dh), b_dc
    else:
        return (b_dh * (1.0 - b_kept[0] * b_kept[0]),), tl.zeros_like(b_dh), b_dc


@triton.jit
def summed(b_values, COUNT: tl.constexpr):
    b_sum = b_values[0]
    for i in tl.static_range(1, COUNT):
        b_sum += b_values[i]
    return b_sum


@triton.jit
def squares(b_values, b_mean, m_unit, COUNT: tl.constexpr):
    """Σ (v - mean)² over the tiles, element by element."""
    b_off = tl.where(m_unit[None, :], b_values[0] - b_mean[:, None], 0.0)
    b_sum = b_off * b_off
    for i in tl.static_range(1, COUNT):
        b_off = tl.where(m_unit[None, :], b_values[i] - b_mean[:, None], 0.0)
        b_sum += b_off * b_off
    return b_sum


@triton.jit
def root(b_variance):
    """1/√(variance + EPS)."""
    return tl.rsqrt(b_variance + _EPS)


@triton.jit
def moments(b_values, m_unit, hidden, COUNT: tl.constexpr):
    """(mean, 1/√(variance + EPS)) of each row's COUNT·hidden values, which these tiles have all of."""
    b_mean = tl.sum(summed(b_values, COUNT), 1) / (COUNT * hidden)
    return b_mean, root(tl.sum(squares(b_values, b_mean, m_unit, COUNT), 1) / (COUNT * hidden))


@triton.jit
def normalised(b_values, b_mean, b_rstd, p_norm, p_bias, i_d, o_unit, m_unit, hidden, COUNT: tl.constexpr):
    """(v - mean)·rstd·norm + bias; norm and bias (directions, COUNT, hidden). Ba et al. 2016, eq. 4."""
    b_found = ()
    for i in tl.static_range(COUNT):
        o_norm = (i_d * COUNT + i) * hidden + o_unit
        b_value = (b_values[i] - b_mean[:, None]) * b_rstd[:, None]
        b_value *= tl.load(p_norm + o_norm, mask=m_unit, other=0.0)[None, :]
        if p_bias is not None:
            b_value += tl.load(p_bias + o_norm, mask=m_unit, other=0.0)[None, :]
        b_found += (b_value,)
    return b_found


@triton.jit
def scaled(b_slopes, p_norm, i_d, o_unit, m_unit, hidden, MODE: tl.constexpr, COUNT: tl.constexpr):
    """dL/dhat in the norms' order of the slopes behind them; the GRU's slopes begin with n, r, z, and not r, z, n."""
    FIRST: tl.constexpr = 1 if MODE == "gru" else 0
    b_found = ()
    for i in tl.static_range(COUNT):
        b_norm = tl.load(p_norm + (i_d * COUNT + i) * hidden + o_unit, mask=m_unit, other=0.0)
        b_found += (b_slopes[(i + FIRST) % COUNT] * b_norm[None, :],)
    return b_found


@triton.jit
def times(b_left, b_right, COUNT: tl.constexpr):
    b_found = ()
    for i in tl.static_range(COUNT):
        b_found += (b_left[i] * b_right[i],)
    return b_found


@triton.jit
def before_norm(b_d, b_hat, b_rstd, b_mean, b_mean_hat, COUNT: tl.constexpr):
    """dL/dv = rstd·(d - mean(d) - hat·mean(d·hat)) of d = dL/d(hat), hat = (v - mean(v))·rstd."""
    b_found = ()
    for i in tl.static_range(COUNT):
        b_found += (b_rstd[:, None] * (b_d[i] - b_mean[:, None] - b_hat[i] * b_mean_hat[:, None]),)
    return b_found


@triton.jit
def zoned(b_new, b_old, p_zone, o_state, m_state, zoneout):
    """The old value where p_zone says so, or the expectation p·old + (1 - p)·new; Krueger et al. 2016, eq. 3 and 4."""
    if p_zone is not None:
        return tl.where(tl.load(p_zone + o_state, mask=m_state, other=0) != 0, b_old, b_new)
    elif zoneout is not None:
        return zoneout * b_old + (1.0 - zoneout) * b_new
    else:
        return b_new


@triton.jit
def unzoned(b_d, p_zone, o_state, m_state, zoneout):
    """(dL/dnew, dL/dold) of `zoned`."""
    if p_zone is not None:
        b_keep = tl.load(p_zone + o_state, mask=m_state, other=0) != 0
        return tl.where(b_keep, 0.0, b_d), tl.where(b_keep, b_d, 0.0)
    elif zoneout is not None:
        return (1.0 - zoneout) * b_d, zoneout * b_d
    else:
        return b_d, tl.zeros_like(b_d)


@triton.jit
def row_lengths(p_lengths, o_row, batch, steps):
    """(rows,) int32: how many steps each row has, 0 past the batch."""
    m_row = o_row < batch
    if p_lengths is None:
        return tl.where(m_row, steps, 0)
    else:
        return tl.minimum(tl.load(p_lengths + o_row, mask=m_row, other=0), steps).to(tl.int32)


@triton.jit
def place_of(i_s, i_d, b_len, p_starts, o_row, batch):
    """(time, token, whether there is one) of each row's step i_s; direction 1 goes from a row's last time to 0."""
    b_time = tl.where(i_d == 0, i_s, b_len - 1 - i_s).to(tl.int64)
    m_live = (i_s >= 0) & (i_s < b_len)
    if p_starts is None:
        return b_time, b_time * batch + o_row, m_live
    else:
        return b_time, tl.load(p_starts + b_time, mask=m_live, other=0) + o_row, m_live


@triton.jit
def reset_at(p_resets, b_time, m_live, o_row, batch):
    """(rows,) bool: the state is zeroed before the step."""
    if p_resets is None:
        return m_live & (o_row < 0)
    else:
        return tl.load(p_resets + b_time * batch + o_row, mask=m_live, other=0) != 0


@triton.jit
def tiles(p_values, o_row, o_unit, hidden, m_state, COUNT: tl.constexpr):
    """The COUNT values of each unit, (COUNT, hidden) at each row's offset."""
    p_values += o_row[:, None] + o_unit[None, :]
    b_values = (tl.load(p_values, mask=m_state, other=0.0),)
    for i in tl.static_range(1, COUNT):
        b_values += (tl.load(p_values + i * hidden, mask=m_state, other=0.0),)
    return b_values


@triton.jit
def store_tiles(p_values, o_row, o_unit, hidden, m_state, b_values, COUNT: tl.constexpr):
    p_values += o_row[:, None] + o_unit[None, :]
    for i in tl.static_range(COUNT):
        tl.store(p_values + i * hidden, b_values[i].to(p_values.dtype.element_ty), mask=m_state)


@triton.jit
def products(b_left, b_right, b_sums, COUNT: tl.constexpr, PRECISION: tl.constexpr):
    """b_sums + b_left · each of b_right."""
    b_found = (tl.dot(b_left, b_right[0], b_sums[0], input_precision=PRECISION),)
    for i in tl.static_range(1, COUNT):
        b_found += (tl.dot(b_left, b_right[i], b_sums[i], input_precision=PRECISION),)
    return b_found


@triton.jit
def rounded(b_values, DTYPE: tl.constexpr, COUNT: tl.constexpr):
    b_found = ()
    for i in tl.static_range(COUNT):
        b_found += (b_values[i].to(DTYPE),)
    return b_found


@triton.jit
def state_before(i_s, i_d, directions, b_len, p_starts, p_h0, p_output, o_row, batch, states):
    """(rows,) pointers to h before step i_s."""
    if i_s == 0:
        p_before = p_h0 + (i_d * batch + o_row) * states
    else:
        p_before = p_output + (place_of(i_s - 1, i_d, b_len, p_starts, o_row, batch)[1] * directions + i_d) * states
    return p_before


@triton.jit
def cell_fwd(
    b_p, b_hn, p_gi, p_before, p_c, b_token, m_live, m_kept, i_d, directions, o_row, o_unit, batch, hidden,
    MODE: tl.constexpr, GATES: tl.constexpr, PROJECTED: tl.constexpr,
):  # fmt: skip
    """(h', c', kept, h, c) of a step: `gates_fwd`. p_before: `state_before`, not read if PROJECTED."""
    m_unit = o_unit < hidden
    m_old = m_kept[:, None] & m_unit[None, :]
    b_old = tl.zeros(m_old.shape, dtype=tl.float32)
    b_c = b_old
    if not PROJECTED:
        b_old = tl.load(p_before[:, None] + o_unit[None, :], mask=m_old, other=0.0).to(tl.float32)
    if MODE == "lstm":
        b_c = tiles(p_c, (i_d * batch + o_row) * hidden, o_unit, hidden, m_old, 1)[0]
    o_gates = (b_token * directions + i_d) * (GATES * hidden)
    b_x = tiles(p_gi, o_gates, o_unit, hidden, m_live[:, None] & m_unit[None, :], GATES)
    b_new, b_new_c, b_kept = gates_fwd(b_x, b_p, b_hn, b_old, b_c, MODE)
    return b_new, b_new_c, b_kept, b_old, b_c


@triton.jit
def keep_cell(
    b_new, b_c, b_kept, p_zone_c, zoneout_c, p_c_all, p_kept, b_token, m_cell, i_d, o_unit, tokens, hidden,
    MODE: tl.constexpr,
):  # fmt: skip
    """c after a step's zoneout; stores it, and what the gates kept."""
    o_row = (i_d * tokens + b_token) * hidden
    if MODE == "lstm":
        b_new = zoned(b_new, b_c, p_zone_c, o_row[:, None] + o_unit[None, :], m_cell, zoneout_c)
        if p_c_all is not None:
            store_tiles(p_c_all, o_row, o_unit, hidden, m_cell, (b_new,), 1)
    if p_kept is not None:
        KEPT: tl.constexpr = 4 if MODE == "lstm" or MODE == "gru" else 1
        store_tiles(p_kept, o_row * KEPT, o_unit, hidden, m_cell, b_kept, KEPT)
    return b_new


@triton.jit
def keep_state(
    b_new, b_h, p_zone_h, zoneout_h, p_output, b_token, m_state, i_d, directions, o_state, tokens, states
):  # fmt: skip
    """h after a step's zoneout, rounded; stores it."""
    o_zone = ((i_d * tokens + b_token) * states)[:, None] + o_state[None, :]
    b_new = zoned(b_new, b_h, p_zone_h, o_zone, m_state, zoneout_h).to(p_output.dtype.element_ty)
    store_tiles(p_output, (b_token * directions + i_d) * states, o_state, states, m_state, (b_new,), 1)
    return b_new


@triton.jit
def store_cell(
    b_new, b_new_c, b_kept, b_old, b_c, p_zone_h, p_zone_c, zoneout_h, zoneout_c, p_output, p_h_n, p_c_n, p_c_all,
    p_kept, p_c, p_m, i_s, b_len, b_token, m_live, i_d, directions, o_row, o_unit, batch, tokens, hidden,
    MODE: tl.constexpr,
):  # fmt: skip
    """Stores what `cell_fwd` found of step i_s; o·tanh(c) in p_m (directions, batch, hidden) if W_hr is to follow."""
    m_cell, o_cell = m_live[:, None] & (o_unit < hidden)[None, :], (i_d * batch + o_row) * hidden
    m_last = m_cell & (i_s + 1 == b_len)[:, None]
    b_new_c = keep_cell(
        b_new_c, b_c, b_kept, p_zone_c, zoneout_c, p_c_all, p_kept, b_token, m_cell, i_d, o_unit, tokens, hidden, MODE
    )
    if p_m is not None:
        store_tiles(p_m, o_cell, o_unit, hidden, m_cell, (b_new,), 1)
    else:
        b_new = keep_state(
            b_new, b_old, p_zone_h, zoneout_h, p_output, b_token, m_cell, i_d, directions, o_unit, tokens, hidden
        )
        store_tiles(p_h_n, o_cell, o_unit, hidden, m_last, (b_new,), 1)
    if MODE == "lstm":
        store_tiles(p_c, o_cell, o_unit, hidden, m_cell, (b_new_c,), 1)
        store_tiles(p_c_n, o_cell, o_unit, hidden, m_last, (b_new_c,), 1)


@triton.jit
def carried_c(
    p_dc, p_grad_c_n, p_dc0, p_resets, p_starts, i_s, i_d, b_len, o_row, o_unit, batch, hidden, MODE: tl.constexpr
):  # fmt: skip
    """dL/dc after step i_s but for grad_c_all, 0 without c. Step -1 leaves it as dL/dc_0. p_dc: what steps pass on."""
    b_time, _, m_after = place_of(i_s + 1, i_d, b_len, p_starts, o_row, batch)
    m_after &= ~reset_at(p_resets, b_time, m_after, o_row, batch)
    o_cell, m_unit = (i_d * batch + o_row) * hidden, (o_unit < hidden)[None, :]
    m_row = (o_row < batch)[:, None] & m_unit
    b_dc = tl.zeros(m_row.shape, dtype=tl.float32)
    if MODE == "lstm":
        b_dc = tiles(p_dc, o_cell, o_unit, hidden, m_after[:, None] & m_unit, 1)[0]
        if p_grad_c_n is not None:
            m_ends = m_row & (i_s + 1 == b_len)[:, None]
            b_dc += tiles(p_grad_c_n, o_cell, o_unit, hidden, m_ends, 1)[0].to(tl.float32)
        if p_dc0 is not None:
            store_tiles(p_dc0, o_cell, o_unit, hidden, m_row & (i_s < 0), (b_dc,), 1)
    return b_dc


@triton.jit
def saved_bwd(
    i_s, b_token, b_before, b_reset, m_cell, i_d, directions, o_row, o_unit, batch, tokens, hidden,
    p_grad_output, p_grad_c_all, p_output, p_c_all, p_kept, p_h0, p_c0, MODE: tl.constexpr,
):  # fmt: skip
    """(kept, h before, c, c before, dL/dh and dL/dc from outside) of a step. b_before: tokens of the step before.

    An RNN keeps h' only where its output is not h'. Of a projected h there is neither value nor gradient.
    """
    b_zero = tl.zeros(m_cell.shape, dtype=tl.float32)
    m_initial, m_before = m_cell & (i_s == 0) & ~b_reset[:, None], m_cell & (i_s > 0) & ~b_reset[:, None]
    o_initial = (i_d * batch + o_row) * hidden
    o_out, o_all = (b_token * directions + i_d) * hidden, (i_d * tokens + b_token) * hidden
    if MODE == "lstm" or MODE == "gru":
        b_kept = tiles(p_kept, o_all * 4, o_unit, hidden, m_cell, 4)
    elif p_kept is not None:
        b_kept = tiles(p_kept, o_all, o_unit, hidden, m_cell, 1)
    else:
        b_kept = tiles(p_output, o_out, o_unit, hidden, m_cell, 1)
    b_h_before, b_c, b_c_before, b_dh, b_dc = b_zero, b_zero, b_zero, b_zero, b_zero
    if MODE == "gru":
        b_h_before = tiles(p_output, (b_before * directions + i_d) * hidden, o_unit, hidden, m_before, 1)[0]
        b_h_before += tiles(p_h0, o_initial, o_unit, hidden, m_initial, 1)[0]
    if MODE == "lstm":
        b_c = tiles(p_c_all, o_all, o_unit, hidden, m_cell, 1)[0]
        b_c_before = tiles(p_c_all, (i_d * tokens + b_before) * hidden, o_unit, hidden, m_before, 1)[0]
        b_c_before += tiles(p_c0, o_initial, o_unit, hidden, m_initial, 1)[0]
    if p_grad_output is not None:
        b_dh = tiles(p_grad_output, o_out, o_unit, hidden, m_cell, 1)[0]
    if p_grad_c_all is not None:
        b_dc = tiles(p_grad_c_all, o_all, o_unit, hidden, m_cell, 1)[0]
    return b_kept, b_h_before, b_c, b_c_before, b_dh, b_dc


@triton.jit
def state_bwd(
    b_dh, p_grad_output, p_zone_h, zoneout_h, p_grad_states, b_token, m_state, i_d, directions, o_state, tokens, states
):  # fmt: skip
    """(dL/d(W_hr·m) rounded, dL/dh that zoneout passes to the step before) of dL/dh after it; stores the first."""
    o_row = (b_token * directions + i_d) * states
    if p_grad_output is not None:
        b_dh += tiles(p_grad_output, o_row, o_state, states, m_state, 1)[0].to(tl.float32)
    o_zone = ((i_d * tokens + b_token) * states)[:, None] + o_state[None, :]
    b_dh, b_passed = unzoned(b_dh, p_zone_h, o_zone, m_state, zoneout_h)
    b_dh = tl.where(m_state, b_dh, 0.0).to(p_grad_states.dtype.element_ty)
    store_tiles(p_grad_states, o_row, o_state, states, m_state, (b_dh,), 1)
    return b_dh, b_passed


@triton.jit
def norm_of_c(p_norm_c, p_bias_c, p_hat_c, p_rstd_c, b_token, m_live, i_d, o_unit, tokens, hidden):
    """(norm, bias, hat, rstd) of a step's layer norm over c."""
    o_norm, m_unit = i_d * hidden + o_unit, o_unit < hidden
    b_norm = tl.load(p_norm_c + o_norm, mask=m_unit, other=0.0)[None, :]
    b_bias = tl.load(p_bias_c + o_norm, mask=m_unit, other=0.0)[None, :]
    m_cell = m_live[:, None] & m_unit[None, :]
    b_hat = tiles(p_hat_c, (i_d * tokens + b_token) * hidden, o_unit, hidden, m_cell, 1)[0]
    return b_norm, b_bias, b_hat, rstd_of(p_rstd_c, b_token, m_live, i_d, tokens)


@triton.jit
def rstd_of(p_rstd, b_token, m_live, i_d, tokens):
    """(rows,) of p_rstd (directions, tokens), 0 for rows that have ended."""
    return tl.load(p_rstd + i_d * tokens + b_token, mask=m_live, other=0.0)


@triton.jit
def finish_bwd(
    b_saved, b_dh, b_dc, b_norm, b_means, p_zone_h, p_zone_c, zoneout_h, zoneout_c,
    b_token, m_cell, i_d, o_unit, tokens, hidden, MODE: tl.constexpr,
):  # fmt: skip
    """(slopes, dL/dh that bypasses the product, dL/dc before, dL/d(normalised c)) of dL/dh and dL/dc after the step.

    b_norm: `norm_of_c`, or None. b_means: of dL/dhat and of dL/dhat·hat over a row, None where these tiles have all of
    it.
    """
    b_kept, b_h_before, b_c, b_c_before, b_grad_h, b_grad_c = b_saved
    o_state = ((i_d * tokens + b_token) * hidden)[:, None] + o_unit[None, :]
    b_dh, b_passed = unzoned(b_dh + b_grad_h.to(tl.float32), p_zone_h, o_state, m_cell, zoneout_h)
    b_dc, b_passed_c = unzoned(b_dc + b_grad_c.to(tl.float32), p_zone_c, o_state, m_cell, zoneout_c)
    b_kept = rounded(b_kept, tl.float32, 4 if MODE == "lstm" or MODE == "gru" else 1)
    b_t, b_into = b_c, b_c
    if MODE == "lstm":
        if b_norm is not None:
            b_t = tanh(b_norm[2] * b_norm[0] + b_norm[1])
        elif p_zone_c is not None or zoneout_c is not None:
            b_t = tanh(b_kept[1] * b_c_before + b_kept[0] * b_kept[2])
        else:
            b_t = tanh(b_c)
        b_into = b_dh * b_kept[3] * (1.0 - b_t * b_t)
        if b_norm is not None:
            b_d, b_hat = b_into * b_norm[0], b_norm[2]
            if b_means is None:
                b_means = tl.sum(b_d, 1) / hidden, tl.sum(b_d * b_hat, 1) / hidden
            b_dc += before_norm((b_d,), (b_hat,), b_norm[3], b_means[0], b_means[1], 1)[0]
        else:
            b_dc += b_into
    b_slopes, b_bypass, b_dc = gates_bwd(b_dh, b_dc, b_kept, b_h_before.to(tl.float32), b_t, b_c_before, MODE)
    return b_slopes, b_passed + b_bypass, b_dc + b_passed_c, b_into
