"""Parts of the benchmarks: counts, comparisons and thresholds; and the commands, on tiny shapes."""

import itertools
import json
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tolerances import FLOAT32, close
from widefield import cli
from widefield.bench import Row
from widefield.benchmarks import Bar, Settings, depthwise, mixture, model
from widefield.benchmarks.record import Record, bar, milliseconds
from widefield.benchmarks.settings import LAYOUTS, Ceilings

TOP = Ceilings(1e9, 1e9)


@pytest.fixture(autouse=True)
def _small_machine(monkeypatch):
    """Ceilings of a large matrix product take as long as all tests here."""
    for module in (depthwise, mixture):
        monkeypatch.setattr(module, "ceilings", lambda settings: TOP)


def row(name, p50):
    return Row(name, 0.9 * p50, p50, 1.1 * p50, 2)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("side", "kernel"), [*itertools.product((1, 2, 5, 7, 16), ((1, 3), (5, 5), (7, 1), (31, 13)))])
def test_only_products_inside_the_map_are_counted(side, kernel, stride):
    padding = (kernel[0] // 2, kernel[1] // 2)
    ones = F.conv2d(torch.ones(1, 1, side, side), torch.ones(1, 1, *kernel), None, stride, padding)
    assert depthwise.Case(1, 1, side, kernel, stride=stride).flops("forward") == 2 * ones.sum()


def test_flops_are_two_for_each_tap_inside_and_a_backward_pass_has_both_gradients():
    case = depthwise.Case(batch=2, channels=3, side=4, kernel=(3, 3), layers=5)
    assert case.flops("forward") == 2 * 5 * 2 * 3 * 10**2
    assert replace(case, kernel=(1, 3), stride=2).flops("forward") == 2 * 5 * 2 * 3 * 2 * 5
    assert case.flops("backward") == 2 * case.flops("weight_grad") == 2 * case.flops("input_grad")


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("step", depthwise.STEPS)
def test_peers_of_a_depthwise_row_compute_the_same(step, stride):
    case = depthwise.Case(2, 3, 7, (3, 5), layers=2, stride=stride)
    calls = depthwise.calls(case, step)
    assert set(calls) == {f"{peer} {layout}" for peer in ("ours", "stock") for layout in LAYOUTS}
    if step != "forward":
        found = [call() for call in calls.values()]
        assert found[0].shape == ((2, 3, 7, 7) if step == "input_grad" else (3, 1, 3, 5))
        for other in found[1:]:
            close(other, found[0], FLOAT32)


def test_a_passes_graph_wants_only_the_gradients_that_it_is_about(monkeypatch):
    seen = []

    def op(x, weight, stride):
        seen.append((x.requires_grad, weight.requires_grad, torch.is_grad_enabled()))
        return depthwise.stock(x, weight, stride)

    monkeypatch.setattr(depthwise, "ours", op)
    for step in depthwise.STEPS:
        depthwise.calls(depthwise.Case(1, 2, 4, (3, 3)), step)["ours NCHW"]()
    assert set(seen) == {(False, False, False), (True, False, True), (False, True, True), (True, True, True)}


def test_rows_of_16_bits_on_a_cpu_have_upcasting_as_a_peer():
    case = depthwise.Case(1, 2, 6, (3, 3), dtype=torch.bfloat16)
    calls = depthwise.calls(case, "weight_grad")
    assert {name.split()[0] for name in calls} == {"ours", "stock", "upcast"}
    assert calls["upcast NCHW"]().dtype == torch.bfloat16


def test_depthwise_ratios_compare_medians(monkeypatch):
    times = {"ours NCHW": 2.0, "ours channels_last": 1.0, "stock NCHW": 8.0, "stock channels_last": 3.0}
    monkeypatch.setattr(Settings, "measure", lambda *_, **__: {name: row(name, p50) for name, p50 in times.items()})
    case = depthwise.Case(1, 2, 4, (3, 3))
    nchw, last = depthwise.rows_of(case, "forward", Settings("test"), TOP)
    assert (nchw["same_layout"], nchw["better_layout"]) == (4, 1.5)
    assert (last["same_layout"], last["better_layout"]) == (3, 3)
    assert nchw["flops_per_s"] == case.flops("forward") / 2
    assert not nchw["measured_again"]


def test_what_comes_out_slower_is_measured_once_more_and_longer(monkeypatch):
    turns = []

    def measure(self, calls, *, more=1):
        turns.append(more)
        ours = 2.0 if more == 1 else 1.0
        return {name: row(name, ours if name.startswith("ours") else 1.5) for name in calls}

    monkeypatch.setattr(Settings, "measure", measure)
    rows = list(depthwise.rows_of(depthwise.Case(1, 2, 4, (3, 3)), "forward", Settings("test"), TOP))
    assert turns == [1, 3]
    assert [(r["same_layout"], r["measured_again"]) for r in rows] == [(1.5, True)] * 2


def test_batches_for_a_cpu_shrink_with_the_map_and_with_many_channels():
    sizes = {
        (384, 16): 8,
        (384, 32): 4,
        (384, 64): 1,
        (384, 56): 1,
        (384, 28): 4,
        (768, 28): 2,
        (768, 7): 8,
        (96, 56): 1,
    }
    assert {shape: depthwise.scaled_batch(*shape) for shape in sizes} == sizes


@pytest.mark.parametrize(
    ("limits", "measured", "where", "verdict"),
    [
        ({"at_least": 2}, 2.0, "b", "met"),
        ({"at_least": 2.5}, 2.0, "b", "not met"),
        ({"at_most": 4}, 4.0, "a", "met"),
        ({"at_most": 3.9}, 4.0, "a", "not met"),
    ],
)
def test_a_bar_is_held_against_the_worst_row(limits, measured, where, verdict):
    found = bar("text", [{"label": "a", "v": 4.0}, {"label": "b", "v": 2.0}], lambda r: r["v"], **limits)
    assert (found.measured, found.where, found.verdict) == (measured, where, verdict)
    assert found.to_dict()["verdict"] == verdict
    assert found.formatted()["verdict"] == verdict


def test_a_bar_without_rows_is_not_measured_and_one_without_a_limit_is_an_error():
    assert bar("text", [], lambda r: r["v"], at_least=1).verdict == "not measured"
    with pytest.raises(ValueError, match="either at_least or at_most"):
        bar("text", [], lambda r: r["v"])


def depthwise_row(kernel, side, step, layout="NCHW", channels=384, dtype="float32", ours=1.0, nchw=1.0, last=1.0):
    times = {"stock NCHW": {"p50": nchw}, "stock channels_last": {"p50": last}}
    times |= {f"ours {one}": {"p50": ours if one == layout else ours / 2} for one in LAYOUTS}
    same, better = times[f"stock {layout}"]["p50"] / ours, min(nchw, last) / ours
    return {
        "label": f"{kernel} {side} {step} {layout}", "kernel": str(kernel), "side": side, "step": step,
        "layout": layout, "channels": channels, "dtype": dtype, "times": times, "same_layout": same,
        "better_layout": better, "is_stock": False,
    }  # fmt: skip


def test_the_bars_of_the_depthwise_convolution_read_the_rows_that_they_speak_of():
    rows = [
        depthwise_row(31, 28, "forward", nchw=19.0, last=1.5),
        depthwise_row(31, 56, "forward", nchw=30.0, last=1.3, channels=96),  # too few channels for the second bar
        depthwise_row(31, 14, "forward", nchw=1.0, last=1.0),  # map too small
        depthwise_row(31, 32, "forward", "channels_last", nchw=99.0, last=1.2),
        depthwise_row(7, 28, "weight_grad", nchw=9.0, last=2.1),
        depthwise_row(31, 56, "weight_grad", nchw=26.0, last=90.0),
        depthwise_row(31, 64, "weight_grad", nchw=2.0, last=3.0),  # larger than 56
        depthwise_row(3, 28, "backward", nchw=0.94, last=0.94),
        {**depthwise_row(3, 14, "forward", nchw=0.93, last=0.93), "is_stock": True},
        {**depthwise_row(7, 28, "forward", dtype="bfloat16"), "upcast": 0.9},
        {**depthwise_row(7, 28, "weight_grad", nchw=9, last=9), "same_bits": False},
    ]
    found = {b.text: (b.measured, b.verdict) for b in depthwise.cpu_bars(rows)}
    assert list(found.values()) == [
        (19.0, "not met"),
        (1.5, "met"),
        (1.2, "not met"),
        (2.1, "met"),
        (4.2, "met"),
        (26.0, "met"),
        (52.0, "met"),
        (1.0, "met"),
        (None, "not measured"),
        (2.0, "met"),
        (0.94, "not met"),
        (0.93, "not met"),
        (0.9, "not met"),
        (None, "not measured"),
        (0.0, "not met"),
    ]
    on_gpu = [depthwise_row(31, 32, step, nchw=4, last=3) for step in depthwise.STEPS]
    on_gpu += [depthwise_row(7, 32, step, nchw=0.9, last=3) for step in depthwise.STEPS]
    verdicts = [b.verdict for b in depthwise.cuda_bars(on_gpu, "float32")]
    assert verdicts == ["met", "met", "not met", "not met", *["not met"] * 4, "not measured", "not measured"]


@pytest.mark.parametrize("mode", mixture.MODES)
def test_peers_of_a_mixture_compute_the_same(mode):
    case = mixture.Case(3, 4, 6, (3, 5, 7))
    calls = mixture.calls(case, mode)
    peers = ("ours", "branches", "stock largest", "our largest")
    assert set(calls) == {f"{peer} {layout}" for peer in peers for layout in LAYOUTS}
    for group in (peers[:2], peers[2:]):
        first, *others = [calls[f"{peer} {layout}"]() for peer in group for layout in LAYOUTS]
        for other in others:
            for a, b in zip(*([value] if mode == "inference" else value for value in (first, other)), strict=True):
                close(b, a, FLOAT32)


def test_hard_routing_keeps_the_largest_weights_as_they_are():
    t = mixture.inputs(mixture.Case(6, 4, 6, mixture.STANDARD), "NCHW")
    assert ((t.hard != 0).sum(1) == mixture.CHOSEN).all()
    assert torch.equal(t.hard.amax(1), t.weights.amax(1))
    calls = mixture.hard_calls(mixture.Case(6, 4, 6, mixture.STANDARD), "inference")
    close(calls["hard channels_last"](), mixture.naive(t.x, t.kernels, t.biases, t.hard, t.groups), FLOAT32)


def measured(case, ours, branches, stock, largest):
    numbers = {"ours": ours, "branches": branches, "stock largest": stock, "our largest": largest}
    return {f"{n} {layout}": row(n, v) for n, pair in numbers.items() for layout, v in zip(LAYOUTS, pair, strict=True)}


def test_mixture_ratios_and_bars():
    case = mixture.Case(16, 4, 14, mixture.STANDARD)
    rows = mixture.rows_of(case, "step", measured(case, (2.0, 4.0), (30.0, 10.0), (9.0, 5.0), (1.0, 4.0)))
    assert [r["branches_over_ours"] for r in rows] == [5, 2.5]
    assert [r["ours_over_stock_largest"] for r in rows] == [0.4, 0.8]
    assert [r["ours_over_our_largest"] for r in rows] == [2, 1]
    assert [r["images_per_s"] for r in rows] == [8, 4]
    many = [{"label": "m", "count": n, "mode": "step", "over_first": v} for n, v in ((5, 1.0), (64, 1.6), (128, 9.0))]
    hard = mixture.hard_rows(
        case, "step", {f"{n} {x}": row(n, v) for x in LAYOUTS for n, v in (("soft", 9), ("hard", 10))}
    )
    bars = mixture.cpu_bars(rows, many, hard)
    assert [(b.measured, b.verdict) for b in bars] == [
        (2.5, "not met"),
        (5.0, "met"),
        (0.8, "met"),
        (0.4, "met"),
        (2.0, "not met"),
        (2.0, "not met"),
        (1.6, "not met"),
        (0.9, "not met"),
    ]
    assert [(b.measured, b.verdict) for b in mixture.cuda_bars(rows, many, hard)[:2]] == [
        (2.5, "met"),
        (0.5, "not met"),
    ]
    assert mixture.throughput(rows, "step") == [
        {
            "shape": "4 x 14x14", "experts": "{3, 5, 7, 9, 11}",
            "ours": "8", "branches": "2", "our largest": "16", "stock largest": "3",
        }
    ]  # fmt: skip


def test_times_show_three_digits():
    assert milliseconds({"p20": 0.00123456, "p50": 0.012, "p80": 1.23456}) == "12 (1.23-1235)"


def test_interrupting_leaves_what_there_is(tmp_path):
    record = Record("name", Settings("command", out=tmp_path))
    table = record.table("Rows", {"a": lambda r: str(r["a"])})
    with record.until_interrupted():
        record.add(table, {"a": 1})
        raise KeyboardInterrupt
    record.finish([Bar("text", 1, True, 2.0, "there")])
    result = json.loads((tmp_path / "name_cpu.json").read_text())
    assert result["tables"] == {"Rows": [{"a": 1}]}
    assert "Interrupted" in result["facts"][0]


def read(folder, stem, capsys):
    result = json.loads((folder / f"{stem}.json").read_text())
    text = (folder / f"{stem}.md").read_text()
    out = capsys.readouterr().out
    assert {"device", "threads", "torch", "date", "dtype"} <= result["environment"].keys()
    assert result["command"].startswith("widefield bench ")
    for written in (text, out):
        assert result["command"] in written
        assert all(b["text"] in written for b in result["summary"])
    assert re.search(r"start:summary\] -->\n\n`widefield bench .*\n(.*\n)*<!-- --8<-- \[end:summary\] -->", text)
    return result, text


def test_bench_depthwise_writes_rows_ratios_and_bars(tmp_path, capsys):
    words = (
        "bench depthwise --channels 4 --resolutions 6 5 --kernels 3 7 --batch-size 1 --repeats 2 --budget 0.01 --out"
    )
    assert cli.main([*words.split(), str(tmp_path / "new")]) == 0
    result, text = read(tmp_path / "new", "depthwise_cpu", capsys)
    rows = result["tables"]["RepLKNet, table 1"]
    assert len(rows) == 2 * 2 * 2 * 4
    for r in rows:
        times = r["times"]
        assert all(t["p20"] <= t["p50"] <= t["p80"] and t["repeats"] >= 2 for t in times.values())
        mine = times[f"ours {r['layout']}"]["p50"]
        stock = {layout: times[f"stock {layout}"]["p50"] for layout in LAYOUTS}
        assert r["same_layout"] == pytest.approx(stock[r["layout"]] / mine)
        assert r["better_layout"] == pytest.approx(min(stock.values()) / mine)
        assert set(r["backend"].split(" + ")) <= {"aten", "onednn", "fft"}
        assert r.get("same_bits", True)
    seen = 0
    for b in result["summary"]:
        if b["text"].startswith("every row"):
            own = [r for r in rows if f"every row, {r['step']}:" in b["text"] and not r["is_stock"]]
            spoken_of = [r for r in rows if r["is_stock"]] if "F.conv2d itself" in b["text"] else own
            seen += len(spoken_of)
            worst = min(spoken_of, key=lambda r: r["same_layout"], default={"same_layout": None, "label": b["where"]})
            assert (b["measured"], b["where"]) == (worst["same_layout"], worst["label"])
    assert seen == len(rows)
    assert "| R |  | 3 | 7 |" in text
    assert list(tmp_path.iterdir()) == [tmp_path / "new"]


def test_bench_mixture_writes_all_tables(tmp_path, capsys):
    words = (
        "bench mixture --shapes 4x5 --sets 3,5 3,5,7,9,11 --counts 2 3 --batch-size 2 --repeats 2 --budget 0.01 --out"
    )
    assert cli.main([*words.split(), str(tmp_path)]) == 0
    result, text = read(tmp_path, "mixture_cpu", capsys)
    tables = result["tables"]
    assert {name: len(rows) for name, rows in tables.items()} == {
        "Sets of experts": 8, "Many experts": 8, "Hard routing": 8, "Dense mixtures": 0,
    }  # fmt: skip
    for r in tables["Many experts"]:
        first, own = (r["times"][f"{n} {r['layout']}"]["p50"] for n in (2, r["count"]))
        assert r["over_first"] == pytest.approx(own / first)
    assert "step, images/s" in text


def test_dense_mixtures_say_what_auto_takes(monkeypatch):
    settings = Settings("test", repeats=2, budget_s=0.01)
    for shape, way in (((2, 6), "merged"), ((8, 1), "branches")):
        case = mixture.Case(2, *shape, (3, 5), dense=True)
        r = mixture.dense_row(case, "NCHW", settings.measure(mixture.dense_calls(case, "NCHW")))
        assert r["auto"] == way
        assert r["branches_over_merged"] == pytest.approx(r["times"]["branches"]["p50"] / r["times"]["merged"]["p50"])


def test_bench_model_compares_a_model_with_itself_converted(tmp_path, capsys):
    words = "bench model test_convnext test_resnet --batch-size 2 --size 32 --repeats 2 --budget 0.01 --out"
    assert cli.main([*words.split(), str(tmp_path)]) == 0
    rows = read(tmp_path, "model_cpu", capsys)[0]["tables"]["Models"]
    assert [(r["model"], r["mode"], r["layout"], r["layers"]) for r in rows] == [
        (name, mode, layout, layers)
        for name, peers in (("test_convnext", ("timm", "FastDepthwise")), ("test_resnet", ("timm",)))
        for mode in model.MODES
        for layout in LAYOUTS
        for layers in peers
    ]
    for r in rows:
        assert r["images_per_s"] == pytest.approx(2 / r["time"]["p50"])
        assert r["macs"] > 0
        assert r["time"]["peak_bytes"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("model resnt18", "no model is called 'resnt18'. Did you mean 'resnet18'?"),
        ("model resnet18 --batch-size 0", "batch_size must be at least 1; got 0"),
        ("depthwise --kernels 4", "kernel sizes must be odd"),
        ("depthwise --repeats 0", "repeats must be at least 1; got 0"),
        ("depthwise --budget -1", "budget_s must be from 0"),
        ("depthwise --layers 0", "layers must be at least 1"),
        ("depthwise --out file.txt/sub", "file.txt"),
        ("mixture --shapes 96", "--shapes takes words such as 96x56; got '96'"),
        ("mixture --sets 3,x", "--sets takes words such as 3,5,7; got '3,x'"),
        ("mixture --sets 3,4", "kernel sizes must be odd"),
        ("mixture --counts 0", "counts must be at least 1"),
        pytest.param(
            "depthwise --device cuda",
            "torch sees no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_what_the_user_can_mend_is_one_line_before_anything_is_measured(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("not a folder")
    assert cli.main(["bench", *words.split()]) == 1
    out, error = capsys.readouterr()
    assert message in error
    assert error.startswith("widefield bench: ")
    assert "Traceback" not in error
    assert not out


@pytest.mark.parametrize("words", ["", "depthwsie", "depthwise --device tpu", "depthwise --kernels x", "model"])
def test_wrong_usage_exits_2(words, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", *words.split()])
    assert caught.value.code == 2
    assert "usage: widefield bench" in capsys.readouterr().err
