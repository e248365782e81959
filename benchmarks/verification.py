"""Measure what checks and analyses cost, in forward passes of the same model on the same images.

python benchmarks/verification.py [--before CHECKOUT] [--only GLOB] [--out benchmarks/results]

CPU time of one thread, which other programs disturb least, on random images and random weights. `--before` measures
another checkout with the same script.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

HERE = Path(__file__).parents[1]
BATCH = 8
Measured = dict[str, Any]

NETWORKS = {
    "resnet50": 128,
    "convnext_tiny + MoRF": 128,
    "replknet_31b": 128,
    "halonet50ts": 256,
    "mvitv2_tiny": 224,
    "dpt_vit_base": 128,
    "maskrcnn_resnet50_fpn": 128,
}
"""Name -> side of the images in pixels."""


def network(name: str) -> nn.Module:
    """Return a network in evaluation mode, with random weights that let no branch start at zero."""
    import widefield

    torch.manual_seed(0)
    if name == "maskrcnn_resnet50_fpn":
        import torchvision

        side = NETWORKS[name]
        make = torchvision.models.detection.maskrcnn_resnet50_fpn
        model: nn.Module = make(weights=None, weights_backbone=None, min_size=side, max_size=side)
        model.double()  # rounding reorders the boxes of random weights
    elif name == "dpt_vit_base":
        import segmentation_models_pytorch

        model = segmentation_models_pytorch.DPT(encoder_weights=None, dynamic_img_size=True)
    else:
        model = timm.create_model(name.removesuffix(" + MoRF"))
    if name.endswith("MoRF"):
        model = widefield.convert(model, widefield.MoRF())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.1)
        if isinstance(getattr(module, "gamma", None), nn.Parameter):  # layer scale
            nn.init.ones_(module.gamma)
    return model.eval()


def noise(name: str, model: nn.Module, count: int = 2) -> Tensor:
    """Return random images for a network."""
    return torch.randn(count, 3, NETWORKS[name], NETWORKS[name], dtype=next(model.parameters()).dtype)


def cpu(work: Callable[[], Any], repeats: int = 1) -> float:
    """Return the CPU seconds of a call, the least of some."""
    spent = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        spent.append(time.process_time() - start)
    return min(spent)


def forward(model: nn.Module, batches: list[Tensor]) -> float:
    """Return the CPU seconds of a forward pass on all of these images."""
    with torch.inference_mode():
        return sum(cpu(partial(model, batch), 3) for batch in batches)


def against_passes(model: nn.Module, batches: list[Tensor], work: Callable[[], Any]) -> Measured:
    """Measure work on a model in passes: by CPU time, and by the images that models of its class run on.

    A model that has nothing to work on is refused after the checks, which is measured, too.
    """
    unit, images = forward(model, batches), 0

    def see(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal images
        if type(module) is type(model) and args:
            images += len(args[0])

    handle, refused = register_module_forward_pre_hook(see), ""
    start = time.process_time()
    try:
        work()
    except ValueError as error:
        refused = type(error).__name__
    spent = time.process_time() - start
    handle.remove()
    return {"seconds": spent, "unit": unit, "runs": images / sum(map(len, batches)), "refused": refused}


def reparameterize(name: str, *, report: bool = False) -> Measured:
    """Measure merging with its checks; with a report, costs are counted, too."""
    from widefield import surgery

    model = network(name)
    x = noise(name, model)
    return against_passes(model, [x], lambda: surgery.reparameterize(model, x, report=id if report else None))


def merged(name: str) -> nn.Module:
    """Return a reparameterized network, or the network if it has nothing to merge."""
    from widefield import surgery

    model = network(name)
    try:
        return surgery.reparameterize(model, noise(name, model))
    except surgery.NothingToFuseError:
        return model


def trim(name: str) -> Measured:
    """Measure cropping each layer within a tolerance, with its check."""
    from widefield import surgery

    model = merged(name)
    x = noise(name, model)
    return against_passes(model, [x], lambda: surgery.trim(model, 0.01, example_input=x))


def trim_by_budget(name: str, side: int, count: int = 16) -> Measured:
    """Measure the search for crops within a budget, on data."""
    from widefield import surgery

    model = surgery.reparameterize(network(name), (3, side, side))
    batches = list(torch.randn(count, 3, side, side).split(BATCH))
    return against_passes(model, batches, lambda: surgery.trim(model, 0.05, loader=batches))


def specialize(name: str, *, report: bool = False) -> Measured:
    """Measure making routing static; with a report, the change by each layer is measured, too."""
    from widefield import surgery

    model = network(name)
    x = noise(name, model)
    options: dict[str, Any] = {"report": id} if report else {}
    return against_passes(model, [x], lambda: surgery.specialize(model, [x], **options))


def plan(name: str) -> Measured:
    """Measure planning a conversion."""
    import widefield

    model = network(name)
    return against_passes(model, [noise(name, model)], lambda: widefield.plan(model, widefield.MoRF()))


def erf(name: str, count: int) -> Measured:
    """Measure an effective receptive field against a plain loop over gradients."""
    from widefield import analysis

    model = network(name).requires_grad_(False)
    images = noise(name, model, count)

    def loop() -> Tensor:
        total = torch.zeros(images.shape[2:], dtype=torch.float64)
        for part in images.split(BATCH):
            leaf = part.clone().requires_grad_()
            found = model.forward_features(leaf)
            unit = found[:, :, found.shape[2] // 2, found.shape[3] // 2].sum()
            total += torch.autograd.grad(unit, leaf)[0].clamp(min=0).sum((0, 1), dtype=torch.float64)
        return total / total.max()

    def field() -> Tensor:
        return torch.from_numpy(analysis.effective_receptive_field(model, images, batch_size=BATCH).scores)

    torch.testing.assert_close(field(), loop(), rtol=1e-3, atol=1e-5)
    return {"seconds": cpu(field, 2), "unit": cpu(loop, 2), "images": count}


def cam(name: str, count: int) -> Measured:
    """Measure class activation maps against captum's."""
    from captum.attr import LayerGradCam

    from widefield import analysis

    model = network(name)
    images = noise(name, model, count)

    def theirs() -> Tensor:
        found = []
        for part in images.split(BATCH):
            chosen = model(part).detach().argmax(1)
            found.append(LayerGradCam(model, model.layer4).attribute(part, chosen, relu_attributions=True).detach())
        maps = torch.cat(found)[:, 0]
        return maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-30)

    def ours() -> Tensor:
        return torch.from_numpy(analysis.class_activation(model, images, layer="layer4", batch_size=BATCH).maps)

    torch.testing.assert_close(ours(), theirs(), rtol=1e-3, atol=1e-5)
    return {"seconds": cpu(ours, 2), "unit": cpu(theirs, 2), "images": count}


