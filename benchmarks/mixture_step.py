"""Training step of a mixture of five experts: one merged convolution against the five branches of the paper.

    python benchmarks/mixture_step.py [--batch 16] [--repeats 7] [--out benchmarks/results]

Depthwise rows are ConvNeXt-T's four stage shapes, in both memory formats; dense rows are ResNet's, with 3x3 and 5x5
experts, and show where "auto" should stay with the branches. A step is forward and backward, with gradients to the
input, every kernel and bias, and the routing weights. Each ratio compares two medians of the same interleaved run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

from widefield import bench, report
from widefield.ops import mixture_conv2d
from widefield.ops.mixture import _choose

DEPTHWISE = [(96, 56), (192, 28), (384, 14), (768, 7)]
DENSE = [(64, 56), (128, 28), (256, 14), (512, 7)]


def step(x: torch.Tensor, kernels: list, biases: list, weights: torch.Tensor, groups: int, backend: str) -> Callable:
    leaves = [x, *kernels, *biases, weights]

    def run() -> None:
        y = mixture_conv2d(x, kernels, biases, weights, groups=groups, backend=backend)
        torch.autograd.grad(y, leaves, torch.ones_like(y))

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.manual_seed(0)
    cases = [(c, h, (3, 5, 7, 9, 11), c) for c, h in DEPTHWISE] + [(c, h, (3, 5), 1) for c, h in DENSE]
    rows = []
    for channels, side, sizes, groups in cases:
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(args.batch, channels, side, side).contiguous(memory_format=layout).requires_grad_()
            kernels = [torch.randn(channels, channels // groups, k, k).requires_grad_() for k in sizes]
            biases = [torch.randn(channels).requires_grad_() for _ in sizes]
            weights = torch.rand(args.batch, len(sizes)).requires_grad_()
            candidates = {b: step(x, kernels, biases, weights, groups, b) for b in ("branches", "merged")}
            timed = bench.measure(candidates, repeats=args.repeats)
            rows.append(
                {
                    "kind": "depthwise" if groups > 1 else "dense",
                    "shape": f"{channels} x {side}x{side}",
                    "experts": str(sizes),
                    "layout": "channels_last" if layout is torch.channels_last else "NCHW",
                    **{
                        f"{name}_{p}_ms": 1e3 * getattr(row, p)
                        for name, row in timed.items()
                        for p in ("p20", "p50", "p80")
                    },
                    "speedup": timed["branches"].p50 / timed["merged"].p50,
                    "auto": _choose("auto", x, kernels[0], len(sizes), max(sizes), 1, groups),
                }
            )
            print(" | ".join(formatted(rows[-1]).values()), flush=True)
    environment = bench.environment()
    args.out.mkdir(parents=True, exist_ok=True)
    result = {
        "command": f"python benchmarks/mixture_step.py --batch {args.batch} --repeats {args.repeats}",
        "environment": environment,
        "rows": rows,
    }
    (args.out / "mixture_step.json").write_text(json.dumps(result, indent=1) + "\n")
    about = ", ".join(f"{key} {value}" for key, value in environment.items())
    table = report.markdown([formatted(row) for row in rows])
    (args.out / "mixture_step.md").write_text(f"`{result['command']}`: {about}\n\n{table}")


def formatted(row: dict) -> dict[str, str]:
    def spread(name: str) -> str:
        return f"{row[f'{name}_p50_ms']:.0f} ({row[f'{name}_p20_ms']:.0f}-{row[f'{name}_p80_ms']:.0f})"

    return {
        **{key: row[key] for key in ("kind", "shape", "experts", "layout")},
        "branches, ms (p20-p80)": spread("branches"),
        "merged, ms (p20-p80)": spread("merged"),
        "branches / merged": f"{row['speedup']:.2f}",
        "auto": row["auto"],
    }


if __name__ == "__main__":
    main()
