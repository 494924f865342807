"""PyTorch itself on a GPU: what every kernel here is compared with, and the machine's own ceilings.

Each part keeps its rows as it goes, so that a run cut short keeps what it measured:
`python -m bench baselines` writes bench/results/<gpu>/baselines.json.
"""

import itertools
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pack_padded_sequence

from bench import machine

BUDGET = {"ceilings": 40, "rnn": 200, "attention": 180, "conv": 140}  # seconds a part may take
Rows = Iterator[tuple[dict, Callable[[], object]]]
_HALF = (torch.bfloat16, torch.float16)
DEVICE = "cuda"


def main(console: Console, folder: Path) -> int:
    if not torch.cuda.is_available():
        console.print("baselines are PyTorch's own speeds on a GPU: there is none here")
        return 1
    torch.backends.cudnn.benchmark = True
    path = folder / "baselines.json"
    found: dict = {"machine": machine.facts(), "cudnn": torch.backends.cudnn.version(), "latencies": barriers()}
    for part, rows in (("ceilings", ceilings), ("rnn", rnn), ("attention", attention), ("conv", conv)):
        found[part] = []
        deadline = time.perf_counter() + BUDGET[part]
        for facts, call in rows():
            found[part].append({**facts, **milliseconds(call)})
            if time.perf_counter() > deadline:
                found[part].append({"cut": f"after {BUDGET[part]} s"})
                break
        path.write_text(json.dumps(found, indent=1) + "\n")
        console.print(f"{part}: {len(found[part])} rows")
    return 0


