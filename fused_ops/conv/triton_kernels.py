"""1x1 convolution in Triton: a matrix product whose epilogue does what follows the convolution."""

import torch
import triton
import triton.language as tl

from fused_ops.conv.op import output_format
from fused_ops.core.precision import convolution_dot_precision

RELU, RELU6, GELU, GELU_TANH, SILU, TANH, SIGMOID, HARDSWISH, LEAKY_RELU = (tl.constexpr(i) for i in range(1, 10))


@triton.jit
def _tanh(y):
    return 1.0 - 2.0 / (tl.exp(2.0 * y) + 1.0)


@triton.jit
def _activate(y, ACTIVATION: tl.constexpr):
    """The activation whose code in `reference.CODES` is ACTIVATION; NaN stays NaN."""
    if ACTIVATION == RELU:
        y = tl.where(y < 0.0, 0.0, y)
    elif ACTIVATION == RELU6:
        y = tl.where(y < 0.0, 0.0, tl.where(y > 6.0, 6.0, y))
    elif ACTIVATION == GELU:
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == GELU_TANH:
        y = 0.5 * y * (1.0 + _tanh(0.7978845608028654 * (y + 0.044715 * y * y * y)))
    elif ACTIVATION == SILU:
        y = y / (1.0 + tl.exp(-y))
    elif ACTIVATION == TANH:
        y = _tanh(y)
    elif ACTIVATION == SIGMOID:
        y = 1.0 / (1.0 + tl.exp(-y))
    elif ACTIVATION == HARDSWISH:
        b_gate = y + 3.0
        y = y * tl.where(b_gate < 0.0, 0.0, tl.where(b_gate > 6.0, 6.0, b_gate)) * 0.16666666666666666
    elif ACTIVATION == LEAKY_RELU:
        y = tl.where(y < 0.0, y * 0.01, y)
    return y


