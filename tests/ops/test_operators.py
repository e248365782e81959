"""torch.ops.widefield.*: fake implementations, derivatives of any order, vmap, torch.compile, torch.export."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from tolerances import BFLOAT16, FLOAT32, FLOAT64, close
from widefield.ops import depthwise_conv2d, mixture_conv2d

OPS = torch.ops.widefield
GEOMETRIES = {
    "plain": ((9, 8), (5, 5), [1, 1], [2, 2], [1, 1]),
    "wide": ((5, 16), (2, 15), [1, 1], [1, 7], [1, 1]),
    "strided": ((9, 8), (3, 5), [2, 3], [1, 4], [1, 1]),
    "dilated": ((9, 8), (3, 5), [1, 1], [2, 6], [2, 3]),
}


def tensors(geometry, per_sample, channels_last, dtype=torch.float32, batch=2):
    size, kernel, stride, padding, dilation = GEOMETRIES[geometry]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(batch, 3, *size, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    weight = torch.randn(batch if per_sample else 1, 3, *kernel, dtype=dtype).requires_grad_()
    bias = torch.randn(batch if per_sample else 1, 3, dtype=dtype).requires_grad_()
    with torch.no_grad():
        y = OPS.depthwise(x, weight, bias, stride, padding, dilation, "aten")
    grad = torch.randn_like(y).requires_grad_()
    return x, weight, bias, grad, (stride, padding, dilation)


def arguments(op, x, weight, bias, grad, geometry, backend):
    return {
        "depthwise": (x, weight, bias, *geometry, backend),
        "depthwise_input_grad": (grad, weight, list(x.shape), *geometry, backend),
        "depthwise_weight_grad": (grad, x, list(weight.shape), *geometry, backend),
    }[op]


NAMES = ("depthwise", "depthwise_input_grad", "depthwise_weight_grad")
both_weights = pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per sample"])
both_layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # within opcheck
@both_layouts
@both_weights
@pytest.mark.parametrize("op", NAMES)
def test_opcheck(op, per_sample, channels_last):
    x, weight, bias, grad, geometry = tensors("plain", per_sample, channels_last)
    opcheck(getattr(OPS, op).default, arguments(op, x, weight, bias, grad, geometry, "auto"))


@pytest.mark.parametrize("backend", ["aten", "fft", "onednn"])
@pytest.mark.parametrize("op", NAMES)
def test_opcheck_of_named_backends(op, backend):
    x, weight, _, grad, geometry = tensors("wide", True, True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(getattr(OPS, op).default, arguments(op, x, weight, None, grad, geometry, backend), test_utils=checks)


@both_layouts
@both_weights
@pytest.mark.parametrize("geometry", list(GEOMETRIES))
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_twins_have_the_shapes_layouts_and_dtypes_of_the_real_ones(geometry, batch, per_sample, channels_last):
    x, weight, bias, grad, steps = tensors(geometry, per_sample and batch > 0, channels_last, torch.bfloat16, batch)
    for op in NAMES:
        real = getattr(OPS, op)(*arguments(op, x, weight, bias, grad, steps, "auto"))
        metas = (t.to("meta") for t in (x, weight, bias, grad))
        fake = getattr(OPS, op)(*arguments(op, *metas, steps, "auto"))
        assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
        for size, one, other in zip(real.shape, real.stride(), fake.stride(), strict=True):
            assert one == other or size <= 1  # strides have no meaning there
        layout = torch.channels_last if channels_last and op != NAMES[2] else torch.contiguous_format
        assert real.is_contiguous(memory_format=layout) or not batch


def test_results_share_no_memory_with_inputs():
    x, weight = torch.randn(1, 3, 4, 4), torch.ones(1, 3, 1, 1)
    plain = ([1, 1], [0, 0], [1, 1])
    for backend in ("aten", "onednn", "fft", "auto"):
        for y in (
            OPS.depthwise(x, weight, None, *plain, backend),
            OPS.depthwise_input_grad(x, weight, list(x.shape), *plain, backend),
            OPS.depthwise_weight_grad(x[..., :1, :1], x[..., :1, :1], [1, 3, 1, 1], *plain, backend),
        ):
            assert y.untyped_storage().data_ptr() not in (
                x.untyped_storage().data_ptr(),
                weight.untyped_storage().data_ptr(),
            )


# Derivatives


@both_layouts
@both_weights
@pytest.mark.parametrize(
    ("geometry", "backend"),
    [("plain", "fft"), ("wide", "fft"), *((geometry, "auto") for geometry in GEOMETRIES)],
)
def test_gradcheck_and_second_derivatives(geometry, backend, per_sample, channels_last):
    x, weight, bias, grad, steps = tensors(geometry, per_sample, channels_last, torch.double)

    def forward(x, weight, bias):
        return OPS.depthwise(x, weight, bias, *steps, backend)

    def input_grad(grad, weight):
        return OPS.depthwise_input_grad(grad, weight, x.shape, *steps, backend)

    def weight_grad(grad, x):
        return OPS.depthwise_weight_grad(grad, x, weight.shape, *steps, backend)

    for f, inputs in ((forward, (x, weight, bias)), (input_grad, (grad, weight)), (weight_grad, (grad, x))):
        assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", ["auto", "fft"])
def test_slow_gradcheck_of_the_public_function(backend):
    x, weight, bias = (torch.randn(s, dtype=torch.double).requires_grad_() for s in ((2, 2, 4, 3), (2, 1, 3, 2), (2,)))

    def f(*inputs):
        return depthwise_conv2d(*inputs, backend=backend)

    assert torch.autograd.gradcheck(f, (x, weight, bias))
    assert torch.autograd.gradgradcheck(f, (x, weight, bias))


@both_layouts
@pytest.mark.parametrize("backend", ["onednn", "auto", "fft", "aten"])
@pytest.mark.parametrize("kernel", [(3, 3), (7, 7), (15, 15), (4, 18)])
def test_second_derivatives_in_float32_equal_those_of_conv2d_in_float64(kernel, backend, channels_last):
    """Second derivatives as in a gradient penalty."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 3, 12, 11).contiguous(memory_format=layout)
    weight, bias, c = torch.randn(3, 1, *kernel), torch.randn(3), torch.randn(2, 3, 12, 11)

    def penalty(conv, x, weight, bias, c):
        inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
        dx, dw, db = torch.autograd.grad((conv(*inputs).sigmoid() * c).sum(), inputs, create_graph=True)
        return torch.autograd.grad(dx.square().mean() + dw.sin().mean() + db.square().sum(), inputs)

    def reference(x, weight, bias):
        rows, columns = (k - 1 for k in kernel)
        x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return F.conv2d(x, weight, bias, groups=3)

    actual = penalty(lambda *inputs: depthwise_conv2d(*inputs, backend=backend), x, weight, bias, c)
    expected = penalty(reference, *(t.double() for t in (x, weight, bias, c)))
    for a, b in zip(actual, expected, strict=True):
        close(a, b, 10 * FLOAT32)  # two passes in sequence, and a sum of both


