"""``widefield models --compare``: the slides' table next to measurements."""

import timm

from widefield import cli
from widefield.models.comparison import CITED


def test_every_network_named_is_in_timms_registry():
    assert len(CITED) == 73
    assert {row.name for row in CITED if row.name} <= set(timm.list_models())
    assert {row.kind for row in CITED} == {"C", "T", "H"}


def test_rows_show_cited_and_measured_and_mark_differences(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    assert cli.main(["models", "--compare", "*t*tiny*"]) == 0
    text = capsys.readouterr().out
    convnext = next(line for line in text.splitlines() if "ConvNeXt-T" in line)
    assert "29 / 28.59 *" in convnext  # 1.4 % apart
    assert "4.5 / 4.456 " in convnext
    assert "82.1" in convnext
    assert "DeiT" in text
    assert "RepLKNet" not in text


def test_a_network_that_is_not_in_the_table_is_an_error(capsys):
    assert cli.main(["models", "--compare", "resnet152"]) == 1
    assert "called 'resnet152'" in capsys.readouterr().err
