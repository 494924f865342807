"""The README's generated parts: the support matrix and the measured table.

`python -m bench readme` rewrites what stands between `<!-- NAME -->` and `<!-- /NAME -->`; a test checks it is current.
"""

import json
import re
from pathlib import Path

from bench.machine import RESULTS
from bench.report import against_compile, backends, speedup
from fused_ops import info

README = Path(__file__).parent.parent / "README.md"


def blocks() -> dict[str, str]:
    return {"support": info.markdown(info.support_matrix()), "measured": measured(RESULTS / "cpu" / "latest.json")}


def measured(path: Path) -> str:
    """The main job's tables as Markdown, with the machine they were measured on and the file they stand in."""
    found = json.loads(path.read_text())
    machine = found["machine"]
    lines = [
        f"{machine['processor']}, {machine['threads']} threads, GPU: {machine['gpu']}, torch {machine['torch']}, "
        f"{found['date']}; `{path.relative_to(README.parent)}`.",
        "",
        "| model | PyTorch ms | fused ms | × PyTorch | × compile | max error | backends |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in found["models"]:
        if "missing" in row:
            lines.append(f"| {row['model']} | – | – | – | – | – | {row['missing']} |")
            continue
        lines.append(
            f"| {row['model']} | {row['PyTorch']['ms']:.2f} | {row['fused']['ms']:.2f} | {speedup(row)} "
            f"| {against_compile(row)} | {row['error']:.1e} | {backends(row)} |"
        )
    lines += [
        "",
        "| op | shape | dtype | backend | ms | PyTorch ms | rate | × PyTorch |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in found["ops"]:
        lines.append(
            f"| `{row['op']}` | {row['shape']} | {row['dtype']} | {row['backend']} | {row['ms']:.4f} "
            f"| {row['peer_ms']:.4f} | {row['rate']:.1f} {row['unit']} | {speedup(row)} |"
        )
    return "\n".join(lines)


def renewed(text: str) -> str:
    """`text` with every generated block brought up to date."""
    for name, body in blocks().items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, count = re.subn(pattern, lambda found, body=body: f"{found[1]}{body}\n{found[2]}", text, flags=re.S)
        if count != 1:
            raise LookupError(f"README.md has {count} blocks named {name}, wanted 1")
    return text


def main() -> int:
    README.write_text(renewed(README.read_text()))
    return 0
