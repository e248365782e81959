"""Measure what static routing and 8-bit quantization cost on the demo's networks.

python benchmarks/digits_deploy.py [--repeats 11] [--out benchmarks/results]

The demo's three networks, and one with 13x13 kernels that train beside a 5x5 branch and merge (RepLKNet), trained on
digits like the demo's. Static routing and 8-bit calibration use the training images; changes, accuracies and flips are
measured on the validation images. Times are measured in onnxruntime, interleaved.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader

from widefield import bench, data, deploy, report
from widefield.benchmarks.record import publish
from widefield.surgery import NothingToFuseError, Specialization, compare, reparameterize, specialize
from widefield.train import ConversionSpec, load_recipe, train

KINDS: dict[str, ConversionSpec | None] = {
    "7x7": None,
    "MoRF soft": ConversionSpec("morf", "*.conv_dw", {"routing": "soft"}),
    "MoRF hard": ConversionSpec("morf", "*.conv_dw", {"routing": "hard"}),
    "13x13 + 5x5": ConversionSpec("large_kernel", "*.conv_dw", {"kernel_sizes": 13, "init": "random"}),
}
BATCH = 64
Batches = list[dict[str, Any]]


def trained(conversion: ConversionSpec | None, output: str) -> nn.Module:
    """Return a network trained like the demo's, in evaluation mode."""
    recipe = dataclasses.replace(load_recipe("demo_digits", ["--output", output]), conversion=conversion)
    return train(recipe, console=Console(quiet=True)).model.cpu().eval()


def batches(split: str, size: int) -> Batches:
    """Return all images of a split with their labels, without augmentation."""
    return list(DataLoader(data.create("digits", split, size=size), batch_size=BATCH, collate_fn=data.collate))


def fused(model: nn.Module, images: Tensor) -> nn.Module:
    """Return the reparameterized model, or the model itself if there is nothing to merge."""
    try:
        return reparameterize(model, images[:2])
    except NothingToFuseError:
        return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    static_rows: list[dict[str, str]] = []
    small_rows: list[dict[str, str]] = []
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        size = load_recipe("demo_digits").data.args["size"]
        seen, held_out = batches("train", size), batches("val", size)
        x = held_out[0]["image"]
        for name, conversion in KINDS.items():
            model = trained(conversion, f"{folder}/{len(results)}")
            forms = {name: fused(model, x)}
            results[name] = {}
            if name.startswith("MoRF"):
                told: list[Specialization] = []
                static = specialize(model, seen, report=told.append)
                change = compare(model, static, held_out)
                forms[f"{name}, specialized"] = fused(static, x)
                results[name]["specialized"] = {**told[0].to_dict(), "held_out": dataclasses.asdict(change)}
                static_rows.append(
                    {
                        "network": name,
                        "predicted": f"{told[0].predicted.rms:.4f}",
                        "measured": f"{told[0].measured.rms:.4f}",
                        "accuracy, predicted": percent(told[0].predicted.accuracy_after),
                        "accuracy, measured": percent(told[0].measured.accuracy_after),
                        "held out: change": f"{change.rms:.4f}",
                        "held out: accuracy": f"{percent(change.accuracy_before)} -> {percent(change.accuracy_after)}",
                    }
                )
            for form, network in forms.items():
                stem = form.replace(" ", "_")
                plain, small = Path(folder) / f"{stem}.onnx", Path(folder) / f"{stem}-int8.onnx"
                deploy.export(network, plain, x[:2])
                done = deploy.quantize(network, small, seen, images=held_out)
                calls = {path.stem: runner(deploy.load(path), x) for path in (plain, small)}
                times = bench.measure(calls, repeats=args.repeats, warmup=3, shortest_s=0.05)
                results[name][form] = {**done.to_dict(), "times": {key: row.to_dict() for key, row in times.items()}}
                worst = done.by_noise[0]
                small_rows.append(
                    {
                        "network": form,
                        "accuracy, float32 -> int8": f"{percent(done.change.accuracy_before)} -> "
                        f"{percent(done.change.accuracy_after)}",
                        "change": f"{done.change.rms:.3f}",
                        "routing flips": "-" if done.flip_rate is None else f"{100 * done.flip_rate:.2f}%",
                        "worst kernel": f"{worst.noise_ratio:.1f} dB",
                        "KiB": f"{done.bytes_before / 1024:.0f} -> {done.bytes / 1024:.0f}",
                        f"ms, batch {BATCH}": f"{1e3 * times[plain.stem].p50:.2f} -> {1e3 * times[small.stem].p50:.2f}",
                    }
                )
                print(" | ".join(small_rows[-1].values()), flush=True)
    command = f"python benchmarks/digits_deploy.py --repeats {args.repeats}"
    publish(
        args.out / "digits_deploy_cpu",
        command,
        {"results": results},
        'The demo\'s mixtures with static routing, policy "mean". Predicted and measured: on the training images, '
        "which the means are taken over; held out: on the validation images.\n\n"
        f"{report.markdown(static_rows)}\n<!-- --8<-- [end:static] -->\n\n<!-- --8<-- [start:int8] -->\n`{command}`\n\n"
        f"Run by onnxruntime, calibrated on the training images; accuracy and flips on the validation images.\n\n"
        f"{report.markdown(small_rows)}\n<!-- --8<-- [end:int8] -->\n",
        before="<!-- --8<-- [start:static] -->\n",
        beside=deploy.PACKAGES["onnx"],
    )


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"


def runner(exported: deploy.Runtime, x: Tensor) -> Any:
    return lambda: exported(x)


if __name__ == "__main__":
    main()