@triton.jit
def conv2d_pointwise_fwd_kernel(
    p_input, p_weight, p_scale, p_shift, p_residual, p_out,
    out_channels, positions, tiles, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    USE_SCALE: tl.constexpr, USE_SHIFT: tl.constexpr, USE_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[p, o] = act(Σ_c input[p, c] · weight[o, c] · scale[o] + shift[o] + residual[p, o]).

    An image is (positions, channels) if CHANNELS_LAST, then all images are one; else (channels, positions). The sum is
    float32 and stays on the chip. One program makes BLOCK_P positions of BLOCK_O channels; programs that read the same
    input run side by side, so that it comes from the second level cache after the first.
    Source: the convolution as an implicit matrix product, Chetlur et al. 2014 (cuDNN), section 3.1.
    """
    i_program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(out_channels, BLOCK_O)
    i_out = (i_program % blocks) * BLOCK_O
    i_position = (i_program // blocks % tiles) * BLOCK_P
    i_image = i_program // blocks // tiles
    p_input += i_image * CHANNELS * positions
    o_image = i_image * out_channels * positions
    stride_in, stride_channel, stride_out, stride_out_channel = 1, positions, 1, positions
    if CHANNELS_LAST:
        stride_in, stride_channel, stride_out, stride_out_channel = CHANNELS, 1, out_channels, 1

    o_position = i_position + tl.arange(0, BLOCK_P)
    o_out = i_out + tl.arange(0, BLOCK_O)
    o_channel = tl.arange(0, BLOCK_C)
    m_position, m_out = o_position < positions, o_out < out_channels
    # Offsets within a tile fit 32 bits; what moves is a scalar.
    p_input += i_position * stride_in
    p_weight += i_out * CHANNELS
    o_x = tl.arange(0, BLOCK_P)[:, None] * stride_in + o_channel[None, :] * stride_channel
    o_w = tl.arange(0, BLOCK_O)[None, :] * CHANNELS + o_channel[:, None]
    b_sum = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    for i_channel in tl.range(0, CHANNELS, BLOCK_C):
        m_channel = i_channel + o_channel < CHANNELS
        b_x = tl.load(p_input + o_x, mask=m_position[:, None] & m_channel[None, :], other=0.0)
        b_w = tl.load(p_weight + o_w, mask=m_channel[:, None] & m_out[None, :], other=0.0)
        b_sum = tl.dot(b_x, b_w, b_sum, input_precision=PRECISION)
        p_input += tl.cast(BLOCK_C, tl.int64) * stride_channel
        p_weight += BLOCK_C

    if USE_SCALE:
        b_sum *= tl.load(p_scale + o_out, mask=m_out, other=0.0)[None, :]
    if USE_SHIFT:
        b_sum += tl.load(p_shift + o_out, mask=m_out, other=0.0)[None, :]
    o_tile = o_image + i_position * stride_out + i_out * stride_out_channel
    o_result = tl.arange(0, BLOCK_P)[:, None] * stride_out + tl.arange(0, BLOCK_O)[None, :] * stride_out_channel
    m_result = m_position[:, None] & m_out[None, :]
    if USE_RESIDUAL:
        b_sum += tl.load(p_residual + o_tile + o_result, mask=m_result, other=0.0).to(tl.float32)
    b_sum = _activate(b_sum, ACTIVATION)
    tl.store(p_out + o_tile + o_result, b_sum.to(p_out.dtype.element_ty), mask=m_result)


def config(
    positions: int, channels: int, out_channels: int, itemsize: int, aligned: bool
) -> tuple[dict[str, int], int, int]:
    """(blocks, warps, stages). At most 72 KB of shared memory: it fits every chip from sm_80 on.

    Not `aligned`, elements are moved one by one, each with an address in a register: smaller tiles, more warps.
    """
    if not aligned:
        return {"BLOCK_P": 64, "BLOCK_O": 32 if out_channels <= 32 or itemsize == 4 else 64, "BLOCK_C": 32}, 8, 3
    block_o = 32 if out_channels <= 32 else 64 if out_channels <= 64 or itemsize == 4 else 128
    block_p = 64 if itemsize == 4 or positions < 16384 else 128
    block_c = 32 if itemsize == 4 or channels <= 32 else 64
    stages = 2 if block_p == 128 and block_o == 128 else 3
    warps = 8 if block_p * block_o * itemsize >= 16384 else 4
    return {"BLOCK_P": block_p, "BLOCK_O": block_o, "BLOCK_C": block_c}, warps, stages


def conv2d_pointwise_fwd(input, weight, scale, shift, residual, activation: int) -> torch.Tensor:
    """input (N, C, H, W), weight (K, C, 1, 1), residual (N, K, H, W) in the output's memory format."""
    layout = output_format(input, weight)
    channels_last = layout is torch.channels_last
    input, weight = input.contiguous(memory_format=layout), weight.contiguous()
    batch, channels, height, width = input.shape
    out_channels = weight.size(0)
    size = (batch, out_channels, height, width)
    out = torch.empty(size, dtype=input.dtype, device=input.device, memory_format=layout)
    images, positions = (1, batch * height * width) if channels_last else (batch, height * width)
    sizes = (channels, out_channels) if channels_last else (channels, out_channels, positions)
    tensors = (input, weight, out, *(t for t in (scale, shift, residual) if t is not None))
    aligned = all(size % 16 == 0 for size in sizes) and all(t.data_ptr() % 16 == 0 for t in tensors)
    blocks, warps, stages = config(batch * height * width, channels, out_channels, input.element_size(), aligned)
    tiles = triton.cdiv(positions, blocks["BLOCK_P"])
    grid = (images * tiles * triton.cdiv(out_channels, blocks["BLOCK_O"]),)
    precision = convolution_dot_precision() if input.dtype is torch.float32 else "ieee"
    guard = torch.cuda.device(input.device) if input.is_cuda else torch.device("cpu")
    with guard:
        conv2d_pointwise_fwd_kernel[grid](
            input, weight, scale, shift, residual, out, out_channels, positions, tiles,
            channels, channels_last, scale is not None, shift is not None, residual is not None, activation, precision,
            **blocks, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out


def gate_cases(chip: tuple[int, int], aligned: bool) -> list[tuple]:
    """(label, kernel, signature, constexprs, warps, stages) of every configuration `conv2d_pointwise_fwd` picks."""
    sizes = dict.fromkeys(("out_channels", "positions", "tiles"), "i32")
    cases = {}
    for dtype, itemsize in (("fp16", 2), ("bf16", 2), ("fp32", 4)):
        for precision in ("ieee", "tf32") if itemsize == 4 else ("ieee",):
            for positions, channels, out_channels in _GATE_SHAPES:
                blocks, warps, stages = config(positions, channels, out_channels, itemsize, aligned)
                for channels_last in (False, True):
                    pointers = dict.fromkeys(("p_input", "p_weight", "p_residual", "p_out"), f"*{dtype}")
                    constants = {
                        "CHANNELS": channels, "CHANNELS_LAST": channels_last,
                        "USE_SCALE": True, "USE_SHIFT": True, "USE_RESIDUAL": True,
                        "ACTIVATION": 3, "PRECISION": precision, **blocks,
                    }  # fmt: skip
                    layout = "NHWC" if channels_last else "NCHW"
                    tile = "x".join(map(str, blocks.values()))
                    label = f"conv2d_pointwise_fwd {dtype} {precision} {layout} {tile}"
                    signature = {**pointers, "p_scale": "*fp32", "p_shift": "*fp32", **sizes}
                    cases[label] = (label, conv2d_pointwise_fwd_kernel, signature, constants, warps, stages)
    return list(cases.values())


_GATE_SHAPES = tuple((p, c, o) for p in (1024, 65536) for c in (32, 512) for o in (32, 64, 512))