def first_cam(name: str) -> Measured:
    """Measure the first class activation map of a process, imports included, in its later ones."""
    from widefield import analysis

    model = network(name)
    images = noise(name, model, 1)
    forward(model, [images])

    def work() -> Any:
        return analysis.class_activation(model, images)

    return {"seconds": cpu(work), "unit": cpu(work, 3)}


def interactions(name: str) -> Measured:
    """Measure interactions of patches, in forward passes of full batches."""
    from widefield import analysis
    from widefield.analysis.interactions import forward_passes

    model = network(name)
    images = torch.randn(4, 3, 64, 64)
    options: dict[str, Any] = {"grid": 6, "pairs": 2, "contexts": 3, "orders": (0, 0.5, 1)}
    count = forward_passes(len(images), **options)
    masked = torch.randn(count, 3, 64, 64)

    def work() -> Any:
        return analysis.interactions(model, images, batch_size=64, **options)

    work()
    return {"seconds": cpu(work, 3), "unit": forward(model, list(masked.split(64))), "images": count}


FIRST = "first class activation of a process, resnet50"
PASSES, LOOPS, CAPTUM, LATER = "forward passes", "plain autograd loops", "captum's LayerGradCam", "later calls"

CASES: dict[str, tuple[Callable[[], Measured], str]] = {
    **{f"reparameterize {name}": (lambda name=name: reparameterize(name), PASSES) for name in NETWORKS},
    "reparameterize resnet50 with a report": (lambda: reparameterize("resnet50", report=True), PASSES),
    "reparameterize replknet_31b with a report": (lambda: reparameterize("replknet_31b", report=True), PASSES),
    **{f"trim {name}": (lambda name=name: trim(name), PASSES) for name in NETWORKS},
    "trimming resnet18 by a budget": (lambda: trim_by_budget("resnet18", 96), PASSES),
    "trimming mobilenetv2_lk by a budget": (lambda: trim_by_budget("mobilenetv2_lk", 64), PASSES),
    "specialize convnext_tiny + MoRF": (lambda: specialize("convnext_tiny + MoRF"), PASSES),
    "specialize convnext_tiny + MoRF with a report": (lambda: specialize("convnext_tiny + MoRF", report=True), PASSES),
    **{f"plan {name}": (lambda name=name: plan(name), PASSES) for name in ("resnet50", "replknet_31b")},
    "field of resnet50, 8 images": (lambda: erf("resnet50", 8), LOOPS),
    "field of resnet50, 32 images": (lambda: erf("resnet50", 32), LOOPS),
    "class activation of resnet50, 16 images": (lambda: cam("resnet50", 16), CAPTUM),
    FIRST: (lambda: first_cam("resnet50"), LATER),
    "interactions of resnet50": (lambda: interactions("resnet50"), PASSES),
}
"""What is measured -> the measurement, and its unit."""


