"""SQuAD: its files, and exact match and F1 as its official script defines them.

Source: Rajpurkar et al. 2018, https://arxiv.org/abs/1806.03822, evaluate-v2.0.py; on answerable questions it is the
script of version 1.1.
"""

import json
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fused_ops.core.errors import ArgumentError


@dataclass(frozen=True)
class Question:
    """A question on a passage. `answers` are (text, the place of its first character in the context), one an annotator;
    none: the passage has no answer."""

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]


def read(file: Path, argument: str) -> list[list[Question]]:
    """The questions of each paragraph of a file of version 1.1 or 2.0.

    Raises:
        ValueError: there is no file, or it is truncated or laid out otherwise; the error names `argument`.
    """
    wanted = "a SQuAD file (json: data, paragraphs, qas, answers)"
    try:
        articles = json.loads(file.read_text(encoding="utf-8"))["data"]
        paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
        found = [[_question(qa, paragraph["context"]) for qa in paragraph["qas"]] for paragraph in paragraphs]
    except (KeyError, TypeError) as error:
        raise ArgumentError(argument, wanted, f"{file}: {type(error).__name__} {error}") from error
    except (OSError, ValueError) as error:
        raise ArgumentError(argument, wanted, f"{file}: {error}") from error
    if not any(found):
        raise ArgumentError(argument, wanted, f"{file} without a question")
    return [questions for questions in found if questions]


def _question(qa: dict, context: str) -> Question:
    answers = () if qa.get("is_impossible") else tuple((a["text"], a["answer_start"]) for a in qa["answers"])
    for text, start in answers:
        if context[start : start + len(text)] != text:
            raise ValueError(f"the answer {text!r} of question {qa['id']} is not at {start} of its context")
    return Question(str(qa["id"]), qa["question"], context, answers)


def normalised(text: str) -> str:
    """In lower case, without punctuation, articles and spare spaces."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(answer: str, truths: Sequence[str]) -> float:
    """1 if the normalised answer is one of the truths', else 0; no truth: the answer has to be empty."""
    return float(normalised(answer) in {normalised(truth) for truth in _given(truths)})


def f1(answer: str, truths: Sequence[str]) -> float:
    """The largest F1 of the answer's words with a truth's: 2·common / (words of the answer + words of the truth)."""
    return max(_f1(normalised(answer).split(), normalised(truth).split()) for truth in _given(truths))


def _given(truths: Sequence[str]) -> list[str]:
    return [truth for truth in truths if normalised(truth)] or [""]


def _f1(answer: list[str], truth: list[str]) -> float:
    if not answer or not truth:
        return float(answer == truth)
    return 2 * (Counter(answer) & Counter(truth)).total() / (len(answer) + len(truth))
