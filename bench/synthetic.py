"""A checkpoint of random weights in the published layout, for trying, testing and timing.

``python -m fluxkontext.bench.synthetic OUT`` writes a tiny one, a few megabytes. It is loaded by
the same code, from the same files, as the real model; its pictures are noise.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..runtime.config import ClipConfig, T5Config, TransformerConfig, VaeConfig
from .checkpoint_writer import Spec, meta_networks, write_json, write_model

CLIP_LENGTH = 77


TINY = Spec(
    transformer=TransformerConfig(
        hidden_size=256,
        num_heads=2,
        depth=2,
        depth_single_blocks=2,
        context_in_dim=64,
        vec_in_dim=64,
        mlp_hidden=1024,
    ),
    vae=VaeConfig(block_out_channels=(32, 32, 64, 64), layers_per_block=1, sample_size=128),
    text_encoder=ClipConfig(
        vocab_size=514,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
    ),
    text_encoder_2=T5Config(
        vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4
    ),
    text_length=64,
)
"""Two blocks of each kind, with the real head size and RoPE axes."""


def write_checkpoint(folder: Path, spec: Spec = TINY, seed: int = 0) -> None:
    """Write a diffusers folder of random float32 weights; the folder must not exist."""
    folder.mkdir(parents=True)
    write_model(folder, spec, random_networks(spec, seed), torch.float32)
    write_tokenizers(folder, spec.text_length)


def write_tokenizers(folder: Path, text_length: int) -> None:
    """Tokenizers of single characters, for any model that knows a few hundred tokens."""
    _write_clip_tokenizer(folder / "tokenizer")
    _write_t5_tokenizer(folder / "tokenizer_2", text_length)


def random_networks(spec: Spec, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """Random float32 values of all networks by component, under their canonical names."""
    rng = np.random.default_rng(seed)
    return {
        component: {
            name: _random(name, tuple(tensor.shape), rng)
            for name, tensor in network.state_dict().items()
        }
        for component, network in meta_networks(spec).items()
    }


def spread(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a canonical tensor: matrices keep the variance of what they
    are applied to, scales are near 1, biases near 0."""
    if len(shape) > 1:
        fan_in = shape[1] if "shared" in name or "embedding" in name else math.prod(shape[1:])
        return 0.0, 1 / math.sqrt(fan_in)
    return (0.0 if name.endswith("bias") else 1.0), 0.1


def _random(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Tensor:
    mean, deviation = spread(name, shape)
    return torch.from_numpy(mean + deviation * rng.standard_normal(shape)).float()


def _write_clip_tokenizer(folder: Path) -> None:
    """Byte-level BPE without merges: every byte a token, and again as the end of a word."""
    from tokenizers.pre_tokenizers import ByteLevel

    symbols = sorted(ByteLevel.alphabet())
    words = [*symbols, *(f"{s}</w>" for s in symbols), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    write_json(folder / "vocab.json", {word: i for i, word in enumerate(words)})
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": CLIP_LENGTH,
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
        },
    )


def _write_t5_tokenizer(folder: Path, text_length: int) -> None:
    """A unigram model whose pieces are single printable characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *map(chr, range(33, 127))]
    tokenizer = Tokenizer(models.Unigram([(piece, -2.0) for piece in pieces], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="\u2581", prepend_scheme="always"
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens(pieces[:3])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "T5TokenizerFast",
            "model_max_length": text_length,
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
            "extra_ids": 0,
        },
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out}: expected a folder that does not exist, found one")
    write_checkpoint(args.out, seed=args.seed)
    print(f"{args.out}: a tiny model with random weights; what it draws is noise")


if __name__ == "__main__":
    main()