def test_only_the_gradients_that_are_needed_are_computed():
    x, weight, bias, _, steps = tensors("wide", False, False)
    for needed in range(3):
        inputs = [t.detach().requires_grad_(i == needed) for i, t in enumerate((x, weight, bias))]
        y = OPS.depthwise(*inputs, *steps, "auto")
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        once = 2 * y.numel() * weight.shape[2] * weight.shape[3]
        assert counter.get_total_flops() == (once if needed < 2 else 0)


def test_complex_numbers_have_the_gradients_of_conv2d_or_a_clear_error():
    x, weight, _, _, steps = tensors("plain", False, False, torch.cdouble)
    expected = torch.autograd.grad(F.conv2d(x, weight.transpose(0, 1), None, *steps, 3).abs().sum(), [x, weight])
    try:
        y = OPS.depthwise(x, weight, None, *steps, "auto")
        actual = torch.autograd.grad(y.abs().sum(), [x, weight])
    except (NotImplementedError, TypeError, ValueError) as error:
        assert "complex" in str(error).lower()  # noqa: PT017
    else:
        for a, b in zip(actual, expected, strict=True):
            close(torch.view_as_real(a), torch.view_as_real(b), FLOAT64)


# torch.func


@pytest.mark.parametrize("in_dims", [(0, None, None), (None, 0, None), (0, 0, None), (None, None, 0), (1, 2, 0)])
@pytest.mark.parametrize("backend", ["auto", "onednn", "fft"])
@both_layouts
def test_vmap(in_dims, backend, channels_last):
    shapes, inputs = ((2, 3, 7, 9), (3, 1, 5, 15), (3,)), []
    for shape, dim in zip(shapes, in_dims, strict=True):
        full = shape if dim is None else (*shape[:dim], 4, *shape[dim:])
        inputs.append(torch.randn(full))
    if channels_last and in_dims[0] == 0:
        inputs[0] = inputs[0].permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)

    def f(*inputs):
        return depthwise_conv2d(*inputs, backend=backend)

    actual = torch.func.vmap(f, in_dims)(*inputs)
    for i in range(4):
        parts = [t if dim is None else t.select(dim, i) for t, dim in zip(inputs, in_dims, strict=True)]
        close(actual[i], f(*parts), FLOAT32)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("kernel", [(3, 3), (4, 4), (5, 15)])
