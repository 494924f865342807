"""Records which GPU kernels a real GPU has run and found right.

`python -m tests.verify [--kernel NAME ...] [--out FILE]` runs the tests marked `gpu` and
`kernel("attention.fwd.triton")`. A kernel all of whose tests passed, and at least one ran, gets an entry in
fused_ops/core/verified.json (the fingerprint of its source, the device, the date), and `auto` may take it until its
source changes. A kernel with a failure loses its entry.
"""

import argparse
import datetime
import json
import os
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch

import fused_ops  # noqa: F401 - registers every kernel
from fused_ops.core import verified

TESTS = Path(__file__).parent


class Outcomes:
    """A pytest plugin: per kernel, what became of each of its tests."""

    def __init__(self, kernels: list[str] | None = None):
        self.wanted = kernels
        self.kernels: dict[str, list[str]] = {}
        self.found: dict[str, dict[str, str]] = defaultdict(dict)
        self.broken = False

    def pytest_collection_modifyitems(self, config, items):
        def chosen(item):
            names = {mark.args[0] for mark in item.iter_markers("kernel")}
            return "gpu" in item.keywords and (self.wanted is None or names & set(self.wanted))

        config.hook.pytest_deselected(items=[item for item in items if not chosen(item)])
        items[:] = [item for item in items if chosen(item)]
        self.kernels = {item.nodeid: [mark.args[0] for mark in item.iter_markers("kernel")] for item in items}

    def pytest_collectreport(self, report):
        self.broken |= report.failed

    def pytest_runtest_logreport(self, report):
        # An expected failure is no proof; an unexpected pass of one is reported as passed or failed by its strictness.
        outcome = "skipped" if hasattr(report, "wasxfail") else report.outcome
        if report.when == "call" or outcome != "passed":
            for kernel in self.kernels[report.nodeid] or [""]:
                before = self.found[kernel].get(report.nodeid)
                self.found[kernel][report.nodeid] = "failed" if "failed" in (before, outcome) else outcome


def judge(tests: dict[str, str]) -> str | None:
    """Why the outcomes of a kernel's tests do not verify it, or None if they do."""
    failed = sorted(name for name, outcome in tests.items() if outcome == "failed")
    if failed:
        return f"{len(failed)} of {len(tests)} tests failed: {failed[0]}"
    return None if "passed" in tests.values() else "none of its GPU tests ran"


def updated(record: dict, found: dict[str, dict[str, str]], device: str, date: str) -> tuple[dict, dict[str, str]]:
    """(the new record, a line per kernel) from what ran; kernels that did not run keep their entries."""
    record, lines = dict(record), {}
    for name, kernel in sorted(verified.KERNELS.items()):
        tests = found.get(name, {})
        reason, fingerprint = judge(tests), verified.fingerprint(kernel)
        if reason is None and fingerprint is None:
            reason = "its source is not part of this installation"
        lines[name] = f"verified by {sum(o == 'passed' for o in tests.values())} tests" if reason is None else reason
        if reason is None:
            record[name] = {"fingerprint": fingerprint, "device": device, "date": date}
        elif "failed" in tests.values():
            record.pop(name, None)
    return {name: record[name] for name in sorted(record) if name in verified.KERNELS}, lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.verify", description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", nargs="+", choices=sorted(verified.KERNELS), help="default: every kernel")
    parser.add_argument("--out", type=Path, default=verified.RECORD, help="default: fused_ops/core/verified.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("only a GPU can verify GPU kernels, and there is none here")
    for name in ("TRITON_INTERPRET", "FUSED_OPS_BACKEND"):
        if os.environ.get(name):
            sys.exit(f"unset {name}: with it, something other than the kernels themselves would be tested")
    outcomes = Outcomes(options.kernel)
    pytest.main(["-q", "-p", "no:cacheprovider", str(TESTS)], plugins=[outcomes])
    if outcomes.broken:
        sys.exit("some tests could not be collected: nothing is recorded")
    unknown = sorted(outcomes.found.keys() - verified.KERNELS.keys() - {""})
    if unknown:
        sys.exit(f"tests name kernels that do not exist: {', '.join(unknown)}; nothing is recorded")
    device, today = torch.cuda.get_device_name(0), datetime.date.today().isoformat()
    record, lines = updated(verified.record(), outcomes.found, device, today)
    options.out.write_text(json.dumps(record, indent=2) + "\n")
    width = max(map(len, lines), default=0)
    print("\n".join(f"{name:<{width}}  {line}" for name, line in lines.items()))
    return 1 if any("failed" in tests.values() for tests in outcomes.found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
