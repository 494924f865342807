"""A layer one launch a step, for any hidden size: a GEMM tile whose epilogue is the whole step.

A program has a tile of rows and all gates of a tile of units, so that only h (forward) and the slopes (backward) go
through memory between steps, where they are results anyway. W_hr takes a launch more, a GEMM to h or from dL/dh. Norms
take one too, for they need a row's whole product: a GEMM and then triton_rows.py. The order of the sums depends on
nothing but the tiles' sizes. Nothing waits for the host: a CUDA graph can capture all steps.

The cell has `hidden` units, the state has `states`: fewer where W_hr projects it.
"""

import triton
import triton.language as tl

from fused_ops.rnn.triton_gates import (
    carried_c,
    cell_fwd,
    finish_bwd,
    keep_state,
    place_of,
    products,
    reset_at,
    row_lengths,
    saved_bwd,
    state_before,
    state_bwd,
    store_cell,
    store_tiles,
    tiles,
)


@triton.jit
def _recurrent(
    p_before, p_w, p_mask, o_first, m_kept, o_unit, outputs, states, GATES: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W·(h·mask), a tile for each gate, 0 for rows that begin anew. p_w (GATES, outputs, states)."""
    o_k, m_unit = tl.arange(0, BLOCK_K), o_unit < outputs
    area = tl.cast(outputs, tl.int64) * states
    o_w = o_unit[None, :] * states + o_k[:, None]
    b_p = (tl.zeros([BLOCK_B, BLOCK_U], dtype=tl.float32),) * GATES
    for i_k in tl.range(0, states * tl.max(m_kept.to(tl.int32)), BLOCK_K):
        m_k = i_k + o_k < states
        m_h = m_kept[:, None] & m_k[None, :]
        b_h = tl.load(p_before[:, None] + (i_k + o_k)[None, :], mask=m_h, other=0.0)
        if p_mask is not None:
            b_mask = tiles(p_mask, o_first, i_k + o_k, states, m_h, 1)[0]
            b_h = (b_h.to(tl.float32) * b_mask.to(tl.float32)).to(b_h.dtype)
        m_w = m_k[:, None] & m_unit[None, :]
        b_w = (tl.load(p_w + i_k + o_w, mask=m_w, other=0.0),)
        for gate in tl.static_range(1, GATES):
            b_w += (tl.load(p_w + gate * area + i_k + o_w, mask=m_w, other=0.0),)
        b_p = products(b_h, b_w, b_p, GATES, PRECISION)
    return b_p


@triton.jit(do_not_specialize=["i_s"])
def rnn_step_fwd_kernel(
    p_gi, p_w, p_b_hn, p_h0, p_lengths, p_starts, p_resets, p_mask, p_zone_h, p_zone_c, zoneout_h, zoneout_c,
    p_output, p_h_n, p_c_n, p_c_all, p_kept, p_c, p_m, i_s, batch, steps, tokens, hidden, states,
    MODE: tl.constexpr, GATES: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """h, c = cell(gi, W_hh·h, c) of every row's step i_s: `gates_fwd`. p_c (directions, batch, hidden): c, in place.
    p_m, of the same shape, takes o·tanh(c) where W_hr is still to come."""
    if p_m is None:
        states = hidden  # so that the compiler knows
    i_d, directions = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    o_row = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    o_unit = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    b_len = row_lengths(p_lengths, o_row, batch, steps)
    b_time, b_token, m_live = place_of(i_s, i_d, b_len, p_starts, o_row, batch)
    m_kept = m_live & ~reset_at(p_resets, b_time, m_live, o_row, batch)
    p_before = state_before(i_s, i_d, directions, b_len, p_starts, p_h0, p_output, o_row, batch, states)
    b_p = _recurrent(
        p_before, p_w + i_d * (GATES * hidden) * states, p_mask, (i_d * batch + o_row) * states, m_kept, o_unit, hidden,
        states, GATES, BLOCK_B, BLOCK_U, BLOCK_K, PRECISION,
    )  # fmt: skip
    b_hn = tl.zeros([1, BLOCK_U], dtype=tl.float32)
    if p_b_hn is not None:
        b_hn = tl.load(p_b_hn + i_d * hidden + o_unit, mask=o_unit < hidden, other=0.0).to(tl.float32)[None, :]
    b_new, b_new_c, b_kept, b_old, b_c = cell_fwd(
        b_p, b_hn, p_gi, p_before, p_c, b_token, m_live, m_kept, i_d, directions, o_row, o_unit, batch, hidden, MODE,
        GATES, p_m is not None,
    )  # fmt: skip
    store_cell(
        b_new, b_new_c, b_kept, b_old, b_c, p_zone_h, p_zone_c, zoneout_h, zoneout_c, p_output, p_h_n, p_c_n, p_c_all,
        p_kept, p_c, p_m, i_s, b_len, b_token, m_live, i_d, directions, o_row, o_unit, batch, tokens, hidden, MODE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["i_s"])
def rnn_product_fwd_kernel(
    p_w, p_h0, p_lengths, p_starts, p_resets, p_mask, p_output, p_z, i_s, batch, steps, outputs, states,
    BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z = W_hh·(h·mask) of every row's step i_s. z (directions, batch, outputs) float32; outputs are gates·hidden."""
    i_d, directions = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    o_row = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    o_unit = tl.program_id(0).to(tl.int64) * BLOCK_U + tl.arange(0, BLOCK_U)
    b_len = row_lengths(p_lengths, o_row, batch, steps)
    b_time, _, m_live = place_of(i_s, i_d, b_len, p_starts, o_row, batch)
    m_kept = m_live & ~reset_at(p_resets, b_time, m_live, o_row, batch)
    p_before = state_before(i_s, i_d, directions, b_len, p_starts, p_h0, p_output, o_row, batch, states)
    b_z = _recurrent(
        p_before, p_w + i_d * outputs * states, p_mask, (i_d * batch + o_row) * states, m_kept, o_unit, outputs, states,
        1, BLOCK_B, BLOCK_U, BLOCK_K, PRECISION,
    )  # fmt: skip
    m_z = m_live[:, None] & (o_unit < outputs)[None, :]
    store_tiles(p_z, (i_d * batch + o_row) * outputs, o_unit, outputs, m_z, b_z, 1)


@triton.jit(do_not_specialize=["i_s"])
def rnn_state_fwd_kernel(
    p_m, p_w_hr, p_h0, p_lengths, p_starts, p_resets, p_zone_h, zoneout_h, p_output, p_h_n,
    i_s, batch, steps, tokens, hidden, states,
    BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h = W_hr·m of every row's step i_s, m = o·tanh(c); Sak et al. 2014, section 2. p_m (directions, batch, hidden)"""
    i_d, directions = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    o_row = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    o_state = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    b_len = row_lengths(p_lengths, o_row, batch, steps)
    b_time, b_token, m_live = place_of(i_s, i_d, b_len, p_starts, o_row, batch)
    p_rows, p_w = p_m + (i_d * batch + o_row) * hidden, p_w_hr + i_d * states * hidden
    b_new = _recurrent(
        p_rows, p_w, None, o_row, m_live, o_state, states, hidden, 1, BLOCK_B, BLOCK_U, BLOCK_K, PRECISION
    )[0]
    m_kept = m_live & ~reset_at(p_resets, b_time, m_live, o_row, batch)
    p_before = state_before(i_s, i_d, directions, b_len, p_starts, p_h0, p_output, o_row, batch, states)
    m_state = m_live[:, None] & (o_state < states)[None, :]
    b_old = tl.load(p_before[:, None] + o_state[None, :], mask=m_kept[:, None] & m_state, other=0.0).to(tl.float32)
    b_new = keep_state(
        b_new, b_old, p_zone_h, zoneout_h, p_output, b_token, m_state, i_d, directions, o_state, tokens, states
    )
    m_last = m_state & (i_s + 1 == b_len)[:, None]
    store_tiles(p_h_n, (i_d * batch + o_row) * states, o_state, states, m_last, (b_new,), 1)


@triton.jit
def _carried(
    p_through, p_w, p_mask, p_resets, p_passed, p_grad_h_n, p_dh0, i_s, i_d, directions, b_len, p_starts, o_row,
    o_state, batch, hidden, states, stride, TURNED: tl.constexpr, GATES: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dL/dh after step i_s but for grad_output: what the step after it gives back, and dL/dh_n where it is the last.

    Step -1 leaves it as dL/dh_0. p_through (N, directions, stride): dL/d(W_hh·h), if TURNED with gates n, r, z.
    """
    b_time, b_after, m_after = place_of(i_s + 1, i_d, b_len, p_starts, o_row, batch)
    m_after &= ~reset_at(p_resets, b_time, m_after, o_row, batch)
    p_after = p_through + (b_after * directions + i_d) * stride
    p_w += i_d * (GATES * hidden) * states
    o_k, m_state = tl.arange(0, BLOCK_K), o_state < states
    b_dh = tl.zeros([BLOCK_B, BLOCK_U], dtype=tl.float32)
    for i_k in tl.range(0, GATES * hidden * tl.max(m_after.to(tl.int32)), BLOCK_K):
        o_slope = i_k + o_k
        m_k = o_slope < GATES * hidden
        o_gate = o_slope
        if TURNED:
            o_gate = tl.where(o_slope < hidden, o_slope + 2 * hidden, o_slope - hidden)
        b_slopes = tl.load(p_after[:, None] + o_slope[None, :], mask=m_after[:, None] & m_k[None, :], other=0.0)
        p_tile = p_w + o_gate.to(tl.int64)[:, None] * states + o_state[None, :]
        b_w = tl.load(p_tile, mask=m_k[:, None] & m_state[None, :], other=0.0)
        b_dh = tl.dot(b_slopes, b_w, b_dh, input_precision=PRECISION)
    o_first = (i_d * batch + o_row) * states
    m_row = (o_row < batch)[:, None] & m_state[None, :]
    m_carried, m_ends = m_after[:, None] & m_state[None, :], m_row & (i_s + 1 == b_len)[:, None]
    if p_mask is not None:
        b_dh *= tiles(p_mask, o_first, o_state, states, m_carried, 1)[0].to(tl.float32)
    if p_passed is not None:
        b_dh += tiles(p_passed, o_first, o_state, states, m_carried, 1)[0]
    if p_grad_h_n is not None:
        b_dh += tiles(p_grad_h_n, o_first, o_state, states, m_ends, 1)[0].to(tl.float32)
    store_tiles(p_dh0, o_first, o_state, states, m_row & (i_s < 0), (b_dh,), 1)
    return b_dh


@triton.jit
def _slopes(
    b_dh, p_grad_output, p_grad_c_n, p_grad_c_all, p_h0, p_c0, p_starts, p_resets, p_zone_h, p_zone_c, zoneout_h,
    zoneout_c, p_output, p_c_all, p_kept, p_slopes, p_passed, p_dc, p_dc0, i_s, i_d, directions, b_len, o_row, o_unit,
    batch, tokens, hidden, MODE: tl.constexpr, SLOPES: tl.constexpr,
):  # fmt: skip
    """Stores the slopes of step i_s, and what goes to the step before."""
    b_dc = carried_c(p_dc, p_grad_c_n, p_dc0, p_resets, p_starts, i_s, i_d, b_len, o_row, o_unit, batch, hidden, MODE)
    b_time, b_token, m_live = place_of(i_s, i_d, b_len, p_starts, o_row, batch)
    m_cell = m_live[:, None] & (o_unit < hidden)[None, :]
    b_reset = reset_at(p_resets, b_time, m_live, o_row, batch)
    b_before = place_of(i_s - 1, i_d, b_len, p_starts, o_row, batch)[1]
    b_saved = saved_bwd(
        i_s, b_token, b_before, b_reset, m_cell, i_d, directions, o_row, o_unit, batch, tokens, hidden,
        p_grad_output, p_grad_c_all, p_output, p_c_all, p_kept, p_h0, p_c0, MODE,
    )  # fmt: skip
    b_slopes, b_passed, b_dc, _ = finish_bwd(
        b_saved, b_dh, b_dc, None, None, p_zone_h, p_zone_c, zoneout_h, zoneout_c,
        b_token, m_cell, i_d, o_unit, tokens, hidden, MODE,
    )  # fmt: skip
    store_tiles(p_slopes, (b_token * directions + i_d) * (SLOPES * hidden), o_unit, hidden, m_cell, b_slopes, SLOPES)
    o_cell = (i_d * batch + o_row) * hidden
    if p_passed is not None:
        store_tiles(p_passed, o_cell, o_unit, hidden, m_cell, (b_passed,), 1)
    if MODE == "lstm":
        store_tiles(p_dc, o_cell, o_unit, hidden, m_cell, (b_dc,), 1)


@triton.jit(do_not_specialize=["i_s"])
def rnn_step_bwd_kernel(
    p_grad_output, p_grad_h_n, p_grad_c_n, p_grad_c_all, p_w, p_h0, p_c0, p_lengths, p_starts, p_resets, p_mask,
    p_zone_h, p_zone_c, zoneout_h, zoneout_c, p_output, p_c_all, p_kept, p_slopes, p_dh0, p_dc0, p_passed, p_dc,
    i_s, batch, steps, tokens, hidden, MODE: tl.constexpr, GATES: tl.constexpr, SLOPES: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Slopes of every row's step i_s, of dL/dh = (slopes of the step after)·W_hh + what bypassed it: `finish_bwd`.

    Step -1 is the state before the first, and leaves dL/dh_0 and dL/dc_0. p_passed, p_dc (directions, batch, hidden)
    float32: dL/dh that bypasses the product (None where nothing does) and dL/dc, in place.
    """
    i_d, directions = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    o_row = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    o_unit = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    b_len = row_lengths(p_lengths, o_row, batch, steps)
    b_dh = _carried(
        p_slopes, p_w, p_mask, p_resets, p_passed, p_grad_h_n, p_dh0, i_s, i_d, directions, b_len, p_starts,
        o_row, o_unit, batch, hidden, hidden, SLOPES * hidden, MODE == "gru", GATES, BLOCK_B, BLOCK_U, BLOCK_K,
        PRECISION,
    )  # fmt: skip
    _slopes(
        b_dh, p_grad_output, p_grad_c_n, p_grad_c_all, p_h0, p_c0, p_starts, p_resets, p_zone_h, p_zone_c, zoneout_h,
        zoneout_c, p_output, p_c_all, p_kept, p_slopes, p_passed, p_dc, p_dc0, i_s, i_d, directions, b_len, o_row,
        o_unit, batch, tokens, hidden, MODE, SLOPES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["i_s"])
def rnn_state_bwd_kernel(
    p_grad_output, p_grad_h_n, p_w, p_lengths, p_starts, p_resets, p_mask, p_zone_h, zoneout_h,
    p_through, p_grad_states, p_dh, p_dh0, p_passed, i_s, batch, steps, tokens, hidden, states, stride,
    GATES: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dL/dh after every row's step i_s, and dL/dh_0 at step -1: dL/d(W_hh·h) of the step after times W_hh, and what
    bypassed it. p_through (N, directions, stride), its gates in W_hh's order.

    Without W_hr into p_dh (directions, batch, hidden) float32, grad_output still to come; with it into p_grad_states.
    """
    i_d, directions = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    o_row = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    o_state = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    b_len = row_lengths(p_lengths, o_row, batch, steps)
    b_dh = _carried(
        p_through, p_w, p_mask, p_resets, p_passed, p_grad_h_n, p_dh0, i_s, i_d, directions, b_len, p_starts,
        o_row, o_state, batch, hidden, states, stride, False, GATES, BLOCK_B, BLOCK_U, BLOCK_K, PRECISION,
    )  # fmt: skip
    b_token, m_live = place_of(i_s, i_d, b_len, p_starts, o_row, batch)[1:]
    o_first, m_state = (i_d * batch + o_row) * states, m_live[:, None] & (o_state < states)[None, :]
    if p_dh is not None:
        store_tiles(p_dh, o_first, o_state, states, m_state, (b_dh,), 1)
    else:
        b_dh, b_passed = state_bwd(
            b_dh, p_grad_output, p_zone_h, zoneout_h, p_grad_states, b_token, m_state, i_d, directions, o_state,
            tokens, states,
        )  # fmt: skip
        if p_passed is not None:
            store_tiles(p_passed, o_first, o_state, states, m_state, (b_passed,), 1)


@triton.jit(do_not_specialize=["i_s"])
def rnn_unit_bwd_kernel(
    p_grad_c_n, p_grad_c_all, p_w_hr, p_c0, p_lengths, p_starts, p_resets, p_zone_c, zoneout_c, p_c_all, p_kept,
    p_grad_states, p_slopes, p_dh, p_dc0, p_dc, i_s, batch, steps, tokens, hidden, states,
    BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dL/dm = dL/d(W_hr·m)·W_hr of every row's step i_s; and the LSTM's slopes, or p_dh (directions, batch, hidden)
    float32 takes it where norms are still to come. At step -1 dL/dc_0."""
    i_d, directions = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    o_row = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    o_unit = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    o_k, m_unit = tl.arange(0, BLOCK_K), o_unit < hidden
    b_len = row_lengths(p_lengths, o_row, batch, steps)
    b_token, m_live = place_of(i_s, i_d, b_len, p_starts, o_row, batch)[1:]
    p_rows = p_grad_states + (b_token * directions + i_d) * states
    p_w_hr += i_d * states * hidden
    b_dm = tl.zeros([BLOCK_B, BLOCK_U], dtype=tl.float32)
    for i_k in tl.range(0, states * tl.max(m_live.to(tl.int32)), BLOCK_K):
        m_k = i_k + o_k < states
        b_dh = tl.load(p_rows[:, None] + (i_k + o_k)[None, :], mask=m_live[:, None] & m_k[None, :], other=0.0)
        p_tile = p_w_hr + (i_k + o_k).to(tl.int64)[:, None] * hidden + o_unit[None, :]
        b_w = tl.load(p_tile, mask=m_k[:, None] & m_unit[None, :], other=0.0)
        b_dm = tl.dot(b_dh, b_w, b_dm, input_precision=PRECISION)
    if p_dh is not None:
        m_cell = m_live[:, None] & m_unit[None, :]
        store_tiles(p_dh, (i_d * batch + o_row) * hidden, o_unit, hidden, m_cell, (b_dm,), 1)
    else:
        _slopes(
            b_dm, None, p_grad_c_n, p_grad_c_all, None, p_c0, p_starts, p_resets, None, p_zone_c, None, zoneout_c,
            None, p_c_all, p_kept, p_slopes, None, p_dc, p_dc0, i_s, i_d, directions, b_len, o_row, o_unit, batch,
            tokens, hidden, "lstm", 4,
        )  # fmt: skip
