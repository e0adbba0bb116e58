"""Token ids are those of transformers' tokenizers on the same files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxkontext.runtime import CheckpointError
from fluxkontext.runtime.tokenizer import PromptTokenizer, load_tokenizer

from . import peers

PROMPTS = [
    "",
    " ",
    "make the circle blue",
    "Make THE Circle   BLUE, don't move it!!",
    "  leading and trailing  ",
    "tabs\tand\nnew lines\r\nand\u00a0no-break\u3000spaces\u200bzero width",
    "naïve café NÉON Straße İstanbul ﬁne ½ ①",
    "e\u0301 is é, A\u030a is Å",
    "中文 日本語 한국어 עברית العربية हिन्दी ไทย",
    "🟦 → 🟥, 👩‍👩‍👧 👍🏽 🏳️‍🌈",
    "12345 1.5 3,000 2x 50% #ff0000 a_b a-b (c) [d] {e} <f> $1 & | \\ / ^ ~ `",
    "it's we're I'll I'm he'd they've IT'S ''s",
    "<|startoftext|> <|endoftext|>",
    "<|STARTOFTEXT|> and <|EndOfText|> and <|startoftext|>x<|endoftext|>y",
    "</s> <pad> <unk> <extra_id_0> <extra_id_99> <s> </w> ▁ ▁▁a",
    "circle</w>blue </w>",
    "\x00\x01\x7f\ufffd\ufeff\ud7ff\U0010ffff",
    "a" * 300,
    "the circle " * 200,
    "!?" * 200,
]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers") / "clip"
    peers.write_clip_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers") / "t5"
    peers.write_t5_tokenizer(folder)
    return folder


@pytest.fixture(scope="module", params=["clip", "t5"])
def pair(request: pytest.FixtureRequest) -> tuple[PromptTokenizer, Any]:
    """Ours and transformers', from one folder."""
    from transformers import CLIPTokenizer, T5TokenizerFast

    folder: Path = request.getfixturevalue(f"{request.param}_folder")
    theirs = {"clip": CLIPTokenizer, "t5": T5TokenizerFast}[request.param]
    default = {"clip": 99, "t5": 999}[request.param]  # not used: the folders name their own
    return load_tokenizer(folder, default), theirs.from_pretrained(folder)


def ids(theirs: Any, prompt: str, length: int) -> np.ndarray:
    """As diffusers' pipelines call it."""
    return theirs(prompt, padding="max_length", max_length=length, truncation=True).input_ids


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_prompts(pair: tuple[PromptTokenizer, Any], prompt: str) -> None:
    ours, theirs = pair
    assert ours.model_max_length == theirs.model_max_length
    found = ours(prompt)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, ids(theirs, prompt, ours.model_max_length))


@settings(max_examples=150)
@given(prompt=st.text(), length=st.integers(2, 77))
def test_any_text(pair: tuple[PromptTokenizer, Any], prompt: str, length: int) -> None:
    ours, theirs = pair
    np.testing.assert_array_equal(ours(prompt, length), ids(theirs, prompt, length))


@settings(max_examples=150)
@given(
    words=st.lists(
        st.sampled_from(
            [
                *peers.WORDS.split(),
                *("<|endoftext|>", "<|StartOfText|>", "</s>", "<pad>", "<extra_id_5>", "▁", "ing"),
                *("\n", " ", "  ", "'s", "'", "é", "É", "\u0301", "\u017f", "12", "!"),
            ]
        )
    )
)
def test_any_mix_of_known_pieces(pair: tuple[PromptTokenizer, Any], words: list[str]) -> None:
    ours, theirs = pair
    prompt = "".join(words)
    np.testing.assert_array_equal(ours(prompt), ids(theirs, prompt, ours.model_max_length))


def test_words_are_merged(clip_folder: Path, t5_folder: Path) -> None:
    """The vocabularies of these tests are more than letters."""
    clip, t5 = load_tokenizer(clip_folder, 77), load_tokenizer(t5_folder, 64)
    assert clip.tokenizer.encode("Circle blue").tokens == [
        peers.START,
        "circle</w>",
        "blue</w>",
        peers.END,
    ]
    assert t5.tokenizer.encode("circle blueing").tokens == ["▁circle", "▁blue", "ing", "</s>"]


def test_long_prompts_are_cut_and_told(
    pair: tuple[PromptTokenizer, Any], caplog: pytest.LogCaptureFixture
) -> None:
    ours, _ = pair
    short = ours("blue", 8)
    assert not caplog.records
    long = ours("blue " * 50, 8)
    assert "are ignored" in caplog.text
    end = ours.tokenizer.encode("").ids[-1]
    assert long[-1] == end
    assert short[list(short).index(end) + 1 :].tolist() == [ours.pad_id] * (
        7 - list(short).index(end)
    )


def test_as_transformers_5_saves_clip(clip_folder: Path, tmp_path: Path) -> None:
    """One tokenizer.json instead of vocab.json and merges.txt."""
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer.from_pretrained(clip_folder)
    theirs.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "vocab.json").exists()
    ours = load_tokenizer(tmp_path / "saved", 77)
    for prompt in PROMPTS:
        np.testing.assert_array_equal(ours(prompt), ids(theirs, prompt, 77))


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_without_settings(request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> None:
    """The vocabulary alone is enough; the length is then the caller's."""
    from transformers import CLIPTokenizer, T5TokenizerFast

    folder: Path = request.getfixturevalue(f"{kind}_folder")
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        if (folder / name).exists():
            (tmp_path / name).write_bytes((folder / name).read_bytes())
    found = load_tokenizer(tmp_path, 33)
    assert found.model_max_length == 33
    theirs = {"clip": CLIPTokenizer, "t5": T5TokenizerFast}[kind].from_pretrained(tmp_path)
    for prompt in PROMPTS:
        np.testing.assert_array_equal(found(prompt, 20), ids(theirs, prompt, 20))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": "1.0"}', "null"])
def test_damaged_files(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match="expected a tokenizer"):
        load_tokenizer(tmp_path, 77)


def test_no_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"vocab\.json and merges\.txt, or tokenizer\.json"):
        load_tokenizer(tmp_path, 77)
