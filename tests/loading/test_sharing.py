"""Files of models: what was changed in any order is loaded in a fresh process, and computes the same bits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import widefield
from widefield import dense, surgery
from widefield.loading import load as load_subject

ATTO = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module) -> nn.Module:
    """Return a model with weights and statistics that no constructor would give it."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
            tensor.add_(0.02 * torch.rand(tensor.shape, generator=generator))
    return model.eval()


def atto(**options: Any) -> nn.Module:
    return timm.create_model("convnext_atto", **{**ATTO, **options})


def converted_resnet() -> nn.Module:
    return trained(widefield.convert(timm.create_model("test_resnet", num_classes=5), widefield.MoRF((3, 5))))


def deployed_mixture() -> nn.Module:
    network = trained(timm.create_model("morf_convnext_tiny", **ATTO, kernel_sizes=(3, (3, 2), 7)))
    return widefield.trim(widefield.reparameterize(network, X), 0.3)


def every_verb() -> nn.Module:
    """Change a network by everything there is, partly in place, and a part of it alone."""
    network = trained(widefield.convert(atto(num_classes=3), widefield.MoRF((3, 7)), "stages.3.*"))
    widefield.convert(network.stages[2], widefield.LargeKernel(9, small=3), inplace=True)
    network = widefield.convert(
        network, widefield.Elastic((3, 5, 7)), lambda module, name: name.startswith("stages.1.")
    )
    surgery.choose_sizes(network, 3)
    widefield.specialize(trained(network), [X], inplace=True)
    network = widefield.reparameterize(network, X)
    network = widefield.trim(network, 0.5, example_input=64)
    return widefield.convert(network, widefield.FastDepthwise(), "*")


def plain_layers() -> nn.Module:
    """Return a network with composite layers, which reparameterizing turns into graphs of torch."""
    return widefield.reparameterize(trained(widefield.convert(atto(), widefield.TokenMixer("lka"))), X)


def masked_resnet() -> nn.Module:
    network = widefield.convert(timm.create_model("test_resnet", in_chans=3), widefield.GMConv())
    return widefield.reparameterize(trained(network), X)


def timms_blocks() -> nn.Module:
    """Return a network whose blocks timm merges in place."""
    return widefield.reparameterize(trained(timm.create_model("repghostnet_050")), X)


def segmenter() -> nn.Module:
    backbone = widefield.convert(atto(), widefield.LargeKernel((13, 11, 9, 7)))
    model = dense.UPerNet(backbone, 4, channels=8, auxiliary=False)
    return widefield.reparameterize(trained(model), X)


def detector() -> nn.Module:
    network = dense.FCOS("test_resnet", 3, neck_channels=32, num_convs=1)
    model: Any = trained(widefield.convert(network, widefield.MoRF((3, 5))))
    model.rules = dense.DetectionRules(score_threshold=0.01, max_per_image=7)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    made.__name__: made
    for made in (
        converted_resnet,
        deployed_mixture,
        every_verb,
        plain_layers,
        masked_resnet,
        timms_blocks,
        segmenter,
        detector,
    )
} | {
    "half": lambda: converted_resnet().to(memory_format=torch.channels_last).bfloat16(),
    "zoo": lambda: trained(timm.create_model("van_b0", num_classes=2)),
    "without_layer_scale": lambda: trained(atto(ls_init_value=None)),
    "torchvision": lambda: trained(load_subject("torchvision:shufflenet_v2_x0_5{num_classes: 4}").model),
}


def numbers(model: nn.Module) -> list[Tensor]:
    """Return everything that a model computes, as a list of tensors."""
    with torch.no_grad():
        output = model(X.to(next(model.parameters()).dtype))
    entries = output if isinstance(output, list) else [output]
    return [t for entry in entries for t in (entry if isinstance(entry, tuple) else (entry,)) if t is not None]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[Tensor]]]:
    """Return the file and the outputs of each model."""
    folder, found = tmp_path_factory.mktemp("files"), {}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model = make()
        before = torch.get_rng_state()
        found[name] = widefield.save(model, folder / f"{name}.safetensors"), numbers(model)
        assert torch.equal(torch.get_rng_state(), before)
    return found


FRESH = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
torch.set_num_threads(1)
import widefield
x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
for path in map(Path, sys.argv[1:]):
    model = widefield.load(path)
    with torch.no_grad():
        output = model(x.to(next(model.parameters()).dtype))
    entries = output if isinstance(output, list) else [output]
    flat = [t for entry in entries for t in (entry if isinstance(entry, tuple) else (entry,)) if t is not None]
    save_file({f"{k:03d}": t.contiguous() for k, t in enumerate(flat)}, path.with_suffix(".outputs"))
"""


def test_a_fresh_process_computes_the_same_bits(saved: dict[str, tuple[Path, list[Tensor]]]) -> None:
    paths = [str(path) for path, _ in saved.values()]
    subprocess.run([sys.executable, "-c", FRESH, *paths], check=True, timeout=300)
    for name, (path, expected) in saved.items():
        outputs = load_file(path.with_suffix(".outputs"))
        assert len(outputs) == len(expected), name
        assert all(torch.equal(outputs[key], one) for key, one in zip(sorted(outputs), expected, strict=True)), name


@pytest.mark.parametrize("name", ["every_verb", "segmenter"])
def test_a_loaded_model_is_changed_and_saved_again(
    name: str, saved: dict[str, tuple[Path, list[Tensor]]], tmp_path: Path
) -> None:
    model = widefield.load(saved[name][0])
    changed = widefield.trim(model, 0.8)
    again = widefield.load(widefield.save(changed, tmp_path / "again.safetensors"))
    assert all(map(torch.equal, numbers(again), numbers(changed)))
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in model.parameters())


def test_the_file_is_json_and_tensors(saved: dict[str, tuple[Path, list[Tensor]]]) -> None:
    with safe_open(str(saved["converted_resnet"][0]), framework="pt") as file:
        content = json.loads(file.metadata()["widefield"])
    assert content["format"] == 1
    assert content["history"]["origin"] == {"kind": "timm", "name": "test_resnet", "args": {"num_classes": 5}}
    (step,) = content["history"]["steps"]
    assert step["groups"][0]["config"] == "MoRF"
    assert step["groups"][0]["args"]["kernel_sizes"] == [3, 5]


# What timm builds


@pytest.mark.parametrize("name", ["every_verb", "zoo", "without_layer_scale"])
def test_timm_builds_a_folder(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    folder = widefield.save(model, tmp_path / "shared", license="mit")
    for pretrained in (
        timm.create_model(f"local-dir:{folder}", pretrained=True),
        widefield.load(f"local-dir:{folder}"),
    ):
        assert all(map(torch.equal, numbers(pretrained.eval()), numbers(model)))
    other = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=11)
    assert numbers(other.eval())[0].shape == (2, 11)
    again = widefield.save(timm.create_model(f"local-dir:{folder}", pretrained=True), tmp_path / "again.safetensors")
    assert all(map(torch.equal, numbers(widefield.load(again)), numbers(model)))


def test_timm_needs_no_widefield_for_its_own_networks(tmp_path: Path) -> None:
    folder = widefield.save(
        trained(timm.create_model("test_resnet", num_classes=3)), tmp_path / "plain", mean=[0.1] * 3
    )
    config = json.loads((folder / "config.json").read_text())
    assert (config["architecture"], config["model_args"]) == ("test_resnet", {"num_classes": 3})
    assert config["pretrained_cfg"]["mean"] == [0.1] * 3


def test_timm_says_what_it_cannot_build(tmp_path: Path) -> None:
    folder = widefield.save(segmenter(), tmp_path / "maps")
    with pytest.raises(ValueError, match=r"load other models with widefield\.load"):
        timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert isinstance(widefield.load(folder), dense.UPerNet)


# What cannot be saved


class Own(nn.Conv2d):
    pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m.stages[0].blocks[0], "conv_dw", nn.Conv2d(8, 8, 3, padding=1)), "is not what its history"),
        (
            lambda m: setattr(m.stages[0].blocks[0].conv_dw, "stride", (2, 2)),
            r"its stride is \[2, 2\] in the model and",
        ),
        (lambda m: nn.utils.parametrizations.weight_norm(m.head.fc), "ParametrizedLinear"),
        (lambda m: m.register_forward_hook(lambda *a: None), "1 forward hooks in the model and 0"),
        (lambda m: setattr(m, "forward", lambda x: x), "its forward was replaced"),
        (lambda m: setattr(m.stages[1].blocks[0].norm, "eps", 0.1), r"its eps is 0\.1"),
    ],
)
def test_changes_by_hand_are_refused(change: Callable[[Any], object], message: str, tmp_path: Path) -> None:
    model = atto()
    change(model)
    with pytest.raises(ValueError, match=message):
        widefield.save(model, tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 3)), "it is not known how to build this Sequential again"),
        (lambda: nn.DataParallel(atto()), r"wraps another model: save its \.module"),
        (lambda: torch.compile(atto()), r"wraps another model: save its \._orig_mod"),
        (lambda: atto(act_layer=nn.ReLU), r"cannot hold one of its arguments.*args="),
        (lambda: dense.UPerNet(nn.Sequential(nn.Conv2d(3, 4, 3)), 2, out_indices=(0,)), "no map|maps"),
        (lambda: atto().to("meta"), "is on the meta device"),
        (lambda: dense.FCN(atto(), 2, stage_norms=nn.BatchNorm2d), "stage_norms of FCN is a type"),
    ],
)
def test_unknown_origins_are_refused(make: Callable[[], nn.Module], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        widefield.save(make(), tmp_path / "model.safetensors")


def test_a_conversion_of_ones_own_is_refused(tmp_path: Path) -> None:
    class Mine(surgery.FastDepthwise):
        pass

    with pytest.raises(ValueError, match="Mine is a conversion of your own"):
        widefield.save(widefield.convert(atto(), Mine()), tmp_path / "model.safetensors")


def test_arguments_can_be_given(tmp_path: Path) -> None:
    model = atto(act_layer=nn.ReLU).eval()
    path = widefield.save(model, tmp_path / "model.safetensors", args={**ATTO, "act_layer": "relu"})
    assert all(map(torch.equal, numbers(widefield.load(path)), numbers(model)))
    with pytest.raises(ValueError, match="args are of timm"):
        widefield.save(segmenter(), tmp_path / "maps.safetensors", args={})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"classes": ["a"]}, ValueError, "classes has 1 names, and the model tells 5 classes apart"),
        ({"classes": "abcde"}, TypeError, "classes must be a list of names"),
        ({"mean": [0.5]}, ValueError, "mean must have 3 numbers"),
        ({"size": 0}, ValueError, "size"),
        ({"labels": ["a"]}, TypeError, "Did you mean 'classes'"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], error: type, message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        widefield.save(timm.create_model("test_resnet", num_classes=5), tmp_path / "model.safetensors", **options)
    with pytest.raises(ValueError, match=r"path must end in \.safetensors"):
        widefield.save(atto(), tmp_path / "model.pth")


# What cannot be loaded


def rewritten(path: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Write a file with another description of the same weights."""
    with safe_open(str(path), framework="pt") as file:
        content = json.loads(file.metadata()["widefield"])
    change(content)
    save_file(load_file(path), target, {"widefield": json.dumps(content)})
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format=2, widefield="9.0"), r"written by widefield 9\.0 in format 2.*pip install -U"),
        (lambda c: c["history"]["steps"][0].update(do="dream"), "step 0 is 'dream', which this version"),
        (lambda c: c["history"]["steps"][0]["groups"][0]["layers"].append("x.y"), "step 0, 'convert', does not fit"),
        (lambda c: c["history"]["steps"].clear(), "do not fit the network"),
        (lambda c: c["history"]["origin"].update(name="test_resmet"), "Did you mean 'test_resnet'"),
        (lambda c: c["history"]["origin"]["args"].update(checkpoint_path="x.pth"), "reads another file"),
        (lambda c: c["history"]["origin"].update(kind="made", name="load_checkpoint", args={}), "has no model"),
    ],
)
def test_files_that_do_not_fit(
    change: Callable[[dict[str, Any]], object],
    message: str,
    saved: dict[str, tuple[Path, list[Tensor]]],
    tmp_path: Path,
) -> None:
    path = rewritten(saved["converted_resnet"][0], tmp_path / "other.safetensors", change)
    with pytest.raises(ValueError, match=message):
        widefield.load(path)


def test_files_of_something_else(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="holds weights alone"):
        widefield.load(tmp_path / "weights.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        widefield.load(tmp_path / "text.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        widefield.load(tmp_path / "nothing.safetensors")
    with pytest.raises(FileNotFoundError, match="with a model"):
        widefield.load(f"local-dir:{tmp_path / 'nothing'}")


def test_torch_hub_loads_files(saved: dict[str, tuple[Path, list[Tensor]]]) -> None:
    root = Path(__file__).parents[2]
    path, expected = saved["every_verb"]
    model = torch.hub.load(str(root), "load", str(path), source="local")
    assert all(map(torch.equal, numbers(model), expected))
    zoo = torch.hub.load(str(root), "network", "van_b0", num_classes=2, source="local")
    assert numbers(zoo.eval())[0].shape == (2, 2)
