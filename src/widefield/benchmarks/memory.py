"""Measure the peak resident memory of training steps (``widefield bench memory``).

Each row is a fresh process on one thread: the second step of AdamW, with forward, cross-entropy, backward and update.
Freed memory returns to the system at once, so that resident memory is memory in use. A row has the peak of the process,
and the peak minus what was resident before the step: activations, gradients and workspaces. Imports, weights and the
optimizer's state are in the first number only. "Kept" are the tensors that autograd keeps for the backward pass,
counted with hooks.

- **Mixtures**: ConvNeXt-T with kernels of 7x7 and 11x11 in timm's layers and in ours, with mixtures of 3x3 to 11x11
  under soft and hard routing, and with mixtures as branches, which keep the output of each expert.
- **Gradient checkpointing**: networks of every family without and with ``set_grad_checkpointing()``.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import widefield.models  # noqa: F401  registers our networks
from widefield import _checks
from widefield.benchmarks.record import Bar, Record, Row, Table, bar
from widefield.benchmarks.settings import Settings
from widefield.nn import MoRFConv2d
from widefield.surgery import FastDepthwise, convert

SIZES = (128, 224)
"""Sides of the images. The maps of ConvNeXt-T's stages are 32 to 4 and 56 to 7 pixels wide."""
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "7x7, timm": ("convnext_tiny", {}),
    "11x11, timm": ("convnext_tiny", {"kernel_sizes": 11}),
    "11x11, ours": ("convnext_tiny", {"kernel_sizes": 11}),
    "mixture": ("morf_convnext_tiny", {}),
    "mixture, hard routing": ("morf_convnext_tiny", {"routing": "hard"}),
    "mixture as branches": ("morf_convnext_tiny", {}),
}
FAMILIES = (
    "hornet_tiny_7x7", "internimage_t", "metaformer_tiny", "mobilenetv2_lk", "moganet_xtiny", "morf_convnext_tiny",
    "morf_resnet18", "replknet_31b", "resnet20_cifar", "slak_tiny", "unireplknet_a", "van_b0",
)  # fmt: skip

_MMAP_THRESHOLD = -3
"""Of mallopt (malloc.h): blocks from this size on are returned to the system when they are freed."""


@dataclass(frozen=True)
class Case:
    """A training step. ``layers``: one of :data:`LAYERS`, or "" for a network as timm's registry has it."""

    network: str
    batch: int
    size: int
    layers: str = ""
    recomputes: bool = False


@dataclass(frozen=True)
class Step:
    """Bytes: resident before the step, the peak during it, and kept for the backward pass (None: not counted)."""

    before: int
    peak: int
    kept: int | None

    @property
    def added(self) -> int:
        """The peak minus what was resident before."""
        return self.peak - self.before


def build(case: Case) -> nn.Module:
    """Return the network of a case in training mode."""
    model: nn.Module = timm.create_model(case.network, **LAYERS.get(case.layers, ("", {}))[1])
    if case.layers == "11x11, ours":
        model = convert(model, FastDepthwise())
    for module in model.modules():
        if isinstance(module, MoRFConv2d) and case.layers == "mixture as branches":
            module.backend = "branches"
    if case.recomputes:
        model.set_grad_checkpointing()  # type: ignore[operator]
    return model.train()


def measure(case: Case) -> Step:
    """Measure a case in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure_here, case).result()


def measure_here(case: Case) -> Step:
    """Measure a case in this process, whose allocator returns freed memory from then on."""
    return_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build(case)
    optimizer = torch.optim.AdamW(model.parameters())
    images, labels = torch.randn(case.batch, 3, case.size, case.size), torch.arange(case.batch) % 10

    def step() -> None:
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the optimizer's state and the caches
    kept = None if case.recomputes else _kept(model, images)
    gc.collect()
    reset_peak()
    before = resident()
    step()
    return Step(before, peak_resident(), kept)


def return_freed_memory() -> None:
    """Make the C library return freed memory to the system at once, so that resident memory is memory in use."""
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 16)


def reset_peak() -> None:
    """Start to measure :func:`peak_resident` from here on, where the system allows it."""
    ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):  # not allowed: the peak is then that of everything before, too
        Path("/proc/self/clear_refs").write_text("5")


def resident() -> int:
    """Return the resident memory of this process in bytes; ValueError on systems other than Linux."""
    return _status("VmRSS")


def peak_resident() -> int:
    """Return the peak of the resident memory in bytes; ValueError on systems other than Linux."""
    return _status("VmHWM")


def _kept(model: nn.Module, images: Tensor) -> int:
    """Return the bytes of tensors that autograd keeps for the backward pass, without parameters."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x.detach()  # the tensor itself would keep the graph alive if it is the result of the node that saves it

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = model(images)
    del y
    return sum(size for pointer, size in found.items() if pointer not in known)


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise ValueError(f"/proc/self/status has no {key}: this benchmark needs Linux.")
    return 1024 * int(found[1])


