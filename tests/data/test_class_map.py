import re

import pytest

from widefield.data.class_map import classes_of, read_class_map


def test_without_a_map_names_are_sorted():
    assert classes_of(["b", "a"], None) == (("a", "b"), {"a": 0, "b": 1})


def test_integers_are_indices_and_gaps_keep_theirs():
    classes, indices = classes_of(["10", "2"], "integer")
    assert classes == tuple(str(n) for n in range(11))
    assert indices == {"10": 10, "2": 2}


@pytest.mark.parametrize("name", ["n01440764", "-1", "01", "²", "1.0", ""])
def test_other_names_are_no_integers(name):
    with pytest.raises(ValueError, match=rf"class_map='integer' takes classes named 0, 1, 2 and so on; got '{name}'"):
        classes_of(["0", name], "integer")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tench\ngoldfish\n", {"tench": 0, "goldfish": 1}),
        ("\r\nblack swan\r\n\r\nox 7 b", {"black swan": 0, "ox 7 b": 1}),
        ("tench 5\nblack swan\t0\n", {"tench": 5, "black swan": 0}),
        ("12\n7", {"12": 0, "7": 1}),
        ("föhn", {"föhn": 0}),
    ],
)
def test_lines_are_names_or_names_with_indices(tmp_path, text, expected):
    (tmp_path / "map.txt").write_bytes(text.encode())
    assert read_class_map(tmp_path / "map.txt") == expected
    classes, indices = classes_of(sorted(expected), tmp_path / "map.txt")
    assert all(classes[index] == name for name, index in indices.items())


def test_classes_without_a_name_are_called_by_their_index(tmp_path):
    (tmp_path / "map.txt").write_text("tench 2")
    assert classes_of(["tench"], tmp_path / "map.txt")[0] == ("0", "1", "tench")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "map.txt' is empty"),
        (b"\xff\xfe", "map.txt' is no text"),
        (b"a\nb\na\nb\nc", "has the name 'a', 'b' more than once"),
        (b"a 1\nb 1", "has the index 1 more than once"),
        (b"a\n", "map.txt' lacks 'b', 'c', 'd', 'e', 'f' and 1 more; add them"),
    ],
)
def test_bad_maps_are_refused(tmp_path, content, text):
    (tmp_path / "map.txt").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(text)):
        classes_of(list("abcdefg"), tmp_path / "map.txt")


def test_a_missing_map_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must be 'integer' or a text file .* got 'integers', no file"):
        classes_of(["a"], "integers")
