"""Measure what verification and analyses cost, in forward passes or against a plain autograd loop.

python benchmarks/verification.py [--before CHECKOUT] [--only GLOB] [--out benchmarks/results]

CPU time of one thread, which other programs disturb least. Networks have random weights. `--before` measures another
checkout as well, with the same script.
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
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

HERE = Path(__file__).parents[1]
BATCH = 8


def network(name: str) -> nn.Module:
    """Return a network without weights, whose residual branches do not start at zero, in evaluation mode."""
    if name == "maskrcnn_resnet50_fpn":
        sizes = {"min_size": 224, "max_size": 224}
        model = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, **sizes)
        model.double()  # rounding reorders the boxes of random weights
    else:
        model = timm.create_model(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.1)
    return model.eval()


def cpu(work: Callable[[], Any], repeats: int = 1) -> float:
    """Return the CPU seconds of a call, the least of some."""
    spent = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        spent.append(time.process_time() - start)
    return min(spent)


def forward(model: nn.Module, x: Tensor) -> float:
    """Return the CPU seconds of a forward pass."""
    with torch.inference_mode():
        model(x)
        return cpu(lambda: model(x), 3)


def reparameterize(name: str, size: int) -> Iterator[float]:
    """Yield the CPU seconds of reparameterizing with a report, and of a forward pass on the same images."""
    from widefield import surgery

    model = network(name)
    x = torch.randn(2, 3, size, size, dtype=next(model.parameters()).dtype)
    yield cpu(lambda: surgery.reparameterize(model, x, report=id))
    yield forward(model, x)


def trim(name: str, size: int) -> Iterator[float]:
    """Yield the CPU seconds of trimming on 32 images, and of a forward pass on these."""
    from widefield import surgery

    model = surgery.reparameterize(network(name), (3, 64, 64))
    batches = list(torch.randn(32, 3, size, size).split(BATCH))
    yield cpu(lambda: surgery.trim(model, 0.05, loader=batches))
    yield sum(forward(model, batch) for batch in batches)


def erf(name: str, size: int, count: int) -> Iterator[float]:
    """Yield the CPU seconds of an effective receptive field, and of a plain loop over its gradients."""
    from widefield import analysis

    model = network(name).requires_grad_(False)
    images = torch.randn(count, 3, size, size)

    def loop() -> Tensor:
        total = torch.zeros(size, size, dtype=torch.float64)
        for part in images.split(BATCH):
            leaf = part.clone().requires_grad_()
            found = model.forward_features(leaf)
            found[:, :, found.shape[2] // 2, found.shape[3] // 2].sum().backward()
            total += leaf.grad.clamp(min=0).sum((0, 1), dtype=torch.float64)
        return total / total.max()

    field = analysis.effective_receptive_field(model, images, batch_size=BATCH)
    torch.testing.assert_close(torch.from_numpy(field.scores), loop(), rtol=1e-3, atol=1e-5)
    yield cpu(lambda: analysis.effective_receptive_field(model, images, batch_size=BATCH), 2)
    yield cpu(loop, 2)


CASES: dict[str, tuple[Callable[[], Iterator[float]], str]] = {
    "reparameterize resnet50, 224": (lambda: reparameterize("resnet50", 224), "forward passes"),
    "reparameterize maskrcnn_resnet50_fpn, 224": (
        lambda: reparameterize("maskrcnn_resnet50_fpn", 224),
        "forward passes",
    ),
    "reparameterize halonet50ts, 256": (lambda: reparameterize("halonet50ts", 256), "forward passes"),
    "trim resnet18 by a budget, 32 images, 96": (lambda: trim("resnet18", 96), "forward passes"),
    "ERF of resnet50, 8 images, 128": (lambda: erf("resnet50", 128, 8), "plain loops"),
}
"""What is measured -> CPU seconds of the work and of its unit, and what the unit is."""


def measured(checkout: Path, only: str) -> dict[str, list[float]]:
    """Return the CPU seconds of each case and of its unit, from a process that imports a checkout."""
    settings = {**os.environ, "PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-W", "ignore", __file__, "--child", "--only", only]
    process = subprocess.run(words, env=settings, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, list[float]] = json.loads(process.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout to compare with")
    parser.add_argument("--only", default="*", metavar="GLOB", help="cases to run")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        torch.manual_seed(0)
        torch.set_num_threads(1)
        chosen = {case: work for case, (work, _) in CASES.items() if fnmatch.fnmatchcase(case, args.only)}
        print(json.dumps({case: list(work()) for case, work in chosen.items()}))
        return
    from widefield import report
    from widefield.benchmarks.record import publish

    checkouts = {"before": args.before.resolve()} if args.before else {}
    checkouts["now"] = HERE
    results = {label: measured(checkout, args.only) for label, checkout in checkouts.items()}
    rows = []
    for case in results["now"]:
        row = {"": case}
        for label, found in results.items():
            spent, one = found[case]
            row |= {f"{label}, s": f"{spent:.2f}", f"{label}, units": f"{spent / one:.1f}"}
        rows.append(row | {"unit": CASES[case][1]})
        print(" | ".join(rows[-1].values()), flush=True)
    old = " --before CHECKOUT" if args.before else ""
    publish(
        args.out / "verification_cpu",
        f"python benchmarks/verification.py{old}",
        {"seconds": results},
        f"CPU seconds of one thread, and the same in units: forward passes on the same images, or plain loops.\n\n"
        f"{report.markdown(rows)}",
    )


if __name__ == "__main__":
    main()
