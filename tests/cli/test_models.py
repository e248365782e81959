"""``widefield models``: the committed counts of our networks; ``--compare``: published tables next to measurements."""

import json

import pytest
import timm
from timm.models import get_pretrained_cfg

from widefield import cli, dense, models
from widefield.cli.models import COUNTS, our_names, row
from widefield.models.comparison import CITED
from widefield.models.comparison_detection import CITED_DETECTORS, METHODS
from widefield.models.comparison_pose import CITED_POSES
from widefield.models.comparison_segmentation import CITED_SEGMENTERS, CLASSES

LISTED = json.loads(COUNTS.read_text())
STALE = "the counts are not those of the networks: run python benchmarks/model_counts.py"


def test_the_list_has_every_network_with_its_input_and_what_is_stated():
    assert list(LISTED) == our_names(), STALE
    for name, entry in LISTED.items():
        stated = models.STATED.get(name)
        assert entry["input"] == list(get_pretrained_cfg(name).input_size), STALE
        assert entry["stated"] == (stated and stated._asdict()), STALE


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("van_b0", "resnet20_cifar", "morf_resnet18") else pytest.mark.slow)
        for name in LISTED
    ],
)
def test_listed_counts_are_those_of_the_network(name):
    assert row(name) == LISTED[name], STALE


def test_a_pattern_reads_the_same_rows_as_the_list(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    assert cli.main(["models"]) == 0
    every = capsys.readouterr().out.splitlines()
    assert cli.main(["models", "van_b?"]) == 0
    some = [line.split() for line in capsys.readouterr().out.splitlines() if "van_b" in line]
    assert [line[1] for line in some] == [f"van_b{index}" for index in range(7)]
    assert all(line in [other.split() for other in every] for line in some)


def test_every_network_named_is_in_timms_registry():
    assert len(CITED) == 73
    assert {row.name for row in CITED if row.name} <= set(timm.list_models())
    assert {row.kind for row in CITED} == {"C", "T", "H"}


def test_rows_show_cited_and_measured_and_mark_differences(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    assert cli.main(["models", "[cd][oe]*t_tiny*", "--compare"]) == 0
    text = capsys.readouterr().out
    convnext = next(line for line in text.splitlines() if "ConvNeXt-T" in line)
    assert "29 / 28.59 *" in convnext  # 1.4 % apart
    assert "4.5 / 4.456 " in convnext
    assert "82.1" in convnext
    assert "DeiT" in text
    assert "RepLKNet" not in text


def test_every_segmentation_model_can_be_named():
    assert {row.name for row in CITED_SEGMENTERS} <= set(timm.list_models())
    assert {row.data for row in CITED_SEGMENTERS} == set(CLASSES)
    assert all(issubclass(getattr(dense, row.method), dense.Segmenter) for row in CITED_SEGMENTERS)
    rows = [(row.architecture, row.method, row.data, row.size) for row in CITED_SEGMENTERS]
    assert len(rows) == len(set(rows))


def test_segmentation_models_are_counted_as_their_authors_count(capsys, monkeypatch):
    """With the auxiliary head in the parameters and without it in the multiply-accumulates, at 512x2048."""
    monkeypatch.setenv("COLUMNS", "170")
    assert cli.main(["models", "--compare", "segmentation", "convnext_tiny"]) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "ConvNeXt-T" in line)
    assert "512x2048" in row
    assert "60 / 60.24 " in row
    assert "939 / 938.5 " in row
    assert "46.0 / 46.7" in row
    assert "*" not in row


def test_counts_that_are_not_stated_get_no_mark(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "170")
    assert cli.main(["models", "--compare", "segmentation", "van_b0"]) == 0
    for line in capsys.readouterr().out.splitlines():
        if "VAN-B0" in line:
            assert "*" not in line
            assert "│      - /" in line


def test_every_detector_can_be_named():
    assert {row.name for row in CITED_DETECTORS} <= set(timm.list_models())
    assert {row.method for row in CITED_DETECTORS} == set(METHODS)
    assert all(issubclass(getattr(dense, method.kind), dense.Detector) for method in METHODS.values())
    rows = [(row.architecture, row.method, row.schedule) for row in CITED_DETECTORS]
    assert len(rows) == len(set(rows))


def test_detectors_are_counted_as_their_authors_count(capsys, monkeypatch):
    """With 1000 RoIs in each box head and 100 in each mask head, at 1280x800."""
    monkeypatch.setenv("COLUMNS", "170")
    assert cli.main(["models", "--compare", "detection", "convnext_tiny"]) == 0
    lines = capsys.readouterr().out.splitlines()
    one, three = (line for line in lines if "ConvNeXt-T" in line)
    assert "Mask R-CNN" in one
    assert "48 / 48.1 " in one
    assert "262 / 261.9 " in one
    assert "46.2 / 41.7" in one
    assert "Cascade Mask R-CNN" in three
    assert "86 / 85.93 " in three
    assert "741 / 740.2 " in three
    assert "*" not in one + three


def test_a_one_stage_detector_is_counted_without_rois(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "170")
    assert cli.main(["models", "--compare", "detection", "moganet_xtiny"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "RetinaNet" in line)
    assert "12.1 / 12.11 " in line
    assert "167.2 / 166.7 " in line


def test_pose_models_are_counted_as_their_authors_count(capsys, monkeypatch):
    """A row that states no counts has those that are measured alone."""
    monkeypatch.setenv("COLUMNS", "170")
    assert cli.main(["models", "--compare", "pose", "moganet_small"]) == 0
    small, large = (line for line in capsys.readouterr().out.splitlines() if "MogaNet-S" in line)
    assert "256x192" in small
    assert "29 / 28.98 " in small
    assert "6 / 5.951 " in small
    assert "74.9" in small
    assert "384x288" in large
    assert "13.5 / 13.39 " in large
    assert "*" not in small + large
    assert cli.main(["models", "--compare", "pose", "van_b0"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "VAN-B0" in line)
    assert "- / 6.991 " in line
    assert "none" in line


def test_the_rows_of_pose_models_are_distinct_and_known():
    assert {row.name for row in CITED_POSES} <= set(timm.list_models())
    rows = [(row.architecture, row.size, row.source) for row in CITED_POSES]
    assert len(rows) == len(set(rows))
    assert {row.size for row in CITED_POSES} == {(256, 192), (384, 288)}


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("imagenet", "the slides' table"),
        ("segmentation", "segmentation model"),
        ("detection", "no detector"),
        ("pose", "no pose model"),
    ],
)
def test_a_name_that_is_not_in_a_table_is_an_error(kind, words, capsys):
    assert cli.main(["models", "--compare", kind, "resnet26"]) == 1
    message = capsys.readouterr().err
    assert words in message
    assert "'resnet26'" in message
