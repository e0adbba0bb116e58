"""How many times as long one takes as another, and how sure that is."""

from collections.abc import Sequence

import numpy as np

CONFIDENCE = 0.95
_RESAMPLES = 4000
_SEED = 0


def ratio_of_medians(base: Sequence[float], other: Sequence[float]) -> tuple[float, list[float]]:
    """median(other) / median(base), and its bootstrap percentile interval at CONFIDENCE.

    Samples of a round stay together, so that load which slowed a whole round slows both; with
    unequal counts, each side is drawn on its own.
    """
    a, b = np.asarray(base, np.float64), np.asarray(other, np.float64)
    rng = np.random.default_rng(_SEED)
    drawn = rng.integers(0, len(a), (_RESAMPLES, len(a)))
    drawn_b = drawn if len(a) == len(b) else rng.integers(0, len(b), (_RESAMPLES, len(b)))
    ratios = np.median(b[drawn_b], axis=1) / np.median(a[drawn], axis=1)
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(ratios, [tail, 100 - tail]).tolist()
    return float(np.median(b) / np.median(a)), [low, high]
