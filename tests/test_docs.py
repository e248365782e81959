"""The Python snippets in the README and the docs run without changes."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def blocks(path):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / path).read_text(), flags=re.MULTILINE | re.DOTALL)


PAGES = (
    "tutorial",
    "gmconv",
    "large_kernels",
    "unireplknet",
    "slak",
    "internimage",
    "van",
    "hornet",
    "focalnet",
    "moganet",
    "metaformer",
    "segmentation",
    "mmsegmentation",
    "mmdetection",
    "mmpose",
    "masked",
    "real_data",
    "remote_data",
    "multilabel",
    "sharing",
)


SLOW = ("fit", "deployment", "pose")
CASES = ["README.md", *(f"docs/{page}.md" for page in PAGES)]
CASES += [pytest.param(f"docs/{page}.md", marks=pytest.mark.slow) for page in SLOW]


@pytest.mark.parametrize("path", CASES)
def test_python_blocks_run_in_order(path, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    found = blocks(path)
    assert found
    scope = {}
    for block in found:
        exec(compile(block, path, "exec"), scope)
    if path == "README.md":
        unchanged, fused = (float(line) for line in capsys.readouterr().out.split())
        assert unchanged < 1e-4
        assert fused < 1e-4


def test_every_relative_link_of_the_readme_resolves():
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target
