"""Build, load, save and publish models, each with the images that it expects."""

from __future__ import annotations

from typing import TYPE_CHECKING

from widefield._lazy import load_on_demand

if TYPE_CHECKING:
    from widefield.loading.labels import MappedClassification, output_places
    from widefield.loading.load import load
    from widefield.loading.sharing import push_to_hub, save
    from widefield.loading.subjects import MissingDataError, Subject
    from widefield.loading.trained import load_trained, read_run_data
    from widefield.loading.weights import Weights

load_on_demand(
    __name__,
    {
        "labels": "MappedClassification output_places",
        "load": "load",
        "sharing": "push_to_hub save",
        "subjects": "MissingDataError Subject",
        "trained": "load_trained read_run_data",
        "weights": "Weights",
    },
)

__all__ = [
    "MappedClassification",
    "MissingDataError",
    "Subject",
    "Weights",
    "load",
    "load_trained",
    "output_places",
    "push_to_hub",
    "read_run_data",
    "save",
]
