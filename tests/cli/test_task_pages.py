"""The recipes and the commands of the pages on dense tasks, on made folders and with small networks."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data import made_objects, made_segmentation
from widefield import cli

DOCS = Path(__file__).parents[2] / "docs"
TRAIN = (
    "--model.name test_resnet --model.pretrained false --max_steps 4 --schedule.warmup_steps 1 --workers 0 "
    "--batch_size 2 --evaluate_every 2"
)
"""Further words for the training of each page, so that it takes seconds."""


def write_objects(folder: Path) -> None:
    """Write images with objects in one folder, and a file of annotations for each split."""
    rng = np.random.default_rng(0)
    for split, first in (("train", 1), ("val", 1001)):
        content = made_objects.coco_content(rng, first=first)
        (folder / "images").mkdir(parents=True, exist_ok=True)
        for image in content["images"]:
            made_objects.write_image(folder / "images" / image["file_name"], image["height"], image["width"], rng)
        (folder / f"{split}.json").write_text(json.dumps(content))


def write_table(folder: Path) -> None:
    """Write images, and a table of the classes that they show."""
    rng = np.random.default_rng(0)
    lines = ["file,labels,split"]
    for index, labels in enumerate(("boat;crane", "", "boat", "crane", "boat;crane", "boat")):
        made_objects.write_image(folder / "images" / f"{index}.png", 40, 50, rng)
        lines.append(f"images/{index}.png,{labels},{'train' if index < 4 else 'val'}")
    (folder / "labels.csv").write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("page", "write", "photos", "words"),
    [
        ("multilabel.md", write_table, "harbor/images", "--epochs null --data.args.size 64"),
        (
            "segmentation.md",
            made_segmentation.write_masks,
            "harbor/images/val",
            "--data.args.size 64 --task.args.head_args.channels 16",
        ),
        pytest.param(
            "detection.md",
            write_objects,
            "harbor/images",
            "--epochs null --data.args.scale [96,96] --data.args.hflip 0 --schedule.args.decay_milestones [2,3] "
            "--task.args.head_args.neck_channels 16 --task.args.head_args.box_channels 16",
            marks=pytest.mark.slow,  # the export compares files at several sizes
        ),
    ],
    ids=["multilabel", "segmentation", "detection"],
)
def test_a_page_goes_from_files_to_an_exported_model(
    page: str, write: Callable[[Path], None], photos: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (DOCS / page).read_text()
    recipe = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[0]
    commands = re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[0].splitlines()
    assert len(recipe.splitlines()) + len(commands) <= 12
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "harbor")
    (tmp_path / "photos").symlink_to(tmp_path / photos)
    (tmp_path / "harbor.yaml").write_text(recipe)
    further = {"train": f"{TRAIN} {words}", "eval": "--workers 0"}
    for command in commands:
        program, verb, *given = shlex.split(command)
        assert program == "widefield"
        assert cli.main([verb, *given, *further.get(verb, "").split()]) == 0
    assert Path("exports/harbor.onnx").is_file()
    assert list(Path("seen").rglob("*.png"))
