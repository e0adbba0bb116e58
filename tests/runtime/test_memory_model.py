"""Activations predicted from shapes, held to the tensors that torch keeps alive."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fluxkontext.kernels import KernelSet, reference
from fluxkontext.kernels.gate_residual import gate_residual
from fluxkontext.kernels.gelu import gelu, gelu_beside
from fluxkontext.kernels.linear_fp8 import linear_fp8_upcast
from fluxkontext.kernels.linear_w4a4 import linear_w4a4_upcast
from fluxkontext.kernels.modulate import modulate, residual_modulate
from fluxkontext.kernels.norm_rope import norm_rope
from fluxkontext.kernels.quantize import quantize_tensor
from fluxkontext.runtime.config import T5Config, VaeConfig
from fluxkontext.runtime.loading import build
from fluxkontext.runtime.memory_model import CPU, Workload, activations, t5_peak, vae_part
from fluxkontext.runtime.memory_model import decoder_peak as decoder_model
from fluxkontext.runtime.memory_model import encoder_peak as encoder_model
from fluxkontext.runtime.models.quantised import QuantisedWeight, stand_in
from fluxkontext.runtime.models.t5 import T5Encoder
from fluxkontext.runtime.models.transformer import Flux, FusedLinear
from fluxkontext.runtime.models.vae import Vae
from fluxkontext.runtime.plan import Planner
from fluxkontext.runtime.recipes import takes_part
from fluxkontext.runtime.tensor_shapes import ModelShapes

from .live_bytes import LiveBytes

PUBLISHED = ModelShapes()
EDIT = Workload((1024, 1024), ((1024, 1024),))
MARGIN = 1.25
"""How far a prediction may lie above what torch keeps alive; it may not lie below."""


def assert_holds(predicted: int, measured: int) -> None:
    assert measured <= predicted <= MARGIN * measured, (predicted, measured, predicted / measured)


def attention_shape(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What any attention allocates; torch's own on the meta device would make the matrix."""
    return q.new_empty(*q.shape[:2], q.shape[2] * q.shape[3])


FUSED = replace(
    reference(),
    modulate=modulate,
    norm_rope=norm_rope,
    gate_residual=gate_residual,
    residual_modulate=residual_modulate,
    gelu=gelu,
    gelu_beside=gelu_beside,
    attention=attention_shape,
)
PLAIN = replace(reference(), attention=attention_shape)
UPCAST = replace(
    FUSED,
    quantize_tensor=quantize_tensor,
    linear_fp8=linear_fp8_upcast,
    linear_w4a4=linear_w4a4_upcast,
)


@pytest.mark.parametrize("kernels", [FUSED, PLAIN], ids=["fused", "plain"])
@pytest.mark.parametrize(
    ("target", "contexts", "text", "batch"),
    [
        ((1024, 1024), ((1024, 1024),), 512, 1),
        ((1024, 1024), (), 512, 1),
        ((512, 512), ((1568, 672), (1024, 1024)), 128, 2),
    ],
)
def test_a_step_of_the_full_width(
    kernels: KernelSet,
    target: tuple[int, int],
    contexts: tuple[tuple[int, int], ...],
    text: int,
    batch: int,
) -> None:
    config = replace(PUBLISHED.transformer, depth=2, depth_single_blocks=3)
    shapes = replace(PUBLISHED, transformer=config)
    work = Workload(target, contexts, batch, text_tokens=text)
    flux = build(lambda: Flux(config, kernels)).to(torch.bfloat16)
    assert_holds(activations(shapes, work, "bf16").denoise, peak_of_a_step(flux, work))


@pytest.mark.parametrize("form", ["fp8", "nvfp4"])
@pytest.mark.parametrize(
    ("target", "contexts"), [((1024, 1024), ((1024, 1024),)), ((512, 512), ())]
)
def test_a_step_whose_products_are_of_copies_in_16_bits(
    form: str, target: tuple[int, int], contexts: tuple[tuple[int, int], ...]
) -> None:
    """Under calibrated scales, which take the most: inputs are made in 16 bits, and quantised."""
    config = replace(PUBLISHED.transformer, depth=2, depth_single_blocks=3)
    shapes, work = replace(PUBLISHED, transformer=config), Workload(target, contexts)
    flux = build(lambda: Flux(config, UPCAST))
    for name, layer in list(flux.named_modules()):
        if isinstance(layer, nn.Linear | FusedLinear) and takes_part("transformer", name, 16):
            weight = QuantisedWeight(form, "static", {})
            flux.set_submodule(name, stand_in(layer, weight, UPCAST, torch.bfloat16))
    for name, held in flux.named_parameters():
        if held.is_floating_point() and held.itemsize > 1 and "scale" not in name:
            held.data = held.data.to(torch.bfloat16)
    predicted = activations(shapes, work, form, upcast=True).denoise
    assert_holds(predicted, peak_of_a_step(flux, work))


