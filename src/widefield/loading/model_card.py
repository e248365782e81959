"""Write the model card of a saved model: Markdown with a head in YAML, as the Hugging Face Hub reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from widefield.data.listing import counted
from widefield.loading.subjects import Subject
from widefield.tasks.metric_names import shown

_PIPELINES = {
    "classification": "image-classification",
    "multilabel": "image-classification",
    "segmentation": "image-segmentation",
    "detection": "object-detection",
    "pose": "keypoint-detection",
    "masked_image": "image-feature-extraction",
}
_WORK = {"multilabel": "multi-label classification"}
"""Tasks whose name is not a word."""
_LISTED = 12
"""Largest number of classes that the card names."""

_USE = """```sh
pip install widefield
widefield predict hf-hub:USER/NAME photos
```

```python
import widefield

model = widefield.load("hf-hub:USER/NAME")
seen = widefield.predict(model, "photos")
```

A local copy of this folder works in place of `hf-hub:USER/NAME`."""

_VERBS = {
    "convert": "converted",
    "fuse_layers": "merged",
    "reparameterize": "reparameterized",
    "trim": "trimmed",
    "specialize": "specialized",
    "choose_sizes": "set to chosen kernel sizes",
    "set": "set",
}


def model_card(
    content: Mapping[str, Any], history: Mapping[str, Any], name: str, subject: Subject, parameters: int
) -> str:
    """Return a model card.

    Args:
        content: of the model's file.
        history: origin and steps.
        name: of the folder or repository.
        subject: the model.
        parameters: number of its parameters.
    """
    trained = content.get("trained") or {}
    sections = [
        f"---\n{_head(content, history, name, subject, trained)}\n---",
        f"# {name}",
        f"{_first_sentence(history, subject)} It has {parameters:,} parameters.",
    ]
    if content.get("notes"):
        sections.append(str(content["notes"]).strip())
    sections += ["## Use", _USE, "## Model", _model(history)]
    sections += ["## Images", _images(subject)]
    if trained.get("metrics"):
        sections += ["## Results", _results(subject, trained)]
    if content["subject"].get("recipe"):
        sections += [
            "## Training",
            f"The recipe, for `widefield train`:\n\n```yaml\n{content['subject']['recipe'].strip()}\n```",
        ]
    said = content.get("license")
    sections += ["## License", str(said) if said else "No license is stated."]
    return "\n\n".join(sections) + "\n"


def _head(content: Mapping[str, Any], history: Mapping[str, Any], name: str, subject: Subject, trained: Any) -> str:
    kinds = {group["config"] for step in history["steps"] if step["do"] == "convert" for group in step["groups"]}
    library = "timm" if history["origin"]["kind"] == "timm" else None
    tags = ["widefield", *([library] if library else []), *sorted(kinds)]
    results = None
    if trained.get("metrics") and subject.recipe is not None:
        results = [
            EvalResult(
                _pipeline(subject),
                subject.recipe.data.name,
                subject.recipe.data.name,
                metric,
                value,
                dataset_split="val",
            )
            for metric, value in trained["metrics"].items()
            if isinstance(value, (int, float))
        ]
    head = ModelCardData(
        license=content.get("license"),
        library_name="widefield",
        pipeline_tag=_pipeline(subject),
        tags=tags,
        model_name=name if results else None,
        eval_results=results,
    )
    return str(head.to_yaml()).strip()


def _pipeline(subject: Subject) -> str:
    return _PIPELINES.get(subject.work, subject.work)


def _first_sentence(history: Mapping[str, Any], subject: Subject) -> str:
    origin = history["origin"]
    what = origin.get("name") or (subject.recipe.model.name if subject.recipe else subject.name)
    source = {"timm": "timm's", "torchvision": "torchvision's"}.get(origin["kind"], "widefield's")
    changes = list(dict.fromkeys(_VERBS.get(step["do"], step["do"]) for step in history["steps"]))
    done = f", {_listed(changes)} by widefield" if changes else ""
    return f"A model for {_WORK.get(subject.work, subject.work)}: {source} `{what}`{done}."


def _model(history: Mapping[str, Any]) -> str:
    origin = history["origin"]
    args = _arguments({k: v for k, v in origin.get("args", {}).items() if not isinstance(v, Mapping)})
    lines = [f"- Built from `{origin.get('name', origin['kind'])}`" + (f" with `{args}`." if args else ".")]
    return "\n".join([*lines, *(f"- {_step(step)}" for step in history["steps"])])


def _step(step: Mapping[str, Any]) -> str:
    do = step["do"]
    if do == "convert":
        parts = [
            f"`{group['config']}({_arguments(group['args'])})` in {counted(len(group['layers']), 'layer')}"
            for group in step["groups"]
        ]
        return f"Converted: {'; '.join(parts)}."
    if do == "reparameterize":
        return f"Reparameterized: {len(step['merged'])} layers merged, {len(step['folded'])} norms folded."
    if do == "trim":
        return f"Trimmed: the kernels of {len(step['sizes'])} layers were cropped where the tolerance allowed."
    if do == "specialize":
        return f"Specialized: {len(step['layers'])} routed layers became static."
    if do == "choose_sizes":
        return f"Kernel sizes chosen for {len(step['sizes'])} elastic layers."
    return f"{_VERBS.get(do, do).capitalize()}: {len(step.get('layers', ()))} layers."


def _arguments(args: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in args.items())


def _images(subject: Subject) -> str:
    rows = [("size", f"{subject.size} pixels"), ("mean", _numbers(subject.mean)), ("std", _numbers(subject.std))]
    rows += [(key, str(value)) for key, value in subject.preprocessing.items() if value is not None]
    table = "\n".join(["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows)])
    names = subject.output_names
    if not names:
        return table
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    kind = "key points" if subject.work == "pose" else "classes"
    return f"{table}\n\n{len(names)} {kind}: {', '.join(names[:_LISTED])}{more}."


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _results(subject: Subject, trained: Mapping[str, Any]) -> str:
    where = f"On the val split of `{subject.recipe.data.name}`" if subject.recipe else "On the val split"
    rows = [f"| {name} | {shown(name, value)} |" for name, value in trained["metrics"].items() if value is not None]
    head = f"{where}, after {trained['step']} steps:"
    return "\n".join([head, "", "| metric | value |", "| --- | ---: |", *rows])


def _listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