@pytest.mark.parametrize("backend", ["auto", "onednn", "fft"])
@both_layouts
def test_gradients_of_every_sample(kernel, backend, channels_last, squared):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(4, 3, 7, 9).contiguous(memory_format=layout)
    parameters = torch.randn(3, 1, *kernel), torch.randn(3)

    mask = torch.randn(7, 9)

    def loss(weight, bias, sample):
        y = depthwise_conv2d(sample[None], weight, bias, backend=backend)
        return (y * mask).sum() + 0.1 * y.square().sum() if squared else (y * mask).sum() + y.sum()

    actual = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)), (None, None, 0))(*parameters, x)
    for i in range(4):
        one = [t.clone().requires_grad_() for t in (*parameters, x[i])]
        expected = torch.autograd.grad(loss(*one), one)
        for a, b in zip(actual, expected, strict=True):
            close(a[i], b, FLOAT32)


@both_weights
@both_layouts
def test_vmap_of_the_operators_themselves(per_sample, channels_last):
    stacks = [tensors("wide", per_sample, channels_last) for _ in range(3)]
    steps = stacks[0][-1]
    x, weight, bias, grad = (torch.stack([s[i].detach() for s in stacks]) for i in range(4))
    for op, mapped, fixed in (
        ("depthwise", (x, weight, bias), ()),
        ("depthwise_input_grad", (grad, weight), (list(x.shape[1:]),)),
        ("depthwise_weight_grad", (grad, x), (list(weight.shape[1:]),)),
    ):
        f = getattr(OPS, op)

        def run(*inputs, f=f, fixed=fixed):
            return f(*inputs, *fixed, *steps, "auto")

        for which in range(2 ** len(mapped) - 1):  # these inputs have no batch dimension
            dims = [None if which >> i & 1 else 0 for i in range(len(mapped))]
            given = [t if d == 0 else t[0] for t, d in zip(mapped, dims, strict=True)]
            actual = torch.func.vmap(run, tuple(dims))(*given)
            for i in range(3):
                close(actual[i], run(*(t if d is None else t[i] for t, d in zip(given, dims, strict=True))), FLOAT32)


@pytest.mark.parametrize("backend", ["auto", "onednn", "fft"])
def test_jacobians(backend):
    x, weight = torch.randn(1, 2, 3, 4), torch.randn(2, 1, 3, 15)

    def f(x, weight):
        return depthwise_conv2d(x, weight, backend=backend)

    actual = torch.func.jacrev(f, (0, 1))(x, weight)
    expected = torch.autograd.functional.jacobian(lambda *t: F.conv2d(*t, padding=(1, 7), groups=2), (x, weight))
    for a, b in zip(actual, expected, strict=True):
        close(a, b, FLOAT32)


def energy(weight, x, backend):
    y = F.conv2d(x, weight, padding=1, groups=2) if backend is None else depthwise_conv2d(x, weight, backend=backend)
    return y.pow(3).sum()


@pytest.mark.parametrize("backend", ["auto", "onednn", "fft"])
def test_hessians_by_two_backward_passes(backend):
    weight, x = torch.randn(2, 1, 3, 3), torch.randn(1, 2, 3, 4)
    hessian = torch.func.jacrev(torch.func.jacrev(energy))
    close(hessian(weight, x, backend), hessian(weight.double(), x.double(), None), 10 * FLOAT32)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")  # within torch.func.jvp
@pytest.mark.parametrize("backend", ["auto", "onednn", "fft", "aten"])
def test_forward_mode_derivatives(backend):
    """F.conv2d has forward-mode derivatives, and torch.func.hessian uses them."""
    weight, x = torch.randn(2, 1, 3, 3), torch.randn(1, 2, 3, 4)
    _, tangent = torch.func.jvp(lambda w: depthwise_conv2d(x, w, backend=backend), (weight,), (weight.cos(),))
    close(tangent, depthwise_conv2d(x, weight.cos(), backend=backend), FLOAT32)
    hessian = torch.func.hessian(energy)
    close(hessian(weight, x, backend), hessian(weight.double(), x.double(), None), 10 * FLOAT32)


# Autocast


@both_weights
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["auto", "onednn", "fft"])
def test_operators_compute_in_the_dtypes_given_also_within_autocast(backend, low, per_sample):
    """Autocast applies before the operators: they keep float32, and accumulate 16 bits in 32."""
    for dtype in (torch.float32, low):
        x, weight, bias, grad, steps = (
            t.detach().to(dtype) if torch.is_tensor(t) else t for t in tensors("wide", per_sample, False, batch=3)
        )
        for op in NAMES:
            given = arguments(op, x, weight, bias, grad, steps, backend)
            outside = getattr(OPS, op)(*given)
            with torch.autocast("cpu", low):
                within = getattr(OPS, op)(*given)
            assert within.dtype == outside.dtype
            assert torch.equal(within, outside)


# torch.compile and torch.export


