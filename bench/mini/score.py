"""Whether an edit happened and nothing else did: exact scores, and what to say about many of them.

Scores come from the parser, so that a displacement of two pixels or the blur of a VAE costs
nothing, and a wrong shape everything. PSNR tells the rest, outside of what the edit touches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .backdrops import CANVAS
from .parser import Parsed, parse, parse_all, tile_slices, truth
from .scenes import CELLS, Scene, render

_MSE_FLOOR = 1e-2  # PSNR of an untouched copy: 68 dB rather than infinity, which JSON cannot hold


@dataclass(frozen=True, slots=True)
class EditScore:
    """The verdict on one output.

    ``changed_ok``: what the request is about came out right. ``untouched_ok``: all else is as it
    was. ``garbled``: some part shows nothing that a scene can hold. ``psnr_untouched``: in dB
    over the pixels of untouched cells and the margin; None if the request concerns every pixel.
    """

    exact: bool
    changed_ok: bool
    untouched_ok: bool
    garbled: bool
    psnr_untouched: float | None


def touched_cells(before: Scene | None, target: Scene) -> frozenset[int]:
    """The cells in which the target differs from the scene before; all nine for a caption."""
    if before is None:
        return frozenset(range(CELLS))
    return frozenset(cell for cell in range(CELLS) if before.at(cell) != target.at(cell))


def untouched_mask(before: Scene | None, target: Scene) -> NDArray[np.bool_]:
    """True (CANVAS, CANVAS) where the target shows the pixels of the scene before."""
    if before is None or before.background != target.background:
        return np.zeros((CANVAS, CANVAS), bool)
    mask = np.ones((CANVAS, CANVAS), bool)
    for cell in touched_cells(before, target):
        mask[tile_slices(cell)] = False
    return mask


def psnr(output: NDArray[np.uint8], wanted: NDArray[np.uint8], mask: NDArray[np.bool_]) -> float:
    """Peak signal to noise ratio in dB over the masked pixels of two (H, W, 3) pictures."""
    error = output[mask].astype(np.float64) - wanted[mask]
    return float(10 * np.log10(255**2 / max(float((error**2).mean()), _MSE_FLOOR)))


def score_parsed(
    before: Scene | None, target: Scene, output: NDArray[np.uint8], seen: Parsed
) -> EditScore:
    """Score an output that has been parsed; ``before`` is None for text to image."""
    wanted = truth(target)
    touched = touched_cells(before, target)
    right = [cell for cell in range(CELLS) if seen.cells[cell] == wanted.cells[cell]]
    changed_ok = touched.issubset(right)
    untouched_ok = touched.union(right) == frozenset(range(CELLS))
    background_ok = seen.background == wanted.background
    if before is None or before.background != target.background:
        changed_ok &= background_ok
    else:
        untouched_ok &= background_ok
    mask = untouched_mask(before, target)
    return EditScore(
        exact=changed_ok and untouched_ok,
        changed_ok=changed_ok,
        untouched_ok=untouched_ok,
        garbled=seen.garbled,
        psnr_untouched=psnr(output, render(target), mask) if mask.any() else None,
    )


def score_edit(before: Scene | None, target: Scene, output: NDArray[np.uint8]) -> EditScore:
    """Score one output, uint8 (CANVAS, CANVAS, 3); ``before`` is None for text to image."""
    return score_parsed(before, target, output, parse(output))


def score_all(
    befores: Sequence[Scene | None],
    targets: Sequence[Scene],
    outputs: Sequence[NDArray[np.uint8]],
) -> list[EditScore]:
    """Score many outputs at once."""
    seen = parse_all(outputs)
    return [score_parsed(*each) for each in zip(befores, targets, outputs, seen, strict=True)]


def score_chain(targets: Sequence[Scene], outputs: Sequence[NDArray[np.uint8]]) -> list[bool]:
    """For each turn of a chain: whether this and every turn before it came out exact."""
    right = [p == truth(t) for p, t in zip(parse_all(outputs), targets, strict=True)]
    return [all(right[: turn + 1]) for turn in range(len(right))]


def summary(
    kinds: Sequence[str], scores: Sequence[EditScore]
) -> dict[str, dict[str, float | None]]:
    """One row per kind and one for "all": n, shares in percent, mean PSNR; ready for JSON."""
    rows = {"all": list(scores)}
    for kind, score in zip(kinds, scores, strict=True):
        rows.setdefault(kind, []).append(score)
    return {kind: _row(chosen) for kind, chosen in rows.items()}


def _percent(flags: Sequence[bool]) -> float:
    return round(100 * sum(flags) / len(flags), 2) if flags else 0.0


def _row(scores: Sequence[EditScore]) -> dict[str, float | None]:
    ratios = [s.psnr_untouched for s in scores if s.psnr_untouched is not None]
    return {
        "n": len(scores),
        "exact": _percent([s.exact for s in scores]),
        "changed_ok": _percent([s.changed_ok for s in scores]),
        "untouched_ok": _percent([s.untouched_ok for s in scores]),
        "garbled": _percent([s.garbled for s in scores]),
        "psnr_untouched": round(float(np.mean(ratios)), 2) if ratios else None,
    }


def compare(reference: Sequence[EditScore], other: Sequence[EditScore]) -> Mapping[str, float]:
    """Two runs over the same requests and seeds: what the other one lost and gained.

    ``psnr_change`` is the mean difference in dB, where both runs have a PSNR.
    """
    pairs = list(zip(reference, other, strict=True))
    changes = [
        theirs.psnr_untouched - ours.psnr_untouched
        for ours, theirs in pairs
        if ours.psnr_untouched is not None and theirs.psnr_untouched is not None
    ]
    return {
        "n": len(pairs),
        "lost": sum(ours.exact and not theirs.exact for ours, theirs in pairs),
        "gained": sum(theirs.exact and not ours.exact for ours, theirs in pairs),
        "psnr_change": round(float(np.mean(changes)), 3) if changes else 0.0,
    }


def chain_summary(chains: Sequence[Sequence[bool]]) -> list[float]:
    """The percentage of chains that are still all correct after each turn."""
    return [_percent(turn) for turn in zip(*chains, strict=True)]
