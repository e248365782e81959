"""Each optional module has an extra, and an error that names it."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import widefield
from widefield._extras import MODULES, explained, need

ROOT = Path(__file__).parents[1]
SOURCES = str(Path(widefield.__file__).parents[1])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Hides the modules of extras, as in an environment without them.
HIDING = f"""
import sys
from importlib.machinery import PathFinder

class Finder:
    find_distributions = PathFinder.find_distributions
    invalidate_caches = PathFinder.invalidate_caches

    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in {sorted(MODULES)!r} else PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [Finder if one is PathFinder else one for one in sys.meta_path]
"""

CALLS = {
    "train": "from widefield import train; train.load_recipe('demo_digits', ['--optimizer.lr', '1'])",
    "digits": "from widefield import data; data.Digits('train')",
    "loop": "from widefield.train import train",
    "metrics": "from widefield.tasks import CocoMetric",
    "onnx": "import torch, timm; m = timm.create_model('test_resnet').eval()\n"
    "widefield.export(m, 'x.onnx', torch.zeros(1, 3, 32, 32))",
    "openvino": "from widefield.deploy.runtime import import_openvino; import_openvino()",
}
NAMED = {
    "train": "jsonargparse is not installed: pip install 'widefield[train]'.",
    "digits": "scikit-learn is not installed: pip install 'widefield[train]'.",
    "loop": "accelerate is not installed: pip install 'widefield[train]'.",
    "metrics": "torchmetrics is not installed: pip install 'widefield[train]'.",
    "onnx": "onnx is not installed: pip install 'widefield[export]'.",
    "openvino": "openvino is not installed: pip install 'widefield[openvino]'.",
}


def without_extras(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a process that has none of the extras."""
    environment = {**os.environ, "PYTHONPATH": SOURCES}
    words = [sys.executable, "-c", f"{HIDING}\n{code}"]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_every_module_is_installed_by_its_extra() -> None:
    extras = {name: {Requirement(one).name for one in ones} for name, ones in PROJECT["optional-dependencies"].items()}
    for module, (package, extra) in MODULES.items():
        assert package in extras[extra], module
    (everything,) = map(Requirement, PROJECT["optional-dependencies"]["all"])
    assert everything.extras == {*extras} - {"all", "dev", "docs", "remote"}


def test_the_core_is_small() -> None:
    core = {Requirement(one).name for one in PROJECT["dependencies"]}
    assert len(core - {"torch", "timm"}) < 5
    assert not core & {package for package, _ in MODULES.values()}


def test_all_errors_name_package_and_extra(tmp_path: Path) -> None:
    lines = ["import widefield"]
    for name, code in CALLS.items():
        indented = code.replace("\n", "\n    ")
        lines.append(f"try:\n    {indented}\nexcept ModuleNotFoundError as error:\n    print({name!r}, error, sep='|')")
    done = without_extras("\n".join(lines), tmp_path)
    assert done.returncode == 0, done.stderr
    assert dict(line.split("|") for line in done.stdout.splitlines()) == NAMED


def test_a_command_names_the_extra_in_one_line(tmp_path: Path) -> None:
    code = "import sys\nfrom widefield import cli\nsys.exit(cli.main(['eval', 'test_resnet', '--data', 'digits']))"
    done = without_extras(code, tmp_path)
    assert done.returncode == 1
    assert done.stderr == "widefield eval: accelerate is not installed: pip install 'widefield[train]'.\n"


def test_other_errors_stay() -> None:
    other = ModuleNotFoundError("No module named 'x'", name="x")
    assert explained(other) is other
    need("json")
    assert str(explained(ModuleNotFoundError(name="onnx.helper"))).startswith("onnx is not installed")


@pytest.mark.parametrize("module", [name for name in ("accelerate", "onnx") if name in MODULES])
def test_what_is_installed_passes(module: str) -> None:
    need(module)
