"""What the Triton kernels need of GPUs that are not present: registers, spills, shared memory, occupancy.

python benchmarks/compiled_kernels.py [--archs 80 90 100] [--out benchmarks/results]

Every kernel is compiled ahead of time with its default block sizes, for shapes of RepLKNet's table 1, of ConvNeXt-T and
of MoRF. Nothing is timed. Occupancy is the share of a multiprocessor's warps that its registers and shared memory hold.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from widefield import report
from widefield.benchmarks.record import publish
from widefield.ops._triton import direct, gemm
from widefield.ops._triton.ahead import SHARED, Call, builds, depthwise, mixture

DTYPES = (torch.float32, torch.bfloat16)
DEPTHWISE = (
    (direct, (64, 96, 56, 56), 3),
    (direct, (64, 96, 56, 56), 7),
    (direct, (64, 384, 14, 14), 11),
    (gemm, (64, 384, 32, 32), 13),
    (gemm, (64, 384, 32, 32), 21),
    (gemm, (64, 384, 32, 32), 31),
)
EXPERTS = (3, 5, 7, 9, 11)


def cases() -> Iterator[tuple[dict[str, str], Call]]:
    """Yield what is compiled, in words, and the call."""
    for dtype in DTYPES:
        for channels_last in (False, True):
            words = {"dtype": str(dtype).removeprefix("torch."), "layout": "channels_last" if channels_last else "NCHW"}
            for backend, shape, size in DEPTHWISE:
                passes = depthwise(backend, shape, size, dtype=dtype, channels_last=channels_last)
                for step, call in passes.items():
                    yield {"kernel size": str(size), "pass": step, **words}, call
            for step, call in mixture((64, 384, 14, 14), EXPERTS, dtype=dtype, channels_last=channels_last).items():
                yield {"kernel size": "3 to 11, mixture", "pass": step, **words}, call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", type=int, nargs="+", choices=tuple(SHARED), default=list(SHARED))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False  # three products: what needs the most registers
    rows, lines = [], []
    for words, call in cases():
        found = {arch: builds(call, arch) for arch in args.archs}
        for number, first in enumerate(found[args.archs[0]]):
            line = {**words, "kernel": first.kernel}
            for arch, each in found.items():
                build = each[number]
                rows.append({**words, **{key: value for key, value in asdict(build).items() if key != "ptx"},
                             "occupancy": build.occupancy})  # fmt: skip
                line[f"sm_{arch}: registers, spilled B, shared KiB, warps"] = (
                    f"{build.registers}, {build.spill}, {build.shared / 1024:.0f}, {100 * build.occupancy:.0f} %"
                )
            print(" | ".join(line.values()), flush=True)
            lines.append(line)
    worst = max(rows, key=lambda row: row["spill"])
    text = f"{len(rows)} kernels. The most that a thread spills are {worst['spill']} bytes.\n\n" + report.markdown(
        lines
    )
    publish(args.out / "compiled_kernels", "python benchmarks/compiled_kernels.py", {"rows": rows}, text)


if __name__ == "__main__":
    main()
