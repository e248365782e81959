"""Displays and progress bars in the kernel of a notebook, without ``%matplotlib inline``."""

from __future__ import annotations

import pytest

from kernel import printed, run_cells, shown

CELLS = (
    """
import timm, torch, widefield
from widefield import analysis, report
model = timm.create_model("test_resnet").eval()
""",
    "plan = widefield.plan(model, widefield.MoRF((3, 5))); plan",
    "print(plan)",
    "field = analysis.effective_receptive_field(model, [torch.randn(2, 3, 64, 64)] * 9, progress=True)",
    "field",
    "field.plot()",
    """
from widefield._progress import ProgressLine, progress_console
from widefield.train.progress import reporter
with reporter(progress_console(), 500) as run:
    for epoch in range(5):
        for step in range(100):
            run.step(100 * epoch + step + 1, "loss 0.5")
        run.line(f"epoch {epoch + 1} of 5")
""",
    """
with ProgressLine(progress_console()) as bar:
    for _ in bar.track(range(7), description="<erf>"):
        if _ == 3:
            break
""",
    "'matplotlib.pyplot' in __import__('sys').modules",
)


pytestmark = pytest.mark.slow  # a kernel takes seconds to start and to import torch


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> list[list[object]]:
    return run_cells(CELLS, tmp_path_factory.mktemp("kernel"))


def test_records_and_figures_are_tables_and_pictures(outputs: list[list[object]]) -> None:
    _, plan, text, _, field, figure, _, _, pyplot = outputs
    (html,) = shown(plan, "text/html")
    assert "<table>" in html
    assert shown(plan, "text/plain")[0].startswith("7 replaced")
    assert len(printed(text).splitlines()) > 10
    assert shown(text, "text/html") == []
    assert 'src="data:image/png;base64,' in shown(field, "text/html")[0]
    assert shown(figure, "image/png")[0].startswith("iVBOR")
    assert shown(pyplot, "text/plain") == ["False"]  # nothing has loaded the inline backend


def test_a_bar_is_one_output_that_ends_complete(outputs: list[list[object]]) -> None:
    (html,) = shown(outputs[3], "text/html")
    assert '<progress value="9" max="9"></progress> 9/9 0:00:0' in html
    assert printed(outputs[3]) == ""
    assert len(shown(outputs[6], "text/html")) == 1
    assert '<progress value="500" max="500"></progress> 500/500' in shown(outputs[6], "text/html")[0]
    assert "loss 0.5" in shown(outputs[6], "text/html")[0]
    assert printed(outputs[6]).splitlines() == [f"epoch {epoch} of 5" for epoch in range(1, 6)]
    assert all(getattr(output, "name", "stdout") == "stdout" for output in outputs[6])


def test_a_bar_that_is_left_early_says_so(outputs: list[list[object]]) -> None:
    assert '&lt;erf&gt; <progress value="3" max="7"></progress> 3/7' in shown(outputs[7], "text/html")[0]
