"""A layer's whole time loop in one launch: a program is a tile of rows in one direction.

W_hh and W_hr stay in shared memory, h and c stay in registers, and a row's gates are all in one program, so that their
layer norm is a reduction there. A step's inputs are asked for a step ahead.

The cell has `hidden` units (BLOCK_H), the state has `states` (BLOCK_P): fewer where W_hr projects it.
"""

import triton
import triton.language as tl

from fused_ops.rnn.triton_gates import (
    before_norm,
    finish_bwd,
    gates_fwd,
    keep_cell,
    keep_state,
    moments,
    norm_of_c,
    normalised,
    place_of,
    products,
    reset_at,
    row_lengths,
    rstd_of,
    saved_bwd,
    scaled,
    state_bwd,
    store_tiles,
    summed,
    tanh,
    tiles,
    times,
)


@triton.jit
def _weight(p_w, gate, i_d, GATES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """(units, k): one gate's rows of a weight that lies padded with zeros to (directions, GATES, BLOCK_N, BLOCK_K)."""
    p_w = tl.multiple_of(p_w + (i_d * GATES + gate) * (BLOCK_N * BLOCK_K), 16)
    return tl.load(p_w + tl.arange(0, BLOCK_N)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :])


@triton.jit
def _weights(p_w, i_d, GATES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TRANSPOSED: tl.constexpr):
    b_w = ()
    for gate in tl.static_range(GATES):
        if TRANSPOSED:
            b_w += (_weight(p_w, gate, i_d, GATES, BLOCK_N, BLOCK_K).T,)
        else:
            b_w += (_weight(p_w, gate, i_d, GATES, BLOCK_N, BLOCK_K),)
    return b_w


@triton.jit
def _inputs(
    i_s, i_d, b_len, p_gi, p_starts, p_resets, o_row, o_unit, batch, hidden, directions, GATES: tl.constexpr
):  # fmt: skip
    """(token, whether there is one, reset, gates' inputs) of step i_s."""
    b_time, b_token, m_live = place_of(i_s, i_d, b_len, p_starts, o_row, batch)
    m_cell = m_live[:, None] & (o_unit < hidden)[None, :]
    b_reset = reset_at(p_resets, b_time, m_live, o_row, batch)
    b_x = tiles(p_gi, (b_token * directions + i_d) * (GATES * hidden), o_unit, hidden, m_cell, GATES)
    return b_token, m_live, b_reset, b_x


@triton.jit
def _cell(
    b_x, b_p, b_hn, b_old, b_c, p_norm_hh, p_b_hh, p_norm_c, p_bias_c, i_d, o_unit, hidden, MODE: tl.constexpr,
    GATES: tl.constexpr,
):  # fmt: skip
    """`gates_fwd`, with norms over the products and the LSTM's c if they are given; Ba et al. 2016, supplement."""
    m_unit = o_unit < hidden
    if p_norm_hh is not None:
        b_mean, b_rstd = moments(b_p, m_unit, hidden, GATES)
        b_p = normalised(b_p, b_mean, b_rstd, p_norm_hh, p_b_hh, i_d, o_unit, m_unit, hidden, GATES)
    b_new, b_new_c, b_kept = gates_fwd(b_x, b_p, b_hn, b_old, b_c, MODE)
    if p_norm_c is not None:
        b_mean, b_rstd = moments((b_new_c,), m_unit, hidden, 1)
        b_u = normalised((b_new_c,), b_mean, b_rstd, p_norm_c, p_bias_c, i_d, o_unit, m_unit, hidden, 1)
        b_new = b_kept[3] * tanh(b_u[0])
    return b_new, b_new_c, b_kept


