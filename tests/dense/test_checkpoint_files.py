"""Checkpoint files are read in every form that OpenMMLab writes, and without running code that they name."""

import collections
import os
import pickle
import sys
import types

import numpy as np
import pytest
import torch

from dense.published_files import made_weights, same, saved, segmenter, write
from widefield import dense

NAME = "van_b0"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return made_weights(saved(segmenter(NAME), tmp_path_factory.mktemp("file")))


def check_loads(path, file, tmp_path):
    model = segmenter(NAME)
    report = dense.load_checkpoint(model, path)
    assert same(saved(model, tmp_path), file)
    return report


def test_the_older_format_of_torch_loads(file, tmp_path):
    """OpenMMLab's tool for publishing writes it."""
    torch.save({"meta": {}, "state_dict": file}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    check_loads(tmp_path / "old.pth", file, tmp_path)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda file: file,
        lambda file: {"state_dict": file},
        lambda file: {"model": file, "optimizer": {"state": {0: torch.zeros(2)}}, "epoch": 3},
        lambda file: {"state_dict": {f"module.{key}": value for key, value in file.items()}},
        lambda file: {"state_dict": {f"module._orig_mod.{key}": value for key, value in file.items()}},
        lambda file: {"state_dict": {"state_dict": file}},
    ],
)
def test_nested_and_wrapped_weights_load(file, wrap, tmp_path):
    torch.save(wrap(file), tmp_path / "file.pth")
    check_loads(tmp_path / "file.pth", file, tmp_path)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_averages_and_preprocessing_are_skipped(file, prefix, tmp_path):
    extra = {f"ema_{key.replace('.', '_')}": value + 1 for key, value in file.items()}
    extra |= {"data_preprocessor.mean": torch.zeros(3, 1, 1), "data_preprocessor.std": torch.ones(3, 1, 1)}
    content = {f"{prefix}{key}": value for key, value in (file | extra).items()}
    report = check_loads(write(content, tmp_path / "ema.pth"), file, tmp_path)
    assert set(report.skipped) == set(extra)


def test_safetensors_load(file, tmp_path):
    from safetensors.torch import save_file

    save_file({key: value.contiguous() for key, value in file.items()}, tmp_path / "file.safetensors")
    check_loads(tmp_path / "file.safetensors", file, tmp_path)


# Objects of other classes


class HistoryBuffer:
    """Stands for mmengine's class of this name."""

    def __init__(self):
        self._log_history = np.arange(3.0)
        self._max_length = 1000


class ConfigDict(dict):
    """Stands for mmengine's class of this name."""


@pytest.fixture
def mmengine(monkeypatch):
    """Make classes belong to mmengine while a file is written; ``forget`` removes it, as in most environments."""
    modules = {}
    for cls, name in ((HistoryBuffer, "mmengine.logging.history_buffer"), (ConfigDict, "mmengine.config.config")):
        module = types.ModuleType(name)
        setattr(module, cls.__name__, cls)
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(cls, "__module__", name)
        modules[name] = module
    for name in ("mmengine", "mmengine.logging", "mmengine.config"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))

    def forget():
        for name in [name for name in sys.modules if name.startswith("mmengine")]:
            monkeypatch.delitem(sys.modules, name)

    return forget


@pytest.mark.parametrize("zipped", [True, False])
def test_files_with_objects_of_mmengine_and_numpy_load_without_them(file, zipped, mmengine, tmp_path):
    meta = {
        "iter": 160000,
        "cfg": ConfigDict(model=ConfigDict(type="EncoderDecoder")),
        "score": np.float64(0.46),
        "lr": np.array([0.1, 0.2]),
        "dataset_meta": {
            "classes": ("wall", "sky", "floor", "tree", "bed"),
            "palette": [[i, 0, 255] for i in range(5)],
        },
    }
    hub = {"log_scalars": collections.OrderedDict({"train/loss": HistoryBuffer()}), "resumed_keys": set()}
    content = {"meta": meta, "state_dict": file, "message_hub": hub, "rank": np.int64(0)}
    torch.save(content, tmp_path / "file.pth", _use_new_zipfile_serialization=zipped)
    mmengine()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "file.pth", weights_only=True)
    before = set(torch.serialization.get_safe_globals())  # torch keeps a set, in no order
    report = check_loads(tmp_path / "file.pth", file, tmp_path)
    assert set(torch.serialization.get_safe_globals()) == before
    assert report.classes == ("wall", "sky", "floor", "tree", "bed")
    assert report.palette[4] == (4, 0, 255)


