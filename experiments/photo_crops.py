"""How far must one look to tell the photographs of photo_crops apart? Bags of patches of several sizes.

python experiments/photo_crops.py [--out experiments/results]

No network is trained. Each crop becomes a histogram of visual words: square patches of one size, reduced to 16
principal components, and assigned to 100 centers of k-means (Varma and Zisserman, "A statistical approach to material
classification using image patch exemplars", PAMI 2009, with fewer words). A logistic regression on the histograms
classifies val crops. Its accuracy says what patches of this size tell, not what a network would reach. The spread is
over three seeds of crops, words and classifier.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from widefield import report
from widefield.benchmarks.record import publish
from widefield.data import PhotoCrops

PATCHES = (1, 3, 7, 13, 21)
SIZES = (32, 64)
WORDS, COMPONENTS, FITTED = 100, 16, 8_000
COUNTS = {"train": 1_200, "val": 600}


def crops(split: str, size: int, seed: int) -> tuple[torch.Tensor, np.ndarray]:
    """Return gray crops (N, 1, size, size) and their classes."""
    found = PhotoCrops(split, size=size, count=COUNTS[split], seed=seed)
    samples = [found[index] for index in range(len(found))]
    return torch.stack([s["image"][:1] for s in samples]), np.array([s["label"] for s in samples])


def patches(images: torch.Tensor, size: int) -> np.ndarray:
    """Return patches at about 100 places of each image, (N, places, size * size)."""
    places = images.shape[-1] - size + 1
    step = max(1, places // 10)
    windows = images[:, 0].unfold(1, size, step).unfold(2, size, step)
    return windows.reshape(len(images), -1, size * size).numpy()


def histograms(images: torch.Tensor, size: int, words: object) -> np.ndarray:
    """Return the share of each word among the patches of each image, (N, WORDS)."""
    found = patches(images, size)
    assigned = words.predict(found.reshape(-1, found.shape[-1])).reshape(found.shape[:2])  # type: ignore[attr-defined]
    return np.stack([np.bincount(row, minlength=WORDS) for row in assigned]) / found.shape[1]


def accuracy(size: int, patch: int, seed: int) -> float:
    """Return the accuracy on val crops of one size by patches of one size."""
    train, labels = crops("train", size, seed)
    val, truth = crops("val", size, seed)
    every = patches(train, patch).reshape(-1, patch * patch)
    some = every[np.random.default_rng(seed).permutation(len(every))[:FITTED]]
    reduce = [PCA(COMPONENTS, random_state=seed)] if patch**2 > COMPONENTS else []
    words = make_pipeline(*reduce, MiniBatchKMeans(WORDS, n_init=1, random_state=seed)).fit(some)
    classifier = LogisticRegression(C=100, max_iter=2000)
    classifier.fit(np.sqrt(histograms(train, patch, words)), labels)
    return float(classifier.score(np.sqrt(histograms(val, patch, words)), truth))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, list[float]]] = {}
    rows = []
    for patch in PATCHES:
        found[str(patch)] = {str(size): [100 * accuracy(size, patch, seed) for seed in range(3)] for size in SIZES}
        row = {"patch": f"{patch}x{patch}"}
        for size, values in found[str(patch)].items():
            row[f"crops of {size} pixels"] = f"{np.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"
        print(row, flush=True)
        rows.append(row)
    text = "Top-1 on 600 val crops, in %: mean and range of three seeds. Chance is 8.3 %.\n\n"
    publish(
        args.out / "photo_crops", "python experiments/photo_crops.py", {"top1": found}, text + report.markdown(rows)
    )


if __name__ == "__main__":
    main()
