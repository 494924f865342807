"""python -m bench [models|ops|all|baselines]: measure, print, and keep the results beside the code."""

import argparse
import json
import sys
import time

import torch
from rich.console import Console
from rich.progress import Progress

from bench import machine, models, ops, report


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("what", nargs="?", default="all", choices=("all", "models", "ops", "baselines"))
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="per rival in an op row (models take four times that)"
    )
    parser.add_argument("--out", default=None, help="folder for the results; default bench/results/<device>")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 160)
    folder = machine.device_folder() if options.out is None else machine.Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    console.print(machine.line())
    if options.what == "baselines":
        from bench import baselines

        return baselines.main(console, folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {"machine": machine.facts(), "date": time.strftime("%Y-%m-%d"), "models": [], "ops": []}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=None)
        advance = lambda label: progress.update(task, description=label)  # noqa: E731
        if options.what in ("all", "models"):
            found["models"] = models.run(device, 4 * options.seconds, advance)
        if options.what in ("all", "ops"):
            found["ops"] = ops.run(device, options.seconds, advance)
    if found["models"]:
        report.print_models(console, found["models"])
    if any(not row.get("correct", True) for row in found["models"]):
        console.print("[red]A fused model is wrong: no speeds are kept.[/]")
        return 1
    if found["ops"]:
        report.print_ops(console, found["ops"])
    name = "latest" if options.what == "all" else options.what
    (folder / f"{name}.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    report.draw(found["models"] + found["ops"], machine.line(), folder / f"{name}.png")
    console.print(f"kept in bench/results/{folder.name}/{name}.json and {name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