def _mib(name: str) -> Callable[[Row], str]:
    return lambda r: "-" if r[name] is None else f"{r[name] / 2**20:.0f}"


_BYTES: dict[str, Callable[[Row], str]] = {
    "step, MiB": _mib("added"),
    "peak, MiB": _mib("peak"),
    "before, MiB": _mib("before"),
}
COLUMNS: dict[str, Callable[[Row], str]] = {
    "layers": lambda r: str(r["layers"]),
    "images": lambda r: f"{r['batch']} x {r['size']}x{r['size']}",
    **_BYTES,
    "kept, MiB": _mib("kept"),
    "step / 11x11, ours": lambda r: f"{r['ratio']:.3f}",
}
FAMILY_COLUMNS: dict[str, Callable[[Row], str]] = {
    "network": lambda r: str(r["network"]),
    "images": lambda r: f"{r['batch']} x {r['size']}x{r['size']}",
    "checkpointing": lambda r: "yes" if r["recomputes"] else "no",
    **_BYTES,
    "with / without": lambda r: f"{r['ratio']:.2f}",
}


def row_of(case: Case, step: Step, base: Step) -> Row:
    """Return the row of a case; the ratio is that of the step's memory to that of ``base``."""
    label = f"{case.layers or case.network}, {case.size}x{case.size}" + (", checkpointing" if case.recomputes else "")
    return {
        "label": label, **asdict(case), **asdict(step), "added": step.added, "ratio": step.added / base.added,
    }  # fmt: skip


def run(
    settings: Settings,
    *,
    batch_size: int = 8,
    sizes: Sequence[int] = SIZES,
    layers: Sequence[str] = tuple(LAYERS),
    families: Sequence[str] = FAMILIES,
) -> list[Bar]:
    """Run the benchmark: print rows, write files to ``settings.out`` and return the bars.

    Args:
        settings: of the measurement; a CPU in float32.
        batch_size: images of a step.
        sizes: sides of the images for the mixtures; networks of the families are measured at the first.
        layers: which of :data:`LAYERS`; "11x11, ours", to which all are compared, is always among them.
        families: networks to measure without and with gradient checkpointing.

    Raises:
        ValueError: another device or dtype, unknown names, numbers out of range.
    """
    if settings.slug != "cpu":
        raise ValueError(
            f"bench memory measures resident memory in float32 on a CPU, not {settings.dtype} on {settings.device}; "
            "bench model has the peak memory of steps on CUDA devices."
        )
    batch = _checks.integer("batch_size", batch_size)
    every = timm.list_models()
    for name in families:
        if name not in every:
            raise ValueError(f"no model is called {name!r}.{_checks.did_you_mean(name, every)}")
    chosen = [name for name in LAYERS if name in {_checks.choice("layers", one, tuple(LAYERS)) for one in layers}]
    out = Record("memory", settings, threads="1", malloc="returns what is freed")
    out.fact(
        "Each row is the second training step (AdamW) of a fresh process. Step: the peak minus what was resident "
        "before, which includes imports, weights and optimizer."
    )
    mixtures = out.table(
        "Mixtures", COLUMNS, "ConvNeXt-T. Kept: the tensors that autograd keeps for the backward pass."
    )
    recomputed = out.table("Gradient checkpointing", FAMILY_COLUMNS, "set_grad_checkpointing() of timm's interface.")
    with out.until_interrupted():
        for size in sizes if chosen else ():
            _mixtures(out, mixtures, chosen, batch, _checks.integer("sizes", size))
        for name in families:
            plain = Case(name, batch, sizes[0])
            again = Case(name, batch, sizes[0], recomputes=True)
            base = measure(plain)
            out.add(recomputed, row_of(plain, base, base))
            out.add(recomputed, row_of(again, measure(again), base))
    bars = bars_of(mixtures.rows, recomputed.rows)
    out.finish(bars)
    return bars


def _mixtures(out: Record, table: Table, layers: Sequence[str], batch: int, size: int) -> None:
    def case(name: str) -> Case:
        return Case(LAYERS[name][0], batch, size, name)

    base = measure(case("11x11, ours"))
    out.add(table, row_of(case("11x11, ours"), base, base))
    for name in layers:
        if name != "11x11, ours":
            out.add(table, row_of(case(name), measure(case(name)), base))


def bars_of(mixtures: Sequence[Row], recomputed: Sequence[Row]) -> list[Bar]:
    """Compare rows with the project's bars."""

    def ratio(row: dict[str, Any]) -> float:
        return float(row["ratio"])

    mixed = [row for row in mixtures if row["layers"] in ("mixture", "mixture, hard routing")]
    again = [row for row in recomputed if row["recomputes"]]
    return [
        bar("ConvNeXt-T step: memory of mixtures / our plain 11x11", mixed, ratio, at_most=1.1),
        bar("networks of this run: memory of a step with / without checkpointing", again, ratio, at_most=0.8),
    ]
