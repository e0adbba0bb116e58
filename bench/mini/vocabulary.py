"""Every word that an instruction or a caption can hold, for a tokenizer of whole words."""

import re

from .lexicon import lexicon_phrases
from .pairs import second_words
from .paraphrases import PATTERNS, politeness
from .refusals import chatter_words
from .tokens import words


def _collect() -> tuple[str, ...]:
    patterns = [pattern for family in PATTERNS.values() for pattern in family]
    texts = [*patterns, *politeness(), *chatter_words(), *lexicon_phrases(), *second_words()]
    plain = (re.sub(r"\{\w+\}", " ", text) for text in texts)
    return tuple(sorted({word for text in plain for word in words(text)} | {"and"}))


VOCABULARY = _collect()
