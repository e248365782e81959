"""Test RepLKNet's ordering of effective receptive fields without training: kernels 3, 7, 13, 31 and ResNet-101.

python experiments/erf_ordering.py [--sizes 224 512 1024] [--counts 4 2 1] [--seeds 0 1 2] [--runs runs/erf_ordering]
    [--out experiments/results]

Every network is measured twice: as created, and with batch norm statistics taken from images.
Fields found in --runs are not measured again. Takes 15 minutes on one thread, and 10 GB of memory at 1024 pixels.
"""

from __future__ import annotations

import argparse
import json
import pickle
import statistics
import time
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from widefield import bench, report
from widefield.analysis import ReceptiveField, effective_receptive_field, save
from widefield.data import Pictures
from widefield.train import ModelSpec, create_model

NETWORKS = {
    # timm initializes the last norm of every residual branch to zero, which would hide the branch.
    "ResNet-101": ("resnet101", {"zero_init_last": False}),
    "RepLKNet-3": ("replknet_31b", {"kernel_sizes": [3] * 4}),
    "RepLKNet-7": ("replknet_31b", {"kernel_sizes": [7] * 4}),
    "RepLKNet-13": ("replknet_31b", {"kernel_sizes": [13] * 4}),
    "RepLKNet-31": ("replknet_31b", {}),
}
CLAIMS = {
    "31 > 13 > ResNet": ["RepLKNet-31", "RepLKNet-13", "ResNet-101"],  # trained and measured in the paper
    "31 > 13 > 7 > 3": ["RepLKNet-31", "RepLKNet-13", "RepLKNet-7", "RepLKNet-3"],  # implied by the paper's argument
    "3 > ResNet": ["RepLKNet-3", "ResNet-101"],
}

NORMS = {"created": "as created", "settled": "batch norms settled"}
SHARE = 0.5


