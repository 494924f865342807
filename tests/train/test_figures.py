"""What `python -m bench.measure.train_cpu` found with default options: it is enough, and the README says the same."""

import json

from bench import machine, readme

FOUND = json.loads((machine.RESULTS / "cpu" / "train.json").read_text())["runs"]


def test_recipes_reach_what_they_promise():
    image, sequence, language, qa = FOUND
    assert image["accuracy"] >= 0.985 and image["seconds"] < 120
    assert sequence["accuracy"] >= 0.97
    assert language["perplexity"] <= 0.7 * language["bigram_perplexity"]
    assert qa["exact_match"] >= 90


def test_the_readme_has_these_figures():
    text = readme.README.read_text()
    image, sequence, language, qa = FOUND
    for row in image, sequence:
        assert f"| {row['accuracy']:.1%} of held-out digits | {row['cpu_seconds']:.0f} |" in text
    perplexity, bigram = f"{language['perplexity']:.1f}", f"{language['bigram_perplexity']:.1f}"
    assert f"| perplexity {perplexity}, the best bigram model's {bigram} | {language['cpu_seconds']:.0f} |" in text
    assert f"| exact match {qa['exact_match']:.1f} % on these questions | {qa['cpu_seconds']:.0f} |" in text
