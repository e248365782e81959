"""Files that are written completely or not at all."""

import pytest

from widefield._files import staged


def fill(stage, *names):
    for name in names:
        (stage / name).write_text("new")


def test_all_files_move_or_none(tmp_path):
    (tmp_path / "a").write_text("old")
    (tmp_path / "b").mkdir()
    with pytest.raises(IsADirectoryError, match="b is a folder"), staged(tmp_path) as stage:
        fill(stage, "a", "b", "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert (tmp_path / "a").read_text() == "old"
    with staged(tmp_path) as stage:
        fill(stage, "a", "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]
    assert (tmp_path / "a").read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_after_an_exception_not_even_the_folder(tmp_path, error):
    def fail():
        with staged(tmp_path / "one" / "two") as stage:
            fill(stage, "a")
            raise error

    with pytest.raises(error):
        fail()
    assert not list(tmp_path.iterdir())
