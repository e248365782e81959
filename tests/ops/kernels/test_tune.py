import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
import triton
from triton.errors import TritonError

from widefield.ops import _cache, _triton
from widefield.ops._triton import direct, gemm, host, routed, tune

CANDIDATES = [{"B": 1}, {"B": 2}, {"B": 3}]


def test_the_fastest_candidate_wins_and_one_that_does_not_compile_drops_out():
    times = {1: 3.0, 2: TritonError("too large"), 3: 2.0}
    launched = []

    def launch(config):
        launched.append(config)
        if isinstance(time := times[config["B"]], Exception):
            raise time
        return time

    assert tune.fastest(CANDIDATES, launch, lambda call: call()) == {"B": 3}
    assert launched == CANDIDATES
    assert tune.fastest(CANDIDATES[:1], launch, None) == {"B": 1}
    with pytest.raises(TritonError, match="too large"):
        tune.fastest([{"B": 2}, {"B": 2}], launch, lambda call: call())


def test_choices_are_kept_in_a_file(tmp_path):
    path = tmp_path / "widefield" / "triton" / "gpu.json"
    assert _cache.read(path) == {}
    _cache.write(path, "a", {"B": 1})
    _cache.write(path, "b", {"B": 2})
    assert _cache.read(path) == {"a": {"B": 1}, "b": {"B": 2}}
    assert [p.name for p in path.parent.iterdir()] == ["gpu.json"]


@pytest.mark.parametrize("content", ["", "{", "[1]", "\udcff"])
def test_a_broken_file_is_no_file(tmp_path, content):
    path = tmp_path / "gpu.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    assert _cache.read(path) == {}
    _cache.write(path, "a", {"B": 1})
    assert json.loads(path.read_text()) == {"a": {"B": 1}}


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    _cache.write(tmp_path / "file" / "gpu.json", "a", {"B": 1})
    assert _cache.read(tmp_path / "file" / "gpu.json") == {}


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Pretend that there is a GPU; yield the state that decides about measuring, and the measured launches."""
    measured = []

    def fastest(candidates, launch):
        measured.append(candidates)
        return candidates[-1]

    state = {"capturing": False}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU/1 (tm)")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    monkeypatch.setattr(tune, "fastest", fastest)
    monkeypatch.setattr(tune, "_best", {})
    tune.cache_file.cache_clear()
    yield state, measured
    tune.cache_file.cache_clear()


def run(key=(7, 7)):
    return tune.run("kernel", key, lambda: CANDIDATES, lambda config: config["B"], torch.device("cuda", 0))


def test_each_key_is_measured_once(gpu, tmp_path):
    _, measured = gpu
    assert [run(), run(), run((9, 9))] == [3, 3, 3]
    assert len(measured) == 2
    tune._best.clear()  # another process
    assert run() == 3
    assert len(measured) == 2
    (path,) = tmp_path.rglob("*.json")
    assert path.name == f"GPU_1_tm_-{torch.__version__}-{triton.__version__}.json"
    path.write_text(json.dumps({entry: {"B": 9} for entry in _cache.read(path)}))  # of a version with other candidates
    tune._best.clear()
    assert run() == 3
    assert len(measured) == 3


def test_nothing_is_measured_while_a_graph_is_captured(gpu):
    state, measured = gpu
    state["capturing"] = True
    assert run() == 1
    state["capturing"] = False
    assert run() == 3
    state["capturing"] = True
    assert run() == 3
    assert len(measured) == 1


def test_without_memory_for_measuring_the_default_serves(gpu, monkeypatch):
    def fastest(candidates, launch):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(tune, "fastest", fastest)
    assert run() == 1
    assert not tune._best


def test_deterministic_algorithms_take_the_default(gpu):
    assert run() == 3
    torch.use_deterministic_algorithms(True)
    try:
        assert run() == 1
        assert run((9, 9)) == 1
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(gpu[1]) == 1


def test_buckets_grow_with_sizes():
    buckets = [tune.bucket(n) for n in range(1, 300)]
    assert buckets[:16] == list(range(1, 17))
    assert buckets == sorted(buckets)
    assert all(b >= n for n, b in enumerate(buckets, 1))
    assert len(set(buckets)) == 25


GPU = torch.device("cuda", 0)


@dataclass(frozen=True)
class Problem:
    step: str = "forward"
    batch: int = 2
    channels: int = 3
    height: int = 8
    width: int = 8
    kernel: tuple = (7, 7)
    stride: tuple = (1, 1)
    padding: tuple = (3, 3)
    dilation: tuple = (1, 1)
    per_sample: bool = False
    dtype: torch.dtype = torch.float32
    device: torch.device = GPU
    channels_last: bool = False


def test_reasons(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 8.0; the device has 7.5" in direct.why_not(Problem())
    assert "compute capability 8.0; the device has 7.5" in gemm.why_not(Problem())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for backend in (direct, gemm):
        assert backend.why_not(Problem(dtype=torch.bfloat16)) is None
        assert "float64" in backend.why_not(Problem(dtype=torch.float64))
        assert "none of float32" in backend.why_not(Problem(dtype=torch.int32))
        assert "x is on cpu" in backend.why_not(Problem(device=torch.device("cpu")))
    assert direct.why_not(Problem(stride=(2, 2), dilation=(2, 1))) is None
    assert "stride (2, 2)" in gemm.why_not(Problem(stride=(2, 2)))
    assert "dilation (1, 2)" in gemm.why_not(Problem(dilation=(1, 2)))
    x, bank, weights = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 5, 5), torch.zeros(2, 2)
    assert "x is on cpu" in routed.why_not(x, bank, None, weights)
    assert "float64" in routed.why_not(x.double(), bank, None, weights)


def test_tf32_is_read_from_either_interface():
    code = """
import torch
from widefield.ops._triton.host import tf32_allowed as allowed
assert allowed() is torch.backends.cudnn.allow_tf32
torch.backends.cudnn.allow_tf32 = False
assert not allowed()
torch.backends.cudnn.allow_tf32 = True
assert allowed()
if hasattr(torch.backends.cudnn, "conv"):
    for precision in ("ieee", "tf32"):
        torch.backends.cudnn.conv.fp32_precision = precision
        assert allowed() is (precision == "tf32")
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr


def test_without_triton_the_package_can_be_imported_and_says_so():
    code = "import sys; sys.modules['triton'] = None; import widefield.ops._triton as t; print(t.unavailable())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "triton is not installed" in result.stdout
    assert _triton.unavailable() == (None if torch.cuda.is_available() else "there is no CUDA device")


def test_this_process_is_not_the_interpreter(interpreted):
    assert interpreted(_interprets)
    assert not _interprets()
    assert "TRITON_INTERPRET" not in os.environ


def _interprets():
    from widefield.ops._triton.host import INTERPRETED

    return INTERPRETED


def test_sizes():
    assert [host.even_parts(n, 8) for n in (1, 7, 8, 9, 14, 56, 57)] == [1, 7, 8, 5, 7, 8, 8]
    assert [host.power_of_two(n) for n in (1, 2, 3, 16, 17)] == [1, 2, 4, 16, 32]
