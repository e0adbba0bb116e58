"""How a text falls into words, and how many of them the miniature reads."""

import re

TEXT_LENGTH = 32  # tokens, the end of text included
MAX_WORDS = TEXT_LENGTH - 1

_WORD = re.compile(r"[a-z0-9]+")


def words(text: str) -> list[str]:
    """The words of a text in lower case; marks and hyphens only separate them."""
    return _WORD.findall(text.lower())
