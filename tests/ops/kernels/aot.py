"""Compile the launches of a call for a GPU that is not present, and count registers and spills.

The call gets meta tensors and runs the real launchers. Arguments for Triton are recorded with their specializations and
compiled ahead of time. Do not use this in a process in which the kernels run in the interpreter.
"""

import inspect
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from widefield.ops._triton import tune

PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
}


@dataclass(frozen=True)
class Build:
    """One compiled kernel: ``registers`` per thread, and ``spill`` bytes per thread in memory."""

    kernel: str
    config: dict
    registers: int
    spill: int
    shared: int
    ptx: str

    def __str__(self):
        config = " ".join(f"{k}={v}" for k, v in self.config.items())
        return f"{self.kernel}: {self.registers} registers, {self.spill} B spilled, {self.shared} B shared; {config}"


def builds(call, arch=90, *, candidates=slice(0, 1)):
    """Compile the launches of ``call`` with each of the chosen block sizes; the first is the default."""
    found = []
    config = {}

    def record(fn, *args, grid, warmup, **options):
        found.append(_build(fn, args, options, config, arch))

    def run(name, key, make, launch, device):
        result = None
        for chosen in list(make())[candidates]:
            config.clear()
            config.update(chosen)
            result = launch(chosen)
        return result

    with mock.patch.object(JITFunction, "run", record), mock.patch.object(tune, "run", run):
        call()
    return found


def _build(fn, args, options, config, arch):
    skip = set(fn.do_not_specialize or ())
    signature, constants, attributes = {}, {}, {}
    options = dict(options)
    parameters = inspect.signature(fn.fn).parameters
    given = dict(zip(fn.arg_names, args, strict=False)) | {k: options.pop(k) for k in fn.arg_names if k in options}
    for i, name in enumerate(fn.arg_names):
        value = given[name]
        if "constexpr" in str(parameters[name].annotation) or value is None:
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(i,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
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
        fn.fn.__name__,
        dict(config),
        int(re.search(r"Used (\d+) registers", report).group(1)),
        sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", report)) // 2,
        compiled.metadata.shared,
        compiled.asm["ptx"],
    )


def _ptxas(ptx, arch):
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        name = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
        command = [str(PTXAS), "-v", f"-arch={name}", str(source), "-o", str(Path(folder) / "kernel.cubin")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr
