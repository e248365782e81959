"""The import rules of docs/architecture.md, read from its table of packages."""

import ast
import functools
import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import widefield

ROOT = Path(widefield.__file__).parent

PAGE = (Path(__file__).parents[1] / "docs/architecture.md").read_text()
ROWS = re.findall(r"^\| `(\w+)` \| (\d+) \| ([^|]+) \|", PAGE, flags=re.MULTILINE)
LEVELS = {name: int(level) for name, level, _ in ROWS}
THIRD_PARTY = {name: set(words.split(", ")) - {"none"} for name, _, words in ROWS if words != "any"}
FILES = sorted(p for p in ROOT.rglob("*.py"))


def test_the_table_has_every_package():
    assert set(LEVELS) == {room(path) for path in FILES} - {"__init__"}


def room(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@functools.cache
def imports(path):
    """Return the absolute dotted name of every import in a file, at any level."""
    found = []
    package = ("widefield", *path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            found += [f"{module}.{alias.name}" for alias in node.names]
    return found


def refused(path, name):
    """Return whether a file may not have an import."""
    here, (top, *rest) = room(path), name.split(".")
    if here == "__init__":
        return False
    if top != "widefield":
        return top not in sys.stdlib_module_names and top not in THIRD_PARTY.get(here, {top})
    if not rest:
        return True
    there = rest[0]
    return there != here and LEVELS[there] > 0 and LEVELS[there] >= LEVELS[here]


def test_imports_go_downward():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}" for path in FILES for name in imports(path) if refused(path, name)
    ]
    assert not wrong, "the table in docs/architecture.md does not allow these:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("ops/_fft.py", "widefield.nn.morf"),
        ("models/van.py", "widefield.analysis.erf"),
        ("nn/morf.py", "widefield"),
        ("nn/morf.py", "matplotlib"),
    ],
)
def test_wrong_imports_are_found(path, name):
    assert refused(ROOT / path, name)


def test_the_page_names_files_that_exist():
    for row in re.findall(r"^\| (`[\w/]+\.py`[^|]*) \|", PAGE, flags=re.MULTILINE):
        for name in re.findall(r"`([\w/.]+)`", row):
            assert any((ROOT / folder / name.rstrip("/")).exists() for folder in ("", "ops", "surgery")), name


def test_no_modules_import_each_other():
    modules = {path.relative_to(ROOT.parent).with_suffix("").as_posix().replace("/", "."): path for path in FILES}
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    graph = {}
    for module, path in modules.items():
        found = {name if name in modules else name.rpartition(".")[0] for name in imports(path)}
        graph[module] = found & set(modules) - {module}
    while leaves := {name for name, targets in graph.items() if not targets}:
        graph = {name: targets - leaves for name, targets in graph.items() if name not in leaves}
    assert not graph, f"these modules, or some that they import, import each other: {sorted(graph)}"


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


def test_names_of_test_modules_are_unique():
    """pytest imports them by their name alone: two of one name fail if one process collects both."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_import_needs_torch_and_timm_alone_and_builds_nothing():
    code = """
import sys
for name in ("accelerate", "torchmetrics", "matplotlib", "rich", "jsonargparse", "sklearn", "tensorboard"):
    sys.modules[name] = None
import timm.models, torch.nn as nn
before = set(sys.modules)
nn.Module.__init__ = None  # nothing may be built
import widefield
print("widefield.surgery" in sys.modules, len(timm.list_models("morf_*")))
print(sorted(m for m in set(sys.modules) - before if not m.startswith(("widefield", "timm"))))
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
    models, new = result.stdout.splitlines()
    assert models == "False 5"
    assert len(ast.literal_eval(new)) < 40, f"the import pulls in {new}"


def test_public_names_resolve():
    for name in widefield.__all__:
        assert getattr(widefield, name) is not None
        assert name in dir(widefield)
    for name in ("nn", "ops", "surgery", "data", "train", "bench", "report", "analysis", "tasks", "models"):
        assert getattr(widefield, name).__name__ == f"widefield.{name}"
    for name in ("loading", "predictions", "runs"):
        assert getattr(widefield, name).__name__ == f"widefield.{name}"


LAZY = [path for path in FILES if path.name == "__init__.py" and "load_on_demand(" in path.read_text()]


@pytest.mark.parametrize("path", LAZY, ids=room)
def test_lazy_packages_load_what_they_declare(path):
    """Type checkers read the imports under TYPE_CHECKING; Python reads the table of modules."""
    tree, package = ast.parse(path.read_text()), importlib.import_module(f"widefield.{room(path)}")
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    (call,) = [node.value for node in tree.body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
    table = {name: home for home, names in ast.literal_eval(call.args[1]).items() for name in names.split()}
    declared = {alias.name: node.module.split(".")[-1] for node in block.body for alias in node.names}
    assert table == declared
    assert set(table) <= set(package.__all__) <= set(dir(package))
    for name in package.__all__:
        assert not isinstance(getattr(package, name), ModuleType), name


def test_a_module_does_not_hide_the_function_of_its_name():
    code = """
import widefield.predictions.predict
from widefield.predictions import predict
assert callable(predict) and widefield.predictions.predict is predict
assert widefield.predictions.image_paths.find_images
"""
    assert run(code).returncode == 0, run(code).stderr


def test_the_root_holds_the_verbs_and_the_conversions_alone():
    verbs = {"plan", "convert", "reparameterize", "specialize", "trim", "export", "quantize", "compare", "fit"}
    verbs |= {"predict", "save", "load", "push_to_hub"}
    conversions = {name for name in widefield.surgery.__all__ if _is_conversion(getattr(widefield.surgery, name))}
    assert set(widefield.__all__) == verbs | conversions - {"Conversion"}


def _is_conversion(thing):
    return isinstance(thing, type) and issubclass(thing, widefield.surgery.Conversion)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("convret", "Did you mean 'convert'?"),
        ("MoRFConv2d", "Use widefield.nn.MoRFConv2d."),
        ("depthwise_conv2d", "Use widefield.ops.depthwise_conv2d."),
        ("effective_receptive_field", "Use widefield.analysis.effective_receptive_field."),
    ],
)
def test_unknown_names_say_where_to_look(name, hint):
    with pytest.raises(AttributeError, match=f"no attribute '{name}'") as raised:
        getattr(widefield, name)
    assert str(raised.value).endswith(hint)
