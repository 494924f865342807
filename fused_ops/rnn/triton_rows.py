"""One step of a layer with layer norms, where the gates of a row are too many for a tile of a GEMM.

A program has one row, and goes over its units tile by tile as often as it takes: a mean, a variance, then the step.
What it reads again comes from the cache. All stores are in the last round.
"""

import triton
import triton.language as tl

from fused_ops.rnn.triton_gates import (
    before_norm,
    carried_c,
    cell_fwd,
    finish_bwd,
    norm_of_c,
    normalised,
    place_of,
    reset_at,
    root,
    row_lengths,
    rstd_of,
    saved_bwd,
    scaled,
    squares,
    state_before,
    store_cell,
    store_tiles,
    summed,
    tanh,
    tiles,
    times,
)


@triton.jit
def _product_moments(p_z, o_z, here, hidden, GATES: tl.constexpr, BLOCK: tl.constexpr):
    """(mean, 1/√(variance + EPS)) of a row's GATES·hidden products. here: hidden, or 0 if the row has ended."""
    b_sum = tl.zeros([1, BLOCK], dtype=tl.float32)
    for i_u in tl.range(0, here, BLOCK):
        o_unit = i_u + tl.arange(0, BLOCK)
        b_sum += summed(tiles(p_z, o_z, o_unit, hidden, (o_unit < hidden)[None, :], GATES), GATES)
    b_mean = tl.sum(b_sum, 1) / (GATES * hidden)
    b_squares = tl.zeros([1, BLOCK], dtype=tl.float32)
    for i_u in tl.range(0, here, BLOCK):
        o_unit = i_u + tl.arange(0, BLOCK)
        m_unit = o_unit < hidden
        b_squares += squares(tiles(p_z, o_z, o_unit, hidden, m_unit[None, :], GATES), b_mean, m_unit, GATES)
    return b_mean, root(tl.sum(b_squares, 1) / (GATES * hidden))


