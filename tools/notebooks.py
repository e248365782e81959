"""Execute the notebooks of examples/ and keep their outputs, with pictures small enough for a repository.

python tools/notebooks.py [NAME ...]
"""

from __future__ import annotations

import base64
import io
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).resolve().parent.parent / "examples"
_COLORS = 128
_EMBEDDED = re.compile(r"data:image/png;base64,([A-Za-z0-9+/=]+)")


def main() -> None:
    names = sys.argv[1:] or sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    for name in names:
        path = FOLDER / f"{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            client = NotebookClient(
                notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}},
                coalesce_streams=True, record_timing=False,
            )  # fmt: skip
            client.execute()
        notebook.metadata["language_info"] = {"name": "python"}
        for cell in notebook.cells:
            for output in cell.get("outputs", []):
                shrink(output)
        nbformat.write(notebook, path)
        print(f"{name}: {time.perf_counter() - started:.0f} s, {path.stat().st_size // 1024} kB")


def shrink(output: dict[str, dict[str, str]]) -> None:
    """Replace the PNGs of an output by smaller ones."""
    data = output.get("data", {})
    if "image/png" in data:
        data["image/png"] = smaller(data["image/png"])
    if "text/html" in data:
        data["text/html"] = _EMBEDDED.sub(lambda found: f"data:image/png;base64,{smaller(found[1])}", data["text/html"])


def smaller(encoded: str) -> str:
    """Return a PNG, in base64, at three quarters of its resolution and with a palette."""
    image = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")
    size = (max(1, image.width * 3 // 4), max(1, image.height * 3 // 4))
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).quantize(_COLORS).save(buffer, "png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    main()