def milliseconds(call: Callable[[], object], rounds: int = 11) -> dict:
    """Median device time, or why there is none. The first call (plans, compilation) is not counted."""
    try:
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        samples = []
        for _ in range(rounds):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            samples.append(start.elapsed_time(end))
    except (RuntimeError, torch.OutOfMemoryError) as error:
        return {"error": str(error).splitlines()[0][:120]}
    samples.sort()
    return {"ms": samples[rounds // 2], "p20": samples[rounds // 5], "p80": samples[rounds * 4 // 5]}


def forward_and_backward(forward: Callable[[], torch.Tensor], inputs: list[torch.Tensor]) -> Callable[[], object]:
    grad = torch.randn_like(forward())
    return lambda: torch.autograd.grad(forward(), inputs, grad)


def barriers() -> dict:
    """Launch, grid-barrier and cluster-barrier latency, from bench/barriers.cu."""
    if shutil.which("nvcc") is None:
        return {"error": "no nvcc"}
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}" + ("a" if major == 9 else "")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "barriers"
        source = Path(__file__).with_name("barriers.cu")
        command = ["nvcc", "-std=c++17", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-o", program, source]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
            return json.loads(subprocess.run([program], check=True, capture_output=True, text=True).stdout)
        except subprocess.CalledProcessError as error:
            return {"error": (error.stderr or str(error)).strip()[:300]}


def ceilings() -> Rows:
    source = torch.randn(2**30, device=DEVICE, dtype=torch.float32)
    target = torch.empty_like(source)
    yield {"what": "copy", "bytes": 2 * source.nbytes}, lambda: target.copy_(source)
    for dtype, n in itertools.product((*_HALF, torch.float32), (4096, 8192)):
        a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
        yield {"what": f"matmul {n}³", "dtype": str(dtype), "flops": 2 * n**3}, lambda a=a, b=b: a @ b


def rnn() -> Rows:
    """The layers in order of what later decisions need; `packed` has lengths evenly from T/2 to T."""
    shapes = [(16, 768, 1024), *itertools.product((1, 8, 16, 32, 64, 128), (64, 128, 256, 512, 1024, 2048), (128,))]
    for (batch, hidden, steps), kind in itertools.product(shapes, (nn.LSTM, nn.GRU, nn.RNN)):
        dtypes = (*_HALF, torch.float32) if batch in (1, 16, 64) else (torch.bfloat16,)
        for dtype in dtypes:
            yield from _layer(kind, dtype, batch, hidden, steps)
    for kind, dtype in itertools.product((nn.LSTM, nn.GRU), (*_HALF, torch.float32)):
        yield from _layer(kind, dtype, 16, 512, 128, num_layers=2)
        yield from _layer(kind, dtype, 16, 512, 128, bidirectional=True)
        yield from _layer(kind, dtype, 12, 320, 128)
        yield from _layer(kind, dtype, 16, 256, 1024, packed=True)


def _layer(kind, dtype, batch, hidden, steps, packed=False, **options) -> Rows:
    module = kind(hidden, hidden, device=DEVICE, dtype=dtype, **options)
    x = torch.randn(steps, batch, hidden, device=DEVICE, dtype=dtype, requires_grad=True)
    lengths = torch.linspace(steps // 2, steps, batch).long()

    def forward():
        data = pack_padded_sequence(x, lengths, enforce_sorted=False) if packed else x
        out = module(data)[0]
        return out.data if packed else out

    facts = dict(layer=kind.__name__, dtype=str(dtype), B=batch, H=hidden, T=steps, packed=packed, **options)
    yield {**facts, "pass": "forward"}, torch.no_grad()(forward)
    yield {**facts, "pass": "forward+backward"}, forward_and_backward(forward, [x, *module.parameters()])


def attention() -> Rows:
    """16k tokens, hidden 2048, bf16; per SDPA backend: plain, causal, masked, and with a bias that has a gradient."""
    backends = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, None)
    for dim, length in itertools.product((128, 64, 256), (4096, 1024, 16384)):
        batch, heads = max(16384 // length, 1), 2048 // dim
        q, k, v = (
            torch.randn(batch, heads, length, dim, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
            for _ in range(3)
        )
        for form, backend in itertools.product(("full", "causal", "mask", "bias"), backends):
            if form in ("mask", "bias") and length > 4096:
                continue
            yield from _sdpa(form, backend, q, k, v)


def _sdpa(form, backend, q, k, v) -> Rows:
    length = q.size(-2)
    mask = None
    if form == "mask":
        mask = torch.rand(length, length, device=DEVICE) > 0.3
    elif form == "bias":
        mask = torch.randn(1, q.size(1), length, length, device=DEVICE, dtype=q.dtype, requires_grad=True)

    def forward():
        with sdpa_kernel(backend) if backend else nullcontext():
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=form == "causal")

    facts = dict(form=form, backend=backend.name if backend else "default", shape=tuple(q.shape), dtype="bfloat16")
    flops = 4 * q.numel() * length / (2 if form == "causal" else 1)
    yield {**facts, "pass": "forward", "flops": flops}, torch.no_grad()(forward)
    inputs = [q, k, v] + ([mask] if form == "bias" else [])
    try:
        call = forward_and_backward(forward, inputs)
    except RuntimeError:
        return
    yield {**facts, "pass": "forward+backward", "flops": 3.5 * flops}, call


# (cin, cout, kernel, stride, size, groups): ResNet-50's unique convolutions, then depthwise layers of mobile networks.
CONVOLUTIONS = (
    (3, 64, 7, 2, 224, 1), (64, 64, 1, 1, 56, 1), (64, 64, 3, 1, 56, 1), (64, 256, 1, 1, 56, 1),
    (256, 64, 1, 1, 56, 1), (256, 128, 1, 1, 56, 1), (128, 128, 3, 2, 56, 1), (128, 512, 1, 1, 28, 1),
    (256, 512, 1, 2, 56, 1), (512, 128, 1, 1, 28, 1), (128, 128, 3, 1, 28, 1), (512, 256, 1, 1, 28, 1),
    (256, 256, 3, 2, 28, 1), (256, 1024, 1, 1, 14, 1), (512, 1024, 1, 2, 28, 1), (1024, 256, 1, 1, 14, 1),
    (256, 256, 3, 1, 14, 1), (1024, 512, 1, 1, 14, 1), (512, 512, 3, 2, 14, 1), (512, 2048, 1, 1, 7, 1),
    (1024, 2048, 1, 2, 14, 1), (2048, 512, 1, 1, 7, 1), (512, 512, 3, 1, 7, 1),
    (144, 144, 3, 1, 56, 144), (384, 384, 3, 1, 28, 384), (96, 96, 7, 1, 56, 96), (384, 384, 7, 1, 14, 384),
)  # fmt: skip


def conv() -> Rows:
    """conv + BN + ReLU in eval mode, bf16 channels_last: eager, compiled, compiled with max-autotune."""
    for batch, (cin, cout, kernel, stride, size, groups) in itertools.product((32, 256, 1), CONVOLUTIONS):
        block = nn.Sequential(
            nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(cout),
            nn.ReLU(),
        )
        block = block.to(DEVICE, torch.bfloat16, memory_format=torch.channels_last).eval()
        x = torch.randn(batch, cin, size, size, device=DEVICE, dtype=torch.bfloat16)
        x = x.to(memory_format=torch.channels_last)
        facts = dict(N=batch, cin=cin, cout=cout, kernel=kernel, stride=stride, size=size, groups=groups)
        flops = 2 * batch * cout * (size // stride) ** 2 * (cin // groups) * kernel**2
        ways = {"eager": block, "compile": torch.compile(block)}
        if batch == 32:
            ways["max-autotune"] = torch.compile(block, mode="max-autotune-no-cudagraphs")
        for way, call in ways.items():
            torch._dynamo.reset()
            yield {**facts, "way": way, "flops": flops}, torch.inference_mode()(lambda call=call, x=x: call(x))
