"""Every published number in the fixtures is met, and the script that checks files finds what does not fit."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from dense import conformance, segmentation_checks
from dense.rules import Differences, images
from widefield import dense

FOLDER = Path(__file__).parents[1] / "fixtures" / "conformance" / "dense"
FILES = sorted(FOLDER.glob("*.json"))
WHOLE = (
    "upernet_convnext_tiny",
    "faster_rcnn_resnet50_fpn",
    "mask_rcnn_resnet50_fpn",
    "mask_rcnn_convnext_tiny_fpn",
    "cascade_rcnn_resnet50_fpn",
    "cascade_mask_rcnn_convnext_tiny_fpn_giou_4conv1fc",
)
"""Files of whole models, which take minutes."""


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow) if path.stem in WHOLE else path for path in FILES],
    ids=lambda path: path.stem,
)
def test_every_number_agrees(path):
    differences = conformance.check(path)
    assert not differences.lines, "\n".join(differences.lines)
    assert differences.compared > 5


def test_counts_of_a_whole_model():
    document = json.loads((FOLDER / f"{WHOLE[0]}.json").read_text())
    with torch.device("meta"):
        model = segmentation_checks.built_upernet(document)
    assert sum(p.numel() for p in model.parameters()) == document["params"]
    differences = Differences()
    segmentation_checks.check_macs("macs_512x2048", model.double().eval(), document["macs_512x2048"], differences)
    assert not differences.lines
    assert differences.compared == 3


def _values(entry, path=()):
    """Yield (path, value) of the numbers and texts of a fixture."""
    pairs = entry.items() if isinstance(entry, dict) else enumerate(entry) if isinstance(entry, list) else ()
    if not isinstance(entry, (dict, list)):
        yield path, entry
    for key, value in pairs:
        yield from _values(value, (*path, key))


def _changed(document, path, value):
    twin = copy.deepcopy(document)
    place = twin
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return twin


def _results(name, *skipped):
    """Return a fixture and the paths of the results in it."""
    document = json.loads((FOLDER / f"{name}.json").read_text())
    paths = [
        path
        for path, value in _values(document)
        if isinstance(value, (int, float)) and not {"config", "fp32_max_abs_diff", *skipped} & set(path)
    ]
    return document, paths


def _found(document, tmp_path):
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(document))
    return conformance.check(path).lines


@pytest.mark.parametrize("name", ["fcn_head_aux", "uper_head", "bbox_heads", "mask_head"])
def test_a_changed_number_is_found(name, tmp_path):
    document, paths = _results(name, "feature_shapes", "label_size", "assigner", "positives", "assigned")
    for path in paths[:: max(1, len(paths) // 12)]:
        value = document
        for key in path:
            value = value[key]
        step = 1 if isinstance(value, int) else 1e-6 * max(1, abs(value))
        lines = _found(_changed(document, path, value + step), tmp_path)
        assert len(lines) >= 1, f"a change of {path} went unseen"


def _summary(tensor):
    flat = tensor.flatten()
    return {"shape": [*tensor.shape], "l2": flat.norm().item(), "first": flat[:8].tolist(), "last": flat[-4:].tolist()}


def _whole_model(tmp_path, aux, layer_scale, align_corners):
    """Return a document in the form of the whole models, of a narrow network with numbers of this library."""
    config = {"classes": 5, "channels": 8, "pool_scales": [1, 2], "aux": aux, "align_corners": align_corners,
              "loss_weights": [1.0, 0.4], "layer_scale": layer_scale}  # fmt: skip
    network = timm.model_entrypoint("convnext_tiny")(
        features_only=True, depths=(1, 2, 1, 1), dims=(4, 8, 12, 16), **({} if layer_scale else {"ls_init_value": None})
    )
    options = {"channels": 8, "pool_scales": (1, 2), "align_corners": align_corners, "auxiliary": False}
    model = dense.UPerNet(network, 5, **options)
    if aux:
        model.auxiliary_head = dense.FCNHead(12, 5, align_corners=align_corners, **aux)
    dense.save_checkpoint(model, tmp_path / "model.pth")
    state = torch.load(tmp_path / "model.pth", weights_only=True)["state_dict"]
    shapes = {key: [*value.shape] for key, value in state.items()}
    segmentation_checks.fill_through_files(model, shapes, Differences())
    x = images((66, 70), 2)
    with torch.no_grad():
        out, other = model.forward_heads(x)
        run = {
            "size": [66, 70],
            "stage_features": [_summary(maps) for maps in model.backbone(x)],
            "decode_logits": _summary(out),
            "upsampled_logits": _summary(model(x)),
            **({"aux_logits": _summary(other)} if aux else {}),
        }
        slid = dense.segment(model, images((66, 70)), window=(64, 48), stride=(32, 48))
    slide = {"size": [66, 70], "crop": [64, 48], "stride": [32, 48], "logits": _summary(slid)}
    return {"model": "upernet_convnext_tiny_variant", "config": config, "state_dict": shapes, "runs": [run],
            "slide": [slide], "params": sum(p.numel() for p in model.parameters())}  # fmt: skip


@pytest.mark.parametrize(
    ("aux", "layer_scale", "align_corners"),
    [
        ({"in_index": 2, "channels": 6, "num_convs": 2, "concat_input": True}, True, True),
        (None, False, False),
    ],
)
def test_variants_of_whole_models_are_understood(aux, layer_scale, align_corners, tmp_path):
    document = _whole_model(tmp_path, aux, layer_scale, align_corners)
    assert _found(document, tmp_path) == []
    document["config"]["align_corners"] = not align_corners
    assert any("upsampled_logits" in line for line in _found(document, tmp_path))


def test_unknown_fields_and_files_are_errors(tmp_path):
    document, _ = _results("fcn_head_aux")
    assert "'surprise' is unknown" in _found({**document, "surprise": 3}, tmp_path)[0]
    twin = copy.deepcopy(document)
    twin["runs"][0]["losses"]["loss_new"] = 1.0
    assert "'loss_new' is unknown" in _found(twin, tmp_path)[0]
    twin = copy.deepcopy(document)
    twin["config"]["type"] = "NewHead"
    assert "kind of this file is unknown" in _found(twin, tmp_path)[0]


def test_the_script_reports_and_exits(tmp_path, capsys):
    good = FOLDER / "fcn_head_aux.json"
    bad = tmp_path / "bad.json"
    bad.write_text('{"model": "something_else"}')
    assert conformance.main([str(good)]) == 0
    assert "fcn_head_aux.json: ok" in capsys.readouterr().out
    command = [sys.executable, conformance.__file__, bad, tmp_path / "absent.json", good]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1, result.stderr
    assert "bad.json: FAILED" in result.stdout
    assert "the kind of this file is unknown" in result.stdout
    assert "absent.json: FAILED" in result.stdout
    assert "fcn_head_aux.json: ok" in result.stdout
