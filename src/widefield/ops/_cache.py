"""Cache measurements of a device between runs, in JSON files under ``$XDG_CACHE_HOME/widefield``.

A file that cannot be read or written is ignored, since everything in it can be measured again.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from pathlib import Path
from typing import Any

from widefield._files import cache_folder


def path(kind: str, *parts: object) -> Path:
    """Return the file for a kind of measurement. ``parts``: what it depends on, such as the card and versions."""
    name = re.sub(r"[^\w.+-]+", "_", "-".join(str(part) for part in parts))
    return cache_folder() / kind / f"{name}.json"


def read(file: Path) -> dict[str, Any]:
    """Return the contents of a file, or an empty dictionary if it cannot be read."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write(file: Path, entry: str, value: object) -> None:
    """Add one entry to a file, atomically, so that other processes never read a partial file."""
    temporary = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        content = read(file) | {entry: value}
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".tmp", delete=False) as opened:
            temporary = Path(opened.name)
            json.dump(content, opened, indent=1, sort_keys=True)
        temporary.replace(file)
    except OSError:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()
