import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from widefield import cli

TINY = [
    "--model.args",
    "{patch_size: 4, depths: [1, 1, 1, 1], dims: [4, 4, 8, 8], ls_init_value: null}",
    "--data.args",
    "{size: 32}",
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_models_lists_ours_with_parameters_and_macs(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main(["models"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"morf_convnext_tiny .* 30\.39M .* 4\.6\d+G", text)
    assert len(re.findall("morf_", text)) == 5


def test_models_needs_neither_torch_nor_timm():
    code = """
import sys
sys.modules["torch"] = sys.modules["timm"] = None
import widefield_cli
sys.exit(widefield_cli.main(["models"]))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "van_b0" in result.stdout


def test_models_takes_a_glob_over_all_of_timm(capsys):
    assert cli.main(["models", "resnet18"]) == 0
    assert re.search(r"resnet18 .* 11\.69M .* 1\.814G", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["models", "resnt18"], "no model matches 'resnt18'. Did you mean 'resnet18'?"),
        (["train"], "give a recipe"),
        (["train", "digits_mrf"], "digits_morf"),
        (["train", "digits_morf", "--optimizer.lrr", "1"], "optimizer.lrr: unknown key. Did you mean 'lr'?"),
        (["train", "digits_morf", "--conversion.args.routing", "sotf"], "Did you mean 'soft'"),
        (["train", "digits_morf", "--conversion.where", "nothing.*"], "These could match"),
        (["train", "digits_morf", "--conversion.args.kernel_sizes", "[3, 4]"], "must be odd"),
        (["train", "digits_morf", "--output", "file.txt/sub"], "file.txt"),
        (["demo", "--output", "file.txt/sub"], "file.txt"),
        (["train", "--resume", "nowhere"], "nowhere"),
        (["train", "--resume", "runs/none"], "there is no run in runs/none: give the folder of one"),
        (
            ["demo", "--data", "digits", "--conversion.args.routing", "hard"],
            "the demo sets conversion.args.routing itself",
        ),
        (["demo", "--data", "digits", "--model.name", "resnet18"], "model.args"),
        (["demo", "--epochs", "1"], "choose a part of the demo with --data"),
        (["demo", "--data", "photo_crops", "--epoch", "1"], "Did you mean 'epochs'?"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_1(words, message, here, capsys):
    (here / "file.txt").write_text("not a folder")
    assert cli.main(words) == 1
    error = capsys.readouterr().err
    assert f"widefield {words[0]}: " in error
    assert message in error
    assert "Traceback" not in error
    assert not (here / "runs").exists() or not list((here / "runs").rglob("*.safetensors"))


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["trian"],
        ["models", "--foo"],
        ["demo", "--data", "mnist"],
        ["train", "digits_morf", "--epochs"],
        ["train", "digits_morf", "digits_7x7"],
        ["bench"],
    ],
)
def test_wrong_usage_exits_2(words, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "usage: widefield" in error
    assert "--optimizer.lr" not in error  # the keys of recipes are in the help


def test_recipe_and_keys_may_stand_anywhere(capsys):
    words = ["--optimizer.lr=1e-2", "--ema", "null", "--model.args.drop_rate", "0.5", "--print-config", "--epochs", "7"]
    found = []
    for place in (0, 1, 3, 5, 6, 8):
        assert cli.main(["train", *words[:place], "digits_morf", *words[place:], "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["recipe"])
    assert all(recipe == found[0] for recipe in found)
    assert (found[0]["optimizer"]["lr"], found[0]["epochs"], found[0]["ema"]) == (0.01, 7, None)
    assert found[0]["model"]["args"]["drop_rate"] == 0.5


def test_help_names_every_key_of_a_recipe(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = capsys.readouterr().out
    for key in ("--optimizer.lr ", "--conversion.where ", "--data.name ", "widefield recipes"):
        assert key in text


def test_train_leaves_a_run_that_can_be_resumed(here, capsys):
    words = ["train", "digits_morf", "--epochs", "2", "--schedule.warmup_epochs", "0", *TINY]
    assert cli.main(words) == 0
    run = here / "runs" / "digits_morf"
    assert (run / "config.yaml").exists()
    assert list((run / "checkpoints").iterdir())
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [e["epoch"] for e in entries if e["kind"] == "epoch"] == [0, 1]
    assert cli.main(words) == 1  # the folder holds a run
    assert "--resume" in capsys.readouterr().err
    assert cli.main(["train", "--resume", "runs/digits_morf"]) == 0  # finished: reports this and returns at once
    shown = capsys.readouterr().err
    assert "the run in runs/digits_morf is finished: all 2 epochs are done (train_loss" in shown
    command = re.search(r"from its weights: widefield (.*)$", shown.strip())[1].replace("NEW", "longer")
    assert cli.main([*command.split(), "--epochs", "1"]) == 0
    assert (here / "runs" / "longer" / "checkpoints").is_dir()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Return the folder of runs with one that was stopped after its first step."""
    from widefield.train.run import Run

    plain = Run._step

    def stopping(run, group):
        plain(run, group)
        signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("stopped"))
        patch.setattr(Run, "_step", stopping)
        first = ["train", "digits_morf", "--epochs", "2", "--schedule.warmup_epochs", "0", *TINY]
        assert cli.main(first) == 128 + signal.SIGINT
        return Path("runs").resolve()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workers", "1"], None),
        (["--workers=1", "--log_every", "3"], None),
        (["--checkpoint.keep", "1", "--trackers", "[]"], None),
        (["--epochs", "9"], "epochs was 2 and is 9. Leave that out, or start another run with --name. Free to change"),
        (["--seed", "1"], "Free to change are checkpoint, log_every, patience, trackers, workers."),
        (["--name", "other"], "a resumed run stays in its folder, runs/digits_morf: leave out --name."),
        (["--output=there"], "a resumed run stays in its folder, runs/digits_morf: leave out --output."),
        (["--worker", "1"], "worker: unknown key. Did you mean 'workers'?"),
        (["--workers", "1", "digits_morf"], "Resume with the recipe of that run"),
    ],
)
def test_keys_beside_resume_mean_what_they_say(words, message, stopped, here, capsys):
    shutil.copytree(stopped, "runs")
    resume = ["--resume", "runs/digits_morf"]
    for order in ([*resume, *words], [*words, *resume]) if message else ([*words, *resume],):
        status = cli.main(["train", *order])
        shown = capsys.readouterr().err
        assert status == (1 if message else 0), shown
        assert message is None or message in shown


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_signals_save_and_leave_cleanly(number, here):
    command = [sys.executable, "-m", "widefield", "train", "digits_morf", "--epochs", "500", *TINY]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=here)
    log = here / "runs" / "digits_morf" / "metrics.jsonl"
    for _ in range(600):
        if log.exists() and log.stat().st_size:
            break
        time.sleep(0.1)
    process.send_signal(number)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 128 + number, error
    assert "--resume" in error
    assert "Traceback" not in error
    assert list((here / "runs" / "digits_morf" / "checkpoints").glob("*/model.safetensors"))


