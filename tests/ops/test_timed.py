"""Timed choices and their file, with a fake device and a fake clock."""

import json
from types import SimpleNamespace

import pytest
import torch
from test_backends import problem

from widefield.ops import _backend, _timed

# Timed choices, with a fake device and a fake clock.


@pytest.fixture
def card(monkeypatch, tmp_path):
    """Return problem, times and calls of a fake CUDA device on which both Triton backends can compute everything."""
    times = {"aten": 3.0, "direct": 2.0, "gemm": 1.0}
    state = SimpleNamespace(
        problem=problem(device=torch.device("cuda", 0)), times=times, calls=[], capturing=False,
        folder=tmp_path, able=["aten", "direct", "gemm"],
    )  # fmt: skip

    def milliseconds(run, device):
        run()
        return state.times[state.calls[-1]]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_timed, "_memory", {})
    monkeypatch.setattr(_timed, "_milliseconds", milliseconds)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card A/100 x")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(_backend, "why_not", lambda name, _: None if name in state.able else "it cannot")
    monkeypatch.setattr(_backend, "module", lambda name: name)
    state.run = state.calls.append
    return state


def test_every_way_is_timed_once_and_the_winner_remembered(card):
    assert _backend.choose(card.problem, card.run) == (
        "gemm", "timed: aten 3.000 ms, direct 2.000 ms, gemm 1.000 ms",
    )  # fmt: skip
    assert card.calls == ["aten", "direct", "gemm"]
    assert _backend.choose(card.problem, card.run)[0] == "gemm"
    assert _backend.choose(card.problem)[0] == "gemm"
    assert len(card.calls) == 3


def test_times_outlive_the_process(card, monkeypatch):
    _backend.choose(card.problem, card.run)
    _backend.choose(card.problem._replace(step="input_grad"), card.run)
    path = _timed.cache_file(card.problem.device)
    assert path.parent == card.folder / "widefield" / "backends"
    assert path.name.startswith("Card_A_100_x-")
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary files remain
    assert sorted(json.loads(path.read_text()).values(), key=str) == [card.times] * 2
    monkeypatch.setattr(_timed, "_memory", {})
    assert _backend.choose(card.problem, card.run)[0] == "gemm"
    assert len(card.calls) == 6


def test_the_cache_lies_at_home_unless_said_otherwise(monkeypatch, card):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(card.folder))
    assert _timed.cache_file(card.problem.device).parent == card.folder / ".cache" / "widefield" / "backends"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1, 2]", b"null", b"\xff\xfe\x00", b'{"a": 3}', "key: null", "key: 3", "key: {}", "key: text"],
)
def test_an_unreadable_cache_is_measured_again(card, content):
    path = _timed.cache_file(card.problem.device)
    path.parent.mkdir(parents=True)
    if isinstance(content, str):
        value = {"null": None, "3": 3, "{}": {}, "text": dict.fromkeys(card.times, "fast")}[content.split()[1]]
        content = json.dumps({_timed.key_of(card.problem): value}).encode()
    path.write_bytes(content)
    assert _backend.choose(card.problem, card.run)[0] == "gemm"
    assert card.calls == ["aten", "direct", "gemm"]
    assert json.loads(path.read_text())[_timed.key_of(card.problem)] == card.times


def test_a_cache_that_cannot_be_written_is_no_error(card, monkeypatch):
    blocked = card.folder / "a file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert _backend.choose(card.problem, card.run)[0] == "gemm"
    assert _backend.choose(card.problem, card.run)[0] == "gemm"  # still cached in this process
    assert len(card.calls) == 3


def test_a_cache_that_cannot_be_replaced_leaves_nothing_behind(card):
    path = _timed.cache_file(card.problem.device)
    path.mkdir(parents=True)
    assert _backend.choose(card.problem, card.run)[0] == "gemm"
    assert list(path.parent.iterdir()) == [path]


def test_times_without_all_candidates_are_measured_again(card):
    card.able = ["direct"]
    assert _backend.choose(card.problem, card.run)[0] == "direct"
    card.able = ["direct", "gemm"]
    assert _backend.choose(card.problem, card.run)[0] == "gemm"
    assert card.calls == ["aten", "direct", "aten", "direct", "gemm"]
    card.able = ["direct"]  # fewer candidates need no new timing
    assert _backend.choose(card.problem, card.run)[0] == "direct"
    assert len(card.calls) == 5


def test_pytorchs_own_is_left_for_a_clear_win_only(card):
    card.times = {"aten": 1.0, "direct": 0.98, "gemm": 2.0}
    assert _backend.choose(card.problem, card.run)[0] == "aten"
    card.times = {"aten": 1.0, "direct": 0.96, "gemm": 2.0}
    assert _backend.choose(card.problem._replace(channels=9), card.run)[0] == "direct"


def test_nothing_is_timed_while_a_graph_is_captured_or_determinism_is_asked_for(card):
    card.capturing = True
    assert _backend.choose(card.problem, card.run)[0] == "direct"
    card.capturing = False
    torch.use_deterministic_algorithms(True)
    try:
        assert _backend.choose(card.problem, card.run)[0] == "direct"
    finally:
        torch.use_deterministic_algorithms(False)
    assert not card.calls
    card.times["aten"] = 0.1
    assert _backend.choose(card.problem, card.run)[0] == "aten"
    torch.use_deterministic_algorithms(True)
    try:  # deterministic algorithms do not use timings
        assert _backend.choose(card.problem, card.run)[0] == "direct"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("kernel", "able", "guess"),
    [
        ((31, 31), ["direct", "gemm"], "gemm"),
        ((31, 5), ["direct", "gemm"], "direct"),
        ((31, 31), ["direct"], "direct"),
        ((3, 3), ["gemm"], "gemm"),
        ((3, 3), [], "aten"),
    ],
)
def test_a_rule_of_thumb_holds_until_it_is_timed(card, kernel, able, guess):
    card.able = able
    assert _backend.choose(card.problem._replace(kernel=kernel))[0] == guess
    assert not card.calls


def test_problems_that_share_times():
    plain = problem(device=torch.device("cuda", 0))
    keys = {batch: _timed.key_of(plain._replace(batch=batch)) for batch in (1, 2, 5, 8, 9)}
    assert keys[5] == keys[8]
    assert len(set(keys.values())) == 4
    others = {
        "step": "input_grad", "channels": 9, "height": 15, "width": 15, "kernel": (7, 9), "stride": (1, 2),
        "padding": (3, 4), "dilation": (1, 2), "per_sample": True, "dtype": torch.float16, "channels_last": True,
    }  # fmt: skip
    assert len(
        {_timed.key_of(plain)} | {_timed.key_of(plain._replace(**{k: v})) for k, v in others.items()}
    ) == 1 + len(others)
    before = torch.backends.cudnn.allow_tf32
    try:
        found = set()
        for allowed in (False, True):
            torch.backends.cudnn.allow_tf32 = allowed
            found.add(_timed.key_of(plain))
        assert len(found) == 2
    finally:
        torch.backends.cudnn.allow_tf32 = before


def test_the_clock_takes_the_median_of_five_calls_after_two(monkeypatch):
    now, durations, calls = [0.0], iter([900.0, 90.0, 5.0, 1.0, 4.0, 70.0, 3.0]), []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def elapsed_time(self, end):
            return end.at - self.at

    def run():
        calls.append(now[0])
        now[0] += next(durations)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert _timed._milliseconds(run, torch.device("cuda", 0)) == 4.0
    assert len(calls) == 7