class Calls:
    """An object that calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("function", [os.mkdir, exec, print])
def test_no_code_that_a_file_names_is_run(file, function, zipped, tmp_path, capsys):
    target = tmp_path / "made"
    argument = f"import os; os.mkdir({str(target)!r})" if function is exec else str(target)
    content = {"meta": {"object": Calls(function, argument)}, "state_dict": file}
    torch.save(content, tmp_path / "file.pth", _use_new_zipfile_serialization=zipped)
    if function is os.mkdir:  # torch refuses its module altogether
        with pytest.raises(ValueError, match=r"without running code that it names.*If you trust the file"):
            dense.load_checkpoint(segmenter(NAME), tmp_path / "file.pth")
    else:
        check_loads(tmp_path / "file.pth", file, tmp_path)
    assert not target.exists()
    assert not capsys.readouterr().out


def test_weights_that_are_objects_of_other_classes_are_refused(file, tmp_path):
    path = write(file | {"decode_head.conv_seg.bias": np.zeros(5)}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"entries must be tensors by name, and 'decode_head.conv_seg.bias' is a"):
        dense.load_checkpoint(segmenter(NAME), path)


# Files that hold no weights


def test_files_without_weights_are_refused(tmp_path):
    model = segmenter(NAME)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint file .*none\.pth"):
        dense.load_checkpoint(model, tmp_path / "none.pth")
    (tmp_path / "page.pth").write_text("<html>Too many requests</html>")
    with pytest.raises(ValueError, match=r"page\.pth cannot be read"):
        dense.load_checkpoint(model, tmp_path / "page.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        dense.load_checkpoint(model, tmp_path / "cut.safetensors")
    for content, reason in (([torch.zeros(1)], "it holds a list"), ({"state_dict": {}}, "there are none")):
        torch.save(content, tmp_path / "file.pth")
        with pytest.raises(ValueError, match=reason):
            dense.load_checkpoint(model, tmp_path / "file.pth")


def test_a_cut_file_is_refused(file, tmp_path):
    path = write(file, tmp_path / "file.pth")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="cannot be read"):
        dense.load_checkpoint(segmenter(NAME), path)


# Classes and palettes


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_classes_and_palette_are_stored_for_both_versions_of_mmsegmentation(suffix, tmp_path):
    names, colors = ["a", "b", "c", "d", "e"], [(0, 0, 0), (1, 2, 3), (4, 5, 6), (7, 8, 9), (255, 255, 255)]
    path = tmp_path / f"file.{suffix}"
    model = segmenter(NAME)
    dense.save_checkpoint(model, path, classes=names, palette=colors)
    report = dense.load_checkpoint(model, path)
    assert report.classes == tuple(names)
    assert report.palette == tuple(colors)
    if suffix == "pth":
        meta = torch.load(path, weights_only=True)["meta"]
        assert meta["CLASSES"] == meta["dataset_meta"]["classes"] == names
        assert meta["PALETTE"] == meta["dataset_meta"]["palette"] == [list(color) for color in colors]
    with pytest.raises(ValueError, match="one entry for each of the model's 5 classes; got 2"):
        dense.save_checkpoint(model, path, classes=names[:2])
    with pytest.raises(TypeError, match="classes must be a sequence of names; got 'abcde'"):
        dense.save_checkpoint(model, path, classes="abcde")
    with pytest.raises(ValueError, match="every number of palette must be from 0 to 255; got 256"):
        dense.save_checkpoint(model, path, palette=[(0, 0, 256)] * 5)
    assert dense.load_checkpoint(model, path).classes == tuple(names)


def test_a_file_is_written_completely_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "file.pth"
    dense.save_checkpoint(segmenter(NAME), path)
    content = path.read_bytes()
    monkeypatch.setattr("pathlib.Path.replace", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        dense.save_checkpoint(segmenter(NAME, 7), path)
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]
