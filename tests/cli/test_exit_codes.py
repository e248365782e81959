"""The exit codes of docs/command_line.md, from real processes."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

PROGRAM = "import sys, widefield_cli; sys.exit(widefield_cli.main())"
PAGE = Path(__file__).parents[2] / "docs" / "command_line.md"


def status(words: str, folder: Path) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words.split()], cwd=folder, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("--help", 0),
        ("recipes van_b0*", 0),
        ("recipes nonsense", 1),
        ("runs nowhere", 1),
        ("train digits_morf --seed -1", 1),
        ("train digits_morf --seed", 2),
        ("nonsense", 2),
        ("predict test_resnet", 2),
    ],
)
def test_codes(words: str, code: int, tmp_path: Path) -> None:
    found, error = status(words, tmp_path)
    assert found == code, error
    assert "Traceback" not in error


WITH_MODELS = {
    "plan test_resnet --to fast_depthwise": 1,
    "predict test_resnet broken.png": 1,
    "predict test_resnet fine.png": 0,
    "predict test_resnet fine.png broken.png": 3,
}


def test_codes_with_models(tmp_path: Path) -> None:
    """Run commands that import torch one after another in one process, as the import takes seconds."""
    Image.new("RGB", (64, 64)).save(tmp_path / "fine.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "fine.png").read_bytes()[:60])
    *earlier, last = WITH_MODELS
    program = f"""
import sys, widefield_cli
print([widefield_cli.main(words.split()) for words in {earlier!r}], file=sys.stderr)
sys.exit(widefield_cli.main({last.split()!r}))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert str([WITH_MODELS[words] for words in earlier]) in done.stderr
    assert done.returncode == WITH_MODELS[last]
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell")
@pytest.mark.parametrize("words", ["recipes", "recipes --json", "completion zsh"])
def test_a_reader_that_has_left(words: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, *words.split()]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_outside_of_a_training(number: signal.Signals, code: int, tmp_path: Path) -> None:
    program = f"""
import os, signal, sys, widefield_cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background processes ignore it
from widefield.cli import recipes
recipes.run = lambda args: os.kill(os.getpid(), {int(number)}) or 0
sys.exit(widefield_cli.main(["recipes"]))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode in (code, -number)  # a shell shows the second as 128 + number, too
    assert "Traceback" not in done.stderr


def test_the_page_has_all_codes() -> None:
    codes = re.findall(r"^\| (\d+) \|", PAGE.read_text(), flags=re.MULTILINE)
    assert set(codes) == {"0", "1", "2", "3", "130", "141", "143"}
