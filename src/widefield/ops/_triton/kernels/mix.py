# ruff: noqa: RUF005, SIM108 (see fma.py)
"""Define the kernels of :mod:`widefield.ops._triton.routed`, which states their formulas."""

from __future__ import annotations

import triton
import triton.language as tl

from widefield.ops._triton.kernels.fma import accumulate, kernel_pointers, lanes, sums


@triton.jit
def mixed_taps(
    bank, live, shares, kh, kw, step, expert,
    K: tl.constexpr, KC: tl.constexpr, EXPERTS: tl.constexpr, SPANS: tl.constexpr, FLIP: tl.constexpr,
    BA: tl.constexpr, BB: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Return taps (kh, kw) to (kh + KC - 1, kw) of sum_r shares[r] bank[r]; ``expert`` is the stride of experts."""
    taps = ()
    for _ in tl.static_range(KC):
        if WIDE:
            taps = taps + (tl.zeros((BA, BB), tl.float32),)
        else:
            taps = taps + (0.0,)
    for r in tl.static_range(EXPERTS):
        if (kw >= (K - SPANS[r]) // 2) & (kw < (K + SPANS[r]) // 2):  # the column is within the expert's span
            for j in tl.static_range(KC):
                if FLIP:
                    at = ((K - 1 - kh - j) * K + (K - 1 - kw)) * step
                else:
                    at = ((kh + j) * K + kw) * step
                if KC == K:
                    if j >= (K - SPANS[r]) // 2 and j < (K + SPANS[r]) // 2:
                        tap = tl.load(bank + r * expert + at, mask=live, other=0.0).to(tl.float32)
                        taps = taps[:j] + (taps[j] + shares[r] * tap,) + taps[j + 1 :]
                else:
                    inside = (kh + j >= (K - SPANS[r]) // 2) & (kh + j < (K + SPANS[r]) // 2)
                    tap = tl.load(bank + r * expert + at, mask=live & inside, other=0.0).to(tl.float32)
                    taps = taps[:j] + (taps[j] + shares[r] * tap,) + taps[j + 1 :]
    return taps


@triton.jit(do_not_specialize=["planes", "H", "W", "row_blocks", "col_blocks"])
def mixture_kernel(
    x, bank, bias, weights, y, C, expert, planes, H, W, row_blocks, col_blocks,
    K: tl.constexpr, EXPERTS: tl.constexpr, SPANS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, FLIP: tl.constexpr, BIAS: tl.constexpr,
    BH: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr, KC: tl.constexpr,
):  # fmt: skip
    """Mix and convolve; see :mod:`.fma`.

    y[n, c] = (sum_r weights[n, r] bank[r, c]) * x[n, c] + sum_r weights[n, r] bias[r, c].
    """
    plane, n, c, col, live, row_block = lanes(
        tl.program_id(0), row_blocks, col_blocks, C, planes, BA, BB, CHANNELS_LAST
    )
    top = row_block * BH
    P: tl.constexpr = K // 2
    WIDE: tl.constexpr = CHANNELS_LAST or BA > 1
    if CHANNELS_LAST:
        step, tap_step, pitch = C, C, W.to(tl.int64) * C
        start = n * (pitch * H) + c
        at_y = start + col * C
    else:
        step: tl.constexpr = 1
        tap_step: tl.constexpr = 1
        pitch = W.to(tl.int64)
        start = plane * (pitch * H)
        at_y = start + col
    bank = kernel_pointers(bank, plane, n, c, C, K, K, BA, BB, CHANNELS_LAST, False)
    share = weights + n * EXPERTS
    if WIDE and not CHANNELS_LAST:  # planes of several samples: as wide as the tile, like the pointers to kernels
        share += tl.zeros((BA, BB), tl.int32)
    shares = ()
    for r in tl.static_range(EXPERTS):
        if CHANNELS_LAST:
            part = tl.load(share + r)
        else:
            part = tl.load(share + r, mask=live, other=0.0)
        shares = shares + (part.to(tl.float32),)
    left = col - P
    acc = sums(BA, BB, BH)
    if KC == K:
        lo, hi = 0, 1
    else:
        lo = tl.maximum(0, P - (top + BH - 1))
        hi = tl.minimum(K, H + P - top)
    for kh in range(lo, hi, KC):
        for kw in range(K):
            ok = live & (left + kw >= 0) & (left + kw < W)
            taps = mixed_taps(bank, live, shares, kh, kw, tap_step, expert, K, KC, EXPERTS, SPANS, FLIP, BA, BB, WIDE)
            acc = accumulate(acc, taps, x + start + (left + kw) * step, ok, top - P + kh, H, pitch, 1, 1, KC, BH)
    shift = 0.0
    if BIAS:
        for r in tl.static_range(EXPERTS):  # one share per plane, from equally narrow loads
            part = tl.load(weights + n * EXPERTS + r, mask=n * C < planes, other=0.0).to(tl.float32)
            shift += part * tl.load(bias + r * C + c, mask=c < C, other=0.0).to(tl.float32)
    for r in tl.static_range(BH):
        tl.store(
            y + at_y + (top + r) * pitch,
            (acc[r] + shift).to(y.dtype.element_ty),
            mask=live & (col < W) & (top + r < H),
        )


@triton.jit(do_not_specialize=["N"])
def bank_grad_kernel(
    dw, bank, weights, d_bank, part, N, expert, tap_blocks,
    K: tl.constexpr, EXPERTS: tl.constexpr, SPANS: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of the bank, and partial sums of the gradient of the routing weights.

    d_bank[r, c] = sum_n a[n, r] dw[n, c] within the span of r, otherwise 0.
    part[., n, r] = <dw[n, c], bank[r, c]> within the span of r.

    A program computes a block of BT taps of one channel, and a row of part. ``expert`` is the stride of experts.
    """
    pid = tl.program_id(0)
    c = (pid // tap_blocks).to(tl.int64)
    t = pid % tap_blocks * BT + tl.arange(0, BT)
    up, across = tl.abs(t // K - K // 2), tl.abs(t % K - K // 2)
    far = tl.where(t < K * K, tl.maximum(up, across), K)  # distance from the center, in taps
    at = c * (K * K) + t
    kernels = ()
    acc = ()
    for r in tl.static_range(EXPERTS):
        kernels = kernels + (tl.load(bank + r * expert + at, mask=far <= SPANS[r] // 2, other=0.0).to(tl.float32),)
        acc = acc + (tl.zeros((BT,), tl.float32),)
    for first in range(0, N, BN):
        n = first + tl.arange(0, BN)
        d = tl.load(
            dw + n.to(tl.int64)[:, None] * expert + at[None, :], mask=(n < N)[:, None] & (far < K)[None, :], other=0.0
        )
        for r in tl.static_range(EXPERTS):
            share = tl.load(weights + n * EXPERTS + r, mask=n < N, other=0.0).to(tl.float32)
            acc = acc[:r] + (acc[r] + tl.sum(share[:, None] * d, 0),) + acc[r + 1 :]
            dot = tl.sum(d * kernels[r][None, :], 1)
            tl.store(part + (pid.to(tl.int64) * N + n) * EXPERTS + r, dot, mask=n < N)
    for r in tl.static_range(EXPERTS):
        value = tl.where(far <= SPANS[r] // 2, acc[r], 0.0)
        tl.store(d_bank + r * expert + at, value.to(d_bank.dtype.element_ty), mask=far < K)