BARS = (
    ("passes that `reparameterize` runs", "reparameterize*", "runs", 5),
    ("passes that `trim` runs", "trim *", "runs", 5),
    ("passes that `specialize` runs", "specialize *MoRF", "runs", 5),
    ("time of a field over a plain autograd loop", "field of *", "units", 1.1),
    ("time of activation maps over captum", "class activation *", "units", 1.0),
)
"""Text, cases, what is compared, and the most it may be."""


def bars(results: dict[str, dict[str, Measured]]) -> list[Any]:
    """Return the bars with the worst case of each."""
    from widefield.benchmarks.record import bar

    rows = [
        {"label": case, **found["now"], "units": found["now"]["seconds"] / found["now"]["unit"]}
        for case, found in results.items()
        if "now" in found
    ]
    return [
        bar(text, [row for row in rows if fnmatch.fnmatch(row["label"], cases)], itemgetter(value), at_most=most)
        for text, cases, value, most in BARS
    ]


def measured(cases: list[str], checkout: Path) -> Iterator[tuple[str, Measured]]:
    """Yield the measurements of cases, from a process that imports a checkout."""
    settings = {**os.environ, "PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-W", "ignore", __file__, "--child", *cases]
    with subprocess.Popen(words, env=settings, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            if line.startswith("{"):
                yield next(iter(json.loads(line).items()))
    if process.returncode:
        raise RuntimeError(f"the measurements of {checkout} stopped with status {process.returncode}.")


def commit(checkout: Path) -> str:
    """Return the commit of a checkout."""
    words = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def row(case: str, results: dict[str, Measured]) -> dict[str, str]:
    """Return the table row of a case."""
    unit, cells = CASES[case][1], {"": case}
    for label, found in results.items():
        cells[f"{label}, s"] = f"{found['seconds']:.2f}"
        cells[f"{label}, units"] = f"{found['seconds'] / found['unit']:.2f}"
        cells[f"{label}, runs"] = f"{found['runs']:.3g}" if "runs" in found else "-"
    cells["unit"] = unit
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout to compare with")
    parser.add_argument("--only", default="*", metavar="GLOB", help="cases to run")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        torch.manual_seed(0)
        torch.set_num_threads(1)
        for case in args.child:
            print(json.dumps({case: CASES[case][0]()}), flush=True)
        return
    from widefield import report
    from widefield.benchmarks.record import publish

    checkouts = {"before": args.before.resolve()} if args.before else {}
    checkouts["now"] = HERE
    chosen = fnmatch.filter(CASES, args.only)
    results: dict[str, dict[str, Measured]] = {case: {} for case in chosen}
    for label, checkout in checkouts.items():
        for cases in ([case for case in chosen if case != FIRST], [case for case in chosen if case == FIRST]):
            for case, found in measured(cases, checkout) if cases else ():
                results[case][label] = found
                print(label, case, found, flush=True)
    torch.set_num_threads(1)  # as in the children: the record says so
    old = f" --before CHECKOUT-OF-{commit(args.before)}" if args.before else ""
    publish(
        args.out / "verification_cpu",
        f"python benchmarks/verification.py{old}",
        {"measured": results},
        "CPU seconds of one thread; the same in units; and how often the model or a copy ran on the images (runs).\n\n"
        f"{report.markdown([row(case, found) for case, found in results.items()])}",
        bars=bars(results),
    )


if __name__ == "__main__":
    main()
