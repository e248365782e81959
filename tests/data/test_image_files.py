"""Broken images in every kind of storage."""

import pickle
import re
import warnings

import pytest
from made_sets import pictures, write_folder, write_parquet, write_tar
from torch.utils.data import DataLoader

from widefield.data import CorruptImageError, CorruptImagesError, collate, create

KINDS = ("folder", "shards", "hfds")
BROKEN = (1, 4, 7)  # the second image of each of the three classes


def break_some(files, broken):
    """Return ``files`` with the images numbered ``broken`` cut in half."""
    number = iter(range(1000))
    return {
        name: [(file, content[: len(content) // 2] if next(number) in broken else content) for file, content in found]
        for name, found in files.items()
    }


@pytest.fixture(params=KINDS)
def made(request, tmp_path):
    """Return a function that makes a set of nine images; some of them are broken."""

    def make(broken=BROKEN, **options):
        files = break_some(pictures(3), broken)
        if request.param == "hfds":
            pytest.importorskip("datasets")
            write_parquet(tmp_path, "train", files)
            options = {"path": str(tmp_path), "cache": tmp_path / "cache", **options}
        elif request.param == "shards":
            for name, found in files.items():
                write_tar(tmp_path / "train" / f"{name}.tar", found)
        else:
            write_folder(tmp_path, "train", files)
        options = options if request.param == "hfds" else {"root": tmp_path, **options}
        return create(request.param, "train", size=16, **options)

    return make


def test_a_broken_image_is_refused_by_name(made):
    data = made()
    for index in BROKEN:
        with pytest.raises(CorruptImageError, match=re.escape(data._name(index)) + '.*Repair.*corrupt="skip"'):
            data[index]
    assert data[0]["image"].shape == (3, 16, 16)


def test_skipped_images_cost_themselves_and_one_warning_each(made):
    data = made(corrupt="skip", max_corrupt=0.34)
    with pytest.warns(UserWarning, match="It is left out; repair or delete it") as caught:
        (batch,) = DataLoader(data, 9, collate_fn=collate)
    assert [re.search(r"cannot read the image ([^:]+):", str(w.message))[1] for w in caught] == [
        data._name(index) for index in BROKEN
    ]
    assert batch["label"].tolist() == [0, 0, 1, 1, 2, 2]
    assert all(data[index] is None for index in BROKEN)  # a further warning would be an error


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_broken_images_stop_with_the_list_of_all(made, workers):
    data = made(corrupt="skip", max_corrupt=0.3)
    loader = DataLoader(Told(data), 1, num_workers=workers, collate_fn=list)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = [batch[0] for batch in loader]
    errors = [sample for sample in found if isinstance(sample, OSError)]
    # The worker that finds the third of three knows of the other two. With several workers the order varies.
    complete = [e for e in errors if all(f"\n  {data._name(index)}" in str(e) for index in BROKEN)]
    assert complete
    assert type(complete[0]) is CorruptImagesError
    assert str(complete[0]).startswith("3 of 9 images of the train split cannot be read, more than max_corrupt=0.3 ")


class Told:
    """A set that returns its errors, like the training loader."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        try:
            return self.data[index]
        except OSError as error:
            return error


def test_the_share_is_of_the_split_and_none_is_allowed_at_0(made):
    data = made(broken=[4], corrupt="skip", max_corrupt=0.0)
    assert data[0] is not None
    with pytest.warns(UserWarning, match="left out"), pytest.raises(CorruptImagesError, match=r"1 of 9 images .*=0 "):
        data[4]


def test_the_error_survives_the_way_from_a_worker():
    error = pickle.loads(pickle.dumps(CorruptImagesError("1 of 2\n  a.png")))
    assert type(error) is CorruptImagesError
    assert str(error) == "1 of 2\n  a.png"
    assert error.errno is None


def test_long_lists_are_cut(tmp_path):
    write_folder(tmp_path, "train", {"cat": [(f"{i:03}.png", b"") for i in range(150)]})
    data = create("folder", "train", root=tmp_path, corrupt="skip", max_corrupt=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for index in range(135):
            assert data[index] is None
        with pytest.raises(CorruptImagesError) as caught:
            data[135]
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("136 of 150 images")
    assert len(lines) == 102
    assert lines[100].endswith("099.png")
    assert lines[101] == "  and 36 more, each named in a warning"
