"""Are these samples larger than those? The rank test of Mann, Whitney and Wilcoxon, one-sided.

It asks nothing of the shape of the noise: latencies have long tails, and one outlier is one rank.
Source: Mann and Whitney 1947; midranks and the variance with ties: Lehmann, Nonparametrics, 1.4;
strata added up: van Elteren 1960.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

EXACT = 60
"""Samples of both sides together up to which every arrangement is counted; above, the sum of ranks
is normal to three digits."""


@dataclass(frozen=True)
class RankSum:
    """The sum of the ranks of one side, and what chance alone gives for it."""

    doubled_ranks: NDArray[np.int64]  # [old + new] twice the midranks, so whole numbers
    count: int  # how many of them are the new side's
    doubled_sum: int

    @property
    def mean(self) -> float:
        return self.count * (len(self.doubled_ranks) + 1) / 2

    @property
    def variance(self) -> float:
        """0 where all samples are equal."""
        total = len(self.doubled_ranks)
        spread = float(np.var(self.doubled_ranks / 2))  # ties make it smaller
        return spread * self.count * (total - self.count) / (total - 1)


def rank_sum(old: Sequence[float], new: Sequence[float]) -> RankSum:
    """The ranks of ``new`` among both; each side needs a sample."""
    values = np.concatenate([np.asarray(old, np.float64), np.asarray(new, np.float64)])
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    doubled = (2 * last - counts + 1)[place].astype(np.int64)
    return RankSum(doubled, len(new), int(doubled[len(old) :].sum()))


def chance_of_larger(old: Sequence[float], new: Sequence[float]) -> float:
    """The probability that noise alone ranks ``new`` as high above ``old`` as was seen, 0..1."""
    ranks = rank_sum(old, new)
    if len(ranks.doubled_ranks) <= EXACT:
        return _exact(ranks)
    return _normal(ranks.doubled_sum / 2 - ranks.mean - 0.5, ranks.variance)


def chance_of_larger_in_all(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> float:
    """The same for several (old, new) at once, each ranked on its own: finds what is a little
    larger everywhere, when no single pair has the samples to show it."""
    excess = variance = 0.0
    for old, new in pairs:
        ranks = rank_sum(old, new)
        weight = 1 / (len(ranks.doubled_ranks) + 1)  # van Elteren's: every sample counts alike
        excess += weight * (ranks.doubled_sum / 2 - ranks.mean - 0.5)
        variance += weight**2 * ranks.variance
    return _normal(excess, variance)


def smallest_chance(old: int, new: int) -> float:
    """What the test gives at best for so many samples: all new ones above all old ones."""
    return 1 / math.comb(old + new, new)


def _exact(ranks: RankSum) -> float:
    """Count the choices of ``count`` ranks by their sum, one rank after another."""
    top = int(ranks.doubled_ranks.sum())
    ways = np.zeros((ranks.count + 1, top + 1))
    ways[0, 0] = 1
    for rank in ranks.doubled_ranks:
        ways[1:, rank:] += ways[:-1, : top + 1 - rank].copy()
    return float(ways[-1, ranks.doubled_sum :].sum() / ways[-1].sum())


def _normal(excess: float, variance: float) -> float:
    return 0.5 * math.erfc(excess / math.sqrt(2 * variance)) if variance else 1.0
