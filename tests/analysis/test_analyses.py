"""The registry of analyses: complete, one call signature, and the same entries for commands and reports."""

import inspect

import pytest
import timm
import torch

from widefield import analysis, cli
from widefield.analysis.registry import ANALYSES, View
from widefield.data import Pictures


def test_every_analysis_is_public_and_has_a_command():
    returned = {entry.function.__annotations__["return"] for entry in ANALYSES.values()}
    results = {name for name in analysis.__all__ if isinstance(getattr(analysis, name), type)}
    results = {name for name in results if issubclass(getattr(analysis, name), analysis.Result)} - {"Result"}
    results.remove("Faithfulness")  # a test of a result, not of a model
    assert returned == results
    assert all(entry.function.__name__ in analysis.__all__ for entry in ANALYSES.values())
    assert set(ANALYSES) <= set(cli.COMMANDS)


@pytest.mark.parametrize("entry", ANALYSES.values(), ids=ANALYSES)
def test_arguments_have_one_order_and_the_same_words(entry):
    parameters = list(inspect.signature(entry.function).parameters.values())
    leading = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert leading == (["model"] if entry.name == "kernels" else ["model", "images"])
    words = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert {"name", "about"} <= words
    assert entry.name == "kernels" or "progress" in words
    assert entry.name in ("kernels", "object-erf") or "batch_size" in words


def test_a_view_runs_every_analysis_of_a_plain_classifier():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet").eval()
    pictures = Pictures(count=2, size=65)
    view = View(model, "tiny", "random", pictures, batch_size=2)
    options = {
        "interactions": {"grid": 2, "pairs": 1, "contexts": 2},
        "stability": {"shifts": (1,)},
    }
    applies = {name for name, entry in ANALYSES.items() if entry.applies(model)}
    assert applies == set(ANALYSES) - {"routing", "masks", "object-erf", "keypoint-erf"}
    for name in applies - {"shape-bias"}:  # it uses images of its own
        entry = ANALYSES[name]
        seen = View(model, "tiny", "random") if not entry.reads_images(model) else view
        result = entry.run(seen, **options.get(name, {}))
        words = type(result).reading({"tiny": result, "another": result})
        assert words.endswith(".")
        assert "another" in words or name == "blocks"
        assert (result.name, result.about["weights"]) == ("tiny", "random")
        html = result._repr_html_()
        assert html.count("data:image/png;base64,") >= 1
        assert "<table>" in html
        assert "tiny" in result.summary()


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [
        ("erf", "target", "position"),
        ("erf", "target_layer", "layer"),
        ("cam", "target", "targets"),
        ("routing", "batch", "batch_size"),
        ("stability", "verbose", "progress"),
    ],
)
def test_another_librarys_argument_names_lead_to_ours(name, wrong, right):
    with pytest.raises(TypeError, match=rf"has no argument '{wrong}'\. Did you mean '{right}'\?"):
        ANALYSES[name].function(torch.nn.Identity(), torch.zeros(1, 3, 8, 8), **{wrong: None})
