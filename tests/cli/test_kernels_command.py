"""``widefield kernels``: models of timm, torchvision and widefield in one figure."""

import json

from widefield.cli import main

OURS = "slak_tiny{depths: [1, 1, 1, 1], widths: [4, 4, 8, 8], kernel_sizes: [13, 11, 9, 7]}"
MORF = "morf_convnext_tiny{depths: [1, 1, 1, 1], dims: [4, 4, 8, 8]}"


def test_models_of_all_kinds_on_one_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    words = ["test_convnext", "torchvision:shufflenet_v2_x0_5", OURS]
    assert main(["kernels", *words, "--limit", "9", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "energy lost at 9" in text
    assert "stages.0.0.large_kernel.LoRA1" in text
    for suffix in ("png", "json", "html"):
        assert (tmp_path / f"kernels.{suffix}").stat().st_size > 10_000
    results = json.loads((tmp_path / "kernels.json").read_text())["results"]
    assert list(results) == words
    assert results["test_convnext"]["about"]["weights"] == "random"
    beyond = {layer["name"] for layer in results[OURS]["layers"] if max(layer["span"]) > 9}
    assert beyond == {f"stages.{stage}.0.large_kernel.LoRA{band}" for stage in (0, 1) for band in (1, 2)}
    assert all((layer["lost"] > 0) == (layer["name"] in beyond) for layer in results[OURS]["layers"])
    assert "slak_tiny" in (tmp_path / "kernels.html").read_text()


def test_shares_are_asked_for_and_errors_are_one_line(tmp_path, capsys):
    assert main(["kernels", MORF, "--shares", "0.3", "0.7", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "kernels.json").read_text())["results"][MORF]
    assert found["shares"] == [0.3, 0.7]
    assert len(found["layers"][0]["smallest"]) == 2
    kinds = [layer["kind"] for layer in found["layers"]]
    assert kinds.count("expert") == 5 * kinds.count("bank") == 20
    capsys.readouterr()
    assert main(["kernels", "test_resnet", "--limit", "0", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "widefield kernels: limit must be at least 1; got 0.\n"


def test_what_cropping_to_the_limit_costs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    slak = OURS.replace("{", "{layer_scale_init: 0, ")
    options = ["--limit", "9", "--cost", "--size", "32", "--count", "6", "--batch-size", "4", "--out", str(tmp_path)]
    assert main(["kernels", slak, MORF, *options]) == 0
    text = capsys.readouterr().out
    assert "cropped to 9" in text
    costs = json.loads((tmp_path / "kernels-cost.json").read_text())
    for word in (slak, MORF):
        cost = costs[word]
        assert cost["change"]["images"] == 6
        assert cost["change"]["accuracy_before"] is None  # its classes are not those of the photographs
        assert cost["parameters_after"] < cost["parameters_before"]
        assert max(side for kernel in cost["kernels"] for side in kernel["after"]) <= 9
    assert costs[slak]["change"]["rms"] > 0
    assert len(costs[MORF]["kernels"]) == 24  # 20 experts


def test_a_runs_own_images_have_labels_that_count(tmp_path, capsys):
    from widefield.train import DataSpec, ModelSpec, Recipe, train

    model = ModelSpec("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [4, 4, 8, 8], "patch_size": 2})
    data = DataSpec("digits", {"size": 32})
    run = train(
        Recipe(name="run", model=model, data=data, output=str(tmp_path), epochs=1, batch_size=512, workers=0)
    ).folder
    capsys.readouterr()
    assert main(["kernels", str(run), "--limit", "5", "--cost", "--count", "5", "--out", str(tmp_path)]) == 0
    change = next(iter(json.loads((tmp_path / "kernels-cost.json").read_text()).values()))["change"]
    assert change["images"] == 5
    assert 0 <= change["accuracy_after"] <= 1


def test_images_are_for_the_cost_alone(tmp_path, capsys):
    assert main(["kernels", "test_resnet", "--size", "64", "--out", str(tmp_path)]) == 1
    assert "images are used only for --cost" in capsys.readouterr().err
    assert main(["kernels", "test_resnet", "--cost", "--out", str(tmp_path)]) == 1
    assert "pass --limit K" in capsys.readouterr().err
