"""Read the words by which models are named: paths of runs, and names with arguments in braces."""

from __future__ import annotations

import os
import re
from typing import Any

from widefield.train.recipe_io import read_yaml


def is_path(word: str) -> bool:
    """Return whether a word must be a path: only names with one of timm's sources, ``hf-hub:``, have slashes."""
    name = word.partition("{")[0]
    return ":" not in name and ("/" in name or os.sep in name or name.startswith(("~", ".")))


def parsed(word: str) -> tuple[str, dict[str, Any]]:
    """Return the name of a model and its arguments; raises ValueError for a word of another form."""
    match = re.fullmatch(r"([^{}]+)(\{.*\})?", word, re.DOTALL)
    if match is None:
        raise ValueError(f"a model is a name, or a name and arguments in braces; got {word!r}.")
    try:
        given = read_yaml(match[2] or "{}")
    except ValueError as error:
        raise ValueError(f"the braces of {word!r} hold no YAML: {str(error).splitlines()[0]}.") from error
    return match[1].strip(), {str(key): value for key, value in given.items()}
