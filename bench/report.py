"""Tables and the chart."""

from pathlib import Path

from rich.console import Console
from rich.table import Table


def print_models(console: Console, rows: list[dict]) -> None:
    columns = ("model", "PyTorch ms", "fused ms", "× PyTorch", "× compile", "max error", "backends")
    table = Table(*columns, title="Models")
    for row in rows:
        if "missing" in row:
            table.add_row(row["model"], "–", "–", "–", "–", "–", row["missing"])
        else:
            table.add_row(
                row["model"],
                _spread(row["PyTorch"]),
                _spread(row["fused"]),
                speedup(row),
                against_compile(row),
                f"{row['error']:.1e}",
                backends(row),
            )
    console.print(table)


def backends(row: dict) -> str:
    """Which backends served a model's ops."""
    return ", ".join(f"{op}: {names}" for op, names in row["backends"].items()) or "PyTorch's own fused encoder"


def against_compile(row: dict) -> str:
    return f"{row['against_compile']:.2f}" if "against_compile" in row else "–"


def print_ops(console: Console, rows: list[dict]) -> None:
    table = Table("op", "shape", "dtype", "backend", "ms", "PyTorch ms", "rate", "× PyTorch", "against", title="Ops")
    for row in rows:
        table.add_row(
            row["op"],
            row["shape"],
            row["dtype"],
            row["backend"],
            f"{row['ms']:.4f}",
            f"{row['peer_ms']:.4f}",
            f"{row['rate']:.1f} {row['unit']}",
            speedup(row),
            row["peer"],
        )
    console.print(table)


def _spread(timing: dict) -> str:
    return f"{timing['ms']:.2f} ({timing['p20']:.2f}–{timing['p80']:.2f})"


def speedup(row: dict) -> str:
    return f"{row['speedup']:.2f}" + (" (disturbed)" if row["disturbed"] else "")


def draw(rows: list[dict], machine: str, path: Path) -> None:
    """A bar per model and op: times PyTorch's speed, 1 marked."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = [(row.get("model") or f"{row['op']} {row['shape']}", row["speedup"]) for row in rows if "speedup" in row]
    figure, axes = plt.subplots(figsize=(9, 0.32 * len(bars) + 1.4), layout="constrained")
    labels, values = zip(*reversed(bars)) if bars else ((), ())
    axes.barh(labels, values, color=["tab:green" if value >= 1.0 else "tab:orange" for value in values])
    axes.axvline(1.0, color="black", linewidth=0.8)
    for place, value in enumerate(values):
        axes.text(value, place, f" {value:.2f}×", va="center", fontsize=8)
    axes.set_xlabel("speed relative to PyTorch")
    axes.set_title(machine.replace(", torch", "\ntorch"), fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