class Block(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 1, 5, 15))
        self.bias = torch.nn.Parameter(torch.randn(4))
        self.options = options

    def forward(self, x):
        return depthwise_conv2d(x.sigmoid(), self.weight, self.bias, **self.options).relu()


def gradients(model, x):
    y = model(x)
    return [y, *torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), [*model.parameters(), x])]


@both_layouts
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"backend": "fft"},
        {"backend": "aten"},
        {"stride": (2, 1), "padding": (2, 7)},
        {"dilation": (1, 2), "padding": (4, 14)},
    ],
    ids=str,
)
def test_compiled_as_one_graph_equals_eager(options, channels_last):
    torch._dynamo.reset()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 4, 9, 16).contiguous(memory_format=layout).requires_grad_()
    block = Block(**options)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled, x), gradients(block, x), strict=True):
        close(a, b, FLOAT32)
    assert compiled(x).stride() == block(x).stride()


def test_compiled_with_even_kernels_and_autocast():
    torch._dynamo.reset()
    x, weight = torch.randn(2, 4, 9, 16), torch.randn(4, 1, 4, 16).requires_grad_()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(x, weight):
        with torch.autocast("cpu", torch.bfloat16):
            return depthwise_conv2d(x, weight)

    y = f(x, weight)
    assert y.dtype == torch.bfloat16
    close(y, depthwise_conv2d(x, weight), BFLOAT16)
    y.float().sum().backward()
    assert weight.grad.dtype == torch.float32


def test_one_graph_serves_all_batches():
    torch._dynamo.reset()
    counter, block = CompileCounterWithBackend("aot_eager"), Block()
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for batch in (3, 2, 7):
        x = torch.randn(batch, 4, 9, 16)
        torch._dynamo.mark_dynamic(x, 0)
        x.requires_grad_()
        torch._dynamo.mark_dynamic(x, 0)
        for a, b in zip(gradients(compiled, x), gradients(block, x), strict=True):
            close(a, b, FLOAT32)
    assert counter.frame_count == 1


def test_one_graph_serves_all_batches_of_a_mixture():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    kernels = [torch.randn(4, 1, k, k).requires_grad_() for k in (3, 15)]

    def mix(x, weights):
        return mixture_conv2d(x, kernels, None, weights, groups=4)

    compiled = torch.compile(mix, fullgraph=True, backend=counter)
    for batch in (3, 2, 7):
        x, weights = torch.randn(batch, 4, 9, 16), torch.randn(batch, 2)
        for t in (x, weights):
            torch._dynamo.mark_dynamic(t, 0)
        y = compiled(x, weights)
        close(y, mix(x, weights), FLOAT32)
        for a, b in zip(torch.autograd.grad(y.sum(), kernels), torch.autograd.grad(mix(x, weights).sum(), kernels),
                        strict=True):  # fmt: skip
            close(a, b, FLOAT32)
    assert counter.frame_count == 1


def test_what_is_refused_eagerly_is_refused_compiled():
    torch._dynamo.reset()
    x, weight = torch.randn(2, 4, 9, 16), torch.randn(4, 1, 5, 5)
    compiled = torch.compile(depthwise_conv2d, backend="aot_eager")
    with pytest.raises(ValueError, match=r"cannot compute the forward.*do not support stride"):
        compiled(x, weight, padding=2, stride=2, backend="fft")


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": (2, 7)}, {"backend": "fft"}], ids=str)
def test_exported_programs_know_plain_pytorch_only(options):
    block, x = Block(**options), torch.randn(3, 4, 9, 16)
    program = torch.export.export(block, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert any("conv2d" in target for target in targets)
    assert not any("widefield" in target for target in targets)
    for batch in (3, 1, 5):
        x = torch.randn(batch, 4, 9, 16)
        close(program.module()(x), block(x), FLOAT32)


@pytest.mark.parametrize("options", [{}, {"padding": (2, 7)}, {"backend": "fft"}], ids=str)
def test_traced_with_symbolic_shapes(options):
    weight = torch.randn(4, 1, 5, 15)

    def f(x):
        return depthwise_conv2d(x, weight, **options)

    graph = make_fx(f, tracing_mode="symbolic", _allow_non_fake_inputs=True)(torch.randn(3, 4, 9, 16))
    for shape in ((3, 4, 9, 16), (2, 4, 11, 17)):
        x = torch.randn(shape)
        close(graph(x), f(x), FLOAT32)


# FLOPs


@both_weights
@pytest.mark.parametrize("geometry", list(GEOMETRIES))
def test_flops_of_all_passes(geometry, per_sample):
    x, weight, bias, grad, steps = tensors(geometry, per_sample, False)
    for op in NAMES:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            getattr(OPS, op)(*arguments(op, x, weight, bias, grad, steps, "auto"))
        assert counter.get_total_flops() == 2 * grad.numel() * weight.shape[2] * weight.shape[3]
