"""What a run leaves to be read: a progress bar, log.csv, TensorBoard's events."""

import csv
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors name the file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path} ({error.strerror})") from error


class Log:
    """The first process's logs of a run. One that goes on from `step` forgets what was written after it.

    Args:
        folder: gets log.csv, a row a call of `write`, and events for TensorBoard.
        columns: what may be written, besides the step.
        step, steps: where the progress bar starts, and its length.
    """

    def __init__(self, folder: Path, columns: list[str], step: int, steps: int):
        self.path, self.columns = folder / "log.csv", ["step", *columns]
        kept = self._rows(step) if step and self.path.is_file() else []
        scratch = self.path.with_suffix(".partial")
        with writing(self.path):
            with open(scratch, "w", newline="") as file:
                writer = csv.DictWriter(file, self.columns, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(kept)
            os.replace(scratch, self.path)
            self.file = open(self.path, "a", newline="", buffering=1)  # noqa: SIM115 - closed by close()
            self.events = SummaryWriter(str(folder), purge_step=step + 1)
        self.rows = csv.DictWriter(self.file, self.columns)
        self.bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True, disable=None)

    def _rows(self, last: int) -> list[dict[str, str]]:
        with open(self.path, newline="") as file:
            return [
                row for row in csv.DictReader(file) if (row.get("step") or "").isdigit() and int(row["step"]) <= last
            ]

    def write(self, step: int, values: dict[str, float]) -> None:
        """A row, and a point in each value's curve."""
        with writing(self.path):
            self.rows.writerow({"step": step} | {name: f"{value:.6g}" for name, value in values.items()})
            for name, value in values.items():
                self.events.add_scalar(name, value, step)
        if "loss" in values:
            self.bar.set_postfix(loss=f"{values['loss']:.4g}", refresh=False)

    def say(self, line: str) -> None:
        """A line on the standard output, above the progress bar."""
        self.bar.write(line)
        sys.stdout.flush()

    def close(self) -> None:
        self.bar.close()
        with writing(self.path):
            self.events.close()
            self.file.close()
