"""What the training recipes reach: `python -m bench.measure.train_cpu` writes results/cpu/train.json.

A row is a command line of `python -m fused_ops.train` in a process of its own: its metrics on held-out data, the
seconds it took by the clock, and the CPU seconds of all its threads. Held out are digits, and the end of Python's
language reference, beside whose perplexity stands that of a bigram model. The qa row shows that MiniLM learns a file:
its metrics are of the questions it was trained on.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import machine
from bench.pretrained import minilm
from bench.pretrained.weights import locate
from fused_ops.train.language import LanguageConfig, LanguageModel
from tests.train.bigram import best_perplexity
from tests.train.material import write_squad

ROOT = Path(__file__).parents[2]
QA = "--model-path=minilm --epochs=15 --batch-size=6 --lr=1.5e-4 --dropout=0 --eval-steps=70"
FILES = (f"--{split}-file=squad.json" for split in ("train", "validation", "test"))
OPTIONS = {"image": (), "sequence": (), "language": (), "qa": (*QA.split(), *FILES)}  # besides the folder of the run


def row(recipe: str, folder: Path) -> dict:
    """Run a command line in `folder`, where its data are."""
    command = ["python", "-m", "fused_ops.train", recipe, *OPTIONS[recipe], f"--output-dir={recipe}"]
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command[1:]], cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found = {"command": " ".join(command), "seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1)}
    return found | json.loads((folder / recipe / "results.json").read_text())


def bigram_perplexity() -> float:
    """The best bigram model's, on what the language recipe holds out."""
    recipe = LanguageModel(LanguageConfig())
    tokens = [data.tokens for data in (recipe.train, recipe.valid, recipe.test)]
    return best_perplexity(*tokens, recipe.tokenizer.get_vocab_size())


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_squad(folder / "squad.json")
        (folder / "minilm").symlink_to(locate(minilm.DISTRIBUTION, "model.safetensors").parent)
        rows = {recipe: row(recipe, folder) for recipe in OPTIONS}
    rows["language"]["bigram_perplexity"] = bigram_perplexity()
    path = machine.RESULTS / "cpu" / "train.json"
    path.write_text(json.dumps({"machine": machine.facts(), "runs": list(rows.values())}, indent=1) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
