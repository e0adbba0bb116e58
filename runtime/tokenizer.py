"""Prompts to token ids, with the ``tokenizers`` library and the published files."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import CheckpointError
from .weights import read_json

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

_log = logging.getLogger(__name__)
_CLIP_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
"""CLIP's word pattern (openai/CLIP ``simple_tokenizer.py``)."""


@dataclass(frozen=True)
class PromptTokenizer:
    """One tokenizer with its padding token and the length that its model was made for."""

    name: str
    tokenizer: "Tokenizer"
    pad_id: int
    model_max_length: int

    @property
    def size(self) -> int:
        """One more than its highest token id."""
        return 1 + max(self.tokenizer.get_vocab().values(), default=-1)

    def __call__(self, prompt: str, length: int | None = None) -> NDArray[np.int64]:
        """Token ids ``[length]`` of one prompt, cut or padded; None: ``model_max_length``."""
        length = length or self.model_max_length
        ids = self.tokenizer.encode(prompt).ids
        if len(ids) > length:
            end = ids[-1]  # both tokenizers close a prompt with their end token
            _log.warning(
                "%s: the prompt has %d tokens, all after %d are ignored",
                self.name,
                len(ids),
                length,
            )
            ids = [*ids[: length - 1], end]
        return np.array(ids + [self.pad_id] * (length - len(ids)), dtype=np.int64)


def load_tokenizer(folder: Path, default_length: int) -> PromptTokenizer:
    """Read ``vocab.json`` and ``merges.txt`` (CLIP) or ``tokenizer.json`` (T5), and settings."""
    from tokenizers import Tokenizer

    settings = (
        read_json(folder / "tokenizer_config.json")
        if (folder / "tokenizer_config.json").exists()
        else {}
    )
    try:
        if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            tokenizer = _clip_tokenizer(folder, settings)
        elif (folder / "tokenizer.json").exists():
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            tokenizer.no_padding()
            tokenizer.no_truncation()
        else:
            raise CheckpointError(
                f"{folder}: expected vocab.json and merges.txt, or tokenizer.json, found neither"
            )
    except CheckpointError:
        raise
    except Exception as error:  # the library raises bare Exceptions
        problem = " ".join(str(error).split())
        raise CheckpointError(f"{folder}: expected a tokenizer, found {problem}") from None
    usual = "<|endoftext|>" if (folder / "vocab.json").exists() else "<pad>"
    pad = _content(settings.get("pad_token")) or usual
    pad_id = tokenizer.token_to_id(pad)
    if pad_id is None:
        raise CheckpointError(
            f"{folder}: expected the padding token {pad} in the vocabulary, found none"
        )
    length = settings.get("model_max_length", default_length)
    if not isinstance(length, int) or not 2 <= length <= 1_000_000:  # "no limit" is a huge number
        length = default_length
    return PromptTokenizer(folder.name, tokenizer, pad_id, length)


def _clip_tokenizer(folder: Path, settings: dict[str, Any]) -> "Tokenizer":
    """Byte-level BPE as CLIP defines it: lower case, ``</w>`` ends a word, start and end tokens."""
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
    from tokenizers.models import BPE

    start = _content(settings.get("bos_token")) or "<|startoftext|>"
    end = _content(settings.get("eos_token")) or "<|endoftext|>"
    unknown = _content(settings.get("unk_token")) or end
    tokenizer = Tokenizer(
        BPE.from_file(
            str(folder / "vocab.json"),
            str(folder / "merges.txt"),
            unk_token=unknown,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.add_special_tokens([_added(token, settings) for token in (start, end)])
    ids = {token: tokenizer.token_to_id(token) or 0 for token in (start, end)}
    # positional: the keywords were renamed between versions (sep, cls, trim offsets, prefix space)
    tokenizer.post_processor = processors.RobertaProcessing(
        (end, ids[end]), (start, ids[start]), False, False
    )
    return tokenizer


def _added(token: str, settings: dict[str, Any]) -> "AddedToken":
    """A special token with the flags of the file: whether it is looked for after lower-casing."""
    from tokenizers import AddedToken

    listed = settings.get("added_tokens_decoder")
    entries = [*(listed.values() if isinstance(listed, dict) else ()), *settings.values()]
    stored = [e for e in entries if isinstance(e, dict) and e.get("content") == token]
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    given = {flag: bool(stored[0].get(flag, False)) for flag in flags} if stored else {}
    return AddedToken(token, **{"normalized": False, **given}, special=True)


def _content(token: Any) -> str | None:
    """A special token is stored as text or as an object with its text."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
