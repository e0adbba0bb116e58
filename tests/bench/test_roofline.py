"""The arithmetic of a step is what torch counts, and at full size what is published."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fluxkontext.bench.ceilings import SLACK, refuse_impossible
from fluxkontext.bench.document import distribution
from fluxkontext.bench.mini.training.spec import MINI
from fluxkontext.bench.ratio import ratio_of_medians
from fluxkontext.bench.roofline import edit_flop, roofline, step_cost
from fluxkontext.kernels import reference
from fluxkontext.runtime.config import TransformerConfig
from fluxkontext.runtime.errors import KontextError
from fluxkontext.runtime.models.transformer import Flux

KONTEXT = {"target": 4096, "context": 4096, "text": 512}
T2I = {"target": 4096, "context": 0, "text": 512}


@pytest.mark.parametrize(
    ("config", "tokens", "batch"),
    [
        (TransformerConfig(), KONTEXT, 1),
        (MINI.transformer, KONTEXT, 2),
        (MINI.transformer, T2I, 1),
    ],
)
def test_flop_is_what_torch_counts(
    config: TransformerConfig, tokens: dict[str, int], batch: int
) -> None:
    target, context, text = tokens.values()
    D, rows = config.hidden_size, 12 * config.depth + 3 * config.depth_single_blocks + 2
    with torch.device("meta"), torch.inference_mode():
        flux = Flux(config, reference()).requires_grad_(False)
        inputs = (
            torch.empty(batch, target, config.in_channels),
            torch.empty(batch, context, D),
            torch.empty(batch, text, D),
            torch.empty(rows, batch, 1, D),
            torch.empty(target + context + text, config.head_dim // 2, 2),
        )
        with FlopCounterMode(display=False) as counter:
            flux(*inputs)
    cost = step_cost(config, tokens, batch, "bf16")
    assert cost.flop == pytest.approx(counter.get_total_flops(), rel=1e-9)


@pytest.mark.parametrize(
    ("tokens", "linear", "total"), [(KONTEXT, 112.4, 165.4), (T2I, 59.5, 74.4)]
)
def test_at_full_size_it_is_that_of_the_reference_sheet(
    tokens: dict[str, int], linear: float, total: float
) -> None:
    """performance.md, section 2, computes every block in full: the last one's context and text,
    which no pixel needs, are 0.8% (section 4)."""
    found = step_cost(TransformerConfig(), tokens, 1, "bf16")
    assert 0.98 * linear <= found.linear / 1e12 <= linear * 1.001
    assert 0.98 * total <= found.flop / 1e12 <= total * 1.001


def test_bytes_are_the_weights_at_least() -> None:
    """8.6 billion weights in the blocks' linears, as in performance.md, section 2."""
    found = {p: step_cost(TransformerConfig(), T2I, 1, p).bytes for p in ("bf16", "fp8", "nvfp4")}
    assert found["bf16"] == pytest.approx(2 * 8.6e9, rel=0.02)
    assert found["bf16"] > found["fp8"] > found["nvfp4"] > 8.6e9 / 2


def ceilings(**flops: float) -> dict[str, Any]:
    return {
        "flops": {name: distribution([value], "FLOP/s") for name, value in flops.items()},
        "copy": distribution([4.3e12], "B/s"),
    }


def test_the_floor_is_the_sum_of_its_parts() -> None:
    """Linears at FP8's ceiling, attention at bf16's; performance.md's H200 gives 177 ms with the
    elementwise part, which this floor does not count."""
    cost = step_cost(TransformerConfig(), KONTEXT, 1, "fp8")
    found = roofline(cost, "fp8", ceilings(bf16=788e12, fp8=1350e12), 0.2)
    assert found is not None
    assert found["bound"] == "flop"
    assert found["floor"] == pytest.approx(cost.linear / 1350e12 + cost.attention / 788e12)
    assert 0.13 < found["floor"] < 0.177
    assert found["share"] == pytest.approx(found["floor"] / 0.2)
    assert roofline(cost, "fp8", ceilings(bf16=788e12), 0.2) is None  # not measured there
    assert roofline(cost, "nvfp4", ceilings(bf16=788e12, fp8=1350e12), 0.2) is None


def test_few_tokens_are_bound_by_the_weights() -> None:
    tokens = {"target": 16, "context": 0, "text": 16}
    found = roofline(
        step_cost(TransformerConfig(), tokens, 1, "bf16"), "bf16", ceilings(bf16=1e15), None
    )
    assert found is not None
    assert found["bound"] == "bytes"
    assert found["share"] is None


def test_what_is_faster_than_the_device_is_refused() -> None:
    best = ceilings(fp32=1e12)
    refuse_impossible("x", 1e12, 1 / SLACK * 1.001, best, "cuda:0")
    with pytest.raises(KontextError, match=r"x: expected at most 1e\+12 FLOP/s.*found 2e\+12"):
        refuse_impossible("x", 1e12, 0.5, best, "cuda:0")


def test_ceilings_of_a_busy_cpu_are_measured_anew_before_a_figure_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fluxkontext.bench.ceilings._AGAIN", 1)
    busy = ceilings(fp32=1e3)
    refuse_impossible("x", 1e6, 1.0, busy, "cpu")
    with pytest.raises(KontextError, match=r"found 1e\+18") as caught:
        refuse_impossible("x", 1e18, 1.0, busy, "cpu")
    assert "at most 1e+03" not in str(caught.value)


def test_an_edit_has_all_its_steps() -> None:
    config = replace(TransformerConfig(), depth=1)
    parameters = {"tokens": T2I, "batch": 1, "precision": "bf16"}
    assert edit_flop(config, parameters, 28) == 28 * step_cost(config, T2I, 1, "bf16").flop
    assert edit_flop(None, parameters, 28) is None


def test_the_ratio_of_medians_and_its_interval() -> None:
    ratio, (low, high) = ratio_of_medians([1.0] * 10, [2.0] * 10)
    assert (ratio, low, high) == (2.0, 2.0, 2.0)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Of 200 experiments of 15 rounds whose true ratio is 1.3, some 95% have it inside."""
    import numpy as np

    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        base = rng.lognormal(0.0, 0.05, 15)
        other = 1.3 * rng.lognormal(0.0, 0.05, 15)
        low, high = ratio_of_medians(base.tolist(), other.tolist())[1]
        held += low <= 1.3 <= high
    assert 0.90 <= held / 200 <= 1.0


def test_load_that_slows_whole_rounds_does_not_widen_it() -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    rounds = rng.lognormal(0.0, 0.5, 15)  # of others: the same for both
    ratio, (low, high) = ratio_of_medians(rounds.tolist(), (1.3 * rounds).tolist())
    assert ratio == pytest.approx(1.3)
    assert low == pytest.approx(1.3)
    assert high == pytest.approx(1.3)
