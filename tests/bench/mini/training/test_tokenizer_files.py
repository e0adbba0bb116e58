"""The tokenizer files: read alike by the runtime and by transformers, one token a known word."""

from pathlib import Path

import numpy as np
import pytest

from fluxkontext.bench.mini.instructions import KINDS, draw_sample
from fluxkontext.bench.mini.tokens import TEXT_LENGTH, words
from fluxkontext.bench.mini.training.tokenizer_files import (
    CLIP_LENGTH,
    T5_SPECIALS,
    T5_TOKENS,
    write_tokenizers,
)
from fluxkontext.bench.mini.vocabulary import VOCABULARY
from fluxkontext.runtime.tokenizer import PromptTokenizer, load_tokenizer

ODD = [
    "",
    " ",
    "MAKE  it\tRed!\n",
    "the 2nd picture's star",
    "Héllo, wörld: 37 x—y 'tis 🙂",
    "it" * 40,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    write_tokenizers(folder)
    return folder


@pytest.fixture(scope="module")
def ours(folder: Path) -> tuple[PromptTokenizer, PromptTokenizer]:
    return load_tokenizer(folder / "tokenizer", 77), load_tokenizer(folder / "tokenizer_2", 512)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = np.random.default_rng(0)
    splits = ("train", "held_out")
    return [draw_sample(rng, k, s).text for k in KINDS for s in splits for _ in range(20)] + ODD


def test_ids_agree_with_transformers(
    folder: Path, ours: tuple[PromptTokenizer, PromptTokenizer], texts: list[str]
) -> None:
    from transformers import CLIPTokenizer, PreTrainedTokenizerFast

    peers = (
        CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer_2"),
    )
    for tokenizer, peer, length in zip(ours, peers, (CLIP_LENGTH, TEXT_LENGTH), strict=True):
        assert tokenizer.model_max_length == peer.model_max_length == length
        found = peer(texts, padding="max_length", max_length=length, truncation=True)
        for text, ids in zip(texts, found.input_ids, strict=True):
            assert tokenizer(text).tolist() == ids, text


def test_t5_reads_whole_words(
    ours: tuple[PromptTokenizer, PromptTokenizer], texts: list[str]
) -> None:
    pad, end, unknown = range(len(T5_SPECIALS))
    for text in texts:
        known = [T5_TOKENS.index(w) if w in VOCABULARY else unknown for w in words(text)]
        ids = [*known[: TEXT_LENGTH - 1], end]
        assert ours[1](text).tolist() == ids + [pad] * (TEXT_LENGTH - len(ids)), text


def test_clip_has_a_token_for_every_known_word(
    ours: tuple[PromptTokenizer, PromptTokenizer], texts: list[str]
) -> None:
    ids = {word: ours[0].tokenizer.encode(word).ids for word in VOCABULARY}
    assert {word for word, found in ids.items() if len(found) != 3} == {"2nd"}  # digits stand alone
    assert len({tuple(found) for found in ids.values()}) == len(VOCABULARY)
    assert max(len(ours[0].tokenizer.encode(text).ids) for text in texts) <= CLIP_LENGTH
