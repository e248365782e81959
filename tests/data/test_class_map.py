import re

import pytest

from widefield.data.class_map import alike, classes_of, indices_of, listed, read_class_map


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
        (b"\xff\xfe", "map.txt' is not a text file"),
        (b"a\nb\na\nb\nc", "has the name 'a', 'b' more than once"),
        (b"a 1\nb 1", "has the index 1 more than once"),
        (b"a 0\nb 1\nc -1\nd 3", "Its line 'c -1' does not end in an index, an integer from 0"),
        (b"a 0\nb 1\nc\nd 3", "Its line 'c' does not end in an index, an integer from 0"),
        (b"a\n", "map.txt' lacks 'b', 'c', 'd', 'e', 'f' and 1 more; add them"),
    ],
)
def test_bad_maps_are_refused(tmp_path, content, text):
    (tmp_path / "map.txt").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(text)):
        classes_of(list("abcdefg"), tmp_path / "map.txt")


def test_a_missing_map_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must be 'integer' or a text file .* there is no file 'integers'"):
        classes_of(["a"], "integers")


CAFE, DECOMPOSED = "caf\u00e9", "cafe\u0301"


def test_names_are_found_in_either_normal_form(tmp_path):
    path = tmp_path / "map.txt"
    path.write_text(f"dog\n{CAFE}\n", encoding="utf-8")
    classes, indices = classes_of([DECOMPOSED, "dog"], path)
    assert (classes, indices[DECOMPOSED]) == (("dog", CAFE), 1)
    path.write_text(f"\ufeffdog\n{CAFE}\n{DECOMPOSED}\n", encoding="utf-8")  # with Windows' byte order mark
    assert classes_of([DECOMPOSED, "dog"], path)[1] == {"dog": 0, CAFE: 1, DECOMPOSED: 2}


def test_names_that_look_the_same_are_told_apart():
    assert alike(["dog", CAFE]) == ""
    message = alike({CAFE, DECOMPOSED})
    for part in (r"'caf\xe9'", r"'cafe\u0301'", "NFC", "NFD", "Rename"):
        assert part in message
    assert listed([CAFE, DECOMPOSED]) == f"'{CAFE}', " + r"'cafe\u0301'"


@pytest.mark.parametrize("line", ["dog -1", "dog x", "dog 99999999999"])
def test_a_line_without_an_index_among_lines_with_one_is_named(tmp_path, line):
    (tmp_path / "map.txt").write_text(f"cat 0\n{line}\n")
    with pytest.raises(
        ValueError, match=f"lacks 'dog'.* Its line '{line}' does not end in an index, an integer from 0"
    ):
        classes_of(["dog"], tmp_path / "map.txt")


@pytest.mark.parametrize("index", [999_999, 2_000_000_000])
def test_an_index_does_not_size_a_network_that_the_data_cannot_fill(tmp_path, index):
    (tmp_path / "map.txt").write_text(f"cat 0\ndog {index}\n")
    for found, class_map in ((["0", str(index)], "integer"), (["cat", "dog"], tmp_path / "map.txt")):
        with pytest.raises(
            ValueError, match=rf"largest index of the class map .* is {index:,}, which makes .* for 50 images"
        ):
            classes_of(found, class_map, 50)
    assert indices_of(["cat", "dog"], tmp_path / "map.txt") == {"cat": 0, "dog": index}
    assert len(classes_of(["0", "999999"], "integer", 100_000)[0]) == 1_000_000
