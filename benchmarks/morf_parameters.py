"""Compare the parameters of the registered MoRF networks with the paper's (tables 1 and 2).

    python benchmarks/morf_parameters.py [--out benchmarks/results]

Three counts, as the paper does not say which it means by "after reparameterization": the network that is trained (all
experts and routers); the reparameterized network as it is stored (the padded kernel bank and the routers); and the
network with one mixed kernel a layer, which is what an image meets (and the routers).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch

import widefield  # noqa: F401  registers the models
from widefield import report
from widefield.nn import MoRFConv2d

PAPER = [
    ("morf_resnet18", {}, "20M"),
    ("morf_resnet50", {}, "37M"),
    ("morf_convnext_tiny", {"kernel_sizes": (3, 5, 7)}, "30M"),
    ("morf_convnext_tiny", {}, "31M"),
    ("morf_convnext_tiny", {"kernel_sizes": (3, 5, 7, 9, 11, 13, 15)}, "31M"),
    ("morf_convnext_tiny", {"kernel_sizes": (3, 7, 11, 15, 19)}, "31M"),
    ("morf_convnext_tiny", {"kernel_sizes": (3, 9, 15, 21, 27)}, "32M"),
    ("morf_convnext_small", {}, "52M"),
    ("morf_convnext_base", {}, "91M"),
]


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def row(name: str, arguments: dict, paper: str) -> dict[str, str]:
    with torch.device("meta"):
        model = timm.create_model(name, **arguments).eval()
        layers = [m for m in model.modules() if isinstance(m, MoRFConv2d)]
        rest = count(model) - sum(count(m) for m in layers)
        fused = [m.fuse() for m in layers]
    routers = sum(count(m.router) for m in layers)
    one_kernel = sum(m.bank[0].numel() + (0 if m.bias_bank is None else m.bias_bank.shape[1]) for m in fused)
    sizes = tuple(zip(layers[0].kernel_sizes, layers[0].dilations, strict=True))
    return {
        "network": name,
        "experts": ", ".join(str(k) if d == 1 else f"{k} (dilation {d})" for k, d in sizes),
        "trained": f"{count(model) / 1e6:.1f}M",
        "fused bank": f"{(rest + sum(count(m) for m in fused)) / 1e6:.1f}M",
        "one kernel a layer": f"{(rest + one_kernel + routers) / 1e6:.1f}M",
        "of these, routers": f"{routers / 1e6:.2f}M",
        "paper": paper,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    text = report.markdown([row(*case) for case in PAPER])
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "morf_parameters.md").write_text(f"`python benchmarks/morf_parameters.py`\n\n{text}")


if __name__ == "__main__":
    main()
