"""Tokenizer files that the runtime, diffusers and transformers read alike.

Whole words for the T5 side; for the CLIP side byte pairs whose merges end in the same words, so
that a known word is one token there too and an unknown one falls into letters.
"""

import re
from functools import cache
from itertools import pairwise
from pathlib import Path

from ...checkpoint_writer import write_json
from ..tokens import TEXT_LENGTH
from ..vocabulary import VOCABULARY

CLIP_LENGTH = 64
"""Tokens: 31 words, as many marks between them, start and end."""
T5_SPECIALS = ("<pad>", "</s>", "<unk>")
T5_TOKENS = (*T5_SPECIALS, *VOCABULARY)
TOKENIZER_2_CLASS = "PreTrainedTokenizerFast"
"""Reads ``tokenizer.json`` as it stands; transformers' T5 class puts its own splitting in place."""

_START, _END = "<|startoftext|>", "<|endoftext|>"
_LAST = "</w>"


def write_tokenizers(folder: Path) -> None:
    """Write ``tokenizer`` (CLIP) and ``tokenizer_2`` (T5) into a model's folder."""
    _write_clip(folder / "tokenizer")
    _write_t5(folder / "tokenizer_2")


@cache
def clip_merges() -> tuple[tuple[str, str], ...]:
    """Merges by which every run of letters of the vocabulary ends as one token.

    Each run is split by the merges so far and what remains is joined from the left. A new merge
    ranks below all before it, so that it never changes how an earlier run is put together.
    """
    ranks: dict[tuple[str, str], int] = {}
    runs = sorted({run for word in VOCABULARY for run in re.findall(r"[a-z]+|[0-9]", word)})
    for run in runs:
        symbols = [*run[:-1], run[-1] + _LAST]
        while len(symbols) > 1:
            pairs = list(pairwise(symbols))
            pair = min(pairs, key=lambda p: ranks.get(p, len(ranks)))
            ranks.setdefault(pair, len(ranks))
            symbols = _merged(symbols, pair)
    return tuple(ranks)


def _merged(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """The symbols with every occurrence of the pair joined, from the left."""
    joined: list[str] = []
    i = 0
    while i < len(symbols):
        if tuple(symbols[i : i + 2]) == pair:
            joined.append("".join(pair))
            i += 2
        else:
            joined.append(symbols[i])
            i += 1
    return joined


@cache
def clip_tokens() -> tuple[str, ...]:
    """The vocabulary of the CLIP side by id: bytes, bytes that end a word, merges, start, end."""
    from tokenizers.pre_tokenizers import ByteLevel

    symbols = sorted(ByteLevel.alphabet())
    merged = dict.fromkeys("".join(pair) for pair in clip_merges())
    return (*symbols, *(symbol + _LAST for symbol in symbols), *merged, _START, _END)


def _write_clip(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(clip_tokens())})
    lines = ["#version: 0.2", *(" ".join(pair) for pair in clip_merges())]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": CLIP_LENGTH,
            "bos_token": _START,
            "eos_token": _END,
            "unk_token": _END,
            "pad_token": _END,
        },
    )


def _write_t5(folder: Path) -> None:
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    pad, end, unknown = T5_SPECIALS
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(T5_TOKENS)}, unknown))
    tokenizer.normalizer = normalizers.Lowercase()
    # the same words as tokens.words
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[a-z0-9]+"), "removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, T5_TOKENS.index(end))]
    )
    tokenizer.add_special_tokens(list(T5_SPECIALS))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": TOKENIZER_2_CLASS,
            "model_max_length": TEXT_LENGTH,
            "eos_token": end,
            "unk_token": unknown,
            "pad_token": pad,
        },
    )
