"""Shared runs: task, classes, images, recipe and metrics come along; the Hub is a folder here."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
import yaml
from PIL import Image

import widefield
from widefield.cli import main
from widefield.loading import Subject, load
from widefield.train import DataSpec, ModelSpec, Recipe, RunResult, TaskSpec

SMALL = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}
LENGTH: dict[str, Any] = {"epochs": None, "max_steps": 1, "evaluate_every": 1, "batch_size": 2}

RUNS: dict[str, dict[str, Any]] = {
    "classification": {"data": DataSpec("scales", {"count": 24, "size": 32}), "model": ModelSpec("test_resnet")},
    "multilabel": {"data": DataSpec("scene_labels", {"count": 24, "size": 32}), "task": TaskSpec("multilabel")},
    "segmentation": {
        "data": DataSpec("scenes", {"count": 4, "size": 32}),
        "task": TaskSpec("segmentation", {"head_args": {"channels": 8}}),
    },
    "detection": {
        "data": DataSpec("scenes", {"count": 4, "size": 64}),
        "task": TaskSpec("detection", {"model": "fcos", "head_args": {"neck_channels": 32, "num_convs": 1}}),
    },
    "pose": {
        "data": DataSpec("scene_poses", {"count": 4, "size": 64, "crop_size": [64, 64]}),
        "task": TaskSpec("pose", {"channels": [8]}),
    },
    "masked_image": {
        "data": DataSpec("scales", {"count": 24, "size": 64}),
        "task": TaskSpec("masked_image", {"method": "simmim", "patch": 32}),
    },
}


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photos" / "photo.png"
    path.parent.mkdir()
    Image.effect_noise((60, 50), 80).convert("RGB").save(path)
    return path


@pytest.mark.parametrize("work", list(RUNS))
def test_a_run_is_shared(work: str, run: Callable[..., RunResult], recipe: Recipe, tmp_path: Path, photo: Path) -> None:
    own = load(str(run(**{**LENGTH, "model": ModelSpec("convnext_atto", SMALL), **RUNS[work]}).folder))
    path = widefield.save(own, tmp_path / f"{work}.safetensors")
    found = load(str(path))
    assert (found.name, found.work) == (work, own.work)
    for name in ("size", "mean", "std", "preprocessing", "trained_on", "classes", "palette", "output_names", "outputs"):
        assert getattr(found, name) == getattr(own, name), name
    assert str(found.weights) == str(own.weights)
    assert found.recipe is not None
    assert own.recipe is not None
    assert found.recipe.data == own.recipe.data
    mine, theirs = (widefield.predict(subject, photo).to_dict()["images"] for subject in (own, found))
    assert mine == theirs
    assert widefield.predict(widefield.load(path), photo).to_dict()["images"] == mine


def test_the_card_has_the_figures_of_the_run(run: Callable[..., RunResult], tmp_path: Path) -> None:
    folder = run(
        **{**LENGTH, "model": ModelSpec("convnext_atto", SMALL)}, data=DataSpec("scales", {"count": 24})
    ).folder
    model = widefield.convert(widefield.load(folder), widefield.LargeKernel(9, norm=False))
    target = widefield.save(model, tmp_path / "kernels", license="cc-by-4.0", notes="Only for **tests**.")
    text = (target / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    front = yaml.safe_load(head)
    metrics = json.loads((next(folder.glob("checkpoints/*/meta.json"))).read_text())["metrics"]
    stated = {entry["type"]: entry["value"] for entry in front["model-index"][0]["results"][0]["metrics"]}
    assert stated == {name: value for name, value in metrics.items() if value is not None}
    assert front["license"] == "cc-by-4.0"
    assert front["library_name"] == "widefield"
    assert front["pipeline_tag"] == "image-classification"
    assert set(front["tags"]) >= {"widefield", "timm", "LargeKernel"}
    assert "Only for **tests**." in body
    assert "Converted: `LargeKernel(kernel_sizes=9, small=5, branches='small', norm=False" in body
    assert f"| top1 | {100 * metrics['top1']:.2f}% |" in body
    assert str(tmp_path) not in text
    assert str(tmp_path) not in (target / "config.json").read_text()
    assert str(tmp_path).encode() not in (target / "model.safetensors").read_bytes()


def test_a_model_without_a_run_knows_classes_and_images(tmp_path: Path, photo: Path) -> None:
    model = widefield.convert(timm.create_model("test_resnet", num_classes=2), widefield.MoRF((3, 5)))
    path = widefield.save(model, tmp_path / "two.safetensors", classes=["cat", "dog"], size=48, mean=[0.4] * 3)
    found = load(str(path))
    assert (found.class_names, found.size, found.mean) == (("cat", "dog"), 48, (0.4, 0.4, 0.4))
    seen = widefield.predict(path, photo)
    assert {entry["name"] for entry in seen.to_dict()["images"][0]["classes"]} == {"cat", "dog"}


def test_a_pickled_model_needs_no_class_of_widefield(run: Callable[..., RunResult]) -> None:
    """Reparameterized models are modules of torch, also when torch.save pickles them."""
    folder = run(**{**LENGTH, "model": ModelSpec("test_resnet")}).folder
    buffer = io.BytesIO()
    torch.save(widefield.reparameterize(load(str(folder)).model), buffer)
    assert b"widefield.loading" not in buffer.getvalue()
    assert b"widefield.train" not in buffer.getvalue()


# Commands


def test_commands_take_files_and_folders(
    run: Callable[..., RunResult], tmp_path: Path, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(**{**LENGTH, "model": ModelSpec("convnext_atto", SMALL)}).folder
    file, shared = str(tmp_path / "small.safetensors"), str(tmp_path / "small")
    assert main(["share", str(folder), file]) == 0
    assert f"widefield predict {file} photos" in capsys.readouterr().out
    assert main(["share", file, shared, "--license", "mit"]) == 0
    for word in (file, shared, f"local-dir:{shared}"):
        assert main(["predict", word, str(photo), "--out", str(tmp_path / "seen")]) == 0
        assert main(["eval", word, "--batch-size", "8", "--workers", "0"]) == 0
    assert main(["plan", shared, "--to", "morf"]) == 0
    assert main(["share", file, shared, "--private"]) == 1
    assert "--private is for repositories of the Hub" in capsys.readouterr().err


# The Hub


class Hub:
    """Stands in for the Hugging Face Hub: repositories are folders."""

    def __init__(self, root: Path) -> None:
        self.root, self.private = root, {}

    def __call__(self, **options: Any) -> Hub:
        assert options["library_name"] == "widefield"
        return self

    def create_repo(self, name: str, private: bool, exist_ok: bool) -> Any:
        name = name if "/" in name else f"me/{name}"
        (self.root / name).mkdir(parents=True, exist_ok=exist_ok)
        self.private[name] = private
        return type("Address", (), {"repo_id": name})

    def file_exists(self, repo_id: str, filename: str, revision: str | None) -> bool:
        return (self.root / repo_id / filename).exists()

    def upload_folder(self, repo_id: str, folder_path: Path, revision: str | None, commit_message: str) -> str:
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        return f"https://hub/{repo_id}/commit/1"

    def download(self, repo_id: str, filename: str, revision: str | None = None, **options: Any) -> str:
        path = self.root / repo_id / filename
        if not path.exists():
            raise FileNotFoundError(f"404 {repo_id}/{filename}")
        return str(path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "hub")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub, "HfApi", made)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", made.download)
    monkeypatch.setattr(timm.models._hub, "hf_hub_download", made.download)
    return made


def test_models_go_to_the_hub_and_come_back(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(3)
    model = widefield.convert(timm.create_model("test_resnet", num_classes=2), widefield.MoRF((3, 5))).eval()
    x = torch.randn(1, 3, 32, 32)
    assert widefield.push_to_hub(model, "small", private=True, classes=["a", "b"]) == "https://hub/me/small/commit/1"
    assert hub.private == {"me/small": True}
    card = hub.root / "me/small/README.md"
    assert 'widefield.load("hf-hub:me/small")' in card.read_text()
    subject = load("hf-hub:me/small")
    assert (subject.name, subject.classes) == ("small", ("a", "b"))
    loaded = (widefield.load("hf-hub:me/small@main"), timm.create_model("hf-hub:me/small", pretrained=True).eval())
    assert all(torch.equal(other(x), model(x)) for other in loaded)
    card.write_text("mine")
    assert main(["share", "hf-hub:me/small", "hf-hub:me/small"]) == 0
    assert card.read_text() == "mine"


def test_repositories_of_timm_still_load(hub: Hub, tmp_path: Path) -> None:
    from timm.models import save_for_hf

    model = timm.create_model("test_resnet", num_classes=2).eval()
    save_for_hf(model, str(hub.root / "timm/other"), safe_serialization=True)
    found: Subject = load("hf-hub:timm/other", pretrained=True)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(found.model(x), model(x))
    assert torch.equal(widefield.load("hf-hub:timm/other")(x), model(x))
    again = widefield.save(found.model, tmp_path / "other.safetensors")
    assert torch.equal(widefield.load(again)(x), model(x))


def test_a_later_format_on_the_hub_is_not_downloaded(hub: Hub) -> None:
    folder = hub.root / "you/new"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"widefield": {"format": 2, "widefield": "9.1"}}))
    with pytest.raises(ValueError, match=r"hf-hub:you/new was written by widefield 9\.1 in format 2"):
        load("hf-hub:you/new")
