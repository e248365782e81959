"""Sets at URLs equal those of a folder bit by bit, and their lists and indices are kept until something changes."""

import io
import multiprocessing
import os
import pickle
import re
import tarfile
import time
from pathlib import Path

import fsspec
import pytest
import torch
from http_server import serving
from made_sets import pictures, webdataset, write_folder, write_tar
from torch.utils.data import DataLoader

from widefield.data import CorruptImageError, Folder, Scales, Shards, _kept, _stores, collate, create, create_both
from widefield.data.shards import divided

HEAVY = {"size": 16, "auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 1.0, "interpolation": "random"}
BRACES = {"train": "train/a-{0..1}.tar", "val": "val/a-{0,1}.tar"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a folder with a set as files and as shards, which tests leave as it is."""
    root = tmp_path_factory.mktemp("sets")
    for split, count in (("train", 3), ("val", 2)):
        found = pictures(count, seed=count)
        write_folder(root / "files", split, found)
        (root / "files" / split / "cat" / "in here").mkdir()
        (root / "files" / split / "cat" / "in here" / "a#1 50%.png").write_bytes(found["dog"][0][1])
        members = webdataset(found)
        write_tar(root / "tars" / split / "a-0.tar", members[:8])
        write_tar(root / "tars" / split / "a-1.tar", members[8:])
    lines = [path.relative_to(root / "files").as_posix() for path in (root / "files").rglob("*.*")]
    (root / "files" / "listing.txt").write_text("".join(f"./{line}\n" for line in reversed(lines)))
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(_stores, "_FIRST_WAIT", 0.001)
    return tmp_path / "cache" / "widefield" / "data"


@pytest.fixture
def memory(made):
    """Return the URL of a copy in memory."""
    files = fsspec.filesystem("memory")
    files.put(str(made), "/sets", recursive=True)
    yield "memory://sets"
    files.rm("/sets", recursive=True)


def same(ours, theirs):
    assert ours.classes == theirs.classes
    assert ours.fingerprint() == theirs.fingerprint()
    assert ours.labels.tolist() == theirs.labels.tolist()
    for epoch in range(2):
        ours.set_epoch(epoch)
        theirs.set_epoch(epoch)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a["image"], b["image"])
            assert {**a, "image": 0} == {**b, "image": 0}


@pytest.mark.parametrize("kind", ["memory", "file", "simplecache", "filecache", "http"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_samples_are_those_of_the_folder(made, memory, tmp_path, kind, split):
    storage = {"filecache": {"cache_storage": str(tmp_path / "bytes")}} if kind == "filecache" else None
    with serving(made) as server:
        base = {"memory": memory, "file": f"file://{made}", "http": server.url}.get(kind, f"{kind}::{memory}")
        listing = "listing.txt" if kind == "http" else None
        options = {"names": True, "storage": storage, **HEAVY}
        same(
            create("folder", split, root=f"{base}/files/", listing=listing, **options),
            Folder(split, root=made / "files", names=True, **HEAVY),
        )
        same(
            create("shards", split, root=f"{base}/tars", **BRACES, **options),
            Shards(split, root=made / "tars", names=True, **HEAVY),
        )
    if kind == "filecache":
        fsspec.filesystem("memory").store.clear()  # what is in the cache needs no store
        again = Folder(split, root=made / "files", size=8)
        kept = _stores.RemoteFiles(f"{base}/files", storage)
        assert kept.whole(f"{split}/{os.fsdecode(again._files[0])}")
        fsspec.filesystem("memory").put(str(made), "/sets", recursive=True)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_index_of_shards_shows_how_far_it_is(made, monkeypatch, tmp_path):
    monkeypatch.setenv("TERM", "xterm")
    with serving(made) as server:
        for rank, shown in ((1, False), (0, True), (0, False)):  # of several processes the first one; then it is kept
            screen = Terminal()
            monkeypatch.setattr("sys.stderr", screen)
            monkeypatch.setenv("RANK", str(rank))
            index = tmp_path / str(rank)
            index.mkdir(exist_ok=True)
            Shards("train", root=f"{server.url}/tars", index=index, **BRACES, size=8)
            assert ("index of 2 tar files, MB" in screen.getvalue()) == shown


@pytest.mark.parametrize(
    ("place", "root", "files"),
    [
        ("data/shards", "data/shards", ""),
        ("data/shards/val-*.tar", "data/shards", "val-*.tar"),
        ("/data/{a,b}/val-{0..3}.tar", "/data", "{a,b}/val-{0..3}.tar"),
        ("http://host:80/sets/val-{0..3}.tar", "http://host:80/sets", "val-{0..3}.tar"),
        ("simplecache::s3://bucket/val.tar", "simplecache::s3://bucket", "val.tar"),
        ("val.tar", "", "val.tar"),
        ("/val.tar", "/", "val.tar"),
        ("s3://bucket/sets", "s3://bucket/sets", ""),
        ("https://host/sets?version=3", "https://host/sets?version=3", ""),
    ],
)
def test_a_place_may_name_the_tar_files(place, root, files):
    assert divided(place) == (root, files)


@pytest.mark.parametrize("name", ["run[1]", "{a}", "x.tar"])
def test_folders_may_have_the_characters_of_globs_in_their_names(tmp_path, name):
    folder = tmp_path / name / "sets"
    folder.mkdir(parents=True)
    assert divided(str(folder)) == (str(folder), "")
    assert divided(str(folder.parent)) == (str(folder.parent), "")
    assert divided(f"{folder}/val-{{0..3}}.tar") == (str(folder), "val-{0..3}.tar")


def test_globs_find_the_same_shards_as_braces(made, memory):
    same(Shards("train", root=f"{memory}/tars", **HEAVY), Shards("train", root=made / "tars", **BRACES, **HEAVY))


def test_val_may_be_the_folder_of_the_classes_itself(made, memory):
    same(Folder("val", root=f"{memory}/files/val", size=8), Folder("val", root=made / "files" / "val", size=8))


class Calls:
    """Counts calls of the methods of a file system."""

    def __init__(self, monkeypatch, *names):
        self.made = dict.fromkeys(names, 0)
        kind = type(fsspec.filesystem("memory"))
        for name in names:
            monkeypatch.setattr(kind, name, self.counting(name, getattr(kind, name)))

    def counting(self, name, method):
        def call(*args, **kwargs):
            self.made[name] += 1
            return method(*args, **kwargs)

        return call


def test_a_kept_list_saves_the_listing_until_the_folders_change(memory, cache, monkeypatch):
    calls = Calls(monkeypatch, "find", "cat_file")
    first = Folder("train", root=f"{memory}/files", size=8)
    assert calls.made == {"find": 1, "cat_file": 0}
    same(Folder("train", root=f"{memory}/files", size=8), first)
    assert calls.made["find"] == 1
    (kept,) = cache.glob(".widefield-folder-index-*.npz")
    content = kept.read_bytes()
    for damaged in (content[:400], b"", b"text"):
        kept.write_bytes(damaged)
        same(Folder("train", root=f"{memory}/files", size=8), first)
        assert kept.read_bytes() == content
    assert calls.made["find"] == 4
    files = fsspec.filesystem("memory")
    files.pipe("/sets/files/train/cat/new.png", pictures(1)["cat"][0][1])  # this store does not show it in the folder
    assert len(Folder("train", root=f"{memory}/files", size=8)) == len(first)
    assert len(Folder("train", root=f"{memory}/files", size=8, refresh=True)) == len(first) + 1
    for split in ("train", "val"):
        files.pipe(f"/sets/files/{split}/fox/new.png", pictures(1)["cat"][0][1])
    assert Folder("train", root=f"{memory}/files", size=8).classes == ("cat", "dog", "eel", "fox")
    assert len(list(cache.glob(".widefield-folder-index-*"))) == 1


def test_a_kept_index_saves_the_headers_until_a_shard_changes(memory, cache, monkeypatch):
    calls = Calls(monkeypatch, "cat_file")
    first = Shards("train", root=f"{memory}/tars", size=8)
    assert calls.made["cat_file"] > 1
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", None)
        same(Shards("train", root=f"{memory}/tars", size=8), first)
    (kept,) = cache.glob(".widefield-tar-index-*.npz")
    content = kept.read_bytes()
    kept.write_bytes(content[:300])
    same(Shards("train", root=f"{memory}/tars", size=8), first)
    assert kept.read_bytes() == content
    files = fsspec.filesystem("memory")
    whole = files.cat("/sets/tars/train/a-1.tar")
    files.pipe("/sets/tars/train/a-1.tar", whole)  # same bytes, another time
    same(Shards("train", root=f"{memory}/tars", size=8), first)
    assert len(list(cache.glob(".widefield-tar-index-*.npz"))) == 2


def test_a_process_killed_while_it_keeps_an_index_leaves_no_half(memory, cache, monkeypatch):
    def die(self, target):
        raise SystemExit(137)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        with pytest.raises(SystemExit):
            Shards("train", root=f"{memory}/tars", size=8)
    assert not list(cache.glob("*.npz"))
    assert len(Shards("train", root=f"{memory}/tars", size=8)) == 9


def test_a_list_that_cannot_be_kept_is_no_reason_to_stop(memory, monkeypatch):
    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(_kept, "write_whole", refuse)
    with pytest.warns(UserWarning, match=r"list of the files in memory://sets/files/train cannot be kept in .*index"):
        assert len(Folder("train", root=f"{memory}/files", size=8)) == 10


CONTEXTS = [("file", "fork", 2), ("http", "fork", 2), pytest.param("http", "spawn", 1, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("kind", "context", "workers"), CONTEXTS)
def test_workers_read_by_themselves_even_after_the_parent_has(made, kind, context, workers):
    started = multiprocessing.get_context(context)
    with serving(made) as server:
        base = f"file://{made}" if kind == "file" else server.url
        sets = [
            Folder("train", root=f"{base}/files", listing="listing.txt", **HEAVY),
            Shards("train", root=f"{base}/tars", **BRACES, **HEAVY),
        ]
        for data in sets if context == "fork" else sets[1:]:
            own = torch.stack([data[index]["image"] for index in range(len(data))])
            loader = DataLoader(data, 4, num_workers=workers, collate_fn=collate, multiprocessing_context=started)
            assert torch.equal(torch.cat([batch["image"] for batch in loader]), own)
            assert torch.equal(pickle.loads(pickle.dumps(data))[3]["image"], own[3])


def test_forked_workers_leave_the_connections_of_the_parent_alone(made):
    with serving(made) as server:
        data = Shards("train", root=f"{server.url}/tars", size=8, **BRACES)
        first = data[0]["image"]
        started = time.monotonic()
        for _ in range(3):
            list(DataLoader(Scales("train", count=4), 2, num_workers=1))
            assert torch.equal(data[0]["image"], first)
        assert time.monotonic() - started < 30  # a connection that is lost to a worker waits for minutes


def test_requests_are_tried_again_and_then_named(made):
    with serving(made) as server:
        data = Shards("train", root=f"{server.url}/tars", size=8, **BRACES)
        first = data[0]["image"]
        server.failures = 3
        assert torch.equal(data[0]["image"], first)
        server.failures = 100
        with pytest.raises(
            OSError, match=r"tars/train/a-0.tar/cat0.png: http.*a-0.tar cannot be read in 4 tries: .*503"
        ):
            data[0]
        server.failures = 0
        server.refused = True
        before = len(server.requests)
        with pytest.raises(PermissionError, match=r"access to http.*a-0.tar is refused.*AWS_ACCESS_KEY_ID"):
            data[0]
        assert len(server.requests) == before + 1
        server.refused = False
        server.ranges = False
        with pytest.raises(OSError, match=r"answers a request for .* bytes with .*does not support ranges of bytes"):
            data[0]


def test_one_image_is_one_request_of_its_bytes(made):
    with serving(made) as server:
        data = Shards("train", root=f"{server.url}/tars", size=8, **BRACES)
        before = len(server.requests)
        data[4]
        ((method, path, span),) = server.requests[before:]
        assert (method, path) == ("GET", "/tars/train/a-1.tar")
        first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", span).groups())
        assert last - first + 1 == data._index.sizes[4]


def test_a_shard_cut_after_its_headers_were_read_costs_its_images(made, memory):
    data = Shards("train", root=f"{memory}/tars", size=16, corrupt="skip", max_corrupt=1.0)
    files = fsspec.filesystem("memory")
    whole = files.cat("/sets/tars/train/a-1.tar")
    files.pipe("/sets/tars/train/a-1.tar", whole[:600])
    with pytest.warns(UserWarning, match=r"memory://sets/tars/train/a-1.tar/.*: the tar file ends before it does"):
        assert data[8] is None
    assert data[0] is not None
    with pytest.raises(OSError, match=r"memory://sets/tars/train/a-1.tar is not a complete, uncompressed tar file"):
        Shards("train", root=f"{memory}/tars")
    files.rm("/sets/tars/train/a-1.tar")
    with pytest.raises(
        FileNotFoundError, match=r"cannot read the image .*there is no memory://sets/tars/train/a-1.tar"
    ):
        data[7]


def test_a_broken_image_is_named(memory):
    data = Folder("train", root=f"{memory}/files", size=8)
    files = fsspec.filesystem("memory")
    files.pipe("/sets/files/train/cat/cat0.png", b"text")
    with pytest.raises(CorruptImageError, match=r"memory://sets/files/train/cat/cat0.png.*Repair"):
        data[0]
    files.rm("/sets/files/train/cat/cat0.png")
    with pytest.raises(FileNotFoundError, match=r"there is no memory://sets/files/train/cat/cat0.png"):
        data[0]


ROOTS = {
    "s3": ("s3://bucket/x", "s3fs is not installed: pip install 'widefield\\[remote\\]'"),
    "gs": ("simplecache::gs://bucket/x", "gcsfs is not installed: pip install 'widefield\\[remote\\]'"),
    "unknown": ("warehouse://x", "warehouse://x cannot be opened .*Protocol not known: warehouse.*Check the protocol"),
    "password": ("ftp://me:geheim@host/x", r"root must not hold a password.*ftp://me:\.\.\.@host/x"),
    "signed": ("https://host/x?sig=geheim", "without a query; got 'https://host/x' with one"),
    "http": ("http://127.0.0.1:9/x", "cannot be listed, as http has no folders: give listing.*find train val -type f"),
    "nowhere": ("memory://nowhere", "root is not a folder: 'memory://nowhere'. Expected root/train"),
    "no split": ("memory://sets/files/train", "'memory://sets/files/train' has no folder 'train'; it holds 'cat'"),
}


@pytest.mark.parametrize("case", ROOTS)
def test_bad_roots_are_refused(memory, case, monkeypatch):
    root, text = ROOTS[case]
    if case in ("s3", "gs"):
        monkeypatch.setattr(_stores, "need", without)
    with pytest.raises((OSError, ValueError, ModuleNotFoundError), match=text) as caught:
        Folder("train", root=root)
    assert "geheim" not in str(caught.value)


def without(module):
    raise ModuleNotFoundError(f"{module} is not installed: pip install 'widefield[remote]'.")


@pytest.mark.parametrize(
    "storage", [{"key": "geheim"}, {"client_kwargs": {"aws_session_token": "geheim"}}, {"s3": {"secretKey": "geheim"}}]
)
def test_credentials_are_refused_without_showing_them(storage):
    with pytest.raises(ValueError, match=r"storage must not hold .*AWS_ACCESS_KEY_ID") as caught:
        Folder("train", root="memory://x", storage=storage)
    assert "geheim" not in str(caught.value)
    assert _stores.checked_storage({"anon": True, "token": "anon", "endpoint_url": "https://s3.example"})


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"storage": "anon"}, TypeError, "storage must be a mapping of options.*got 'anon'"),
        ({"index": "nowhere"}, FileNotFoundError, "index is not a folder: 'nowhere'"),
        ({"listing": 3}, TypeError, "listing must be the name of a text file.*got 3"),
        ({"listing": "none.txt"}, FileNotFoundError, "there is no memory://sets/files/none.txt"),
        ({"listing": "bad.txt"}, ValueError, "line 2 of the listing memory://sets/files/bad.txt is '../a/b.png'"),
        ({"listing": "train/cat/cat0.png"}, ValueError, "is not a text file in UTF-8"),
    ],
)
def test_bad_options_are_refused(memory, options, error, text):
    fsspec.filesystem("memory").pipe("/sets/files/bad.txt", b"train/cat/cat0.png\n../a/b.png\n")
    with pytest.raises(error, match=text):
        Folder("train", root=f"{memory}/files", **options)


def test_options_of_urls_are_refused_for_folders(made):
    with pytest.raises(ValueError, match="storage has the options of a URL's file system"):
        Shards("train", root=made / "tars", storage={"anon": True})
    with pytest.raises(ValueError, match="listing, index and refresh are for URLs"):
        Folder("train", root=made / "files", refresh=True)
    with pytest.raises(ValueError, match=r"'yolo' reads files of this machine only; got root='s3://x/y'"):
        create("yolo", "train", root="s3://x/y")


def test_globs_over_http_and_missing_shards_are_refused(made, memory):
    with serving(made) as server:
        with pytest.raises(OSError, match=r"cannot be listed.*'train/\{000000..000099\}.tar'"):
            Shards("train", root=f"{server.url}/tars")
        with pytest.raises(FileNotFoundError, match=r"there is no http.*/tars/train/a-2.tar"):
            Shards("train", root=f"{server.url}/tars", train="train/a-{0..2}.tar")
    with pytest.raises(
        FileNotFoundError, match=r"no file in 'memory://sets/tars' is named 'x\*.tar'; it holds train/a-0"
    ):
        Shards("train", root=f"{memory}/tars", train="x*.tar")
    with pytest.raises(ValueError, match=r"counts down: write \{0..3\}"):
        Shards("train", root=f"{memory}/tars", train="train/a-{3..0}.tar")
    with pytest.raises(FileNotFoundError, match=r"is named 'train/a-7.tar'"):
        Shards("train", root=made / "tars", train="train/a-{0..1}.tar".replace("1", "7").replace("0", "7"))


def test_both_splits_say_what_they_found(memory):
    fsspec.filesystem("memory").pipe("/sets/files/val/cat/.hidden/a.png", b"")
    train, val = create_both("folder", root=f"{memory}/files", size=8)
    assert train.found() == "train: 10 images in memory://sets/files/train, 3 classes"
    assert "left out: 1 hidden ('memory://sets/files/val/cat/.hidden')" in val.found()
    fsspec.filesystem("memory").pipe("/sets/files/train/wolf/a.png", b"")
    with pytest.raises(ValueError, match=r"train and val in 'memory://sets/files' must have the same.*in train: wolf"):
        Folder("train", root=f"{memory}/files")
