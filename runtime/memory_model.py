"""How much memory an edit needs beside the weights, from shapes and precision alone; no torch.

Activations are sums of the tensors that live at a stage's fullest moment, in the order in which the
modules make and drop them; the tests hold them to what torch really keeps alive. Attention keeps no
matrix of tokens x tokens: torch's fused kernels, on a CPU too, and ours never make one.
"""

from dataclasses import dataclass

from .config import T5Config, TransformerConfig, VaeConfig
from .geometry import Size
from .tensor_shapes import ModelShapes
from .weight_model import computes_in, element_bytes, vae_element_bytes

_STEPS = 32
"""Buffers of modulation hold a multiple of so many steps (:mod:`.executor`)."""


@dataclass(frozen=True)
class Workload:
    """The sizes of an edit. Sizes are pixels (w, h); branches: 2 with true CFG.

    remembered: how many prompts and pictures stay encoded on the device between calls.
    """

    target: Size
    contexts: tuple[Size, ...] = ()
    batch: int = 1
    steps: int = 28
    text_tokens: int = 512
    branches: int = 1
    remembered: int = 16


@dataclass(frozen=True)
class Overhead:
    """What a device takes beside tensors.

    fixed: bytes of the CUDA context, loaded kernels and library handles. workspace: bytes that
    cuBLAS and cuDNN take while they run. fragmentation: share of everything but weights that the
    allocator's rounding and caching waste.
    """

    fixed: int
    workspace: int
    fragmentation: float


CPU = Overhead(0, 0, 0.0)
CUDA = Overhead(fixed=640 << 20, workspace=256 << 20, fragmentation=0.08)
"""Assumed, until ``fluxkontext bench`` has measured them on a GPU; torch documents 32 MiB of the
workspace (cuBLAS on Hopper), the rest is for convolutions."""


@dataclass(frozen=True)
class Activations:
    """Bytes that live beside the weights. kept: from begin to the end of an edit, and what is
    remembered; the others: the most that each stage adds to that."""

    kept: int
    text: int
    image: int
    begin: int
    denoise: int
    decode: int


