"""Average the weights of several checkpoints of one network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from widefield import _checks
from widefield.data.listing import counted
from widefield.loading.load import load
from widefield.loading.subject_json import attach
from widefield.loading.subjects import Subject
from widefield.loading.weights import Weights
from widefield.train import checkpoint


@_checks.guided
def average(
    sources: Sequence[str | Path],
    *,
    last: int | None = None,
    weights: str | None = None,
    batches: Iterable[Tensor] | None = None,
) -> Subject:
    """Return a model whose weights are the mean of those of several.

    That is the mean of runs from one starting point ("model soups", Wortsman et al. 2022, uniform soup), or of the last
    checkpoints of a run. Runs that started from different random weights have no mean that works.

    Args:
        sources: folders of runs, or files that :func:`widefield.save` wrote; of runs their best checkpoints. With
            ``last`` one run.
        last: average that many of the newest checkpoints of the run, of those that ``checkpoint.keep`` has kept.
        weights: of runs ``"ema"`` or ``"model"``; default: the moving average if there is one.
        batches: images (N, C, H, W), prepared as in training, on which batch norms measure their statistics anew
            (Izmailov et al. 2018, SWA). Default: statistics are averaged as well.

    Returns:
        The first source's model and images, with averaged weights, in evaluation mode, on the CPU.
        :func:`widefield.save` writes it.

    Raises:
        ValueError: there are fewer than two, or the networks differ.
        FileNotFoundError: a source does not exist, or the run has fewer checkpoints.
    """
    words = [str(one) for one in sources]
    if last is not None:
        _checks.integer("last", last, minimum=2)
        if len(words) != 1:
            raise ValueError(f"last averages checkpoints of one run; got {len(words)} sources.")
        subject = load(words[0], which="last", weights=weights)
        states, names = _checkpoints(Path(words[0]).expanduser(), last, weights)
    else:
        if len(words) < 2:
            raise ValueError(
                "an average needs at least two sources, or one run and last (--last N), the number of its newest "
                "checkpoints."
            )
        subjects = [load(word, weights=weights if Path(word).expanduser().is_dir() else None) for word in words]
        subject, states, names = subjects[0], [one.model.state_dict() for one in subjects], words
    subject.model.load_state_dict(mean_of(states, names))
    if batches is not None:
        update_bn(batches, subject.model)
    subject.model.eval()
    loaded = Weights("run", f"mean of {', '.join(names)}")
    # Metrics are those of the parts, so the mean has none until it is evaluated.
    return attach(replace(subject, name=f"average of {len(states)}", weights=loaded), trained={"mean_of": names})


def mean_of(states: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> dict[str, Tensor]:
    """Return the mean of state dicts, computed in float64; integers, such as counters, are those of the first.

    Raises ValueError, with ``names``, if they differ in names or shapes.
    """
    first = states[0]
    for state, name in zip(states[1:], names[1:], strict=True):
        other = next((key for key in {**first, **state} if key not in first or key not in state), None)
        other = other or next((key for key in first if first[key].shape != state[key].shape), None)
        if other is not None:
            raise ValueError(f"{names[0]} and {name} are different networks: they differ in {other!r}.")
    return {
        key: torch.stack([state[key].double() for state in states]).mean(0).to(value.dtype)
        if value.is_floating_point()
        else value.clone()
        for key, value in first.items()
    }


def has_batch_norms(model: nn.Module) -> bool:
    """Return whether a model has batch norms with statistics of their own."""
    return any(
        isinstance(part, nn.modules.batchnorm._BatchNorm) and part.track_running_stats for part in model.modules()
    )


def _checkpoints(run: Path, count: int, weights: str | None) -> tuple[list[dict[str, Tensor]], list[str]]:
    found = checkpoint.checkpoints(run / "checkpoints")[-count:]
    if len(found) < count:
        raise FileNotFoundError(
            f"{run} holds {counted(len(found), 'checkpoint')}, not {count}: a run keeps more with checkpoint.keep, and "
            "writes one at each evaluation or checkpoint.every steps."
        )
    files = [one.weights if weights is None else one.path / f"{weights}.safetensors" for one in found]
    return [load_file(file) for file in files], [one.path.name for one in found]