def settle(model: nn.Module, images: Tensor) -> None:
    """Set the statistics of every batch norm from these images."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    model.train()
    with torch.no_grad():
        model(images)
    model.eval()


def network(name: str, seed: int, norms: str, images: Tensor) -> nn.Module:
    torch.manual_seed(seed)
    word, options = NETWORKS[name]
    model = create_model(ModelSpec(word, options)).eval()
    if norms == "settled":
        settle(model, images)
    return model


def images(count: int, size: int, seed: int = 0) -> Pictures:
    return Pictures(count=count, size=size, seed=seed)


def measured(runs: Path, name: str, seed: int, norms: str, pictures: Pictures, settling: Tensor) -> ReceptiveField:
    """Return a field, from the folder of runs if it was measured before."""
    word = f"{name}_{norms}_{pictures.image_size}px_{len(pictures)}images{pictures.seed}_weights{seed}"
    path = runs / f"{word}.pickle"
    if not path.exists():
        start = time.process_time()
        about = {**pictures.about, "weights": "random", "weights_seed": seed, "norms": NORMS[norms]}
        model = network(name, seed, norms, settling)
        field = effective_receptive_field(model, pictures.batches(1), batch_size=1, name=name, about=about)
        runs.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(field))
        print(f"{word}: {field.area_ratio}, {time.process_time() - start:.0f} s", flush=True)
    return pickle.loads(path.read_bytes())


def facts(field: ReceptiveField) -> dict:
    found = field.to_dict()
    del found["scores"]
    return found


def order(ratios: dict[str, float]) -> str:
    """Return the names from the largest ratio to the smallest, with "=" between equal ones."""
    names = sorted(ratios, key=lambda name: -ratios[name])
    text = names[0]
    for before, name in pairwise(names):
        text += (" = " if ratios[before] == ratios[name] else " > ") + name
    return text


def orders(fields: dict[str, dict[tuple[str, str], ReceptiveField]]) -> list[dict[str, str]]:
    """Return one row per size and kind of norm: the networks ordered by area."""
    rows = []
    for norms, found in fields.items():
        for size in dict.fromkeys(size for _, size in found):
            entries = {name: field for (name, at), field in found.items() if at == size}
            scales = {
                "A": {name: field.area_ratio[SHARE] for name, field in entries.items()},
                "log10(A + 1)": {name: field.log_area_ratio[SHARE] for name, field in entries.items()},
            }
            for scale, ratios in scales.items():
                holds = {
                    claim: "yes" if all(ratios[a] > ratios[b] for a, b in pairwise(names)) else "no"
                    for claim, names in CLAIMS.items()
                }
                rows.append(
                    {"norms": NORMS[norms], "size, px": size, "scores": scale, "by area": order(ratios), **holds}
                )
    return rows


def verdict(fields: dict[str, dict[tuple[str, str], ReceptiveField]]) -> str:
    """Return which claims hold, in numbers."""
    said = []
    for norms, found in fields.items():
        rows = [row for row in orders({norms: found}) if row["scores"] == "A"]
        held = (f"{claim} at {sum(row[claim] == 'yes' for row in rows)} of {len(rows)} sizes" for claim in CLAIMS)
        said.append(f"By the contributions, {NORMS[norms]}, these hold: {', '.join(held)}.")
        sizes = [size for _, size in found]
        for name in ("ResNet-101", "RepLKNet-31"):
            small, large = found[name, sizes[0]], found[name, sizes[-1]]
            said.append(
                f"From {small.size} to {large.size} pixels the standard deviation of {name}'s field goes from "
                f"{small.sigma_x:.0f} to {large.sigma_x:.0f} pixels, and the area that holds half of it from "
                f"{small.area_ratio[SHARE]:.1%} to {large.area_ratio[SHARE]:.1%} of the image."
            )
    return " ".join(said)


def spread(groups: list[list[float]]) -> str:
    """Return the standard deviation within groups of equal size, in percentage points."""
    if len(groups[0]) < 2:
        return "-"
    return f"{100 * statistics.mean(statistics.variance(group) for group in groups) ** 0.5:.2f}"


def movement(moved: list[ReceptiveField]) -> list[dict[str, str]]:
    """Return how much the area with half of the contributions varies over weights and images, in percentage points."""
    rows = []
    for text in NORMS.values():
        for name in NETWORKS:
            found = {
                (field.about["weights_seed"], field.about["seed"]): field.area_ratio[SHARE]
                for field in moved
                if (field.name, field.about["norms"]) == (name, text)
            }
            if not found:
                continue
            weights, sets = sorted({w for w, _ in found}), sorted({s for _, s in found})
            rows.append(
                {
                    "network": name,
                    "norms": text,
                    "mean": f"{statistics.mean(found.values()):.1%}",
                    "least": f"{min(found.values()):.1%}",
                    "most": f"{max(found.values()):.1%}",
                    "sd over weights": spread([[found[w, s] for w in weights] for s in sets]),
                    "sd over images": spread([[found[w, s] for s in sets] for w in weights]),
                }
            )
    return rows


def write(out: Path, fields: dict[str, dict[tuple[str, str], ReceptiveField]], moved: list[ReceptiveField]) -> None:
    environment = bench.environment()
    out.mkdir(parents=True, exist_ok=True)
    content = {
        "environment": environment,
        "fields": [facts(field) for found in fields.values() for field in found.values()],
        "weights_and_images": [facts(field) for field in moved],
    }
    (out / "erf_ordering.json").write_text(json.dumps(content, indent=1) + "\n")
    for norms, found in fields.items():
        results = {f"{name} {size}": field for (name, size), field in found.items()}
        stem = "erf_ordering" if norms == "settled" else f"erf_ordering_{norms}"
        save(results, out / f"{stem}.png")
    lines = [
        "# The paper's ordering of effective receptive fields, without training",
        "RepLKNet-31B with kernels of 31, 29, 27 and 13 in its four stages, with 13, 7 and 3 in all, and ResNet-101, "
        "with random weights. RepLKNet (section 5, appendix B) measures trained networks on 50 images of 1024 pixels: "
        "RepLKNet-31 > RepLKNet-13 > ResNet-101. Here: crops of two photographs. A field spread evenly over the image "
        "would need 20, 30, 50 and 99 % of it.",
        "Made by `python experiments/erf_ordering.py`. " + ", ".join(f"{k} {v}" for k, v in environment.items()) + ".",
        "## Order",
        f"By the share of the image that holds {SHARE:.0%} of the contributions, largest first. The paper takes "
        "log10(A + 1) instead, which flattens a field more if its gradients are larger.",
        report.markdown(orders(fields)),
        verdict(fields),
    ]
    for norms, found in fields.items():
        name = "erf_ordering" if norms == "settled" else f"erf_ordering_{norms}"
        lines += [
            f"## Fields, {NORMS[norms]}",
            f"![Effective receptive fields, {NORMS[norms]}]({name}.png)",
            report.markdown([row for field in found.values() for row in field.rows()]),
        ]
    if moved:
        first = moved[0].about
        lines += [
            f"## Variation over weights and images: {first['size']} px, {first['images']} images a set",
            "The share of the image that holds half of the contributions; standard deviations in percentage "
            "points, over weights for the same images and over images for the same weights.",
            report.markdown(movement(moved)),
        ]
    (out / "erf_ordering.md").write_text("\n\n".join(line.rstrip("\n") for line in lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 512, 1024])
    parser.add_argument("--counts", type=int, nargs="+", default=[4, 2, 1], help="images at each size")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of weights, at the first size")
    parser.add_argument("--runs", type=Path, default=Path("runs/erf_ordering"))
    parser.add_argument("--out", type=Path, default=Path("experiments/results"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    settling = images(8, args.sizes[0]).tensor()  # the same network at every size
    fields: dict[str, dict[tuple[str, str], ReceptiveField]] = {norms: {} for norms in NORMS}
    moved = [
        measured(args.runs, name, seed, norms, images(2, args.sizes[0], chosen), settling)
        for norms in NORMS
        for name in NETWORKS
        for seed in args.seeds
        for chosen in (0, 1)
    ]
    for size, count in zip(args.sizes, args.counts, strict=True):
        for norms in NORMS:
            for name in NETWORKS:
                field = measured(args.runs, name, 0, norms, images(count, size), settling)
                fields[norms][name, field.size] = field
    write(args.out, fields, moved)


if __name__ == "__main__":
    main()
