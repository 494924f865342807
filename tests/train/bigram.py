"""A bigram model to measure language models against."""

import torch
from torch import Tensor


class KneserNey:
    """p(w|v) = max(n(v,w) − d, 0)/n(v) + d·kinds(v)/n(v)·p(w); p(w) the share of distinct bigrams that end in w.

    Interpolated Kneser–Ney, the strongest of the common smoothings; p(w) is itself interpolated with the uniform
    distribution, so that every token is possible. Source: Chen and Goodman 1999, section 4.
    """

    def __init__(self, tokens: Tensor, vocab_size: int, discount: float):
        before, after = tokens[:-1].long(), tokens[1:].long()
        self.counts = torch.zeros(vocab_size, vocab_size, dtype=torch.float64)
        self.counts.index_put_((before, after), torch.ones(len(before), dtype=torch.float64), accumulate=True)
        self.discount = discount
        kinds = (self.counts > 0).double()
        followed = kinds.sum(0)
        self.unigram = (followed - discount).clamp(min=0) / followed.sum()
        self.unigram += discount * (followed > 0).sum() / followed.sum() / vocab_size
        self.kinds, self.totals = kinds.sum(1), self.counts.sum(1)

    def perplexity(self, tokens: Tensor) -> float:
        """Of every token but the first."""
        before, after = tokens[:-1].long(), tokens[1:].long()
        total = self.totals[before].clamp(min=1)
        seen = (self.counts[before, after] - self.discount).clamp(min=0) / total
        rest = torch.where(self.totals[before] > 0, self.discount * self.kinds[before] / total, 1.0)
        return float(torch.exp(-(seen + rest * self.unigram[after]).log().mean()))


def best_perplexity(train: Tensor, valid: Tensor, test: Tensor, vocab_size: int) -> float:
    """Of `test`, with the discount that suits `valid` best."""
    models = [KneserNey(train, vocab_size, discount / 20) for discount in range(2, 20)]
    return min(models, key=lambda model: model.perplexity(valid)).perplexity(test)
