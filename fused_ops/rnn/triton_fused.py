"""A layer's whole time loop in one launch: a program is a tile of rows in one direction.

W_hh stays in shared memory, h and c stay in registers; a step's inputs are asked for a step ahead.
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


@triton.jit
def _weight(p_w, gate, i_d, GATES: tl.constexpr, BLOCK_H: tl.constexpr):
    """(units, k): one gate's rows of W_hh, which lies padded with zeros to (directions, GATES, BLOCK_H, BLOCK_H)."""
    o_unit = tl.arange(0, BLOCK_H)
    p_w = tl.multiple_of(p_w + (i_d * GATES + gate) * (BLOCK_H * BLOCK_H), 16)
    return tl.load(p_w + o_unit[:, None] * BLOCK_H + o_unit[None, :])


@triton.jit
def _inputs(
    i_s, i_d, b_len, p_gi, p_starts, p_resets, o_row, o_unit, batch, hidden, directions, GATES: tl.constexpr
):  # fmt: skip
    """(token, mask, reset, gates' inputs) of step i_s."""
    b_time, b_token, m_live = place_of(i_s, i_d, b_len, p_starts, o_row, batch)
    m_state = m_live[:, None] & (o_unit < hidden)[None, :]
    b_reset = reset_at(p_resets, b_time, m_live, o_row, batch)
    b_x = tiles(p_gi, (b_token * directions + i_d) * (GATES * hidden), o_unit, hidden, m_state, GATES)
    return b_token, m_state, b_reset, b_x


