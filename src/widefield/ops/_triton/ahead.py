"""Compile the launches of a call for a GPU that is not present: registers, spills, shared memory, occupancy.

The call gets meta tensors and runs the real launchers. Arguments for Triton are recorded with their specializations and
compiled ahead of time. Do not use this in a process in which the kernels run in the interpreter.
"""

from __future__ import annotations

import inspect
import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from widefield.ops._triton import routed, tune

Call = Callable[[], Any]

_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32"}

SHARED = {80: 164, 90: 228, 100: 228}
"""Compute capability, times 10 -> KiB of shared memory of a multiprocessor (CUDA C++ programming guide, table of
technical specifications)."""
_WARPS, _BLOCKS, _REGISTERS = 64, 32, 65536
"""Limits of a multiprocessor, the same for all of ``SHARED``. Registers are allocated to warps in units of 256."""


@dataclass(frozen=True)
class Build:
    """One compiled kernel.

    Attributes:
        kernel: name of the function.
        arch: compute capability, times 10.
        config: block sizes.
        warps: of a block.
        registers: of a thread.
        spill: bytes of a thread that are in memory for lack of registers.
        shared: bytes of shared memory of a block.
        ptx: the code.
    """

    kernel: str
    arch: int
    config: dict[str, int]
    warps: int
    registers: int
    spill: int
    shared: int
    ptx: str

    @property
    def occupancy(self) -> float:
        """Share of a multiprocessor's 64 warps that can be resident at once, 0 to 1."""
        by_warp = 256 * math.ceil(32 * self.registers / 256)
        blocks = min(
            _BLOCKS,
            _WARPS // self.warps,
            _REGISTERS // (by_warp * self.warps),
            1024 * SHARED[self.arch] // (self.shared + 1024),  # 1 KiB of each block is the system's
        )
        return blocks * self.warps / _WARPS

    def __str__(self) -> str:
        config = " ".join(f"{key}={value}" for key, value in self.config.items())
        used = f"{self.registers} registers, {self.spill} B spilled, {self.shared} B shared"
        return f"{self.kernel}, sm_{self.arch}: {used}, {100 * self.occupancy:.0f} % of warps; {config}"


def depthwise(
    backend: ModuleType,
    shape: Sequence[int],
    size: int | tuple[int, int],
    *,
    stride: int = 1,
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> dict[str, Call]:
    """Return the three passes of a depthwise convolution on meta tensors.

    Args:
        backend: :mod:`.direct` or :mod:`.gemm`.
        shape: (N, C, H, W) of the input.
        size: of the kernel.
        stride: of both axes.
        groups: number of kernels for each channel, one for each group of images.
        dtype: of all tensors.
        channels_last: layout of input and output.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    kernel = (size, size) if isinstance(size, int) else size
    padding = (kernel[0] // 2, kernel[1] // 2)
    out = [(s + 2 * p - k) // stride + 1 for s, p, k in zip(shape[2:], padding, kernel, strict=True)]
    x = _meta(*shape, dtype=dtype).contiguous(memory_format=layout)
    grad = _meta(*shape[:2], *out, dtype=dtype).contiguous(memory_format=layout)
    weight = _meta(groups, shape[1], *kernel, dtype=dtype)
    bias = _meta(groups, shape[1], dtype=dtype)
    rest = ((stride, stride), padding, (1, 1))
    return {
        "forward": partial(backend.forward, x, weight, bias, *rest),
        "input_grad": partial(backend.input_grad, grad, weight, x.shape, *rest),
        "weight_grad": partial(backend.weight_grad, grad, x, weight.shape, *rest),
    }


def mixture(
    shape: Sequence[int],
    spans: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> dict[str, Call]:
    """Return forward and backward of a mixture with experts of these sizes on meta tensors; (N, C, H, W)."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = _meta(*shape, dtype=dtype).contiguous(memory_format=layout)
    bank = _meta(len(spans), shape[1], max(spans), max(spans))
    bias, weights = _meta(len(spans), shape[1]), _meta(shape[0], len(spans))
    return {
        "forward": partial(routed.forward, x, bank, spans, bias, weights),
        "backward": partial(routed.backward, x, x, bank, spans, bias, weights),
    }


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def builds(call: Call, arch: int = 90, *, candidates: slice = slice(0, 1)) -> list[Build]:
    """Compile the launches of a call.

    Args:
        call: of :func:`depthwise` or :func:`mixture`.
        arch: compute capability, times 10: 80, 90 or 100.
        candidates: which of the block sizes that would be timed on the GPU; the first is the default.
    """
    found: list[Build] = []
    config: dict[str, int] = {}

    def record(fn: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append(_build(fn, args, options, config, arch))

    def run(name: str, key: Any, make: Callable[[], Sequence[tune.Config]], launch: Any, device: Any) -> Any:
        result = None
        for chosen in list(make())[candidates]:
            config.clear()
            config.update(chosen)
            result = launch(chosen)
        return result

    with mock.patch.object(JITFunction, "run", record), mock.patch.object(tune, "run", run):
        call()
    return found


def _build(fn: Any, args: Sequence[Any], options: dict[str, Any], config: dict[str, int], arch: int) -> Build:
    skip = set(fn.do_not_specialize or ())
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    options = dict(options)
    parameters = inspect.signature(fn.fn).parameters
    given = dict(zip(fn.arg_names, args, strict=False)) | {k: options.pop(k) for k in fn.arg_names if k in options}
    for i, name in enumerate(fn.arg_names):
        value = given[name]
        if "constexpr" in str(parameters[name].annotation) or value is None:
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name], attributes[(i,)] = _TYPES[value.dtype], [["tt.divisibility", 16]]
        elif value == 1 and name not in skip:
            signature[name], constants[(i,)] = "constexpr", 1
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and name not in skip:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    report = _ptxas(compiled.asm["ptx"], arch)
    return Build(
        kernel=fn.fn.__name__,
        arch=arch,
        config=dict(config),
        warps=compiled.metadata.num_warps,
        registers=max(int(count) for count in re.findall(r"Used (\d+) registers", report)),
        spill=sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", report)) // 2,
        shared=compiled.metadata.shared,
        ptx=compiled.asm["ptx"],
    )


def _ptxas(ptx: str, arch: int) -> str:
    """Return what the assembler of Triton's package reports."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    tool, name = tools / ("ptxas" if arch < 100 else "ptxas-blackwell"), f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [str(tool), "-v", f"-arch={name}", str(source), "-o", str(Path(folder) / "kernel.cubin")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr
