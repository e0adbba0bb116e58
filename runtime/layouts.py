"""Where each canonical tensor lies in a checkpoint.

BFL's names are canonical. A diffusers checkpoint splits some tensors by rows and swaps the halves
of one; the rules below name, for a canonical tensor, the stored pieces that make it up, in order.
Source: `scripts/convert_flux_to_diffusers.py` and the tensors themselves, matched one by one in the
tests against the published shapes.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """A stored tensor, or one half of its rows."""

    key: str
    half: int | None = None


Locate = Callable[[str], tuple[Piece, ...]]
"""Canonical tensor name -> the stored pieces that are its rows from top to bottom."""


def identity(name: str) -> tuple[Piece, ...]:
    """The layout whose names are canonical already."""
    return (Piece(name),)


def _renamer(rules: Sequence[tuple[str, Sequence[str]]]) -> Locate:
    """Build a layout of (canonical pattern, stored names); what follows the match is kept."""
    compiled = [(re.compile(pattern), targets) for pattern, targets in rules]

    def locate(name: str) -> tuple[Piece, ...]:
        for pattern, targets in compiled:
            if match := pattern.match(name):
                rest = name[match.end() :]
                return tuple(Piece(match.expand(target) + rest) for target in targets)
        return (Piece(name),)

    return locate


_IN, _OUT = r"linear_1", r"linear_2"
_DOUBLE = r"double_blocks\.(\d+)\."
_SINGLE = r"single_blocks\.(\d+)\."
_TO_DOUBLE = r"transformer_blocks.\1."
_TO_SINGLE = r"single_transformer_blocks.\1."

_transformer = _renamer(
    [
        (r"img_in", ["x_embedder"]),
        (r"txt_in", ["context_embedder"]),
        (r"time_in\.in_layer", [rf"time_text_embed.timestep_embedder.{_IN}"]),
        (r"time_in\.out_layer", [rf"time_text_embed.timestep_embedder.{_OUT}"]),
        (r"guidance_in\.in_layer", [rf"time_text_embed.guidance_embedder.{_IN}"]),
        (r"guidance_in\.out_layer", [rf"time_text_embed.guidance_embedder.{_OUT}"]),
        (r"vector_in\.in_layer", [rf"time_text_embed.text_embedder.{_IN}"]),
        (r"vector_in\.out_layer", [rf"time_text_embed.text_embedder.{_OUT}"]),
        (_DOUBLE + r"img_mod\.lin", [_TO_DOUBLE + "norm1.linear"]),
        (_DOUBLE + r"txt_mod\.lin", [_TO_DOUBLE + "norm1_context.linear"]),
        (_DOUBLE + r"img_attn\.qkv", [_TO_DOUBLE + f"attn.to_{x}" for x in "qkv"]),
        (_DOUBLE + r"txt_attn\.qkv", [_TO_DOUBLE + f"attn.add_{x}_proj" for x in "qkv"]),
        (_DOUBLE + r"img_attn\.norm\.query_norm\.scale", [_TO_DOUBLE + "attn.norm_q.weight"]),
        (_DOUBLE + r"img_attn\.norm\.key_norm\.scale", [_TO_DOUBLE + "attn.norm_k.weight"]),
        (
            _DOUBLE + r"txt_attn\.norm\.query_norm\.scale",
            [_TO_DOUBLE + "attn.norm_added_q.weight"],
        ),
        (_DOUBLE + r"txt_attn\.norm\.key_norm\.scale", [_TO_DOUBLE + "attn.norm_added_k.weight"]),
        (_DOUBLE + r"img_attn\.proj", [_TO_DOUBLE + "attn.to_out.0"]),
        (_DOUBLE + r"txt_attn\.proj", [_TO_DOUBLE + "attn.to_add_out"]),
        (_DOUBLE + r"img_mlp\.0", [_TO_DOUBLE + "ff.net.0.proj"]),
        (_DOUBLE + r"img_mlp\.2", [_TO_DOUBLE + "ff.net.2"]),
        (_DOUBLE + r"txt_mlp\.0", [_TO_DOUBLE + "ff_context.net.0.proj"]),
        (_DOUBLE + r"txt_mlp\.2", [_TO_DOUBLE + "ff_context.net.2"]),
        (
            _SINGLE + r"linear1",
            [*(_TO_SINGLE + f"attn.to_{x}" for x in "qkv"), _TO_SINGLE + "proj_mlp"],
        ),
        (_SINGLE + r"linear2", [_TO_SINGLE + "proj_out"]),
        (_SINGLE + r"norm\.query_norm\.scale", [_TO_SINGLE + "attn.norm_q.weight"]),
        (_SINGLE + r"norm\.key_norm\.scale", [_TO_SINGLE + "attn.norm_k.weight"]),
        (_SINGLE + r"modulation\.lin", [_TO_SINGLE + "norm.linear"]),
        (r"final_layer\.linear", ["proj_out"]),
        (r"final_layer\.adaLN_modulation\.1", ["norm_out.linear"]),
    ]
)


def diffusers_transformer(name: str) -> tuple[Piece, ...]:
    """``FluxTransformer2DModel``: its last modulation is (scale, shift), not (shift, scale)."""
    pieces = _transformer(name)
    if name.startswith("final_layer.adaLN_modulation"):
        return Piece(pieces[0].key, half=1), Piece(pieces[0].key, half=0)
    return pieces


def diffusers_vae(levels: int) -> Locate:
    """``AutoencoderKL`` with so many resolutions; its up blocks count from the other end."""
    middle = [
        (r"((?:en|de)coder)\.mid\.block_1", [r"\1.mid_block.resnets.0"]),
        (r"((?:en|de)coder)\.mid\.block_2", [r"\1.mid_block.resnets.1"]),
        (r"((?:en|de)coder)\.mid\.attn_1\.norm", [r"\1.mid_block.attentions.0.group_norm"]),
        (r"((?:en|de)coder)\.mid\.attn_1\.([qkv])", [r"\1.mid_block.attentions.0.to_\2"]),
        (r"((?:en|de)coder)\.mid\.attn_1\.proj_out", [r"\1.mid_block.attentions.0.to_out.0"]),
        (r"((?:en|de)coder)\.norm_out", [r"\1.conv_norm_out"]),
    ]
    blocks = []
    for i in range(levels):
        for here, there in (
            (rf"encoder\.down\.{i}", f"encoder.down_blocks.{i}"),
            (rf"decoder\.up\.{i}", f"decoder.up_blocks.{levels - 1 - i}"),
        ):
            blocks += [
                (here + r"\.block\.(\d+)\.nin_shortcut", [there + r".resnets.\1.conv_shortcut"]),
                (here + r"\.block\.(\d+)", [there + r".resnets.\1"]),
                (here + r"\.downsample\.conv", [there + ".downsamplers.0.conv"]),
                (here + r"\.upsample\.conv", [there + ".upsamplers.0.conv"]),
            ]
    return _renamer(middle + blocks)