@pytest.mark.parametrize("data", [pytest.param("digits", marks=pytest.mark.slow), "scales"])
def test_demo_writes_results_and_a_self_contained_page(data, here, capsys):
    small = ["--epochs", "1", "--schedule.warmup_epochs", "0"]
    small += ["--data.args.size", "32"] if data == "digits" else ["--data.args.count", "128"]
    words = ["demo", "--data", data, *small, "--model.args.dims", "[4, 8, 8, 8]"]
    folder = here / "runs" / "demo"
    earlier = folder / "7x7" / "config.yaml"  # of an earlier demo, which is replaced
    earlier.parent.mkdir(parents=True)
    earlier.write_text("name: earlier\n")
    assert cli.main(words) == 0
    assert "earlier" not in earlier.read_text()
    results = json.loads((folder / "results.json").read_text())
    assert set(results[data]["models"]) == {"7x7", "MoRF soft", "MoRF hard"}
    for name, entry in results[data]["models"].items():
        assert 0 <= entry["accuracy"] <= 1
        assert entry["cost"]["parameters"] > 0
        assert entry["cost"]["macs"] > 0
        assert entry["step"]["p20"] <= entry["step"]["p50"] <= entry["step"]["p80"]
        assert entry["blocks"]["score"] == pytest.approx(entry["accuracy"])
        assert len(entry["blocks"]["blocks"]) == 5
        assert name == "7x7" or entry["difference"]["max_abs"] <= 1e-4 * entry["difference"]["scale"]
    for blocks in results[data]["routing"].values():
        assert len(blocks) == 5
        assert all(sum(b["frequencies"]) == pytest.approx(1, abs=1e-5) for b in blocks)
    page = (folder / "mixtures.html").read_text()
    assert page.count("<svg ") == 12 + 3  # figures, and a confusion matrix for each network
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "MoRF hard" in page
    report = (folder / "report.html").read_text()
    assert 'href="mixtures.html"' in report
    for term in ("Why a fused mixture has more parameters", "Dead expert", "Signed routing weights"):
        assert f"<dt>{term}</dt>" in report
    assert re.search(
        r'class="headline"><p>7x7, MoRF soft and MoRF hard were compared on the same \d+ validation', report
    )
    out = capsys.readouterr().out
    assert "runs/demo/report.html" in out
    assert "training step" in out
    assert "all blocks off" in out


def test_help_version_lists_and_wrong_usage_need_no_torch(tmp_path):
    program = """
import sys
import widefield_cli
import json
for words, status in json.loads(sys.argv[1]):
    try:
        found = widefield_cli.main(words)
    except SystemExit as end:
        found = end.code
    assert found == status, (words, found)
    assert not {"torch", "timm", "numpy", "matplotlib"} & set(sys.modules), words
sys.exit(widefield_cli.main(["plan", "replknet_31b", "--to", "nonsense"]))
"""
    for name, log in (("trained", True), ("fresh", False)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(f"base: slak_tiny_in1k\nname: {name}\n")
        if log:
            entry = {"kind": "epoch", "step": 9, "epoch": 0, "seconds": 3.0, "top1": 0.5}
            (tmp_path / name / "metrics.jsonl").write_text(json.dumps(entry) + "\n")
    place = str(tmp_path)
    light = [
        [["--help"], 0], [["--version"], 0], [["erf", "--help"], 0], [["train", "--help"], 0], [["fit", "--help"], 0],
        [["nonsense"], 2], [["erf", "--sise", "3"], 2], [["erf"], 2], [["plan", "resnet18"], 2],
        [["train"], 1], [["train", "digits_mrf"], 1], [["train", "digits_morf", "--epoch", "1"], 1], [["fit"], 1],
        [["train", "digits_morf", "--print-config"], 0],
        [["recipes"], 0], [["recipes", "nonsense"], 1], [["models"], 0],
        [["runs", place], 0], [["runs", place, "--compare", "trained", "fresh"], 0], [["runs", "nowhere"], 1],
        [["runs", place, "--out", str(tmp_path / "runs.json")], 0],
    ]  # fmt: skip
    words = [sys.executable, "-c", program, json.dumps(light)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "nonsense" in done.stderr  # and not that there is no replknet_31b: models are registered when needed
