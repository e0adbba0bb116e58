"""How fast a denoising step could be: its arithmetic and its traffic over what the device can do.

The arithmetic is that of the model as the runtime computes it: contexts and text embedded once an
edit, modulation of all steps at once, the last single block for target tokens alone. Rounding,
norms, activations and softmax are not counted: they are small, and none of them has to be slow.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..runtime.config import TransformerConfig
from .document import Json

WEIGHT_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "nvfp4": 0.5 + 1 / 16}
"""Of one weight of a block's matrix; NVFP4 has a byte of scale for every 16."""
_CEILING = {"fp32": "fp32", "bf16": "bf16", "fp16": "bf16", "fp8": "fp8", "nvfp4": "nvfp4"}
"""Which measured product bounds the linears of a precision."""


@dataclass(frozen=True)
class StepCost:
    """Of one evaluation of the transformer: FLOP in linears and in attention, and the fewest bytes
    that move (weights, inputs and outputs once)."""

    linear: float
    attention: float
    bytes: float

    @property
    def flop(self) -> float:
        return self.linear + self.attention


def step_cost(
    config: TransformerConfig, tokens: Mapping[str, int], batch: int, precision: str
) -> StepCost:
    """tokens: ``target``, ``context`` and ``text`` of one picture.

    A block's linears hold ``4 D^2 + 2 D M`` weights (M the feed-forward's width), a double block's
    once a stream; a token costs 2 FLOP a weight. Attention costs ``4 D`` a pair of tokens.
    """
    D, M = config.hidden_size, config.mlp_hidden
    target, text = tokens["target"], tokens["text"]
    every = target + tokens["context"] + text
    block = 4 * D * D + 2 * D * M
    full = config.depth + max(0, config.depth_single_blocks - 1)
    linear = 2 * full * block * every
    pairs = full * every * every
    if config.depth_single_blocks:  # keys and values of all, the rest of the target
        linear += 2 * (2 * D * D * every + (block - 2 * D * D) * target)
        pairs += target * every
    linear += 2 * 2 * config.in_channels * D * target  # img_in and the last layer
    blocks = (2 * config.depth + config.depth_single_blocks) * block
    weights = WEIGHT_BYTES[precision] * blocks
    activation = 4 if precision == "fp32" else 2
    rows = 12 * config.depth + 3 * config.depth_single_blocks + 2
    once = batch * (
        2 * 4 * target * config.in_channels  # latents, float32, in and out
        + activation * D * (tokens["context"] + text + rows)
    )
    return StepCost(batch * linear, batch * 4.0 * D * pairs, weights + once)


def roofline(
    cost: StepCost,
    precision: str,
    ceilings: Json,
    step_seconds: float | None,
    attention_fp8: bool = False,
) -> Json | None:
    """As the schema's ``roofline``; None where the needed products were not measured.

    Attention runs in bf16 (fp32 for fp32) whatever the linears do, unless it is said to be FP8.
    """
    flops = {name: found["p50"] for name, found in ceilings["flops"].items()}
    linear = flops.get(_CEILING[precision])
    plain = "fp32" if precision == "fp32" else "bf16"
    attention = flops.get("fp8" if attention_fp8 else plain)
    if linear is None or attention is None:
        return None
    compute = cost.linear / linear + cost.attention / attention
    traffic = cost.bytes / ceilings["copy"]["p50"]
    floor = max(compute, traffic)
    return {
        "flop": cost.flop,
        "bytes": cost.bytes,
        "floor": floor,
        "share": None if step_seconds is None else floor / step_seconds,
        "bound": "flop" if compute >= traffic else "bytes",
    }


def edit_flop(
    config: TransformerConfig | None, parameters: Mapping[str, Any], forwards: int
) -> float | None:
    """Of all denoising steps of a call; None for a model whose shapes are not known."""
    if config is None or parameters["precision"] not in WEIGHT_BYTES:
        return None
    tokens, batch = parameters["tokens"], parameters["batch"]
    return forwards * step_cost(config, tokens, batch, parameters["precision"]).flop
