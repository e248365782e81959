"""The built wheel and source archive: what they hold, and what works with the core dependencies alone."""

from __future__ import annotations

import email
import importlib.metadata
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from PIL import Image

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a wheel and a source archive, built from a copy of what git has."""
    folder = tmp_path_factory.mktemp("dist")
    source = tmp_path_factory.mktemp("source")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    for name in filter(None, map(os.fsdecode, files)):
        if (ROOT / name).is_file() and not name.startswith(("tests/", "experiments/", "benchmarks/", "docs/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)], check=True,
        capture_output=True,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def core(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of an environment with the wheel and the core dependencies alone, outside of the project."""
    folder = tmp_path_factory.mktemp("core")
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    where = call(python, "import sysconfig; print(sysconfig.get_path('purelib'))", folder).strip()
    (wheel,) = built.glob("*.whl")
    words = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(words, check=True, capture_output=True)
    with zipfile.ZipFile(wheel) as opened:
        (metadata,) = (name for name in opened.namelist() if name.endswith(".dist-info/METADATA"))
        fields = email.message_from_bytes(opened.read(metadata))
    for name in needed(fields.get_all("Requires-Dist", [])):
        link(importlib.metadata.distribution(name), Path(where))
    return python


def needed(
    requirements: Iterable[str], extras: frozenset[str] = frozenset(), known: set[str] | None = None
) -> set[str]:
    """Return the names of the packages that these need on this machine, those of other extras left out."""
    known = set() if known is None else known
    for requirement in map(Requirement, requirements):
        asked = requirement.marker is None or any(requirement.marker.evaluate({"extra": one}) for one in extras or {""})
        try:
            installed = asked and importlib.metadata.distribution(requirement.name) is not None
        except importlib.metadata.PackageNotFoundError:  # not for this machine, although its marker does not say so
            continue
        if installed and requirement.name not in known:
            known.add(requirement.name)
            below = importlib.metadata.requires(requirement.name) or ()
            needed(below, frozenset(requirement.extras), known)
    return known


def link(package: importlib.metadata.Distribution, where: Path) -> None:
    """Link a package's files into the site-packages of another environment."""
    base = Path(str(package.locate_file("")))
    for top in {file.parts[0] for file in package.files or () if file.parts[0] != ".."}:
        if top not in ("__pycache__", "bin"):
            merge(base / top, where / top)


def merge(source: Path, target: Path) -> None:
    """Link a file or folder; folders that several packages share become folders of links."""
    if target.is_symlink() and target.is_dir() and target.resolve() != source.resolve():
        old = target.resolve()
        target.unlink()
        target.mkdir()
        for part in old.iterdir():
            (target / part.name).symlink_to(part)
    if target.is_dir() and not target.is_symlink():
        for part in source.iterdir():
            merge(part, target / part.name)
    elif not target.exists():
        target.symlink_to(source)


def call(python: Path, code: str, folder: Path) -> str:
    """Run code in an environment, outside of the project."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    words = [python, "-c", code]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_package_and_its_data(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(["git", "ls-files", "src"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    expected = {name.removeprefix("src/") for name in tracked.splitlines() if (ROOT / name).is_file()}
    assert expected <= names
    assert not {name for name in names - expected if ".dist-info/" not in name}


def test_the_source_archive_can_be_built(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "src/widefield/__init__.py", "src/widefield_cli.py"} <= names


def test_metadata_pass_twine(built: Path) -> None:
    words = [sys.executable, "-m", "twine", "check", "--strict", *map(str, built.iterdir())]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_core_has_no_extra(core: Path, tmp_path: Path) -> None:
    code = (
        "from importlib.util import find_spec; from widefield._extras import MODULES; "
        "print([name for name in MODULES if find_spec(name)])"
    )
    assert call(core, code, tmp_path).strip() == "[]"
    assert "site-packages" in call(core, "import widefield; print(widefield.__file__)", tmp_path)


def test_convert_save_load_predict_and_analyze_with_the_core_alone(core: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(256, size=(80, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    made = """
import timm, torch, widefield
torch.manual_seed(0)
model = timm.create_model("test_convnext", num_classes=3).eval()
mixed = widefield.convert(model, widefield.MoRF(), "*.conv_dw").eval()
x = torch.randn(2, 3, 64, 64)
fused = widefield.reparameterize(mixed, x)
with torch.no_grad():
    print(float((fused(x) - mixed(x)).abs().max()) < 1e-3)
    torch.save((x, fused(x)), "outputs.pt")
widefield.save(fused, "model.safetensors", classes=["a", "b", "c"])
"""
    assert call(core, made, tmp_path).strip() == "True"
    loaded = """
import torch, widefield
model = widefield.load("model.safetensors")
x, expected = torch.load("outputs.pt")
with torch.no_grad():
    print(torch.equal(model(x), expected))
print(len(widefield.predict("model.safetensors", "images")))
"""
    assert call(core, loaded, tmp_path).split() == ["True", "2"]
    for words in (
        ["predict", "model.safetensors", "images", "--csv", "seen.csv"],
        ["erf", "model.safetensors", "--images", "images", "--count", "2", "--size", "64"],
    ):
        done = subprocess.run(
            [core.parent / "widefield", *words], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "seen.csv").read_text().count("\n") == 1 + 2 * 3  # a line for each class of each image
    assert (tmp_path / "analysis" / "erf.png").is_file()
