"""The recipe and the commands of the page on segmentation, on a made folder and with a small network."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from data import made_segmentation
from widefield import cli

PAGE = Path(__file__).parents[2] / "docs" / "segmentation.md"
SMALL = {
    "train": "--model.name test_resnet --model.pretrained false --max_steps 4 --schedule.warmup_steps 1 --workers 0 "
    "--batch_size 2 --data.args.size 64 --task.args.head_args.channels 16 --evaluate_every 2",
    "eval": "--workers 0",
}
"""Further words for the commands of the page, so that they take seconds."""


def test_the_page_goes_from_a_folder_to_an_exported_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = PAGE.read_text()
    recipe = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[0]
    commands = re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[0].splitlines()
    assert len(recipe.splitlines()) + len(commands) == 12
    monkeypatch.chdir(tmp_path)
    made_segmentation.write_masks(tmp_path / "harbor")
    (tmp_path / "photos").symlink_to(tmp_path / "harbor/images/val")
    (tmp_path / "harbor.yaml").write_text(recipe)
    for command in commands:
        program, verb, *words = shlex.split(command)
        assert program == "widefield"
        assert cli.main([verb, *words, *SMALL.get(verb, "").split()]) == 0
    assert Path("exports/harbor.onnx").is_file()
    assert list(Path("seen").rglob("*.png"))
