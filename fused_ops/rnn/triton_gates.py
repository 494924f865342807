"""What the Triton kernels of cells and layers share: the gates' maths, and where a step's values are.

Names as in layers.py: tokens N, directions D, gates G, kept K, slopes S. Tiles are (rows, units); what a gate, a kept
value or a slope has one of is a tuple of tiles. An argument that is None is not compiled in.
"""

import triton
import triton.language as tl


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
    Gers et al. 2000.
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
        return relu(b_x[0] + b_p[0]), b_c, ()
    else:
        return tanh(b_x[0] + b_p[0]), b_c, ()


@triton.jit
def gates_bwd(b_dh, b_dc, b_kept, b_h_before, b_c, b_c_before, MODE: tl.constexpr):
    """(slopes, dL/dh that bypasses the product, dL/dc of the step before) of dL/dh' and dL/dc'.

    Slopes are dL/d(gates before their activation): RNN [s], LSTM [i, f, g, o], GRU [q, r, z, n]. The RNN's kept is h'.
    """
    if MODE == "lstm":
        b_i, b_f, b_g, b_o = b_kept
        b_t = tanh(b_c)
        b_dc += b_dh * b_o * (1.0 - b_t * b_t)
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
def finish_fwd(
    b_x, b_p, b_hn, b_h, b_c, p_zone_h, p_zone_c, zoneout_h, zoneout_c, p_output, p_c_all, p_kept,
    b_token, m_state, i_d, directions, o_unit, tokens, hidden, MODE: tl.constexpr,
):  # fmt: skip
    """(h, c) of a step, rounded and in float32, from its inputs, products and the states before; and stores it."""
    b_new, b_new_c, b_kept = gates_fwd(b_x, b_p, b_hn, b_h, b_c, MODE)
    o_row = (i_d * tokens + b_token) * hidden
    o_state = o_row[:, None] + o_unit[None, :]
    b_new = zoned(b_new, b_h, p_zone_h, o_state, m_state, zoneout_h).to(p_output.dtype.element_ty)
    store_tiles(p_output, (b_token * directions + i_d) * hidden, o_unit, hidden, m_state, (b_new,), 1)
    if MODE == "lstm":
        b_new_c = zoned(b_new_c, b_c, p_zone_c, o_state, m_state, zoneout_c)
        if p_c_all is not None:
            store_tiles(p_c_all, o_row, o_unit, hidden, m_state, (b_new_c,), 1)
    if p_kept is not None:
        store_tiles(p_kept, o_row * 4, o_unit, hidden, m_state, b_kept, 4)
    return b_new, b_new_c


@triton.jit
def saved_bwd(
    i_s, b_token, b_before, b_reset, m_state, i_d, directions, o_row, o_unit, batch, tokens, hidden,
    p_grad_output, p_grad_c_all, p_output, p_c_all, p_kept, p_h0, p_c0, MODE: tl.constexpr, NEEDS_H: tl.constexpr,
):  # fmt: skip
    """(kept, h before, c, c before, dL/dh and dL/dc from outside) of a step. b_before: tokens of the step before."""
    b_zero = tl.zeros(m_state.shape, dtype=tl.float32)
    m_initial, m_before = m_state & (i_s == 0) & ~b_reset[:, None], m_state & (i_s > 0) & ~b_reset[:, None]
    o_initial = (i_d * batch + o_row) * hidden
    o_out, o_all = (b_token * directions + i_d) * hidden, (i_d * tokens + b_token) * hidden
    if MODE == "lstm" or MODE == "gru":
        b_kept = tiles(p_kept, o_all * 4, o_unit, hidden, m_state, 4)
    else:
        b_kept = tiles(p_output, o_out, o_unit, hidden, m_state, 1)
    b_h_before, b_c, b_c_before, b_dh, b_dc = b_zero, b_zero, b_zero, b_zero, b_zero
    if NEEDS_H:
        b_h_before = tiles(p_output, (b_before * directions + i_d) * hidden, o_unit, hidden, m_before, 1)[0]
        b_h_before += tiles(p_h0, o_initial, o_unit, hidden, m_initial, 1)[0]
    if MODE == "lstm":
        b_c = tiles(p_c_all, o_all, o_unit, hidden, m_state, 1)[0]
        b_c_before = tiles(p_c_all, (i_d * tokens + b_before) * hidden, o_unit, hidden, m_before, 1)[0]
        b_c_before += tiles(p_c0, o_initial, o_unit, hidden, m_initial, 1)[0]
    if p_grad_output is not None:
        b_dh = tiles(p_grad_output, o_out, o_unit, hidden, m_state, 1)[0]
    if p_grad_c_all is not None:
        b_dc = tiles(p_grad_c_all, o_all, o_unit, hidden, m_state, 1)[0]
    return b_kept, b_h_before, b_c, b_c_before, b_dh, b_dc


@triton.jit
def unzoned_output(b_out, b_before, zoneout, DTYPE: tl.constexpr, MODE: tl.constexpr):
    """The RNN's h~ of h' = p·h + (1 - p)·h~. ReLU's derivative asks only whether h' moved away from p·h."""
    b_rest = (zoneout * b_before).to(DTYPE).to(tl.float32)
    if MODE == "rnn_relu":
        return b_out - b_rest
    else:
        b_new = (b_out - zoneout * b_before) / tl.maximum(1.0 - zoneout, 1e-6)
        return tl.minimum(tl.maximum(b_new, -1.0), 1.0)


@triton.jit
def finish_bwd(
    b_saved, b_dh, b_dc, p_zone_h, p_zone_c, zoneout_h, zoneout_c,
    b_token, m_state, i_d, o_unit, tokens, hidden, DTYPE: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """(slopes rounded to DTYPE, dL/dh that bypasses the product, dL/dc before) of dL/dh and dL/dc after the step."""
    b_kept, b_h_before, b_c, b_c_before, b_grad_h, b_grad_c = b_saved
    o_state = ((i_d * tokens + b_token) * hidden)[:, None] + o_unit[None, :]
    b_h_before = b_h_before.to(tl.float32)
    b_dh, b_passed = unzoned(b_dh + b_grad_h.to(tl.float32), p_zone_h, o_state, m_state, zoneout_h)
    b_dc, b_passed_c = unzoned(b_dc + b_grad_c.to(tl.float32), p_zone_c, o_state, m_state, zoneout_c)
    if MODE == "lstm" or MODE == "gru":
        b_kept = (
            b_kept[0].to(tl.float32), b_kept[1].to(tl.float32), b_kept[2].to(tl.float32), b_kept[3].to(tl.float32)
        )  # fmt: skip
    elif zoneout_h is not None and p_zone_h is None:
        b_kept = (unzoned_output(b_kept[0].to(tl.float32), b_h_before, zoneout_h, DTYPE, MODE),)
    else:
        b_kept = (b_kept[0].to(tl.float32),)
    if MODE == "lstm" and (p_zone_c is not None or zoneout_c is not None):
        b_c = b_kept[1] * b_c_before + b_kept[0] * b_kept[2]
    b_slopes, b_bypass, b_dc = gates_bwd(b_dh, b_dc, b_kept, b_h_before, b_c, b_c_before, MODE)
    if MODE == "lstm" or MODE == "gru":
        b_slopes = (
            b_slopes[0].to(DTYPE), b_slopes[1].to(DTYPE), b_slopes[2].to(DTYPE), b_slopes[3].to(DTYPE)
        )  # fmt: skip
    else:
        b_slopes = (b_slopes[0].to(DTYPE),)
    return b_slopes, b_passed + b_bypass, b_dc + b_passed_c
