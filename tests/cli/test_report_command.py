"""``widefield report``: one page about runs, with every analysis that applies."""

import json
import re

import pytest
from rich.console import Console

from widefield import cli
from widefield.train import ConversionSpec, DataSpec, ModelSpec, Recipe, train

TINY = {"patch_size": 4, "depths": [1, 1, 1, 1], "dims": [4, 4, 8, 8], "ls_init_value": None}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return a mixture and a network with masks, trained for one epoch of a few steps."""
    output = tmp_path_factory.mktemp("runs")

    def trained(name, kind, args):
        recipe = Recipe(
            name=name,
            model=ModelSpec("convnext_atto", TINY),
            conversion=ConversionSpec(kind, "stages.*.conv_dw", args),
            data=DataSpec("digits", {"size": 32}),
            output=str(output),
            epochs=1,
            batch_size=360,
            workers=0,
        )
        return train(recipe, console=Console(quiet=True)).folder

    return [trained("mixture", "morf", {"kernel_sizes": [3, 5, 7]}), trained("masks", "gmconv", {})]


def test_one_run_gets_a_page_in_its_folder(runs, capsys):
    assert cli.main(["report", str(runs[0]), "--count", "4"]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == f"wrote {runs[0] / 'report.html'}"
    assert said.err.count("mixture: 4 of digits val: 355 images, 10 classes") == 1
    page = (runs[0] / "report.html").read_text()
    headings = ("Training", "Metrics", "Classes", "What is mistaken for what", "Best images", "Worst images")
    for heading in (*headings, "Effective receptive field", "Routing", "Class activation"):
        assert f"<h2>{heading}</h2>" in page
    assert re.search(r'class="headline"><p>mixture classifies \d+ of 128 validation images of digits correctly: ', page)
    links = re.findall(r'<a href="#(.*?)">', page)
    assert links == re.findall(r'<section id="(.*?)">', page)
    assert "Learned masks" not in page
    assert "left out" not in page
    found = json.loads((runs[0] / "report.json").read_text())["results"]
    assert found["Effective receptive field"]["mixture"]["kind"] == "ReceptiveField"
    assert found["Evaluation"]["mixture"]["images"] == 128
    assert found["Routing"]["mixture"]["about"]["images"] == 16


def test_several_runs_stand_side_by_side(runs, tmp_path):
    out = tmp_path / "both.html"
    assert cli.main(["report", *map(str, runs), "--count", "2", "--out", str(out)]) == 0
    found = json.loads(out.with_suffix(".json").read_text())["results"]
    assert set(found["Effective receptive field"]) == {"mixture", "masks"}
    assert set(found["Routing"]) == {"mixture"}
    assert set(found["Learned masks"]) == {"masks"}
    page = out.read_text()
    assert "conversion.kind" in page  # differences between their recipes
    assert "mixture and masks were compared on the same 64 validation images of digits." in page
    assert "<h2>Evaluation</h2>" in page
    assert "<summary>mixture: worst images</summary>" in page
    assert "<summary>masks: classes</summary>" in page


def test_what_cannot_be_reported_is_said(runs, tmp_path, capsys):
    assert cli.main(["report", *map(str, runs)]) == 1
    assert "several runs needs a place of its own: give out" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "is not the folder of a run" in capsys.readouterr().err
