"""What ``--json`` prints."""

from __future__ import annotations

import json
from typing import Any

import pytest


def document(text: str) -> dict[str, Any]:
    """Return the one JSON document that stdout holds; fails for a second line, or for NaN and infinity."""
    assert text.count("\n") == 1
    found: dict[str, Any] = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    return found
