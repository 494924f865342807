"""The RNNs on a GPU against cuDNN: `python -m bench.measure.rnn_gpu [--out folder]` writes <folder>/rnn.json.

Every row is one call with its rivals timed in turn in one process; `wanted` is what the fastest of ours should reach
over torch's, input projection included on both sides. What cannot run says why.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fused_ops
from bench import machine

BACKENDS = ("cuda", "triton")
KINDS = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN"}


@dataclass(frozen=True)
class Row:
    """One call: inputs = hidden. what: "padded"; "lengths", uniform in steps/2..steps; "resets", with all states."""

    kind: str
    batch: int
    steps: int
    hidden: int
    dtype: str = "bfloat16"
    layers: int = 1
    bidirectional: bool = False
    what: str = "padded"
    wanted: float = 1.0


ROWS = (
    Row("lstm", 16, 1024, 768, wanted=2.5),
    Row("lstm", 16, 1024, 768, "float16"),
    *(
        Row("gru", batch, 128, hidden, dtype, wanted=2.5)
        for hidden, batch, dtype in itertools.product((256, 512, 1024), (8, 32, 64), ("bfloat16", "float32"))
    ),
    Row("lstm", 16, 128, 512, bidirectional=True, wanted=2.0),
    Row("lstm", 16, 128, 512, layers=2, wanted=2.0),
    Row("lstm", 12, 128, 320, wanted=2.0),
    *(Row(kind, 16, 128, hidden) for kind, hidden in itertools.product(KINDS, (64, 128, 192))),
    Row("lstm", 16, 1024, 440, wanted=2.0),
    Row("lstm", 32, 1000, 256, what="lengths", wanted=8.0),
    Row("gru", 32, 1000, 256, what="lengths", wanted=8.0),
    Row("lstm", 128, 128, 512, what="resets", wanted=10.0),
)


def calls(row: Row, device: str) -> dict[str, tuple[Callable[[], Tensor], list[Tensor]]]:
    """{rival: (its forward, what it is differentiated by)}."""
    dtype = getattr(torch, row.dtype)
    sizes = {"num_layers": row.layers, "bidirectional": row.bidirectional}
    torch.manual_seed(0)
    torchs = getattr(nn, KINDS[row.kind])(row.hidden, row.hidden, **sizes).to(device, dtype)
    ours = getattr(fused_ops.nn, KINDS[row.kind])(row.hidden, row.hidden, **sizes).to(device, dtype)
    ours.load_state_dict(torchs.state_dict())
    x = torch.randn(row.steps, row.batch, row.hidden, device=device, dtype=dtype, requires_grad=True)
    lengths = torch.randint(row.steps // 2, row.steps + 1, (row.batch,)).clamp(min=1)
    resets = torch.rand(row.steps, row.batch, device=device) < 0.02
    extras = {
        "padded": {},
        "lengths": {"lengths": lengths.to(device)},
        "resets": {"resets": resets, "return_all_states": True},
    }[row.what]

    def mine(backend: str, **keywords) -> Callable[[], Tensor]:
        def forward():
            with fused_ops.use_backend(backend):
                return ours(x, **keywords)[0]

        return forward

    found = {backend: (mine(backend, **extras), [x, *ours.parameters()]) for backend in BACKENDS}
    if row.what != "padded":
        found |= {f"{backend} plain": (mine(backend), [x, *ours.parameters()]) for backend in BACKENDS}
    if row.what == "lengths":
        packed = lambda: torchs(pack_padded_sequence(x, lengths, enforce_sorted=False))[0].data  # noqa: E731
        found["torch"] = packed, [x, *torchs.parameters()]
    elif row.what == "resets":
        cell = getattr(nn, f"{KINDS[row.kind]}Cell")(row.hidden, row.hidden).to(device, dtype)
        found["torch"] = lambda: _loop(cell, x, resets), [x, *cell.parameters()]
    else:
        found["torch"] = lambda: torchs(x)[0], [x, *torchs.parameters()]
    return found


def _loop(cell: nn.Module, x: Tensor, resets: Tensor) -> Tensor:
    """An LSTMCell step by step, its state zeroed at resets: what PyTorch's users write."""
    h = c = x.new_zeros(x.size(1), cell.hidden_size)
    outputs = []
    for step, reset in zip(x, resets, strict=True):
        h, c = (state.masked_fill(reset[:, None], 0.0) for state in (h, c))
        h, c = cell(step, (h, c))
        outputs.append(h)
    return torch.stack(outputs)


def training(forward: Callable[[], Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    grad = torch.randn_like(forward())
    return lambda: torch.autograd.grad(forward(), inputs, grad)


def milliseconds(rivals: dict[str, Callable[[], object]], rounds: int) -> dict[str, float | str]:
    """Median device time of each, measured in turn; or why it cannot run."""
    found: dict[str, float | str] = {}
    samples: dict[str, list[float]] = {}
    for name, call in rivals.items():
        try:
            for _ in range(3):
                call()
            torch.cuda.synchronize()
            samples[name] = []
        except (RuntimeError, torch.OutOfMemoryError) as error:
            found[name] = str(error).splitlines()[0][:160]
    for _ in range(rounds):
        for name, kept in samples.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            rivals[name]()
            end.record()
            torch.cuda.synchronize()
            kept.append(start.elapsed_time(end))
    return found | {name: statistics.median(kept) for name, kept in samples.items()}


def measured(row: Row, rounds: int = 21) -> Iterator[dict]:
    rivals = calls(row, "cuda")
    passes = {
        "forward": {name: torch.no_grad()(forward) for name, (forward, _) in rivals.items()},
        "forward+backward": {},
    }
    for name, (forward, inputs) in rivals.items():
        try:
            passes["forward+backward"][name] = training(forward, inputs)
        except RuntimeError as error:
            print(f"{row}: {name}: {error}")
    for which, timed in passes.items():
        found = milliseconds(timed, rounds if row.what != "resets" else 7)
        ours = [found[name] for name in BACKENDS if isinstance(found.get(name), float)]
        facts = asdict(row) | {"pass": which, "ms": found}
        if ours and isinstance(found.get("torch"), float):
            facts["speedup"] = round(found["torch"] / min(ours), 2)
        yield facts


def errors(device: str, steps: int = 4096, hidden: int = 256) -> dict[str, float | str]:
    """Largest error of the output of a long sequence against float64, ours and torch's; wanted: at most 1.25 times."""
    rivals = calls(Row("lstm", 4, steps, hidden), device)
    exact = nn.LSTM(hidden, hidden).to(device, torch.float64)
    with torch.no_grad():
        for to, param in zip(exact.parameters(), rivals["torch"][1][1:], strict=True):
            to.copy_(param)
        truth, found = exact(rivals["torch"][1][0].double())[0], {}
        for name, (forward, _) in rivals.items():
            try:
                found[name] = (forward().double() - truth).abs().max().item()
            except RuntimeError as error:
                found[name] = str(error).splitlines()[0][:160]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=machine.device_folder())
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this measures a GPU: there is none here")
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.rnn.fp32_precision = "tf32"
    options.out.mkdir(parents=True, exist_ok=True)
    results = {"machine": machine.facts(), "errors_at_4096_steps": errors("cuda"), "rows": []}
    for row in ROWS:
        for facts in measured(row):
            results["rows"].append(facts)
            print({name: facts[name] for name in ("kind", "hidden", "what", "pass", "ms")}, facts.get("speedup"))
        (options.out / "rnn.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