def peak_of_a_step(flux: Flux, work: Workload) -> int:
    """Bytes that torch keeps alive at its fullest moment."""
    config, batch, text = flux.config, work.batch, work.text_tokens
    T, C = (sum(w * h for w, h in sizes) // 256 for sizes in ((work.target,), work.contexts))

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    rows = 12 * config.depth + 3 * config.depth_single_blocks + 2
    inputs = (
        meta(batch, T, 64),
        meta(batch, C, 3072),
        meta(batch, text, 3072),
        meta(rows, batch, 1, 3072),
        meta(text + T + C, 64, 2, dtype=torch.float32),
    )
    with torch.inference_mode(), LiveBytes() as live:
        flux(*inputs)
    return live.peak


def test_the_modulation_of_all_steps() -> None:
    flux = build(lambda: Flux(PUBLISHED.transformer, PLAIN)).to(torch.bfloat16)
    sigmas, guidance = (torch.empty(n, device="meta") for n in (28, 1))
    pooled = torch.empty(1, 768, dtype=torch.bfloat16, device="meta")
    with torch.inference_mode(), LiveBytes() as live:
        flux.modulation(sigmas, guidance, pooled)
    # a picture of one token: what is left is the modulation
    assert_holds(activations(PUBLISHED, Workload((16, 16), text_tokens=1), "bf16").begin, live.peak)


@pytest.mark.parametrize("size", [(512, 512), (1024, 1024), (1568, 672)])
def test_the_decoder_at_full_width(size: tuple[int, int]) -> None:
    """Its middle, where torch's attention on the meta device would make a matrix, is left out."""
    vae = build(lambda: Vae(PUBLISHED.vae)).to(torch.bfloat16)
    vae.decoder.mid.attn_1.forward = lambda x: x.clone()
    latents = torch.empty(1, 16, size[1] // 8, size[0] // 8, dtype=torch.bfloat16, device="meta")
    with torch.inference_mode(), LiveBytes() as live:
        vae.decode(latents)
    assert_holds(decoder_model(PUBLISHED.vae, size, 2), live.peak)


@pytest.mark.parametrize("size", [(512, 512), (1024, 1024), (1568, 672)])
def test_the_encoder_at_full_width(size: tuple[int, int]) -> None:
    vae = build(lambda: Vae(PUBLISHED.vae)).to(torch.bfloat16)
    vae.encoder.mid.attn_1.forward = lambda x: x.clone()
    pixels = torch.empty(1, 3, size[1], size[0], dtype=torch.bfloat16, device="meta")
    with torch.inference_mode(), LiveBytes() as live:
        vae.encode(pixels)
    assert_holds(encoder_model(PUBLISHED.vae, size, 2), live.peak)


@pytest.mark.parametrize("widths", [(8, 8, 16, 16), (32, 32, 64, 64)])
def test_a_whole_vae_on_a_cpu(widths: tuple[int, ...]) -> None:
    config = VaeConfig(widths, layers_per_block=1, norm_num_groups=4, sample_size=128)
    vae = Vae(config).eval()
    with torch.inference_mode(), LiveBytes() as live:
        vae.decode(torch.zeros(1, 16, 16, 16))
    assert_holds(decoder_model(config, (128, 128), 4), live.peak)
    pixels = torch.zeros(1, 3, 128, 128)
    with torch.inference_mode(), LiveBytes() as live:
        vae.encode(pixels)
    assert_holds(encoder_model(config, (128, 128), 4), live.peak)


@pytest.mark.parametrize("tokens", [32, 256])
def test_t5_on_a_cpu(tokens: int) -> None:
    config = T5Config(vocab_size=64, d_model=64, d_kv=8, d_ff=160, num_layers=2, num_heads=8)
    t5 = T5Encoder(config).eval()
    with torch.inference_mode(), LiveBytes() as live:
        t5(torch.zeros(1, tokens, dtype=torch.int64))
    assert_holds(t5_peak(config, tokens, 4), live.peak)


def test_tiles_make_the_vae_small() -> None:
    planner = Planner(PUBLISHED, "bf16", CPU)
    whole, tiled = (activations(PUBLISHED, EDIT, "bf16", tile) for tile in (0, planner.tile))
    assert vae_part(PUBLISHED.vae, (1568, 672), planner.tile) == (512, 512)
    assert tiled.decode < 0.4 * whole.decode
    assert tiled.image < 0.4 * whole.image
    assert tiled.denoise == whole.denoise
