"""A layer one launch a step, for any hidden size: a GEMM tile whose epilogue is the whole step.

A program has a tile of rows and all gates of a tile of units, so that only h (forward) and the slopes (backward) go
through memory between steps, where they are results anyway. The order of the sums depends on nothing but the tiles'
sizes. Nothing waits for the host: a CUDA graph can capture all steps.
"""

import triton
import triton.language as tl

from fused_ops.rnn.triton_gates import (
    finish_bwd,
    finish_fwd,
    place_of,
    products,
    reset_at,
    row_lengths,
    saved_bwd,
    store_tiles,
    tiles,
)


@triton.jit(do_not_specialize=["i_s"])
def rnn_step_fwd_kernel(
    p_gi, p_w, p_b_hn, p_h0, p_lengths, p_starts, p_resets, p_mask, p_zone_h, p_zone_c, zoneout_h, zoneout_c,
    p_output, p_h_n, p_c_n, p_c_all, p_kept, p_c, i_s, batch, steps, tokens, hidden,
    MODE: tl.constexpr, GATES: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """h, c = cell(gi, W_hh·h, c) of every row's step i_s: `gates_fwd`. p_c (directions, batch, hidden): c, in place."""
    i_d, directions = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    o_row = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    o_unit = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    o_k = tl.arange(0, BLOCK_K)
    m_unit = o_unit < hidden
    b_len = row_lengths(p_lengths, o_row, batch, steps)
    b_time, b_token, m_live = place_of(i_s, i_d, b_len, p_starts, o_row, batch)
    m_state = m_live[:, None] & m_unit[None, :]
    m_kept = m_live & ~reset_at(p_resets, b_time, m_live, o_row, batch)
    o_first = (i_d * batch + o_row) * hidden
    if i_s == 0:
        p_before = p_h0 + o_first
    else:
        p_before = p_output + (place_of(i_s - 1, i_d, b_len, p_starts, o_row, batch)[1] * directions + i_d) * hidden
    p_w += i_d * (GATES * hidden) * hidden
    area = tl.cast(hidden, tl.int64) * hidden
    o_w = o_unit[None, :] * hidden + o_k[:, None]
    b_p = (tl.zeros([BLOCK_B, BLOCK_U], dtype=tl.float32),) * GATES
    for i_k in tl.range(0, hidden * tl.max(m_kept.to(tl.int32)), BLOCK_K):
        m_k = i_k + o_k < hidden
        m_h = m_kept[:, None] & m_k[None, :]
        b_h = tl.load(p_before[:, None] + (i_k + o_k)[None, :], mask=m_h, other=0.0)
        if p_mask is not None:
            b_mask = tiles(p_mask, o_first, i_k + o_k, hidden, m_h, 1)[0]
            b_h = (b_h.to(tl.float32) * b_mask.to(tl.float32)).to(b_h.dtype)
        m_w = m_k[:, None] & m_unit[None, :]
        b_w = (tl.load(p_w + i_k + o_w, mask=m_w, other=0.0),)
        for gate in tl.static_range(1, GATES):
            b_w += (tl.load(p_w + gate * area + i_k + o_w, mask=m_w, other=0.0),)
        b_p = products(b_h, b_w, b_p, GATES, PRECISION)
    m_old = m_kept[:, None] & m_unit[None, :]
    b_old = tl.load(p_before[:, None] + o_unit[None, :], mask=m_old, other=0.0).to(tl.float32)
    b_hn = tl.zeros([1, BLOCK_U], dtype=tl.float32)
    if p_b_hn is not None:
        b_hn = tl.load(p_b_hn + i_d * hidden + o_unit, mask=m_unit, other=0.0).to(tl.float32)[None, :]
    b_c = b_old
    if MODE == "lstm":
        b_c = tiles(p_c, o_first, o_unit, hidden, m_old, 1)[0]
    b_x = tiles(p_gi, (b_token * directions + i_d) * (GATES * hidden), o_unit, hidden, m_state, GATES)
    b_new, b_c = finish_fwd(
        b_x, b_p, b_hn, b_old, b_c, p_zone_h, p_zone_c, zoneout_h, zoneout_c,
        p_output, p_c_all, p_kept, b_token, m_state, i_d, directions, o_unit, tokens, hidden, MODE,
    )  # fmt: skip
    m_last = m_state & (i_s + 1 == b_len)[:, None]
    store_tiles(p_h_n, o_first, o_unit, hidden, m_last, (b_new,), 1)
    if MODE == "lstm":
        store_tiles(p_c, o_first, o_unit, hidden, m_state, (b_c,), 1)
        store_tiles(p_c_n, o_first, o_unit, hidden, m_last, (b_c,), 1)


@triton.jit(do_not_specialize=["i_s"])
def rnn_step_bwd_kernel(
    p_grad_output, p_grad_h_n, p_grad_c_n, p_grad_c_all, p_w, p_h0, p_c0, p_lengths, p_starts, p_resets, p_mask,
    p_zone_h, p_zone_c, zoneout_h, zoneout_c, p_output, p_c_all, p_kept, p_slopes, p_dh0, p_dc0, p_passed, p_dc,
    i_s, batch, steps, tokens, hidden, MODE: tl.constexpr, GATES: tl.constexpr, SLOPES: tl.constexpr,
    NEEDS_H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Slopes of every row's step i_s, of dL/dh = (slopes of the step after)·W_hh + what bypassed it: `gates_bwd`.

    Step -1 is the state before the first, and leaves dL/dh_0 and dL/dc_0. p_passed, p_dc (directions, batch, hidden)
    float32: dL/dh that bypasses the product (None where nothing does) and dL/dc, in place.
    """
    i_d, directions = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    o_row = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    o_unit = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    o_k = tl.arange(0, BLOCK_K)
    m_unit = o_unit < hidden
    b_len = row_lengths(p_lengths, o_row, batch, steps)
    b_time, b_after, m_after = place_of(i_s + 1, i_d, b_len, p_starts, o_row, batch)
    m_after &= ~reset_at(p_resets, b_time, m_after, o_row, batch)
    p_after = p_slopes + (b_after * directions + i_d) * (SLOPES * hidden)
    p_w += i_d * (GATES * hidden) * hidden
    b_dh = tl.zeros([BLOCK_B, BLOCK_U], dtype=tl.float32)
    for i_k in tl.range(0, GATES * hidden * tl.max(m_after.to(tl.int32)), BLOCK_K):
        o_slope = i_k + o_k
        m_k = o_slope < GATES * hidden
        o_gate = o_slope
        if MODE == "gru":  # slopes n, r, z meet the weights' gates r, z, n
            o_gate = tl.where(o_slope < hidden, o_slope + 2 * hidden, o_slope - hidden)
        b_slopes = tl.load(p_after[:, None] + o_slope[None, :], mask=m_after[:, None] & m_k[None, :], other=0.0)
        p_tile = p_w + o_gate.to(tl.int64)[:, None] * hidden + o_unit[None, :]
        b_w = tl.load(p_tile, mask=m_k[:, None] & m_unit[None, :], other=0.0)
        b_dh = tl.dot(b_slopes, b_w, b_dh, input_precision=PRECISION)
    o_first = (i_d * batch + o_row) * hidden
    m_row = (o_row < batch)[:, None] & m_unit[None, :]
    m_carried, m_ends = m_after[:, None] & m_unit[None, :], m_row & (i_s + 1 == b_len)[:, None]
    if p_mask is not None:
        b_dh *= tiles(p_mask, o_first, o_unit, hidden, m_carried, 1)[0].to(tl.float32)
    b_dc = tl.zeros([BLOCK_B, BLOCK_U], dtype=tl.float32)
    if p_passed is not None:
        b_dh += tiles(p_passed, o_first, o_unit, hidden, m_carried, 1)[0]
    if p_grad_h_n is not None:
        b_dh += tiles(p_grad_h_n, o_first, o_unit, hidden, m_ends, 1)[0].to(tl.float32)
    if MODE == "lstm":
        b_dc = tiles(p_dc, o_first, o_unit, hidden, m_carried, 1)[0]
    if p_grad_c_n is not None:
        b_dc += tiles(p_grad_c_n, o_first, o_unit, hidden, m_ends, 1)[0].to(tl.float32)
    m_initial = m_row & (i_s < 0)
    store_tiles(p_dh0, o_first, o_unit, hidden, m_initial, (b_dh,), 1)
    if MODE == "lstm":
        store_tiles(p_dc0, o_first, o_unit, hidden, m_initial, (b_dc,), 1)
    b_time, b_token, m_live = place_of(i_s, i_d, b_len, p_starts, o_row, batch)
    m_state = m_live[:, None] & m_unit[None, :]
    b_reset = reset_at(p_resets, b_time, m_live, o_row, batch)
    b_before = place_of(i_s - 1, i_d, b_len, p_starts, o_row, batch)[1]
    b_saved = saved_bwd(
        i_s, b_token, b_before, b_reset, m_state, i_d, directions, o_row, o_unit, batch, tokens, hidden,
        p_grad_output, p_grad_c_all, p_output, p_c_all, p_kept, p_h0, p_c0, MODE, NEEDS_H,
    )  # fmt: skip
    b_slopes, b_passed, b_dc = finish_bwd(
        b_saved, b_dh, b_dc, p_zone_h, p_zone_c, zoneout_h, zoneout_c,
        b_token, m_state, i_d, o_unit, tokens, hidden, p_slopes.dtype.element_ty, MODE,
    )  # fmt: skip
    store_tiles(p_slopes, (b_token * directions + i_d) * (SLOPES * hidden), o_unit, hidden, m_state, b_slopes, SLOPES)
    if p_passed is not None:
        store_tiles(p_passed, o_first, o_unit, hidden, m_state, (b_passed,), 1)
    if MODE == "lstm":
        store_tiles(p_dc, o_first, o_unit, hidden, m_state, (b_dc,), 1)
