"""``widefield routing`` on widefield's models, on a run, and on models without mixtures."""

import json

import pytest

from widefield import cli

SMALL = "morf_convnext_tiny{depths: [1, 1, 2, 1], dims: [8, 8, 16, 16], num_classes: 10}"
FEW = ["--images", "digits", "--count", "24", "--size", "32"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "240")
    return tmp_path


def test_ours(here, capsys):
    words = [SMALL, SMALL.replace("depths", "routing: hard, depths"), *FEW, "--vector", "svg"]
    assert cli.main(["routing", *words, "--kind", "heat", "--seed", "3"]) == 0
    stored = json.loads((here / "analysis" / "routing.json").read_text())["results"]
    assert list(stored) == words[:2]
    for result in stored.values():
        assert [block["block"] for block in result["blocks"]] == [
            f"stages.{i}.blocks.{j}.conv_dw" for i, j in ((0, 0), (1, 0), (2, 0), (2, 1), (3, 0))
        ]
        assert result["classes"] == [str(i) for i in range(10)]
        assert result["names"][0].startswith("digits ")
        assert (result["about"]["images"], result["about"]["weights"], result["about"]["seed"]) == (24, "random", 3)
        assert all(len(block["weights"]) == 24 for block in result["blocks"])
    assert "mean share of the routing weight" in (here / "analysis" / "routing.svg").read_text()
    assert (here / "analysis" / "routing.html").read_text().count("<svg ") == 4
    assert (here / "analysis" / "routing.png").read_bytes().startswith(b"\x89PNG")
    assert "stages.2.blocks.1 " in capsys.readouterr().out  # spelled as in the figures


def test_a_run_and_its_own_images(here):
    words = ["digits_morf", "--epochs", "1", "--schedule.warmup_epochs", "0", "--log_every", "100"]
    small = ["--model.args.dims", "[4, 8, 8, 8]", "--data.args.size", "32", "--batch_size", "128"]
    assert cli.main(["train", *words, *small]) == 0
    assert cli.main(["routing", "runs/digits_morf", "--count", "40", "--out", "out"]) == 0
    found = json.loads((here / "out" / "routing.json").read_text())["results"]["digits_morf"]
    assert found["about"]["weights"].startswith("model, best (step ")
    assert (found["about"]["source"], found["about"]["labeled"]) == ("digits", 40)
    assert found["blocks"][0]["experts"] == ["3x3", "5x5", "7x7"]
    assert sorted(found["blocks"][0]["by_class"]) == sorted({str(label) for label in found["labels"]})
    assert cli.main(["blocks", "runs/digits_morf", "--count", "40", "--out", "out"]) == 0
    found = json.loads((here / "out" / "blocks.json").read_text())["results"]["digits_morf"]
    assert (found["metric"], found["about"]["images"], len(found["blocks"])) == ("accuracy", 40, 5)
    assert cli.main(["blocks", "runs/digits_morf", "--images", "photographs", "--count", "2", "--out", "out"]) == 0
    found = json.loads((here / "out" / "blocks.json").read_text())["results"]["digits_morf"]
    assert found["score"] is None


@pytest.mark.parametrize(("name", "kind"), [("test_convnext", "ConvNeXt"), ("torchvision:squeezenet1_1", "SqueezeNet")])
def test_models_without_mixtures_are_told_how_to_get_them(here, capsys, name, kind):
    assert cli.main(["routing", name, *FEW]) == 1
    error = capsys.readouterr().err
    assert f"widefield routing: {kind} has no mixture of receptive fields: convert it with widefield.MoRF" in error
    assert not (here / "analysis").exists()
