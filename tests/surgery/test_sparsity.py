"""Dynamic sparsity in training loops: masks at every step, exact resuming, averages, errors, several processes."""

import copy
import io
import math
import socket

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import nn

import widefield.models.slak  # noqa: F401 (registers the networks)
from widefield.surgery.sparsity import DynamicSparsity


def small_cnn():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 5, padding=2, groups=16), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


def tiny_slak():
    return timm.create_model(
        "slak_tiny", depths=(1, 1, 1, 1), widths=(8, 8, 16, 16), kernel_sizes=(9, 7, 7, 5), small_kernel=3,
        num_classes=4, layer_scale_init=0.5,
    )  # fmt: skip


MODELS = [small_cnn, tiny_slak]


def batches(count, size=16, side=32, seed=0):
    """Return images of noise with one bright quarter; its position is the class."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(count):
        x, y = torch.randn(size, 3, side, side, generator=generator), torch.randint(4, (size,), generator=generator)
        half = side // 2
        for image, label in zip(x, y.tolist(), strict=True):
            rows, columns = label // 2 * half, label % 2 * half
            image[label % 3, rows : rows + half, columns : columns + half] += 2
        result.append((x, y))
    return result


def loss(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


def make(build=small_cnn, **options):
    torch.manual_seed(0)
    model = build()
    sparse = DynamicSparsity(model, **{"interval": 3, **options})
    sparse.start(batches(2), loss)
    return model, sparse


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.05)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


def counts(sparse):
    return {name: int(mask.sum()) for name, mask in sparse.masks.items()}


def check_masked(model, sparse, optimizer=None, momentum=None):
    parameters = dict(model.named_parameters())
    for name, mask in sparse.masks.items():
        assert not parameters[name][~mask].any(), name
        if optimizer is not None:
            assert not optimizer.state[parameters[name]][momentum][~mask].any(), name


# Real loops


@pytest.mark.parametrize("growth", ["random", "gradient"])
@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize(("build_optimizer", "momentum"), [(adamw, "exp_avg"), (sgd, "momentum_buffer")])
def test_a_loop_learns_and_every_step_is_masked_exactly(build, build_optimizer, momentum, growth):
    model, sparse = make(build, growth=growth)
    optimizer = build_optimizer(model)
    before, losses, moves = counts(sparse), [], []
    assert sparse.density() == pytest.approx(0.6, abs=1e-3)
    for batch in batches(24, seed=1):
        value = loss(model, batch)
        value.backward()
        optimizer.step()
        old = dict(sparse.masks)
        sparse.step(optimizer)
        optimizer.zero_grad()
        check_masked(model, sparse, optimizer, momentum)
        assert counts(sparse) == before
        moves.append(any(not torch.equal(old[name], mask) for name, mask in sparse.masks.items()))
        losses.append(value.item())
    assert moves == [step % 3 == 0 for step in range(1, 25)]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])


def test_what_grows_starts_from_zero_with_no_momentum_and_a_known_scale():
    model, sparse = make(growth="gradient", interval=2)
    optimizer = adamw(model)
    for batch in batches(2, seed=1):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
        old = dict(sparse.masks)
        sparse.step(optimizer)
    grown = 0
    for name, weight in model.named_parameters():
        if name not in sparse.masks:
            continue
        new = sparse.masks[name] & ~old[name]
        grown += int(new.sum())
        state = optimizer.state[weight]
        assert not weight[new].any()
        assert not state["exp_avg"][new].any()
        assert (state["exp_avg_sq"][new] > 0).all()
        kept = sparse.masks[name] & old[name]
        assert state["exp_avg"][kept].any()
    assert grown > 50


def test_accumulated_gradients_clipping_and_autocast():
    model, sparse = make(tiny_slak, growth="gradient")
    optimizer = adamw(model)
    losses = []
    for step in range(12):
        for batch in batches(2, seed=step):
            with torch.autocast("cpu", torch.bfloat16):
                value = loss(model, batch) / 2
            value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        sparse.step(optimizer)
        optimizer.zero_grad()
        check_masked(model, sparse, optimizer, "exp_avg")
        losses.append(value.item())
    assert sum(losses[-3:]) < sum(losses[:3])


def test_several_optimizers():
    model, sparse = make()
    first, last = model[:-1], model[-1:]
    optimizers = [sgd(first), adamw(last)]
    for batch in batches(3):
        loss(model, batch).backward()
        for optimizer in optimizers:
            optimizer.step()
        sparse.step(*optimizers)
    check_masked(model, sparse)
    weight = model[-1].weight
    assert not optimizers[1].state[weight]["exp_avg"][~sparse.masks["11.weight"]].any()
    assert not optimizers[0].state[model[0].weight]["momentum_buffer"][~sparse.masks["0.weight"]].any()


def test_a_moving_average_keeps_the_masks():
    model, sparse = make(interval=2)
    ema = ModelEmaV3(model, decay=0.9)
    optimizer = sgd(model)
    for batch in batches(4, seed=1):
        loss(model, batch).backward()
        optimizer.step()
        sparse.step(optimizer)
        optimizer.zero_grad()
        ema.update(model)
        averaged = copy.deepcopy(ema.module)
        sparse.apply(ema.module)
        check_masked(ema.module, sparse)
    for name, mask in sparse.masks.items():
        ours, theirs = ema.module.get_parameter(name), averaged.get_parameter(name)
        assert torch.equal(ours[mask], theirs[mask])
        assert theirs[~mask].any()  # the masks moved in this step, so the helper was needed


def run(steps, growth, build_optimizer, stop=None):
    """Train. With ``stop``, save a checkpoint after that many steps and continue with new objects."""
    model, sparse = make(growth=growth, end=20, exploration=0.4)
    optimizer = build_optimizer(model)
    for step, batch in enumerate(batches(steps, seed=5), 1):
        loss(model, batch).backward()
        optimizer.step()
        sparse.step(optimizer)
        optimizer.zero_grad()
        if step == stop:
            file = io.BytesIO()
            torch.save([model.state_dict(), optimizer.state_dict(), sparse.state_dict()], file)
            torch.manual_seed(99)
            model = small_cnn()
            optimizer = build_optimizer(model)
            sparse = DynamicSparsity(model, interval=3, growth=growth, end=20, exploration=0.4, seed=7)
            states = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
            for thing, state in zip((model, optimizer, sparse), states, strict=True):
                thing.load_state_dict(state)
    return model, sparse


@pytest.mark.parametrize("growth", ["random", "gradient"])
@pytest.mark.parametrize("build_optimizer", [adamw, sgd])
def test_a_resumed_run_is_the_same_run_to_the_bit(build_optimizer, growth):
    model, sparse = run(16, growth, build_optimizer)
    again, resumed = run(16, growth, build_optimizer, stop=7)
    assert resumed.steps == sparse.steps == 16
    assert resumed.rate == sparse.rate
    for name, mask in sparse.masks.items():
        assert torch.equal(mask, resumed.masks[name]), name
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_state_does_not_change_later():
    model, sparse = make(interval=1)
    state = sparse.state_dict()
    saved = copy.deepcopy(state)
    optimizer = sgd(model)
    for batch in batches(3):
        loss(model, batch).backward()
        optimizer.step()
        sparse.step(optimizer)
    assert state["steps"] == saved["steps"] == 0
    assert torch.equal(state["random"], saved["random"])
    assert all(torch.equal(state["masks"][name], mask) for name, mask in saved["masks"].items())
    assert any(not torch.equal(sparse.masks[name], mask) for name, mask in saved["masks"].items())


def test_exploration_falls_to_nothing_at_the_end():
    model, sparse = make(interval=1, exploration=0.5, end=4)
    optimizer = sgd(model)
    rates, moved = [sparse.rate], []
    for batch in batches(6):
        loss(model, batch).backward()
        optimizer.step()
        old = dict(sparse.masks)
        sparse.step(optimizer)
        rates.append(sparse.rate)
        moved.append(any(not torch.equal(old[name], mask) for name, mask in sparse.masks.items()))
    assert rates == pytest.approx([0.25 * (1 + math.cos(math.pi * min(t, 4) / 4)) for t in range(7)])
    assert moved == [True, True, True, False, False, False]
    model, still = make(exploration=0.0, interval=1)
    old = dict(still.masks)
    optimizer = sgd(model)
    loss(model, batches(1)[0]).backward()
    still.step(optimizer)
    assert all(still.masks[name] is not None and torch.equal(still.masks[name], mask) for name, mask in old.items())


def test_growth_waits_for_finite_gradients_and_asks_for_any():
    model, sparse = make(growth="gradient", interval=1)
    optimizer = sgd(model)
    loss(model, batches(1)[0]).backward()
    model[3].weight.grad[0, 0, 0, 0] = math.inf  # a GradScaler skips this step
    old = dict(sparse.masks)
    sparse.step(optimizer)
    assert all(torch.equal(sparse.masks[name], mask) for name, mask in old.items())
    model[3].weight.grad = None  # not used in this step: its mask does not change
    sparse.step(optimizer)
    changed = [name for name, mask in old.items() if not torch.equal(sparse.masks[name], mask)]
    assert changed
    assert "3.weight" not in changed
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"needs gradients: call step\(\) before optimizer.zero_grad"):
        sparse.step(optimizer)


# Errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsity": 1.0}, ValueError, "sparsity must be below 1"),
        ({"sparsity": -0.1}, ValueError, "sparsity must be from 0"),
        ({"sparsity": 2}, ValueError, "sparsity must be from 0"),
        ({"sparsity": "0.4"}, TypeError, "sparsity must be a number"),
        ({"exploration": 1.5}, ValueError, "exploration must be from 0"),
        ({"interval": 0}, ValueError, "interval must be at least 1; got 0"),
        ({"end": 0}, ValueError, "end must be at least 1"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"init": "snap"}, ValueError, "Did you mean 'snip'"),
        ({"growth": "momentum"}, ValueError, "growth must be one of 'random', 'gradient'; got 'momentum'"),
        ({"where": "nothing.*"}, ValueError, "matches no layer of Sequential. These could match: 0, 3, 6, 11"),
        ({"where": 3}, TypeError, "where must be a glob"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        DynamicSparsity(small_cnn(), **options)


def test_nothing_to_mask():
    with pytest.raises(ValueError, match="ReLU has no convolution or linear layer whose weight is trained"):
        DynamicSparsity(nn.ReLU())


def test_before_the_start_and_twice():
    model = small_cnn()
    sparse = DynamicSparsity(model)
    for call in (lambda: sparse.step(sgd(model)), sparse.apply, sparse.density, sparse.densities, sparse.state_dict):
        with pytest.raises(RuntimeError, match=r"has not started: call start\(\)"):
            call()
    assert sparse.steps == 0
    with pytest.raises(ValueError, match=r"init='snip' needs gradients: call start\(batches, loss\)"):
        sparse.start()
    with pytest.raises(ValueError, match="batches is empty"):
        sparse.start([], loss)
    with pytest.raises(ValueError, match="gradients are not finite"):
        sparse.start(batches(1), lambda model, batch: loss(model, batch) * math.inf)
    sparse.start(batches(1), loss)
    with pytest.raises(RuntimeError, match="has started already"):
        sparse.start(batches(1), loss)


def test_a_state_or_a_model_of_another_kind():
    model, sparse = make()
    state = sparse.state_dict()
    wider = small_cnn()
    wider[0] = nn.Conv2d(3, 8, 5, 2, 2, bias=False)
    with pytest.raises(ValueError, match=r"0.weight is \(8, 3, 5, 5\) here and \(8, 3, 3, 3\) there"):
        DynamicSparsity(wider).load_state_dict(state)
    with pytest.raises(ValueError, match=r"0.weight is not selected here and \(8, 3, 3, 3\) there, .* 2 differences"):
        DynamicSparsity(model, where=["6", "11"]).load_state_dict(state)
    with pytest.raises(ValueError, match=r"stages.* is \(.*\) here and absent there"):
        DynamicSparsity(tiny_slak(), where="stages.*").load_state_dict(state)
    with pytest.raises(ValueError, match=r"this state has sparsity=0.4, but this object has 0.5"):
        DynamicSparsity(model, sparsity=0.5).load_state_dict(state)
    for other in (wider, tiny_slak()):
        with pytest.raises(ValueError, match=r"has no parameter 0.weight with the shape of its mask"):
            sparse.apply(other)


# Several processes, a GPU


def _worker(rank, port, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    for growth in ("random", "gradient"):
        torch.manual_seed(0)
        model = small_cnn()
        sparse = DynamicSparsity(model, interval=2, growth=growth)
        sparse.start(batches(1, seed=rank), loss)  # each process has its own images
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = sgd(model)
        for batch in batches(5, seed=10 + rank):
            loss(wrapped, batch).backward()
            optimizer.step()
            sparse.step(optimizer)
            optimizer.zero_grad()
        torch.save([sparse.masks, dict(model.named_parameters())], f"{folder}/{growth}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_choose_alike(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_worker, (port, str(tmp_path)), nprocs=2)
    for growth in ("random", "gradient"):
        first, second = (torch.load(tmp_path / f"{growth}-{rank}.pt", weights_only=False) for rank in range(2))
        for ours, theirs in zip(first, second, strict=True):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("growth", ["random", "gradient"])
def test_on_a_gpu_with_a_grad_scaler(growth):
    model, sparse = make(growth=growth)  # the model is moved after the start
    before = counts(sparse)
    model.cuda()
    optimizer, scaler = adamw(model), torch.amp.GradScaler(init_scale=2.0**40)  # the first steps are skipped
    for x, y in batches(40, seed=1):
        with torch.autocast("cuda", torch.float16):
            value = F.cross_entropy(model(x.cuda()), y.cuda())
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        sparse.step(optimizer)
        optimizer.zero_grad()
        check_masked(model, sparse)
        assert counts(sparse) == before
    assert all(mask.is_cuda for mask in sparse.masks.values())
    assert value.item() < 1.2
    twin = small_cnn()
    sparse.apply(twin)  # on the CPU
    check_masked(twin.cuda(), sparse)
