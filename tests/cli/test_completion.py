"""``widefield completion``: the scripts, and what they complete."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import widefield
from widefield import cli
from widefield.train.recipe_io import key_names, shipped_recipes

Complete = Callable[[str], list[str]]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Return an environment with ``widefield`` on the path."""
    command = tmp_path / "bin" / "widefield"
    command.parent.mkdir()
    blocked = "".join(f"sys.modules[{name!r}] = None; " for name in ("torch", "timm"))
    command.write_text(
        f"#!{sys.executable}\nimport sys; {blocked}import widefield_cli\nsys.exit(widefield_cli.main())\n"
    )
    command.chmod(0o755)
    source = str(Path(widefield.__file__).parents[1])
    return {**os.environ, "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": source}


@pytest.fixture
def complete(tmp_path: Path, environment: dict[str, str]) -> Complete:
    """Return a function from the words before the cursor to the completions, in a folder with a run."""
    run = tmp_path / "work" / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("base: digits_morf\n")

    def ask(line: str) -> list[str]:
        out = tmp_path / "out"
        asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(out), "_ARGCOMPLETE_IFS": "\n"}
        asked |= {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
        out.unlink(missing_ok=True)
        words = ["widefield"]
        done = subprocess.run(
            words, env={**environment, **asked}, cwd=tmp_path / "work", capture_output=True, text=True, check=False
        )
        assert not done.stderr, done.stderr
        return [word.strip() for word in out.read_text().split("\n")]

    return ask


def test_commands_options_and_choices(complete: Complete) -> None:
    assert complete("widefield tr") == ["train"]
    assert set(complete("widefield ")) >= set(cli.COMMANDS)
    assert complete("widefield runs --js") == ["--json"]
    assert complete("widefield export resnet18 --format o") == ["onnx", "openvino"]


def test_recipes_runs_models_and_keys_without_torch(complete: Complete) -> None:
    assert complete("widefield train digits_mo") == [name for name in shipped_recipes() if name.startswith("digits_mo")]
    assert complete("widefield train runs/m") == ["runs/mine"]
    assert complete("widefield erf van_b") == [f"van_b{number}" for number in range(7)]
    keys = complete("widefield train digits_morf --optimizer.l")
    assert keys == [f"--{key}" for key in key_names() if key.startswith("optimizer.l")]


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes(tmp_path: Path, environment: dict[str, str]) -> None:
    program = """
eval "$(widefield completion bash)"
[[ $(complete -p widefield) =~ -F\\ ([^ ]+) ]] || exit 3
COMP_LINE="widefield train upernet_van_b0" COMP_POINT=30 COMP_TYPE=9
COMP_WORDS=(widefield train upernet_van_b0) COMP_CWORD=2
"${BASH_REMATCH[1]}" widefield
printf '%s\\n' "${COMPREPLY[@]}"
"""
    done = subprocess.run(
        ["bash", "--norc", "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = [word.strip() for word in done.stdout.split()]
    assert found == [name for name in shipped_recipes() if name.startswith("upernet_van_b0")] != []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts(shell: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["completion", shell]) == 0
    assert "widefield" in (script := capsys.readouterr().out)
    assert cli.main(["completion", shell, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["script"] == script.removesuffix("\n")
    monkeypatch.setitem(sys.modules, "argcomplete.shell_integration", None)
    assert cli.main(["completion", shell]) == 1
    assert "pip install argcomplete" in capsys.readouterr().err