@triton.jit
def _cell(
    i_u, b_mean, b_rstd, p_z, p_gi, p_norm_hh, p_b_hh, p_before, p_c, b_token, m_live, m_kept, i_d, directions, o_row,
    batch, hidden, MODE: tl.constexpr, GATES: tl.constexpr, PROJECTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`cell_fwd` of the units from i_u on."""
    o_unit = i_u + tl.arange(0, BLOCK)
    m_unit = o_unit < hidden
    b_z = tiles(p_z, (i_d * batch + o_row) * (GATES * hidden), o_unit, hidden, m_unit[None, :], GATES)
    b_p = normalised(b_z, b_mean, b_rstd, p_norm_hh, p_b_hh, i_d, o_unit, m_unit, hidden, GATES)
    return cell_fwd(
        b_p, 0.0, p_gi, p_before, p_c, b_token, m_live, m_kept, i_d, directions, o_row, o_unit, batch, hidden, MODE,
        GATES, PROJECTED,
    )  # fmt: skip


@triton.jit(do_not_specialize=["i_s"])
def rnn_row_fwd_kernel(
    p_gi, p_z, p_norm_hh, p_b_hh, p_norm_c, p_bias_c, p_h0, p_lengths, p_starts, p_resets, p_zone_h, p_zone_c,
    zoneout_h, zoneout_c, p_output, p_h_n, p_c_n, p_c_all, p_kept, p_c, p_m, i_s, batch, steps, tokens, hidden, states,
    MODE: tl.constexpr, GATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """h, c = cell(gi, LN(z)·norm + b, c) of every row's step i_s, z (directions, batch, gates, hidden) = W_hh·h; the
    LSTM's h = o·tanh(LN(c)·norm + bias). Ba et al. 2016, supplement; the cells: `gates_fwd`."""
    i_d, directions = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    o_row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    b_len = row_lengths(p_lengths, o_row, batch, steps)
    b_time, b_token, m_live = place_of(i_s, i_d, b_len, p_starts, o_row, batch)
    m_kept = m_live & ~reset_at(p_resets, b_time, m_live, o_row, batch)
    p_before = state_before(i_s, i_d, directions, b_len, p_starts, p_h0, p_output, o_row, batch, states)
    PROJECTED: tl.constexpr = p_m is not None
    here = hidden * tl.max(m_live.to(tl.int32))
    b_mean, b_rstd = _product_moments(p_z, (i_d * batch + o_row) * (GATES * hidden), here, hidden, GATES, BLOCK)
    how = (
        b_mean, b_rstd, p_z, p_gi, p_norm_hh, p_b_hh, p_before, p_c, b_token, m_live, m_kept, i_d, directions, o_row,
        batch, hidden,
    )  # fmt: skip
    if p_norm_c is not None:
        b_sum = tl.zeros([1, BLOCK], dtype=tl.float32)
        for i_u in tl.range(0, here, BLOCK):
            b_sum += _cell(i_u, *how, MODE, GATES, PROJECTED, BLOCK)[1]
        b_mean_c = tl.sum(b_sum, 1) / hidden
        b_squares = tl.zeros([1, BLOCK], dtype=tl.float32)
        for i_u in tl.range(0, here, BLOCK):
            b_new_c = _cell(i_u, *how, MODE, GATES, PROJECTED, BLOCK)[1]
            b_squares += squares((b_new_c,), b_mean_c, i_u + tl.arange(0, BLOCK) < hidden, 1)
        b_rstd_c = root(tl.sum(b_squares, 1) / hidden)
    for i_u in tl.range(0, here, BLOCK):
        b_new, b_new_c, b_kept, b_old, b_c = _cell(i_u, *how, MODE, GATES, PROJECTED, BLOCK)
        o_unit = i_u + tl.arange(0, BLOCK)
        if p_norm_c is not None:
            m_unit = o_unit < hidden
            b_u = normalised((b_new_c,), b_mean_c, b_rstd_c, p_norm_c, p_bias_c, i_d, o_unit, m_unit, hidden, 1)
            b_new = b_kept[3] * tanh(b_u[0])
        store_cell(
            b_new, b_new_c, b_kept, b_old, b_c, p_zone_h, p_zone_c, zoneout_h, zoneout_c, p_output, p_h_n, p_c_n,
            p_c_all, p_kept, p_c, p_m, i_s, b_len, b_token, m_live, i_d, directions, o_row, o_unit, batch, tokens,
            hidden, MODE,
        )  # fmt: skip


@triton.jit
def _unit(
    i_u, b_means, p_dh, p_dc, p_grad_output, p_grad_c_n, p_grad_c_all, p_norm_c, p_bias_c, p_hat_c, p_rstd_c, p_h0,
    p_c0, p_starts, p_resets, p_zone_h, p_zone_c, zoneout_h, zoneout_c, p_output, p_c_all, p_kept, i_s, i_d,
    directions, b_len, o_row, batch, tokens, hidden, MODE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`finish_bwd` of the units from i_u on. b_means: of dL/dhat and dL/dhat·hat over c's row."""
    o_unit = i_u + tl.arange(0, BLOCK)
    b_dc = carried_c(p_dc, p_grad_c_n, None, p_resets, p_starts, i_s, i_d, b_len, o_row, o_unit, batch, hidden, MODE)
    b_time, b_token, m_live = place_of(i_s, i_d, b_len, p_starts, o_row, batch)
    m_cell = m_live[:, None] & (o_unit < hidden)[None, :]
    b_reset = reset_at(p_resets, b_time, m_live, o_row, batch)
    b_before = place_of(i_s - 1, i_d, b_len, p_starts, o_row, batch)[1]
    b_saved = saved_bwd(
        i_s, b_token, b_before, b_reset, m_cell, i_d, directions, o_row, o_unit, batch, tokens, hidden,
        p_grad_output, p_grad_c_all, p_output, p_c_all, p_kept, p_h0, p_c0, MODE,
    )  # fmt: skip
    b_dh = tiles(p_dh, (i_d * batch + o_row) * hidden, o_unit, hidden, m_cell, 1)[0]
    b_norm = None
    if p_norm_c is not None:
        b_norm = norm_of_c(p_norm_c, p_bias_c, p_hat_c, p_rstd_c, b_token, m_live, i_d, o_unit, tokens, hidden)
    return finish_bwd(
        b_saved, b_dh, b_dc, b_norm, b_means, p_zone_h, p_zone_c, zoneout_h, zoneout_c, b_token, m_cell, i_d, o_unit,
        tokens, hidden, MODE,
    )  # fmt: skip


@triton.jit
def _means_of_c(
    here, p_norm_c, p_hat_c, b_token, i_d, tokens, hidden, b_zeros, how, MODE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Means of dL/dhat and dL/dhat·hat over c's row. b_zeros: those of no units; how: what `_unit` takes."""
    b_sum, b_sum_hat = tl.zeros([1, BLOCK], dtype=tl.float32), tl.zeros([1, BLOCK], dtype=tl.float32)
    for i_u in tl.range(0, here, BLOCK):
        o_unit = i_u + tl.arange(0, BLOCK)
        b_norm = tl.load(p_norm_c + i_d * hidden + o_unit, mask=o_unit < hidden, other=0.0)[None, :]
        o_row, m_cell = (i_d * tokens + b_token) * hidden, (o_unit < hidden)[None, :]
        b_d = _unit(i_u, b_zeros, *how, MODE, BLOCK)[3] * b_norm
        b_sum += b_d
        b_sum_hat += b_d * tiles(p_hat_c, o_row, o_unit, hidden, m_cell, 1)[0]
    return tl.sum(b_sum, 1) / hidden, tl.sum(b_sum_hat, 1) / hidden


@triton.jit(do_not_specialize=["i_s"])
def rnn_row_bwd_kernel(
    p_grad_output, p_grad_c_n, p_grad_c_all, p_norm_hh, p_norm_c, p_bias_c, p_hat_hh, p_rstd_hh, p_hat_c, p_rstd_c,
    p_h0, p_c0, p_lengths, p_starts, p_resets, p_zone_h, p_zone_c, zoneout_h, zoneout_c, p_output, p_c_all, p_kept,
    p_slopes, p_through, p_slopes_c, p_dh, p_passed, p_dc, p_dc0, i_s, batch, steps, tokens, hidden,
    MODE: tl.constexpr, GATES: tl.constexpr, SLOPES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Slopes of every row's step i_s, and dL/d(W_hh·h) behind its norm: `finish_bwd`, `before_norm`. At -1 dL/dc_0.

    p_dh (directions, batch, hidden): dL/dh after the step, grad_output still to come; or dL/d(o·tanh(c)).
    """
    i_d, directions = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    o_row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    b_len = row_lengths(p_lengths, o_row, batch, steps)
    b_token, m_live = place_of(i_s, i_d, b_len, p_starts, o_row, batch)[1:]
    if MODE == "lstm" and i_s < 0:
        for i_u in tl.range(0, hidden, BLOCK):
            carried_c(
                p_dc, p_grad_c_n, p_dc0, p_resets, p_starts, i_s, i_d, b_len, o_row, i_u + tl.arange(0, BLOCK), batch,
                hidden, MODE,
            )  # fmt: skip
    here = hidden * tl.max(m_live.to(tl.int32))
    b_zero = tl.zeros([1], dtype=tl.float32)
    b_means = b_zero, b_zero
    how = (
        p_dh, p_dc, p_grad_output, p_grad_c_n, p_grad_c_all, p_norm_c, p_bias_c, p_hat_c, p_rstd_c, p_h0, p_c0,
        p_starts, p_resets, p_zone_h, p_zone_c, zoneout_h, zoneout_c, p_output, p_c_all, p_kept, i_s, i_d, directions,
        b_len, o_row, batch, tokens, hidden,
    )  # fmt: skip
    if p_norm_c is not None:
        b_means = _means_of_c(here, p_norm_c, p_hat_c, b_token, i_d, tokens, hidden, b_means, how, MODE, BLOCK)
    b_sum, b_sum_hat = tl.zeros([1, BLOCK], dtype=tl.float32), tl.zeros([1, BLOCK], dtype=tl.float32)
    o_gates, o_token = (i_d * tokens + b_token) * (GATES * hidden), (b_token * directions + i_d) * hidden
    for i_u in tl.range(0, here, BLOCK):
        b_slopes = _unit(i_u, b_means, *how, MODE, BLOCK)[0]
        o_unit = i_u + tl.arange(0, BLOCK)
        b_d = scaled(b_slopes, p_norm_hh, i_d, o_unit, o_unit < hidden, hidden, MODE, GATES)
        b_hat = tiles(p_hat_hh, o_gates, o_unit, hidden, m_live[:, None] & (o_unit < hidden)[None, :], GATES)
        b_sum += summed(b_d, GATES)
        b_sum_hat += summed(times(b_d, b_hat, GATES), GATES)
    b_mean, b_mean_hat = tl.sum(b_sum, 1) / (GATES * hidden), tl.sum(b_sum_hat, 1) / (GATES * hidden)
    b_rstd = rstd_of(p_rstd_hh, b_token, m_live, i_d, tokens)
    for i_u in tl.range(0, here, BLOCK):
        b_slopes, b_passed, b_dc, b_into = _unit(i_u, b_means, *how, MODE, BLOCK)
        o_unit = i_u + tl.arange(0, BLOCK)
        m_cell = m_live[:, None] & (o_unit < hidden)[None, :]
        if p_norm_c is not None:
            store_tiles(p_slopes_c, o_token, o_unit, hidden, m_cell, (b_into,), 1)
        b_d = scaled(b_slopes, p_norm_hh, i_d, o_unit, o_unit < hidden, hidden, MODE, GATES)
        b_hat = tiles(p_hat_hh, o_gates, o_unit, hidden, m_cell, GATES)
        b_d = before_norm(b_d, b_hat, b_rstd, b_mean, b_mean_hat, GATES)
        store_tiles(p_through, o_token * GATES, o_unit, hidden, m_cell, b_d, GATES)
        store_tiles(p_slopes, o_token * SLOPES, o_unit, hidden, m_cell, b_slopes, SLOPES)
        o_cell = (i_d * batch + o_row) * hidden
        if p_passed is not None:
            store_tiles(p_passed, o_cell, o_unit, hidden, m_cell, (b_passed,), 1)
        if MODE == "lstm":
            store_tiles(p_dc, o_cell, o_unit, hidden, m_cell, (b_dc,), 1)