@triton.jit
def rnn_fused_fwd_kernel(
    p_gi, p_w, p_b_hn, p_h0, p_c0, p_lengths, p_starts, p_resets, p_mask, p_zone_h, p_zone_c, zoneout_h, zoneout_c,
    p_output, p_h_n, p_c_n, p_c_all, p_kept, batch, steps, tokens, hidden,
    MODE: tl.constexpr, GATES: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h_t, c_t = cell(gi_t, W_hh·h_{t-1}, c_{t-1}) for all t; the cells and their sources: `gates_fwd`."""
    i_d, directions = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    o_unit = tl.arange(0, BLOCK_H)
    m_unit = o_unit < hidden
    b_w = (_weight(p_w, 0, i_d, GATES, BLOCK_H).T,)
    for gate in tl.static_range(1, GATES):
        b_w += (_weight(p_w, gate, i_d, GATES, BLOCK_H).T,)
    o_first = (i_d * batch + o_row) * hidden
    m_first = (o_row < batch)[:, None] & m_unit[None, :]
    b_h = tiles(p_h0, o_first, o_unit, hidden, m_first, 1)[0]
    b_zero = tl.zeros([BLOCK_B, BLOCK_H], dtype=tl.float32)
    b_c, b_hn = b_zero, b_zero
    if MODE == "lstm":
        b_c = tiles(p_c0, o_first, o_unit, hidden, m_first, 1)[0].to(tl.float32)
    if p_b_hn is not None:
        b_hn = tl.load(p_b_hn + i_d * hidden + o_unit, mask=m_unit, other=0.0).to(tl.float32)[None, :]
    if p_mask is not None:
        b_mask = tiles(p_mask, o_first, o_unit, hidden, m_first, 1)[0]
    b_len = row_lengths(p_lengths, o_row, batch, steps)
    b_token, m_state, b_reset, b_x = _inputs(
        0, i_d, b_len, p_gi, p_starts, p_resets, o_row, o_unit, batch, hidden, directions, GATES
    )
    for i_s in tl.range(0, tl.max(b_len)):
        b_next_token, m_next, b_next_reset, b_next_x = _inputs(
            i_s + 1, i_d, b_len, p_gi, p_starts, p_resets, o_row, o_unit, batch, hidden, directions, GATES
        )
        if p_resets is not None:
            b_h = tl.where(b_reset[:, None], 0.0, b_h)
            b_c = tl.where(b_reset[:, None], 0.0, b_c)
        b_fed = b_h
        if p_mask is not None:
            b_fed = (b_h.to(tl.float32) * b_mask.to(tl.float32)).to(b_h.dtype)
        b_p = products(b_fed, b_w, (b_zero,) * GATES, GATES, PRECISION)
        b_new, b_new_c = finish_fwd(
            b_x, b_p, b_hn, b_h.to(tl.float32), b_c, p_zone_h, p_zone_c, zoneout_h, zoneout_c,
            p_output, p_c_all, p_kept, b_token, m_state, i_d, directions, o_unit, tokens, hidden, MODE,
        )  # fmt: skip
        b_h, b_c = tl.where(m_state, b_new, b_h), tl.where(m_state, b_new_c, b_c)
        b_token, m_state, b_reset, b_x = b_next_token, m_next, b_next_reset, b_next_x
    store_tiles(p_h_n, o_first, o_unit, hidden, m_first, (b_h,), 1)
    if MODE == "lstm":
        store_tiles(p_c_n, o_first, o_unit, hidden, m_first, (b_c,), 1)


@triton.jit
def _saved(
    i_s, i_d, directions, b_len, p_starts, p_resets, o_row, o_unit, batch, tokens, hidden,
    p_grad_output, p_grad_c_all, p_output, p_c_all, p_kept, p_h0, p_c0, MODE: tl.constexpr, NEEDS_H: tl.constexpr,
):  # fmt: skip
    """(token, mask, reset, `saved_bwd`) of step i_s."""
    b_time, b_token, m_live = place_of(i_s, i_d, b_len, p_starts, o_row, batch)
    m_state = m_live[:, None] & (o_unit < hidden)[None, :]
    b_reset = reset_at(p_resets, b_time, m_live, o_row, batch)
    b_before = place_of(i_s - 1, i_d, b_len, p_starts, o_row, batch)[1]
    return b_token, m_state, b_reset, saved_bwd(
        i_s, b_token, b_before, b_reset, m_state, i_d, directions, o_row, o_unit, batch, tokens, hidden,
        p_grad_output, p_grad_c_all, p_output, p_c_all, p_kept, p_h0, p_c0, MODE, NEEDS_H,
    )  # fmt: skip


@triton.jit
def rnn_fused_bwd_kernel(
    p_grad_output, p_grad_h_n, p_grad_c_n, p_grad_c_all, p_w, p_h0, p_c0, p_lengths, p_starts, p_resets, p_mask,
    p_zone_h, p_zone_c, zoneout_h, zoneout_c, p_output, p_c_all, p_kept, p_slopes, p_dh0, p_dc0,
    batch, steps, tokens, hidden, MODE: tl.constexpr, GATES: tl.constexpr, SLOPES: tl.constexpr,
    NEEDS_H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dL/dh_{t-1} = slopes_t·W_hh + what bypasses the product, from the last step to the first: `gates_bwd`."""
    i_d, directions = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    o_unit = tl.arange(0, BLOCK_H)
    TURN: tl.constexpr = 2 if MODE == "gru" else 0  # slopes n, r, z meet the weights' gates r, z, n
    b_w = (_weight(p_w, TURN, i_d, GATES, BLOCK_H),)
    for gate in tl.static_range(1, GATES):
        b_w += (_weight(p_w, (gate + TURN) % GATES, i_d, GATES, BLOCK_H),)
    o_first = (i_d * batch + o_row) * hidden
    m_first = (o_row < batch)[:, None] & (o_unit < hidden)[None, :]
    b_dh, b_dc = tl.zeros([BLOCK_B, BLOCK_H], dtype=tl.float32), tl.zeros([BLOCK_B, BLOCK_H], dtype=tl.float32)
    if p_grad_h_n is not None:
        b_dh = tiles(p_grad_h_n, o_first, o_unit, hidden, m_first, 1)[0].to(tl.float32)
    if p_grad_c_n is not None:
        b_dc = tiles(p_grad_c_n, o_first, o_unit, hidden, m_first, 1)[0].to(tl.float32)
    if p_mask is not None:
        b_mask = tiles(p_mask, o_first, o_unit, hidden, m_first, 1)[0]
    b_len = row_lengths(p_lengths, o_row, batch, steps)
    last = tl.max(b_len) - 1
    b_token, m_state, b_reset, b_saved = _saved(
        last, i_d, directions, b_len, p_starts, p_resets, o_row, o_unit, batch, tokens, hidden,
        p_grad_output, p_grad_c_all, p_output, p_c_all, p_kept, p_h0, p_c0, MODE, NEEDS_H,
    )  # fmt: skip
    for i in tl.range(0, last + 1):
        b_next_token, m_next, b_next_reset, b_next_saved = _saved(
            last - i - 1, i_d, directions, b_len, p_starts, p_resets, o_row, o_unit, batch, tokens, hidden,
            p_grad_output, p_grad_c_all, p_output, p_c_all, p_kept, p_h0, p_c0, MODE, NEEDS_H,
        )  # fmt: skip
        b_slopes, b_passed, b_new_dc = finish_bwd(
            b_saved, b_dh, b_dc, p_zone_h, p_zone_c, zoneout_h, zoneout_c,
            b_token, m_state, i_d, o_unit, tokens, hidden, p_slopes.dtype.element_ty, MODE,
        )  # fmt: skip
        o_slopes = (b_token * directions + i_d) * (SLOPES * hidden)
        store_tiles(p_slopes, o_slopes, o_unit, hidden, m_state, b_slopes, SLOPES)
        b_into = tl.dot(tl.where(m_state, b_slopes[0], 0.0), b_w[0], input_precision=PRECISION)
        for gate in tl.static_range(1, GATES):
            b_into = tl.dot(tl.where(m_state, b_slopes[gate], 0.0), b_w[gate], b_into, input_precision=PRECISION)
        if p_mask is not None:
            b_into *= b_mask.to(tl.float32)
        b_new = b_into + b_passed
        if p_resets is not None:
            b_new = tl.where(b_reset[:, None], 0.0, b_new)
            b_new_dc = tl.where(b_reset[:, None], 0.0, b_new_dc)
        b_dh, b_dc = tl.where(m_state, b_new, b_dh), tl.where(m_state, b_new_dc, b_dc)
        b_token, m_state, b_reset, b_saved = b_next_token, m_next, b_next_reset, b_next_saved
    store_tiles(p_dh0, o_first, o_unit, hidden, m_first, (b_dh,), 1)
    if MODE == "lstm":
        store_tiles(p_dc0, o_first, o_unit, hidden, m_first, (b_dc,), 1)
