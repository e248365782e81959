"""Compare three ways to compute a 31x31 depthwise convolution with fewer products against PyTorch in channels_last.

python benchmarks/fewer_products.py [--repeats 15] [--out benchmarks/results]

PyTorch (oneDNN) multiplies every tap with every pixel, at some share of the speed of a matrix product. That share
bounds the gain of any direct convolution. These three need fewer products:

- spectra: the "fft" backend of widefield.ops.depthwise_conv2d, 2-D transforms and a product for each frequency;
- row spectra: Fourier transforms along the rows as matrix products, then for each frequency a convolution along the
  columns, with three real products for a complex one;
- Karatsuba: the map as 2x2 interleaved maps and the kernel likewise, 9 convolutions of a quarter of the size instead of
  16 (fast FIR; Winograd 1980, F(2, 2) on both axes).

All are exact up to rounding; errors are measured against float64. Row spectra and Karatsuba, which the package does not
have, process chunks of channels; the fastest chunk size is reported.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from widefield import report
from widefield.benchmarks.depthwise import Case
from widefield.benchmarks.record import milliseconds, publish, times
from widefield.benchmarks.settings import Settings, ceilings
from widefield.ops import depthwise_conv2d

KERNEL, HALF = 31, 15
CASES = ((4, 384, 28), (2, 768, 28), (4, 384, 32), (1, 384, 56), (1, 384, 64))
"""(batch, channels, side), sides even."""
CHUNKS = (32, 64, 128)


def stock(x: Tensor, weight: Tensor) -> Tensor:
    """Return PyTorch's own result."""
    return F.conv2d(x, weight, padding=HALF, groups=x.shape[1])


def in_chunks(convolve: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, count: int) -> Tensor:
    """Convolve chunks of channels, so that intermediate results stay in the cache."""
    y = torch.empty_like(x)
    for i in range(0, x.shape[1], count):
        y[:, i : i + count] = convolve(x[:, i : i + count], weight[i : i + count])
    return y


