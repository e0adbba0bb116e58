"""What weights a model has, and their bytes, from its shapes alone."""

import json
import math
from pathlib import Path

import pytest

from fluxkontext.bench.checkpoint_writer import Spec, meta_networks
from fluxkontext.bench.synthetic import TINY
from fluxkontext.runtime.config import ClipConfig, T5Config, TransformerConfig, VaeConfig
from fluxkontext.runtime.tensor_shapes import ModelShapes
from fluxkontext.runtime.weight_model import component_bytes, weigh

PUBLISHED = ModelShapes()
FULL = Spec(TransformerConfig(), VaeConfig(), ClipConfig(), T5Config(), 512)


def shapes_of(spec: Spec) -> ModelShapes:
    return ModelShapes(spec.transformer, spec.vae, spec.text_encoder, spec.text_encoder_2)


@pytest.mark.parametrize("spec", [FULL, TINY], ids=["full", "tiny"])
def test_the_tables_name_every_tensor_of_the_modules(spec: Spec) -> None:
    predicted = shapes_of(spec).tensors()
    for component, network in meta_networks(spec).items():
        wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        assert predicted[component] == wanted


def test_the_published_model_has_its_published_shapes_and_bytes() -> None:
    published = json.loads((Path(__file__).parent / "flux_dev_shapes.json").read_text())
    found = PUBLISHED.tensors()
    for component, key in (("transformer", "bfl"), ("vae", "vae_bfl")):
        wanted = {name: tuple(shape) for name, shape in published[key].items()}
        assert found[component] == wanted
    numbers = {k: sum(map(math.prod, v.values())) for k, v in found.items()}
    assert component_bytes(PUBLISHED, "bf16") == {k: 2 * n for k, n in numbers.items()}
    assert component_bytes(PUBLISHED, "fp32") == {k: 4 * n for k, n in numbers.items()}
    # performance.md §2: 8.6 B numbers in block linears, 3.23 B in modulation
    weights = weigh(PUBLISHED, "bf16")
    assert sum(weights.groups["modulation"].values()) / 2e9 == pytest.approx(3.23, abs=0.01)
    assert sum(weights.groups["blocks"].values()) / 2e9 == pytest.approx(8.6, abs=0.05)


@pytest.mark.parametrize(
    ("precision", "block_bits", "text_bits"), [("fp8", 8, 8), ("nvfp4", 4.5, 8), ("bf16", 16, 16)]
)
def test_quantised_weights_take_the_bits_of_their_format(
    precision: str, block_bits: float, text_bits: float
) -> None:
    weights, plain = weigh(PUBLISHED, precision).groups, weigh(PUBLISHED, "bf16").groups
    for group, bits in (("blocks", block_bits), ("text", text_bits), ("modulation", 16)):
        ratio = sum(weights[group].values()) / sum(plain[group].values())
        # CLIP, biases and norms stay bf16; scales come on top
        assert ratio == pytest.approx(bits / 16, abs=0.012), group
