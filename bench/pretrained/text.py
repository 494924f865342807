"""Real English that every Python ships and no release has changed: the Zen of Python and heapq's essay on heaps."""

import codecs
import contextlib
import heapq
import io
import re

with contextlib.redirect_stdout(io.StringIO()):
    import this

ZEN = codecs.decode(this.s, "rot13")
ESSAY = heapq.__about__


def sentences(count: int) -> list[str]:
    """`count` sentences of ragged length, alternating between aphorisms and an essay's long sentences."""
    aphorisms = ZEN.splitlines()[2:]
    prose = " ".join(part for part in ESSAY.split("\n\n") if part[:1].isalpha() and "." in part)
    essay = re.split(r"(?<=[.!])\s+(?=[A-Z])", " ".join(prose.split()))
    return [text for pair in zip(aphorisms, essay, strict=False) for text in pair][:count]


def words() -> list[str]:
    """Every lower-case word of both texts once, in order of appearance: two to fifteen letters."""
    found = re.findall(r"(?<![\w'-])[a-z]{2,}(?![\w'-])", f"{ZEN}\n{ESSAY}")
    return list(dict.fromkeys(found))
