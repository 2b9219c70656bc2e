"""How a stage's arguments travel to a node: `$`, line breaks and other control characters are written as %24, %0A ...

Each scheduler reads some `$` of a job's command as its own: torchx those of its macros, Kubernetes `$(NAME)` and `$$`.
A word that needs nothing of this travels as it is, so that what a dry run prints can be read.
"""

import string
from urllib.parse import quote, unquote

MARK = "quoted:"
"""Begins a word that is not as it was given."""
KEPT = "".join(set(string.punctuation) - {"$", "%"}) + " "
"""Characters that are not replaced in such a word, beside letters and digits."""


def pack(word: str) -> str:
    """An argument as it is written into a job."""
    if "$" not in word and word.isprintable() and not word.startswith(MARK):
        return word
    return MARK + quote(word, safe=KEPT, errors="surrogateescape")


def unpack(word: str) -> str:
    """The argument that `pack` was given."""
    return unquote(word.removeprefix(MARK), errors="surrogateescape") if word.startswith(MARK) else word
