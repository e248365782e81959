# ruff: noqa: RUF005, SIM108 (Triton supports neither unpacking nor conditional expressions as Python does)
"""Compute depthwise convolutions with small kernels by multiply-adds: any stride, padding, dilation and memory format.

A program computes BH rows of a tile of lanes. In NCHW the tile is BA planes (n, c) by BB columns, so that small maps
fill it too; in channels_last it is BA columns by BB channels. For each column of the kernel, the program loads the
column's taps and every image row that any of its output rows needs, each once::

    y[r] += w[kh, kw] * x[r * stride + kh * dilation - padding]   for all r < BH, kh < KC

All r and kh are unrolled, so BH + 2 KC loads serve BH * KC multiply-adds. Rows are separate values, since an axis of
the tile would be distributed over threads. Large kernels are processed in chunks of KC rows; rows outside the map are
skipped.

With stride 1, the gradient with respect to the input is the same convolution with the kernel rotated by 180 degrees.
With larger strides, each phase of the columns has its own program, so that no lane processes the zeros between columns.
The gradient with respect to the kernel keeps one sum per tap and lane, in a fixed order without atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add(acc, at: tl.constexpr, value):
    """Return the tuple of tiles with ``value`` added to the tile at index ``at``."""
    return acc[:at] + (acc[at] + value,) + acc[at + 1 :]


@triton.jit
def sums(BA: tl.constexpr, BB: tl.constexpr, COUNT: tl.constexpr):
    """Return COUNT tiles of zeros."""
    acc = ()
    for _ in tl.static_range(COUNT):
        acc = acc + (tl.zeros((BA, BB), tl.float32),)
    return acc


@triton.jit
def lanes(pid, row_blocks, col_blocks, C, planes, BA: tl.constexpr, BB: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Return a program's work: each lane's plane (n * C + c), n, c, column and whether it exists; and its row block.

    Programs that share image rows or cache lines are adjacent.
    """
    if CHANNELS_LAST:
        channel_blocks = tl.cdiv(C, BB)
        c = (pid % channel_blocks) * BB + tl.arange(0, BB)[None, :]
        rest = pid // channel_blocks
        col = (rest % col_blocks) * BA + tl.arange(0, BA)[:, None]
        rest = rest // col_blocks
        n = (rest // row_blocks).to(tl.int64)
        plane = n * C + c
        live = c < C
        row_block = rest % row_blocks
    else:
        col = (pid % col_blocks) * BB + tl.arange(0, BB)[None, :]
        rest = pid // col_blocks
        row_block = rest % row_blocks
        plane = (rest // row_blocks).to(tl.int64) * BA
        if BA > 1:  # otherwise it stays a scalar, and so does everything computed from it
            plane = plane + tl.arange(0, BA)[:, None]
        n = plane // C
        c = (plane % C).to(tl.int32)
        live = plane < planes
    return plane, n, c, col, live, row_block


@triton.jit
def accumulate(
    acc, taps, source, ok, row, height, pitch,
    SH: tl.constexpr, DH: tl.constexpr, KC: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Add KC taps times image rows ``row + r * SH + kh * DH`` to each of BH output rows; ``source`` is row 0."""
    for i in tl.static_range((BH - 1) * SH + (KC - 1) * DH + 1):
        value = tl.load(
            source + (row + i).to(tl.int64) * pitch, mask=ok & (row + i >= 0) & (row + i < height), other=0.0
        ).to(tl.float32)
        for r in tl.static_range(BH):
            if i >= r * SH and (i - r * SH) % DH == 0 and (i - r * SH) // DH < KC:
                acc = add(acc, r, taps[(i - r * SH) // DH] * value)
    return acc


@triton.jit
def read_taps(
    w, live, kh, kw, step,
    KH: tl.constexpr, KW: tl.constexpr, KC: tl.constexpr, FLIP: tl.constexpr,
):  # fmt: skip
    """Return taps (kh, kw) to (kh + KC - 1, kw), zero below the kernel."""
    taps = ()
    for j in tl.static_range(KC):
        if FLIP:
            at = ((KH - 1 - kh - j) * KW + (KW - 1 - kw)) * step
        else:
            at = ((kh + j) * KW + kw) * step
        if KC == KH:
            tap = tl.load(w + at, mask=live, other=0.0)
        else:
            tap = tl.load(w + at, mask=live & (kh + j < KH), other=0.0)
        taps = taps + (tap.to(tl.float32),)
    return taps


@triton.jit
def kernel_pointers(
    w, plane, n, c, C,
    KH: tl.constexpr, KW: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, PER_SAMPLE: tl.constexpr,
):  # fmt: skip
    """Return a pointer to each lane's kernel, in (G, KH, KW, C) for channels_last, otherwise in (G, C, KH, KW).

    The pointers are as wide as the tile, so that each thread loads the taps it uses; narrower ones would be passed
    through shared memory.
    """
    if CHANNELS_LAST:
        if PER_SAMPLE:
            w += n * (KH * KW * C)
        w += c + tl.zeros((BA, BB), tl.int32)
    else:
        kernel = plane if PER_SAMPLE else c
        w += kernel.to(tl.int64) * (KH * KW)
        if BA > 1:
            w += tl.zeros((BA, BB), tl.int32)
    return w


@triton.jit(do_not_specialize=["planes", "H", "W", "OH", "OW", "ph", "pw", "row_blocks", "col_blocks"])
def forward_kernel(
    x, w, bias, y, C, planes, H, W, OH, OW, ph, pw, row_blocks, col_blocks,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, PER_SAMPLE: tl.constexpr, FLIP: tl.constexpr, BIAS: tl.constexpr,
    BH: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr, KC: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Convolve x with w.

    y[n, c, oh, ow] = bias[c] + sum_(kh, kw) w[c, kh, kw] x[n, c, oh SH + kh DH - ph, ow SW + kw DW - pw].
    """
    plane, n, c, col, live, row_block = lanes(
        tl.program_id(0), row_blocks, col_blocks, C, planes, BA, BB, CHANNELS_LAST
    )
    top = row_block * BH
    if CHANNELS_LAST:
        step, pitch = C, W.to(tl.int64) * C
        x += n * (pitch * H) + c
        y += n * (OW.to(tl.int64) * C * OH) + c + col * C
        y_pitch = OW.to(tl.int64) * C
        tap_step = C
    else:
        step: tl.constexpr = 1
        tap_step: tl.constexpr = 1
        pitch = W.to(tl.int64)
        x += plane * (pitch * H)
        y += plane * (OW.to(tl.int64) * OH) + col
        y_pitch = OW.to(tl.int64)
    w = kernel_pointers(w, plane, n, c, C, KH, KW, BA, BB, CHANNELS_LAST, PER_SAMPLE)
    left = col * SW - pw
    acc = sums(BA, BB, BH)
    if KC == KH:
        lo, hi = 0, 1
    else:  # rows of the kernel that overlap the map for any of the BH rows
        lo = tl.maximum(0, tl.cdiv(tl.maximum(ph - (top + BH - 1) * SH, 0), DH))
        hi = tl.minimum(KH, tl.cdiv(tl.maximum(H + ph - top * SH, 0), DH))
    for kh in range(lo, hi, KC):
        row = top * SH - ph + kh * DH
        if UNROLL:
            for kw in tl.static_range(KW):
                ok = live & (left + kw * DW >= 0) & (left + kw * DW < W)
                taps = read_taps(w, live, kh, kw, tap_step, KH, KW, KC, FLIP)
                acc = accumulate(acc, taps, x + (left + kw * DW) * step, ok, row, H, pitch, SH, DH, KC, BH)
        else:
            for kw in range(KW):
                ok = live & (left + kw * DW >= 0) & (left + kw * DW < W)
                taps = read_taps(w, live, kh, kw, tap_step, KH, KW, KC, FLIP)
                acc = accumulate(acc, taps, x + (left + kw * DW) * step, ok, row, H, pitch, SH, DH, KC, BH)
    shift = 0.0
    if BIAS:
        if PER_SAMPLE:
            shift = tl.load(bias + plane, mask=live, other=0.0).to(tl.float32)
        else:
            shift = tl.load(bias + c, mask=live, other=0.0).to(tl.float32)
    for r in tl.static_range(BH):
        tl.store(
            y + (top + r) * y_pitch,
            (acc[r] + shift).to(y.dtype.element_ty),
            mask=live & (col < OW) & (top + r < OH),
        )


@triton.jit(do_not_specialize=["planes", "H", "W", "OH", "OW", "pw", "row_blocks", "col_blocks"])
def strided_input_grad_kernel(
    g, w, dx, C, planes, H, W, OH, OW, pw, row_blocks, col_blocks,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    PH: tl.constexpr, CHANNELS_LAST: tl.constexpr, PER_SAMPLE: tl.constexpr,
    BH: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """Compute the gradient with respect to the input, for any stride.

    dx[n, c, ih, iw] = sum_(kh, kw) w[c, kh, kw] g[n, c, (ih + PH - kh DH) / SH, (iw + pw - kw DW) / SW],
    over all (kh, kw) for which both divisions are exact.

    BH is a multiple of SH, so that the compiler knows which rows divide; columns iw = SW * lane + phase.
    """
    pid = tl.program_id(0)
    phase = pid % SW
    plane, n, c, lane, live, row_block = lanes(pid // SW, row_blocks, col_blocks, C, planes, BA, BB, CHANNELS_LAST)
    top = row_block * BH
    col = lane * SW + phase
    if CHANNELS_LAST:
        step, pitch = C, OW.to(tl.int64) * C
        g += n * (pitch * OH) + c
        dx += n * (W.to(tl.int64) * C * H) + c + col * C
        dx_pitch = W.to(tl.int64) * C
        tap_step = C
    else:
        step: tl.constexpr = 1
        tap_step: tl.constexpr = 1
        pitch = OW.to(tl.int64)
        g += plane * (pitch * OH)
        dx += plane * (W.to(tl.int64) * H) + col
        dx_pitch = W.to(tl.int64)
    w = kernel_pointers(w, plane, n, c, C, KH, KW, BA, BB, CHANNELS_LAST, PER_SAMPLE)
    FIRST: tl.constexpr = (PH - (KH - 1) * DH) // SH  # first row of g that BH rows of dx need, from top / SH
    LAST: tl.constexpr = (BH - 1 + PH) // SH
    acc = sums(BA, BB, BH)
    for kw in range(KW):
        across = phase + pw - kw * DW
        if across % SW == 0:
            at = lane + across // SW
            ok = live & (at >= 0) & (at < OW)
            taps = read_taps(w, live, 0, kw, tap_step, KH, KW, KH, False)
            for i in tl.static_range(LAST - FIRST + 1):
                row = top // SH + FIRST + i
                value = tl.load(
                    g + at * step + row.to(tl.int64) * pitch, mask=ok & (row >= 0) & (row < OH), other=0.0
                ).to(tl.float32)
                for r in tl.static_range(BH):
                    if (
                        r + PH >= (FIRST + i) * SH
                        and (r + PH - (FIRST + i) * SH) % DH == 0
                        and (r + PH - (FIRST + i) * SH) // DH < KH
                    ):
                        acc = add(acc, r, taps[(r + PH - (FIRST + i) * SH) // DH] * value)
    for r in tl.static_range(BH):
        tl.store(dx + (top + r) * dx_pitch, acc[r].to(dx.dtype.element_ty), mask=live & (col < W) & (top + r < H))


@triton.jit(do_not_specialize=["N", "H", "W", "OH", "OW", "ph", "pw", "row_blocks", "col_blocks", "tiles", "per"])
def weight_grad_kernel(
    g, x, part, N, C, H, W, OH, OW, ph, pw, row_blocks, col_blocks, tiles, per,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, PER_SAMPLE: tl.constexpr,
    BH: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr, KC: tl.constexpr, KD: tl.constexpr,
):  # fmt: skip
    """Compute the gradient with respect to the kernel, in partial sums.

    dW[c, kh, kw] = sum_(n, oh, ow) g[n, c, oh, ow] x[n, c, oh SH + kh DH - ph, ow SW + kw DW - pw].

    A program computes KC x KD taps of one channel (BB channels in channels_last; BA planes in NCHW with per-sample
    kernels) and sums over ``per`` of the tiles into which the maps are split.
    part: (splits, G, C, KH, KW), or (splits, G, KH, KW, C) in channels_last.

    This is one long function because its loops share a tuple of accumulators, which Triton helpers could only return
    as a whole.
    """
    COLS: tl.constexpr = (KW + KD - 1) // KD
    CHUNKS: tl.constexpr = COLS * ((KH + KC - 1) // KC)
    chunk = tl.program_id(0) % CHUNKS
    unit = tl.program_id(0) // CHUNKS
    kh0, kw0 = chunk // COLS * KC, chunk % COLS * KD
    a, b = tl.arange(0, BA)[:, None], tl.arange(0, BB)[None, :]
    if CHANNELS_LAST:
        channel_blocks = tl.cdiv(C, BB)
        c = (unit % channel_blocks) * BB + b
        sample = (unit // channel_blocks).to(tl.int64)  # 0 unless kernels are per-sample
        step = C
    else:
        step: tl.constexpr = 1
    acc = sums(BA, BB, KC * KD)
    split = tl.program_id(1)
    for tile in range(split * per, tl.minimum((split + 1) * per, tiles)):
        col_block = tile % col_blocks
        top = tile // col_blocks % row_blocks * BH
        group = tile // (col_blocks * row_blocks)
        if CHANNELS_LAST:
            col = col_block * BA + a
            live = c < C
            n = sample if PER_SAMPLE else group.to(tl.int64)
            pitch = W.to(tl.int64) * C
            source = x + n * (pitch * H) + c
            grad = g + n * (OW.to(tl.int64) * C * OH) + c + col * C
            g_pitch = OW.to(tl.int64) * C
        else:
            col = col_block * BB + b
            if PER_SAMPLE:
                plane = unit.to(tl.int64) * BA + a
                live = plane < N.to(tl.int64) * C
            else:
                n = group.to(tl.int64) * BA + a
                plane = n * C + unit
                live = n < N
            pitch = W.to(tl.int64)
            source = x + plane * (pitch * H)
            grad = g + plane * (OW.to(tl.int64) * OH) + col
            g_pitch = OW.to(tl.int64)
        rows = ()
        for r in tl.static_range(BH):
            rows = rows + (
                tl.load(grad + (top + r) * g_pitch, mask=live & (col < OW) & (top + r < OH), other=0.0).to(tl.float32),
            )
        row = top * SH - ph + kh0 * DH
        for q in tl.static_range(KD):
            at = col * SW - pw + (kw0 + q) * DW
            ok = live & (at >= 0) & (at < W)
            for i in tl.static_range((BH - 1) * SH + (KC - 1) * DH + 1):
                value = tl.load(
                    source + at * step + (row + i).to(tl.int64) * pitch,
                    mask=ok & (row + i >= 0) & (row + i < H),
                    other=0.0,
                ).to(tl.float32)
                for r in tl.static_range(BH):
                    if i >= r * SH and (i - r * SH) % DH == 0 and (i - r * SH) // DH < KC:
                        acc = add(acc, (i - r * SH) // DH * KD + q, rows[r] * value)
    kernels = C if not PER_SAMPLE else N * C
    for j in tl.static_range(KC):
        for q in tl.static_range(KD):
            kh, kw = kh0 + j, kw0 + q
            inside = (kh < KH) & (kw < KW)
            if CHANNELS_LAST:
                total = tl.sum(acc[j * KD + q], 0)[None, :]
                at_out = ((split * (kernels // C) + sample) * (KH * KW) + kh * KW + kw) * C + c
                tl.store(part + at_out, total.to(part.dtype.element_ty), mask=inside & (c < C))
            elif PER_SAMPLE:
                total = tl.sum(acc[j * KD + q], 1)[:, None]
                first = split.to(tl.int64) * kernels + unit.to(tl.int64) * BA + a
                tl.store(
                    part + first * (KH * KW) + kh * KW + kw,
                    total.to(part.dtype.element_ty),
                    mask=inside & (unit.to(tl.int64) * BA + a < kernels),
                )
            else:
                total = tl.sum(tl.sum(acc[j * KD + q], 1), 0)
                first = split.to(tl.int64) * kernels + unit
                tl.store(part + first * (KH * KW) + kh * KW + kw, total.to(part.dtype.element_ty), mask=inside)
