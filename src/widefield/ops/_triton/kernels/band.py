# ruff: noqa: RUF005 (see fma.py)
"""Compute depthwise convolutions with large kernels on tensor cores: stride 1, dilation 1, any padding.

For one channel and one row kh of its kernel, a row convolution is a product with a band (Toeplitz) matrix::

    y[n, oh, ow] = sum_kh sum_iw x[n, oh + kh - ph, iw] T_kh[iw, ow],    T_kh[iw, ow] = w[kh, iw - ow + pw]

One tl.dot multiplies BM image rows, of any samples, by a BN-column block of T. For the 31x31 kernels of RepLKNet (Ding
et al. 2022, section 3) about half of the products are with nonzero entries of T. The launcher pads kernels, so that T
is gathered without a mask. Blocks of x begin at multiples of ALIGN columns, so that loads are wide.

The gradient with respect to x is the same with the kernel rotated by 180 degrees. The gradient with respect to the
kernel is another product of the same two maps::

    D_kh[iw, ow] = sum_(n, oh) x[n, oh + kh - ph, iw] g[n, oh, ow],    dW[kh, kw] = sum_ow D_kh[ow + kw - pw, ow]

Rows that the kernel moves outside the map are skipped, and the sums over diagonals use tl.gather.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["N", "H", "OH", "OW", "row_blocks", "col_blocks", "x_wide", "ph"])
def band_kernel(
    x, w, bias, y, N, C, H, OH, OW, row_blocks, col_blocks, x_wide, ph,
    KH: tl.constexpr, SHIFT: tl.constexpr, ORIGIN: tl.constexpr, LENGTH: tl.constexpr, CHUNKS: tl.constexpr,
    VECTOR: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    """Compute y[n, c, oh, ow] = bias[c] + sum_(kh, iw) x[n, c, oh + kh - ph, iw] w[c, kh, iw - ow + ORIGIN].

    w: (C, KH, LENGTH), zero around the kernel. W = x_wide * VECTOR, which tells the compiler how rows are aligned.
    With BY_ROW, rows of the product are ordered by (oh, n). Then all rows of a block leave the map together, and kernel
    rows that overlap none of them are skipped. Otherwise they are ordered by (n, oh) and share more of x.
    """
    pid = tl.program_id(0)
    row_block = pid % row_blocks
    col_block = pid // row_blocks % col_blocks
    c = pid // (row_blocks * col_blocks)
    W = x_wide * VECTOR
    m = row_block * BM + tl.arange(0, BM)
    live = m < N * OH
    lo, hi = 0, KH
    if BY_ROW:
        n, oh = m % N, m // N
        first = row_block * BM // N
        last = tl.minimum((row_block * BM + BM - 1) // N, OH - 1)
        lo = tl.maximum(ph - last, 0)
        hi = tl.minimum(H + ph - first, KH)
    else:
        n, oh = m // OH, m % OH
    col, k = tl.arange(0, BN), tl.arange(0, BK)
    plane = n.to(tl.int64) * C + c
    rows = x + (plane * H + oh - ph) * W
    band = w + c.to(tl.int64) * (KH * LENGTH) + (k[:, None] - col[None, :] - SHIFT + ORIGIN)
    acc = tl.zeros((BM, BN), tl.float32)
    for t in range(lo * CHUNKS, hi * CHUNKS):
        kh, chunk = t // CHUNKS, t % CHUNKS
        ih = oh + kh - ph
        iw = col_block * BN - SHIFT + chunk * BK + k
        a = tl.load(
            rows[:, None] + (kh * W + iw)[None, :],
            mask=(live & (ih >= 0) & (ih < H))[:, None] & ((iw >= 0) & (iw < W))[None, :],
            other=0.0,
        )
        b = tl.load(band + kh * LENGTH + chunk * BK)
        if WIDEN:  # the interpreter would multiply the bits of bfloat16 as integers
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    if BIAS:
        acc += tl.load(bias + c).to(tl.float32)
    ow = col_block * BN + col
    tl.store(
        y + ((plane * OH + oh) * OW)[:, None] + ow[None, :],
        acc.to(y.dtype.element_ty),
        mask=live[:, None] & (ow < OW)[None, :],
    )


@triton.jit
def _zeros(count: tl.constexpr, BI: tl.constexpr, BN: tl.constexpr):
    acc = ()
    for _ in tl.static_range(count):
        acc = acc + (tl.zeros((BI, BN), tl.float32),)
    return acc


@triton.jit(do_not_specialize=["N", "H", "OH", "col_blocks", "x_wide", "g_wide", "ph", "parts"])
def band_weight_grad_kernel(
    g, x, part, N, C, H, OH, col_blocks, x_wide, g_wide, ph, parts,
    KH: tl.constexpr, KW: tl.constexpr, SHIFT: tl.constexpr, OFFSET: tl.constexpr,
    X_VECTOR: tl.constexpr, G_VECTOR: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr, KWP: tl.constexpr, KB: tl.constexpr,
):  # fmt: skip
    """Compute the kernel's gradient, one partial sum per split of the rows (n, oh) of g.

    part[split, c, kh, kw] = sum_(n, oh, ow) x[n, c, oh + kh - ph, ow + kw - pw] g[n, c, oh, ow], (n, oh) in split.

    A program computes KB rows of the kernel, which share the loads of g, and one of ``parts`` splits. Tap kw of column
    ow of a block is D[ow + kw + OFFSET, ow], OFFSET = SHIFT - pw. BI covers the window or else the whole map.
    """
    GROUPS: tl.constexpr = (KH + KB - 1) // KB
    pid = tl.program_id(0)
    kh0 = pid % GROUPS * KB
    split = pid // GROUPS % parts
    c = pid // (GROUPS * parts)
    W = x_wide * X_VECTOR
    OW = g_wide * G_VECTOR
    first = tl.maximum(ph - kh0 - (KB - 1), 0)  # first row of g that uses a row of x with any of the KB kernel rows
    count = tl.maximum(tl.minimum(OH, H + ph - kh0) - first, 0)
    total = N * count
    per = tl.cdiv(tl.cdiv(total, BM), parts) * BM
    j, i, k, kq = tl.arange(0, BN), tl.arange(0, BI), tl.arange(0, BM), tl.arange(0, KWP)
    out = ()
    for _ in tl.static_range(KB):
        out = out + (tl.zeros((KWP,), tl.float32),)
    for col_block in range(col_blocks):
        ow = col_block * BN + j
        iw = col_block * BN - SHIFT + i
        acc = _zeros(KB, BI, BN)
        for start in range(split * per, tl.minimum((split + 1) * per, total), BM):
            m = start + k
            n, oh = m // tl.maximum(count, 1), first + m % tl.maximum(count, 1)
            live = m < total
            plane = n.to(tl.int64) * C + c
            b = tl.load(
                g + ((plane * OH + oh) * OW)[:, None] + ow[None, :], mask=live[:, None] & (ow < OW)[None, :], other=0.0
            )
            if WIDEN:
                b = b.to(tl.float32)
            for q in tl.static_range(KB):
                ih = oh + (kh0 + q - ph)
                a = tl.load(
                    x + ((plane * H + ih) * W)[:, None] + iw[None, :],
                    mask=(live & (ih >= 0) & (ih < H))[:, None] & ((iw >= 0) & (iw < W))[None, :],
                    other=0.0,
                )
                if WIDEN:
                    a = a.to(tl.float32)
                acc = acc[:q] + (tl.dot(tl.trans(a), b, acc[q], input_precision=PRECISION),) + acc[q + 1 :]
        at = kq[:, None] + j[None, :] + OFFSET
        inside = (at >= 0) & (at < BI)
        at = tl.minimum(tl.maximum(at, 0), BI - 1)
        for q in tl.static_range(KB):
            taps = tl.sum(tl.where(inside, tl.gather(acc[q], at, 0), 0.0), 1)
            out = out[:q] + (out[q] + taps,) + out[q + 1 :]
    for q in tl.static_range(KB):
        at_out = ((split.to(tl.int64) * C + c) * KH + kh0 + q) * KW + kq
        tl.store(part + at_out, out[q].to(part.dtype.element_ty), mask=(kq < KW) & (kh0 + q < KH))
