"""The layer rule of docs/architecture.md: imports go downward only, function-local imports included."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import widefield

ROOT = Path(widefield.__file__).parent

LEVELS = {
    "_checks": 0, "_files": 0, "bench": 0, "report": 0,
    "ops": 1,
    "nn": 2,
    "surgery": 3, "data": 3,
    "models": 4, "analysis": 4, "tasks": 4, "deploy": 4,
    "train": 5,
    "runs": 6,
    "demo": 7, "benchmarks": 7,
    "cli": 8, "__main__": 9,
}  # fmt: skip
OPEN = {"_checks", "_files", "bench", "report"}  # level 0 is open to all
THIRD_PARTY = {
    "_checks": set(),
    "_files": set(),
    "bench": {"torch"},
    "report": {"numpy", "matplotlib"},
    "ops": {"torch", "triton"},  # triton in ops/_triton alone: see below
    "nn": {"torch", "timm"},
    "surgery": {"torch", "timm", "rich"},
    "models": {"torch", "timm"},
    "analysis": {"torch", "numpy", "captum", "rich", "matplotlib"},
    "deploy": {"torch", "timm", "numpy", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "openvino"},
    "data": {"torch", "torchvision", "timm", "sklearn", "numpy", "PIL"},
    "benchmarks": {"torch", "timm", "torchvision"},
    "tasks": {"torch", "torchvision", "timm", "torchmetrics"},
}
FILES = sorted(p for p in ROOT.rglob("*.py"))


def room(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path):
    """Yield the absolute dotted name of every import in a file, wherever it stands."""
    package = ("widefield", *path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            if module == "widefield":
                yield from (f"widefield.{alias.name}" for alias in node.names)
            else:
                yield module


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downward(path):
    here = room(path)
    if here == "__init__":
        return
    assert here in LEVELS, f"{here} has no level: add it here and in docs/architecture.md"
    for name in imports(path):
        top, *rest = name.split(".")
        if top != "widefield":
            if top not in sys.stdlib_module_names and here in THIRD_PARTY:
                assert top in THIRD_PARTY[here], f"{path.name} imports {name}"
            continue
        assert rest, f"{path.name} imports the package root"
        there = rest[0]
        if there != here and there not in OPEN:
            assert LEVELS[there] < LEVELS[here], f"{here} imports {there}"


def test_triton_has_one_home():
    for path in FILES:
        if "_triton" not in path.parts:
            assert not any(name.split(".")[0] == "triton" for name in imports(path)), path


def test_no_file_grows_past_500_lines():
    root = Path(__file__).parent
    long = [p for p in [*FILES, *root.rglob("*.py")] if len(p.read_text().splitlines()) > 500]
    assert not long


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


def test_import_needs_torch_and_timm_alone_and_builds_nothing():
    code = """
import sys
for name in ("accelerate", "torchmetrics", "matplotlib", "rich", "jsonargparse", "sklearn", "tensorboard"):
    sys.modules[name] = None
import timm.models, torch.nn as nn
before = set(sys.modules)
nn.Module.__init__ = None  # nothing may be built
import widefield
print(len(timm.list_models("morf_*")))
print(sorted(m for m in set(sys.modules) - before if not m.startswith(("widefield", "timm"))))
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
    models, new = result.stdout.splitlines()
    assert models == "5"
    assert len(ast.literal_eval(new)) < 40, f"the import pulls in {new}"


def test_public_names_resolve():
    for name in widefield.__all__:
        assert getattr(widefield, name) is not None
        assert name in dir(widefield)
    for name in ("nn", "ops", "surgery", "data", "train", "bench", "report", "analysis", "tasks", "models", "runs"):
        assert getattr(widefield, name).__name__ == f"widefield.{name}"


def test_the_root_holds_the_verbs_and_the_conversions_alone():
    verbs = {"plan", "convert", "reparameterize", "specialize", "trim", "export", "quantize", "compare"}
    conversions = {name for name in widefield.surgery.__all__ if _is_conversion(getattr(widefield.surgery, name))}
    assert set(widefield.__all__) == verbs | conversions - {"Conversion"}


def _is_conversion(thing):
    return isinstance(thing, type) and issubclass(thing, widefield.surgery.Conversion)


@pytest.mark.parametrize(
    ("name", "mend"),
    [
        ("convret", "Did you mean 'convert'?"),
        ("MoRFConv2d", "Use widefield.nn.MoRFConv2d."),
        ("depthwise_conv2d", "Use widefield.ops.depthwise_conv2d."),
        ("effective_receptive_field", "Use widefield.analysis.effective_receptive_field."),
    ],
)
def test_unknown_names_say_where_to_look(name, mend):
    with pytest.raises(AttributeError, match=f"no attribute '{name}'") as raised:
        getattr(widefield, name)
    assert str(raised.value).endswith(mend)