def activations(
    shapes: ModelShapes,
    work: Workload,
    precision: str,
    tile: int = 0,
    plain: str = "bf16",
    upcast: bool = False,
) -> Activations:
    """Activations of an edit.

    tile: side in pixels of the VAE's tiles, 0 for its own rule. plain: as
    :func:`.weight_model.computes_in` has it. upcast: whether quantised products are of copies in
    16 bits, as where tensor cores do not multiply their type.
    """
    c, compute = shapes.transformer, computes_in(precision, plain)
    e, vae_e = element_bytes(compute), vae_element_bytes(shapes.vae, compute)
    counts = _Tokens.of(shapes.vae, work)
    state = _state(c, work, counts, e, work.steps)
    rows = _rows(c, work, e, work.steps)
    vectors = (work.steps + 2) * work.batch * (6 * c.hidden_size + 1024) * e  # embedded, summed
    rope = 48 * counts.all * c.head_dim // 2  # float64 angles, cosines, sines, and both
    text = (c.vec_in_dim + work.text_tokens * c.context_in_dim) * e
    picture = max((_area(size) for size in (*work.contexts, work.target)), default=0)
    handle = picture // (2 * shapes.vae.downscale) ** 2 * c.in_channels * e
    encoded = work.batch * (work.branches * text + len(work.contexts) * handle)
    return Activations(
        kept=_state(c, work, counts, e, -(-work.steps // _STEPS) * _STEPS)
        + max(encoded, work.remembered * (text + handle)),
        text=t5_peak(shapes.text_encoder_2, work.text_tokens, e) + text,
        image=max(
            (_encode_peak(shapes.vae, size, vae_e, tile) for size in work.contexts), default=0
        ),
        # what is begun is whole before it is copied into the buffers that the steps keep
        begin=state + max(rows + vectors, rope) + work.batch * counts.context * c.in_channels * e,
        denoise=denoise_peak(c, work.batch, counts, precision, work.branches, e, upcast),
        decode=_decode_peak(shapes.vae, work.target, vae_e, tile),
    )


@dataclass(frozen=True)
class _Tokens:
    """Tokens of one picture's sequence."""

    text: int
    target: int
    context: int

    @property
    def all(self) -> int:
        return self.text + self.target + self.context

    @classmethod
    def of(cls, vae: VaeConfig, work: Workload) -> "_Tokens":
        patch = (2 * vae.downscale) ** 2
        contexts = sum(_area(size) // patch for size in work.contexts)
        return cls(work.text_tokens, _area(work.target) // patch, contexts)


def _area(size: Size) -> int:
    return size[0] * size[1]


def _rows(c: TransformerConfig, work: Workload, e: int, steps: int) -> int:
    """Bytes of one branch's modulation for so many steps."""
    per_step = 12 * c.depth + 3 * c.depth_single_blocks + 2
    return steps * per_step * work.batch * c.hidden_size * e


def _state(c: TransformerConfig, work: Workload, counts: _Tokens, e: int, steps: int) -> int:
    """Bytes of all that steps read and write."""
    rope = counts.all * c.head_dim * 4
    text = work.batch * counts.text * c.hidden_size * e
    latents = work.batch * counts.target * c.in_channels * 4
    context = work.batch * counts.context * c.hidden_size * e
    return latents + context + work.branches * (_rows(c, work, e, steps) + rope + text)


def denoise_peak(
    c: TransformerConfig,
    batch: int,
    counts: _Tokens,
    precision: str,
    branches: int,
    e: int,
    upcast: bool,
) -> int:
    """The fullest moment of a step: in a single block, before the second linear layer; or in a
    double block, at attention or in the feed-forward."""
    D, M = c.hidden_size, c.mlp_hidden
    every = batch * counts.all
    # x, img and txt that became it, normed, q k v, attention; up; both in one, and GELU by itself
    # where its kernel does not write into that
    single = every * ((1 + 1 + 1 + 3 + 1) * D + M + (D + M) + M)
    # img and txt, normed, q k v, rotated q k, joint q k v, attention
    joint = every * (1 + 1 + 3 + 2 + 3 + 1) * D
    # img and txt old and new, q k v, attention, normed, out; up, gelu
    double = max(joint, every * ((2 + 3 + 1 + 1 + 1) * D + 2 * M))
    sixteenths = {"fp8": 16, "nvfp4": 9}.get(precision, 0)
    cast = every * (D + M) * sixteenths // 16  # linear2's input, quantised
    if upcast and precision == "nvfp4":
        cast = every * (D + M) * 2  # rounded, in place of that
    if upcast and precision == "fp8":
        single += every * (D + M) + D * (D + M)  # copies of linear2's input and weight
        double += every * M + 2 * D * M  # of the last ones of the feed-forwards, text and image
    blocks = max(single if c.depth_single_blocks else 0, double if c.depth else 0) * e
    velocity = (branches + 1) * batch * counts.target * c.in_channels * 4
    return blocks + cast + velocity


def t5_peak(c: T5Config, tokens: int, e: int) -> int:
    """The fullest moment of T5: its buckets, or a layer's attention or feed-forward."""
    inner, D = c.num_heads * c.d_kv, c.d_model
    bias = c.num_heads * tokens**2 * e
    buckets = 53 * tokens**2  # six maps of int64 and some of their comparisons
    ids = 8 * tokens
    attention = bias + tokens * (4 * D + 5 * inner) * e  # x, normed, out; q k v, mixed, flat
    feed_forward = bias + tokens * (4 * D + 3 * c.d_ff) * e  # x old and new, normed; gate, up, both
    first = tokens * D * e + max(buckets, bias + 10 * tokens**2)
    return ids + max(first, attention, feed_forward)


def _encode_peak(c: VaeConfig, size: Size, e: int, tile: int) -> int:
    """Pixels as bytes, float32 and in the VAE's type, and the encoder's fullest moment."""
    part = vae_part(c, size, tile)
    pixels = _area(size) * 3
    return max(pixels * (1 + 4 + e) + encoder_peak(c, part, e), pixels * (1 + 3 * 4))


def _decode_peak(c: VaeConfig, size: Size, e: int, tile: int) -> int:
    """The decoder's fullest moment, tiles that wait to be joined, or the way to 8 bits."""
    part = vae_part(c, size, tile)
    pixels = _area(size) * 3
    joined = 0 if part == size else 4 * pixels * e
    return max(decoder_peak(c, part, e) + joined, pixels * (e + 4 + 4 + 4) + joined)


def vae_part(c: VaeConfig, size: Size, tile: int) -> Size:
    """What goes through the VAE at once: the picture, or a tile of it (see ``Vae``'s rule)."""
    side = tile or c.sample_size
    limit = side if tile else 2 * side
    return size if max(size) <= limit else (min(size[0], side), min(size[1], side))


def encoder_peak(c: VaeConfig, size: Size, e: int) -> int:
    """Bytes of the feature maps that live at the encoder's fullest moment."""
    widths, area = c.block_out_channels, _area(size)
    peaks = [_middle(widths[-1]) * area / 4 ** (len(widths) - 1)]
    for i, (inner, outer) in enumerate(zip((widths[0], *widths), widths, strict=False)):
        down = inner + 2 * outer + outer / 4 if i < len(widths) - 1 else 0
        peaks.append(max(_level(inner, outer, c.layers_per_block), down) * area / 4**i)
    return int(max(peaks) * e)


def decoder_peak(c: VaeConfig, size: Size, e: int) -> int:
    """Bytes of the latents and the feature maps that live at the decoder's fullest moment."""
    widths, area = c.block_out_channels, _area(size)
    latents = c.latent_channels * area // c.downscale**2
    peaks = [_middle(widths[-1]) * area / 4 ** (len(widths) - 1), 4 * widths[0] * area]
    for i, (outer, inner) in enumerate(zip(widths, (*widths[1:], widths[-1]), strict=True)):
        up = inner + (1 + 4 + 4) * outer if i > 0 else 0
        peaks.append(max(_level(inner, outer, c.layers_per_block + 1), up) * area / 4**i)
    return int((latents + max(peaks)) * e)


def _level(inner: int, outer: int, blocks: int) -> int:
    """Channels that live in one resolution; its input lives as long as its blocks run."""
    first = inner + max(2 * inner, inner + outer, 3 * outer)  # norm, activation; conv; second half
    return max(first, inner + 4 * outer if blocks > 1 else 0)


def _middle(width: int) -> int:
    """Channels that live in attention over all places: x twice, normed, q k v with their copies."""
    return 9 * width
