"""Scripts that put no spaces between words, such as Thai, Khmer, Chinese and Japanese."""

import re

SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
"""Character ranges for a regular expression."""
LETTER = re.compile(f"[{SPACELESS}]")
MOST_SPACELESS = 0.1


def separates_words(text: str) -> bool:
    """Whether a text's words are separated by spaces: at most a tenth of it is in other scripts."""
    return text.isascii() or len(LETTER.findall(text)) <= MOST_SPACELESS * len(text)
