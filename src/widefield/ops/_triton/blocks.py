"""List candidate block sizes for measurement, most promising first; the first is the default without measurement.

Each candidate is a dict of a kernel's constants in capitals and of Triton's ``num_warps`` and ``num_stages``. They are
guesses from counting loads and registers. Every candidate is correct for every problem.
"""

from __future__ import annotations

from collections.abc import Iterable

from widefield._checks import Pair
from widefield.ops._triton.host import even_parts, power_of_two
from widefield.ops._triton.tune import Config


def forward_configs(kernel: Pair, size: Pair, channels: int, batch: int, channels_last: bool) -> list[Config]:
    """Return candidates for :func:`.kernels.fma.forward_kernel`; ``size`` is that of the output."""
    height = kernel[0]
    chunk = height if height <= 16 else even_parts(height, 8)
    small = chunk == height and height * kernel[1] <= 49 and not channels_last  # registers of unrolled columns
    found = []
    for i, tile in enumerate(_tiles(kernel[1], size[1], channels, batch, channels_last)):
        guesses = [(8, 0), (16, 0)] if i else [(8, 0), (16, 0), (4, 0), (8, 1)]
        for rows, unroll in guesses:
            found.append({"BH": even_parts(size[0], rows), **tile, "KC": chunk, "UNROLL": int(unroll and small)})
    return _distinct(found)


def strided_configs(size: Pair, channels: int, batch: int, channels_last: bool, stride: int) -> list[Config]:
    """Return candidates for :func:`.kernels.fma.strided_input_grad_kernel`.

    ``size``: rows of dx, columns of one phase of dx.
    """
    found = []
    for tile in _tiles(3, size[1], channels, batch, channels_last):
        for rows in (8, 4):
            parts = even_parts(-(-size[0] // stride), max(1, rows // stride))
            found.append({"BH": parts * stride, **tile})
    return _distinct(found)


def weight_grad_configs(
    kernel: Pair, size: Pair, channels: int, batch: int, channels_last: bool, per_sample: bool
) -> list[Config]:
    """Return candidates for :func:`.kernels.fma.weight_grad_kernel`; ``size`` is that of grad.

    A program has one register for each tap.
    """
    found = []
    for taps, rows, warps in ((52, 8, 1), (52, 4, 1), (28, 8, 1), (28, 4, 4)):
        tall = even_parts(kernel[0], 13)
        wide = even_parts(kernel[1], max(1, taps // tall))
        threads = 32 * warps
        if channels_last:
            b = min(32, power_of_two(channels))
            a = max(1, min(threads // b, power_of_two(size[1])))
        else:
            b = min(_columns(kernel[1], size[1]), threads)
            planes = batch * channels if per_sample else batch
            a = max(1, min(threads // b, power_of_two(planes)))
        found.append({"BH": even_parts(size[0], rows), "BA": a, "BB": b, "KC": tall, "KD": wide, "num_warps": warps})
    return _distinct(found)


def _tiles(width: int, columns: int, channels: int, batch: int, channels_last: bool) -> Iterable[Config]:
    """Yield tiles of lanes for rows of ``columns``, with their numbers of warps."""
    if channels_last:
        a = min((8, 4, 2, 16), key=lambda a: -(-columns // a) * (a + width / 4))
        for warps, each in ((4, 4), (4, 2), (2, 4)):  # each: neighboring channels per thread, in one load
            b = min(power_of_two(channels), max(each, 32 * warps * each // a))
            yield {"BA": a, "BB": b, "num_warps": warps}
        return
    b = _columns(width, columns)
    if b >= 64:  # in a tile of one plane, taps are scalars, loaded once for all columns of a thread
        yield {"BA": 1, "BB": b, "num_warps": 1}
        yield {"BA": 1, "BB": b, "num_warps": 2}
    for warps in (4, 2):
        yield {"BA": min(max(1, 32 * warps // b), power_of_two(batch * channels)), "BB": b, "num_warps": warps}


def _columns(width: int, columns: int) -> int:
    """Return a number of lanes for rows of ``columns`` with few idle lanes and few columns read twice."""
    return min((128, 64, 32, 16, 8), key=lambda b: -(-columns // b) * (b + (min(width, 16) + 3) / 2))


def _distinct(found: Iterable[Config]) -> list[Config]:
    return [dict(items) for items in dict.fromkeys(tuple(config.items()) for config in found)]


def band_configs(size: Pair, batch: int, precision: str) -> list[Config]:
    """Return candidates for :func:`.kernels.band.band_kernel`; ``size`` is that of the output.

    Configurations with one stage come first. With more stages, copies ahead of the products bypass the L1 cache, from
    which each image row is read KH times.
    """
    whole = max(16, power_of_two(size[1]))
    height = max(16, power_of_two(batch * size[0]))
    if size[1] <= 16:
        guesses = [(128, 16, 16, 4), (64, 16, 16, 4), (256, 16, 16, 8)]
    elif size[1] <= 32:
        guesses = [(128, 32, 32, 4), (64, 32, 32, 4), (256, 32, 32, 8)]
    elif precision == "tf32x3":  # each operand is kept in two parts, so wider blocks do not fit in the registers
        guesses = [(128, 32, 32, 4), (256, 32, 32, 8), (64, 32, 32, 4)]
    else:
        guesses = [(128, 32, 32, 4), (128, 64, 32, 8), (256, 32, 32, 8)]
    found = []
    for by_row, stages in ((1, 1), (0, 1), (0, 2)):
        for m, n, k, warps in guesses[: 2 if stages > 1 else None]:
            block = {"BM": min(m, height), "BN": min(n, whole), "BK": k, "BY_ROW": by_row}
            found.append({**block, "num_warps": 4 if block["BM"] < 128 else warps, "num_stages": stages})
    return _distinct(found)


def band_weight_grad_configs(size: Pair) -> list[Config]:
    """Return candidates for :func:`.kernels.band.band_weight_grad_kernel`; ``size`` is that of grad."""
    whole = max(16, power_of_two(size[1]))
    found = []
    for m, n, together, warps, stages in (
        (32, 32, 1, 4, 1), (32, 32, 2, 4, 1), (32, 32, 4, 8, 1), (64, 32, 1, 8, 2), (32, 64, 1, 8, 1),
        (64, 16, 2, 4, 1),
    ):  # fmt: skip
        found.append({"BM": m, "BN": min(n, whole), "KB": together, "num_warps": warps, "num_stages": stages})
    return _distinct(found)


def mixture_configs(side: int, size: Pair, channels: int, batch: int, channels_last: bool) -> list[Config]:
    """Return candidates for :func:`.kernels.mix.mixture_kernel`, with many rows, which share the work of mixing."""
    chunk = side if side <= 16 else even_parts(side, 8)
    found = []
    tiles = list(_tiles(side, size[1], channels, batch, channels_last))
    if channels_last:  # two channels per thread first: the taps of four leave few registers
        tiles = [tiles[1], tiles[0], *tiles[2:]]
    for tile in tiles:
        for rows in (8, 16) if channels_last else (16, 8):
            found.append({"BH": even_parts(size[0], rows), **tile, "KC": chunk})
    return _distinct(found)