@functools.cache
def row_transforms(side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the matrices (side, M), (KERNEL, M) and (M, side) that transform rows of maps, rows of kernels, and back.

    Circular rows have side + HALF pixels, so that wrap-around does not reach the outputs. (a + ib)(c + id) takes three
    products, k1 = c (a + b), k2 = a (d - c) and k3 = b (c + d): its real part is k1 - k3, its imaginary part k1 + k2.
    Real frequencies take one product.
    """
    length = side + HALF
    frequencies = torch.arange(length // 2 + 1, dtype=torch.float64)
    real = frequencies * 2 % length == 0

    def waves(positions: Tensor) -> tuple[Tensor, Tensor]:
        angle = 2 * math.pi / length * torch.outer(positions.double(), frequencies)
        return angle.cos(), angle.sin()

    a, b = waves(torch.arange(side))
    b = -b
    c, d = waves(torch.arange(KERNEL) - HALF)  # conjugate: F.conv2d correlates
    p, q = (part / length for part in waves(torch.arange(side)))
    into = torch.cat([a[:, real], (a + b)[:, ~real], a[:, ~real], b[:, ~real]], 1)
    kernel = torch.cat([c[:, real], c[:, ~real], (d - c)[:, ~real], (c + d)[:, ~real]], 1)
    back = torch.cat([p[:, real], 2 * (p - q)[:, ~real], -2 * q[:, ~real], -2 * p[:, ~real]], 1)
    return into.float(), kernel.float(), back.t().contiguous().float()


def row_spectra(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve (N, C, H, W) with (C, 1, KERNEL, KERNEL)."""
    batch, channels, side, _ = x.shape
    into, kernel, back = row_transforms(side)
    products = channels * into.shape[1]
    taps = (weight.reshape(-1, KERNEL) @ kernel).view(channels, KERNEL, -1).transpose(1, 2).reshape(products, 1, -1, 1)
    rows = x.permute(2, 0, 1, 3).reshape(-1, side) @ into  # samples become columns: they share their kernels
    image = rows.view(1, side, batch, products).permute(0, 3, 1, 2)
    done = F.conv2d(image, taps, padding=(HALF, 0), groups=products)
    y = done.permute(0, 2, 3, 1).reshape(-1, into.shape[1]) @ back
    return y.view(side, batch, channels, side).permute(1, 2, 0, 3)


def thirds(x: Tensor, axis: int, out: Tensor) -> None:
    """Split an axis of length 2n into three of length n + 1 on a new axis: odd - previous even, even, even - odd."""
    x, out = x.movedim(axis, 0), out.movedim((axis, axis + 1), (0, 1))
    even, odd = x[::2], x[1::2]
    torch.neg(even, out=out[:-1, 0])
    out[-1] = 0
    out[1:, 0] += odd
    out[:-1, 1] = even
    torch.sub(even, odd, out=out[:-1, 2])


def joined(y: Tensor, axis: int) -> Tensor:
    """Undo `thirds`: first + second are the even outputs, second - third the odd ones."""
    first, second, third = y.unbind(axis + 1)
    return torch.stack((first + second, second - third), axis + 1).flatten(axis, axis + 1)


def karatsuba(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve (N, C, H, W) with (C, 1, KERNEL, KERNEL)."""
    batch, channels, side, _ = x.shape
    taps = F.pad(weight[:, 0], (0, 1, 0, 1))
    for axis in (1, 3):
        even, odd = (taps.movedim(axis, 0)[i::2] for i in (0, 1))
        taps = torch.stack((even, even + odd, odd), 1).movedim((0, 1), (axis, axis + 1))
    kernels = taps.permute(2, 4, 0, 1, 3).reshape(9 * channels, 1, taps.shape[1], taps.shape[3])  # of (C, k, 3, k, 3)
    half = side // 2 + 1
    rows = x.new_empty(batch, half, 3, side, channels)
    image = x.new_empty(batch, half, half, 3, 3, channels)
    thirds(x.permute(0, 2, 3, 1), 1, rows)
    thirds(rows, 3, image.transpose(2, 3))
    image = image.flatten(3).permute(0, 3, 1, 2)
    y = F.conv2d(image, kernels, padding=HALF // 2, groups=9 * channels)
    y = y.permute(0, 2, 3, 1).unflatten(3, (3, 3, channels)).permute(0, 1, 3, 2, 4, 5)
    return joined(joined(y, 3), 1).permute(0, 3, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    command = f"python benchmarks/fewer_products.py --repeats {args.repeats}"
    settings = Settings(command, repeats=args.repeats, budget_s=60)
    top = ceilings(settings)
    results, rows, worst = [], [], 0.0
    for batch, channels, side in CASES:
        torch.manual_seed(0)
        x = torch.randn(batch, channels, side, side).contiguous(memory_format=torch.channels_last)
        planes, weight = x.contiguous(), torch.randn(channels, 1, KERNEL, KERNEL)
        exact = stock(x.double(), weight.double())
        ways: dict[str, Callable[[], Tensor]] = {
            "stock": functools.partial(stock, x, weight),
            "spectra": functools.partial(depthwise_conv2d, planes, weight, backend="fft"),
        }
        for name, way in (("row spectra", row_spectra), ("Karatsuba", karatsuba)):
            ways |= {f"{name}, {n} at a time": functools.partial(in_chunks, way, x, weight, n) for n in CHUNKS}
        with torch.no_grad():
            measured = settings.measure(ways)
        flops = Case(batch, channels, side, (KERNEL, KERNEL)).flops("forward")
        share = flops / measured["stock"].p50 / top.gemm_flops
        row = {
            "shape": f"{batch} x {channels} x {side}x{side}",
            "channels_last, ms": milliseconds(measured["stock"].to_dict()),
            "of gemm": f"{100 * share:.0f}%",
        }
        for name in ("spectra", "row spectra", "Karatsuba"):
            best = min((key for key in ways if key.startswith(name)), key=lambda key: measured[key].p50)
            error = float((ways[best]() - exact).abs().max() / exact.abs().max())
            row[f"{name}, ms"] = f"{1e3 * measured[best].p50:.3g}, {measured['stock'].p50 / measured[best].p50:.2f}x"
            worst = max(worst, error)
            results.append({"shape": row["shape"], "way": best, "error": error, "times": times(measured)})
        rows.append(row)
        print(" | ".join(row.values()), flush=True)
    publish(
        args.out / "fewer_products_cpu",
        command,
        {"gemm_flops": top.gemm_flops, "results": results},
        f"31x31 forward convolutions, float32. Matrix product: {top.gemm_flops / 1e9:.0f} GFLOP/s; 'of gemm' is the "
        "share of it that PyTorch's channels_last convolution reaches, counting only products inside the map. "
        "Each time is followed by the speed relative to that convolution; 'spectra' run on NCHW maps, which suit "
        f"them, the others on channels_last maps. Largest error: {worst:.0e} of the outputs' scale.\n\n"
        f"{report.markdown(rows)}",
    )


if __name__ == "__main__":
    main()
