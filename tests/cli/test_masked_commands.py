"""Commands on a run of masked pre-training: its encoder is examined, and nothing is said about classes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from widefield import cli, deploy
from widefield.loading import load, load_trained
from widefield.masking import Encoder
from widefield.runs import write_report
from widefield.train import DataSpec, EmaSpec, ModelSpec, Recipe, TaskSpec, train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of one step, with a token inside the encoder."""
    recipe = Recipe(
        name="masked",
        model=ModelSpec("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 16], "patch_size": 1}),
        data=DataSpec("digits", {"size": 32}),
        task=TaskSpec("masked_image", {"method": "a2mim", "patch": 8, "token_stage": 1, "neighbors": 5}),
        output=str(tmp_path_factory.mktemp("runs")),
        ema=EmaSpec(0.5),
        max_steps=1,
        evaluate_every=1,
        batch_size=64,
        workers=0,
        trackers=[],
    )
    return train(recipe, console=Console(quiet=True)).folder


def headings(page: Path) -> list[str]:
    return re.findall(r"<h2[^>]*>(.*?)</h2>", page.read_text())


def test_an_evaluation_shows_reconstructions(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", str(run), "--page", str(tmp_path / "page.html"), "--out", str(tmp_path / "out.json")]
    assert cli.main([*words, "--examples", "2"]) == 0
    assert headings(tmp_path / "page.html") == ["Metrics", "Reconstructions", "Best images", "Worst images"]
    page = (tmp_path / "page.html").read_text()
    cards = re.findall(r"image \d+: ([\d.]+)<", page)
    assert len(cards) == 6 + 2 + 2
    best, worst = cards[6:8], cards[8:]
    assert max(map(float, best)) < min(map(float, worst))
    assert page.count("<figcaption>visible</figcaption>") == len(cards)
    assert "the encoder itself knows no classes" in page.lower()
    (found,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert found["metrics"].keys() == {"loss", "knn_top1"}
    assert found["classes"] == 0


def test_a_report_leaves_out_what_needs_classes(run: Path, tmp_path: Path) -> None:
    page = write_report([run], tmp_path / "report.html", count=4)
    assert headings(page) == [
        "Runs", "Training", "Metrics", "Reconstructions", "Best images", "Worst images", "Effective receptive field",
        "Kernel energy",
    ]  # fmt: skip
    results = json.loads(page.with_suffix(".json").read_text())["results"]
    assert results["Effective receptive field"]["masked"]["layer"] == "encoder.body"
    layers = json.dumps(results["Kernel energy"])
    assert "encoder.body" in layers
    assert "decoder" not in layers


@pytest.mark.parametrize("words", ["cam", "stability", "interactions --count 1", "erf --class 3 --count 1"])
def test_analyses_of_classes_say_what_to_do(
    words: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, *more = words.split()
    assert cli.main([command, str(run), *more, "--out", str(tmp_path)]) == 1
    text = capsys.readouterr()
    assert "gives features and no class scores" in text.err
    assert "widefield train RECIPE --model.pretrained RUN" in text.err
    assert "the last feature map" in text.out


def test_shape_bias_is_refused_before_images_are_drawn(run: Path, tmp_path: Path) -> None:
    assert cli.main(["shape-bias", str(run), "--generate", "--out", str(tmp_path / "new")]) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow  # the export compares files
def test_the_encoder_is_exported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", str(run), "--format", "pt2", "--dynamic", "batch", "--count", "8", "--out", str(tmp_path)]
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert "the last feature map, and its mean over positions" in text
    assert "top-1 the same" not in text
    images = torch.randn(3, 3, 32, 32)
    model = load_trained(run)
    expected = model(images)  # no mask: no token either
    last, mean = deploy.load(tmp_path / "masked.pt2")(images)
    assert torch.allclose(last, expected, atol=1e-5)
    assert torch.allclose(mean, expected.mean((2, 3)), atol=1e-5)


def test_an_encoder_alone_has_neither_rules_nor_tokens(run: Path) -> None:
    model = load(str(run)).model
    alone = Encoder(model)
    assert not alone.training
    assert not any(module._forward_pre_hooks or "forward" in vars(module) for module in alone.modules())
    assert any(module._forward_pre_hooks for module in model.modules())


def test_plans(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(run), "--masked", "--options", "patch=8"]) == 0
    text = capsys.readouterr().out
    assert "10 of 16 patches are masked in images of 32x32" in text
    assert "nothing visible depends on masked patches" in text
    assert cli.main(["plan", str(run), "--to", "morf", "--where", "*conv_dw", "--options", "kernel_sizes=[3,7]"]) == 0
    assert "4 replaced" in capsys.readouterr().out
    simmim = ["plan", "resnet18{layers: [1, 1, 1, 1], channels: [8, 8, 8, 8]}", "--masked", "simmim", "--size", "64"]
    assert cli.main(simmim) == 0
    assert re.search(
        r"\d+ of 3072 masked pixels \([\d.]+ %\) reach the encoder: the layers before the token overlap",
        capsys.readouterr().out,
    )
    attention = "mobilevitv2_050"
    assert cli.main(["plan", attention, "--masked"]) == 1
    assert cli.main(["plan", "resnet18", "--masked", "--where", "*"]) == 1
    assert "--where chooses layers of a conversion" in capsys.readouterr().err