@triton.jit
def rnn_fused_fwd_kernel(
    p_gi, p_w, p_b_hn, p_w_hr, p_norm_hh, p_b_hh, p_norm_c, p_bias_c, p_h0, p_c0, p_lengths, p_starts, p_resets,
    p_mask, p_zone_h, p_zone_c, zoneout_h, zoneout_c, p_output, p_h_n, p_c_n, p_c_all, p_kept,
    batch, steps, tokens, hidden, states, MODE: tl.constexpr, GATES: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h_t, c_t = cell(gi_t, W_hh·h_{t-1}, c_{t-1}) for all t; the cells and their sources: `gates_fwd`, `_cell`."""
    if p_w_hr is None:
        states = hidden  # so that the compiler knows
    i_d, directions = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    o_unit, o_state = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_P)
    m_unit, m_row = o_unit < hidden, (o_row < batch)[:, None]
    b_w = _weights(p_w, i_d, GATES, BLOCK_H, BLOCK_P, True)
    if p_w_hr is not None:
        b_w_hr = _weight(p_w_hr, 0, i_d, 1, BLOCK_P, BLOCK_H).T
    o_first, o_cell = (i_d * batch + o_row) * states, (i_d * batch + o_row) * hidden
    m_first = m_row & (o_state < states)[None, :]
    b_h = tiles(p_h0, o_first, o_state, states, m_first, 1)[0]
    b_zero = tl.zeros([BLOCK_B, BLOCK_H], dtype=tl.float32)
    b_c, b_hn = b_zero, b_zero
    if MODE == "lstm":
        b_c = tiles(p_c0, o_cell, o_unit, hidden, m_row & m_unit[None, :], 1)[0].to(tl.float32)
    if p_b_hn is not None:
        b_hn = tl.load(p_b_hn + i_d * hidden + o_unit, mask=m_unit, other=0.0).to(tl.float32)[None, :]
    if p_mask is not None:
        b_mask = tiles(p_mask, o_first, o_state, states, m_first, 1)[0]
    b_len = row_lengths(p_lengths, o_row, batch, steps)
    how = i_d, b_len, p_gi, p_starts, p_resets, o_row, o_unit, batch, hidden, directions
    b_token, m_live, b_reset, b_x = _inputs(0, *how, GATES)
    for i_s in tl.range(0, tl.max(b_len)):
        b_next_token, m_next, b_next_reset, b_next_x = _inputs(i_s + 1, *how, GATES)
        m_cell, m_state = m_live[:, None] & m_unit[None, :], m_live[:, None] & (o_state < states)[None, :]
        if p_resets is not None:
            b_h = tl.where(b_reset[:, None], 0.0, b_h)
            b_c = tl.where(b_reset[:, None], 0.0, b_c)
        b_fed = b_h
        if p_mask is not None:
            b_fed = (b_h.to(tl.float32) * b_mask.to(tl.float32)).to(b_h.dtype)
        b_p = products(b_fed, b_w, (b_zero,) * GATES, GATES, PRECISION)
        b_old = b_h.to(tl.float32)
        b_new, b_new_c, b_kept = _cell(
            b_x, b_p, b_hn, b_old, b_c, p_norm_hh, p_b_hh, p_norm_c, p_bias_c, i_d, o_unit, hidden, MODE, GATES
        )
        if p_w_hr is not None:
            b_m = tl.where(m_unit[None, :], b_new, 0.0).to(b_h.dtype)
            b_new = tl.dot(b_m, b_w_hr, input_precision=PRECISION)
        b_new = keep_state(
            b_new, b_old, p_zone_h, zoneout_h, p_output, b_token, m_state, i_d, directions, o_state, tokens, states
        )
        b_new_c = keep_cell(
            b_new_c, b_c, b_kept, p_zone_c, zoneout_c, p_c_all, p_kept, b_token, m_cell, i_d, o_unit, tokens, hidden,
            MODE,
        )  # fmt: skip
        b_h, b_c = tl.where(m_state, b_new, b_h), tl.where(m_cell, b_new_c, b_c)
        b_token, m_live, b_reset, b_x = b_next_token, m_next, b_next_reset, b_next_x
    store_tiles(p_h_n, o_first, o_state, states, m_first, (b_h,), 1)
    if MODE == "lstm":
        store_tiles(p_c_n, o_cell, o_unit, hidden, m_row & m_unit[None, :], (b_c,), 1)


@triton.jit
def _saved(
    i_s, i_d, directions, b_len, p_starts, p_resets, o_row, o_unit, batch, tokens, hidden,
    p_grad_output, p_grad_c_all, p_output, p_c_all, p_kept, p_h0, p_c0, MODE: tl.constexpr,
):  # fmt: skip
    """(token, whether there is one, reset, `saved_bwd`) of step i_s."""
    b_time, b_token, m_live = place_of(i_s, i_d, b_len, p_starts, o_row, batch)
    b_reset = reset_at(p_resets, b_time, m_live, o_row, batch)
    b_before = place_of(i_s - 1, i_d, b_len, p_starts, o_row, batch)[1]
    return b_token, m_live, b_reset, saved_bwd(
        i_s, b_token, b_before, b_reset, m_live[:, None] & (o_unit < hidden)[None, :], i_d, directions, o_row, o_unit,
        batch, tokens, hidden, p_grad_output, p_grad_c_all, p_output, p_c_all, p_kept, p_h0, p_c0, MODE,
    )  # fmt: skip


@triton.jit
def _cell_bwd(
    b_saved, b_dh, b_dc, p_norm_hh, p_norm_c, p_bias_c, p_hat_hh, p_rstd_hh, p_hat_c, p_rstd_c, p_zone_h, p_zone_c,
    zoneout_h, zoneout_c, p_slopes, p_through, p_slopes_c, b_token, m_live, i_d, directions, o_unit, tokens, hidden,
    MODE: tl.constexpr, GATES: tl.constexpr, SLOPES: tl.constexpr,
):  # fmt: skip
    """(dL/d(W_hh·h) in the order of W_hh's gates, dL/dh that bypasses it, dL/dc before) of dL/dh and dL/dc: stores the
    slopes, and dL/d(W_hh·h) where it is behind a norm."""
    m_unit, m_cell = o_unit < hidden, m_live[:, None] & (o_unit < hidden)[None, :]
    b_norm = None
    if p_norm_c is not None:
        b_norm = norm_of_c(p_norm_c, p_bias_c, p_hat_c, p_rstd_c, b_token, m_live, i_d, o_unit, tokens, hidden)
    b_slopes, b_passed, b_dc, b_slopes_c = finish_bwd(
        b_saved, b_dh, b_dc, b_norm, None, p_zone_h, p_zone_c, zoneout_h, zoneout_c, b_token, m_cell, i_d, o_unit,
        tokens, hidden, MODE,
    )  # fmt: skip
    o_token = (b_token * directions + i_d) * hidden
    store_tiles(p_slopes, o_token * SLOPES, o_unit, hidden, m_cell, b_slopes, SLOPES)
    if p_norm_c is not None:
        store_tiles(p_slopes_c, o_token, o_unit, hidden, m_cell, (b_slopes_c,), 1)
    b_through = b_slopes
    if p_norm_hh is not None:
        b_d = scaled(b_slopes, p_norm_hh, i_d, o_unit, m_unit, hidden, MODE, GATES)
        b_hat = tiles(p_hat_hh, (i_d * tokens + b_token) * (GATES * hidden), o_unit, hidden, m_cell, GATES)
        b_mean = tl.sum(summed(b_d, GATES), 1) / (GATES * hidden)
        b_mean_hat = tl.sum(summed(times(b_d, b_hat, GATES), GATES), 1) / (GATES * hidden)
        b_rstd = rstd_of(p_rstd_hh, b_token, m_live, i_d, tokens)
        b_through = before_norm(b_d, b_hat, b_rstd, b_mean, b_mean_hat, GATES)
        store_tiles(p_through, o_token * GATES, o_unit, hidden, m_cell, b_through, GATES)
    elif MODE == "gru":
        b_through = b_slopes[1], b_slopes[2], b_slopes[0]
    return b_through, b_passed, b_dc


@triton.jit
def _given(p_grad, o_row, o_unit, hidden, m_state):
    """dL/d(a last state) of these rows and units, 0 where there is none."""
    if p_grad is not None:
        return tiles(p_grad, o_row, o_unit, hidden, m_state, 1)[0].to(tl.float32)
    else:
        return tl.zeros(m_state.shape, dtype=tl.float32)


@triton.jit
def _carried(
    b_through, b_w, m_cell, DTYPE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, GATES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dL/d(W_hh·h), rounded, times W_hh."""
    b_into = tl.zeros([BLOCK_B, BLOCK_P], dtype=tl.float32)
    for gate in tl.static_range(GATES):
        b_gate = tl.where(m_cell, b_through[gate], 0.0).to(DTYPE)
        b_into = tl.dot(b_gate, b_w[gate], b_into, input_precision=PRECISION)
    return b_into


@triton.jit
def rnn_fused_bwd_kernel(
    p_grad_output, p_grad_h_n, p_grad_c_n, p_grad_c_all, p_w, p_w_hr, p_norm_hh, p_norm_c, p_bias_c, p_hat_hh,
    p_rstd_hh, p_hat_c, p_rstd_c, p_h0, p_c0, p_lengths, p_starts, p_resets, p_mask, p_zone_h, p_zone_c, zoneout_h,
    zoneout_c, p_output, p_c_all, p_kept, p_slopes, p_through, p_slopes_c, p_grad_states, p_dh0, p_dc0,
    batch, steps, tokens, hidden, states, MODE: tl.constexpr, GATES: tl.constexpr, SLOPES: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dL/dh_{t-1} = dL/d(W_hh·h_{t-1})·W_hh + what bypasses it, from the last step to the first: `finish_bwd`."""
    if p_w_hr is None:
        states = hidden  # so that the compiler knows
    i_d, directions = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    o_unit, o_state = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_P)
    b_w = _weights(p_w, i_d, GATES, BLOCK_H, BLOCK_P, False)
    if p_w_hr is not None:
        b_w_hr = _weight(p_w_hr, 0, i_d, 1, BLOCK_P, BLOCK_H)
    o_first, o_cell = (i_d * batch + o_row) * states, (i_d * batch + o_row) * hidden
    m_first = (o_row < batch)[:, None] & (o_state < states)[None, :]
    m_first_cell = (o_row < batch)[:, None] & (o_unit < hidden)[None, :]
    b_dh = _given(p_grad_h_n, o_first, o_state, states, m_first)
    b_dc = _given(p_grad_c_n, o_cell, o_unit, hidden, m_first_cell)
    if p_mask is not None:
        b_mask = tiles(p_mask, o_first, o_state, states, m_first, 1)[0]
    # What is W_hr's is no business of the cell's.
    PROJECTED: tl.constexpr = p_w_hr is not None
    p_own_grad, p_own_zone, own_zoneout = p_grad_output, p_zone_h, zoneout_h
    if PROJECTED:
        p_own_grad, p_own_zone, own_zoneout = None, None, None
    b_len = row_lengths(p_lengths, o_row, batch, steps)
    last = tl.max(b_len) - 1
    how = (
        i_d, directions, b_len, p_starts, p_resets, o_row, o_unit, batch, tokens, hidden, p_own_grad, p_grad_c_all,
        p_output, p_c_all, p_kept, p_h0, p_c0,
    )  # fmt: skip
    b_token, m_live, b_reset, b_saved = _saved(last, *how, MODE)
    for i in tl.range(0, last + 1):
        b_next_token, m_next, b_next_reset, b_next_saved = _saved(last - i - 1, *how, MODE)
        m_cell = m_live[:, None] & (o_unit < hidden)[None, :]
        m_state = m_live[:, None] & (o_state < states)[None, :]
        b_dm = b_dh
        if PROJECTED:
            b_grad_state, b_past = state_bwd(
                b_dh, p_grad_output, p_zone_h, zoneout_h, p_grad_states, b_token, m_state, i_d, directions, o_state,
                tokens, states,
            )  # fmt: skip
            b_dm = tl.dot(b_grad_state, b_w_hr, input_precision=PRECISION)
        b_through, b_passed, b_new_dc = _cell_bwd(
            b_saved, b_dm, b_dc, p_norm_hh, p_norm_c, p_bias_c, p_hat_hh, p_rstd_hh, p_hat_c, p_rstd_c, p_own_zone,
            p_zone_c, own_zoneout, zoneout_c, p_slopes, p_through, p_slopes_c, b_token, m_live, i_d, directions, o_unit,
            tokens, hidden, MODE, GATES, SLOPES,
        )  # fmt: skip
        if PROJECTED:
            b_passed = b_past
        b_into = _carried(b_through, b_w, m_cell, p_slopes.dtype.element_ty, BLOCK_B, BLOCK_P, GATES, PRECISION)
        if p_mask is not None:
            b_into *= b_mask.to(tl.float32)
        b_new = b_into + b_passed
        if p_resets is not None:
            b_new = tl.where(b_reset[:, None], 0.0, b_new)
            b_new_dc = tl.where(b_reset[:, None], 0.0, b_new_dc)
        b_dh, b_dc = tl.where(m_state, b_new, b_dh), tl.where(m_cell, b_new_dc, b_dc)
        b_token, m_live, b_reset, b_saved = b_next_token, m_next, b_next_reset, b_next_saved
    store_tiles(p_dh0, o_first, o_state, states, m_first, (b_dh,), 1)
    if MODE == "lstm":
        store_tiles(p_dc0, o_cell, o_unit, hidden, m_first_cell, (b_dc,), 1)
