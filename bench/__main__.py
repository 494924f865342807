"""python -m bench [all|models|ops|baselines|readme]: measure, print, keep the results; or renew the README's tables."""

import argparse
import json
import os
import sys
import time

import torch
from rich.console import Console
from rich.progress import Progress

from bench import machine, models, ops, readme, report


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("what", nargs="?", default="all", choices=("all", "models", "ops", "baselines", "readme"))
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="per rival in an op row (models take four times that)"
    )
    parser.add_argument("--out", default=None, help="folder for the results; default bench/results/<device>")
    options = parser.parse_args()
    if options.what == "readme":
        return readme.main()
    console = Console(width=None if sys.stdout.isatty() else 160)
    folder = machine.device_folder() if options.out is None else machine.Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    console.print(machine.line())
    if options.what == "baselines":
        from bench import baselines

        return baselines.main(console, folder)
    found, wrong = _measure(console, options.what, options.seconds)
    if wrong:
        console.print("\n".join(["[red]Wrong results have no speed; nothing is kept:[/]", *wrong]))
        return 1
    if found["models"]:
        report.print_models(console, found["models"])
    if found["ops"]:
        report.print_ops(console, found["ops"])
    name = "latest" if options.what == "all" else options.what
    (folder / f"{name}.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    report.draw(found["models"] + found["ops"], machine.line(), folder / f"{name}.png")
    console.print(f"kept in {os.path.relpath(folder)}/{name}.json and {name}.png")
    return 0


def _measure(console: Console, what: str, seconds: float) -> tuple[dict, list[str]]:
    """What was found, and every result that is wrong."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {"machine": machine.facts(), "date": time.strftime("%Y-%m-%d"), "models": [], "ops": []}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=None)

        def advance(label: str) -> None:
            progress.update(task, description=label)

        if what in ("all", "models"):
            found["models"] = models.run(device, 4 * seconds, advance)
        if what in ("all", "ops"):
            found["ops"] = ops.run(device, seconds, advance)
    wrong = [
        f"{row['model']}: error {row['error']:.1e} of {row['scale']:.1e}; "
        + "; ".join(claim for claim, holds in row["claims"] if not holds)
        for row in found["models"]
        if not row.get("correct", True)
    ]
    return found, wrong + [f"{row['op']} {row['shape']}: {row['wrong']}" for row in found["ops"] if "wrong" in row]


if __name__ == "__main__":
    sys.exit(main())
