"""The C library's fake quantization against torch's operators, to the bit, and what layers save for their backward pass."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_quant.calibration import set_flags
from lightning_quant.fake_quant import FakeQuantize, dynamic_fake_quantize, fake_quantize, lsq_fake_quantize
from lightning_quant.kernels import cpu_fake_quant, native
from lightning_quant.kernels.native import fake
from lightning_quant.methods import METHODS
from lightning_quant.numerics import calc_qparams, qrange, to_groups
from lightning_quant.recipe import Recipe
from lightning_quant.spec import QuantScheme, QuantSpec
from lightning_quant.surgery import prepare
from tests.helpers import assert_same_state, spec_id, thinned

DTYPES = (torch.float32, torch.bfloat16)
FORMATS = [(bits, signed, symmetric) for bits in (2, 3, 4, 8) for signed in (True, False) for symmetric in (True, False)]
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def grid(name: str, x: Tensor) -> Tensor:
    """The same values in another place in memory."""
    if name == "channels_last" and x.dim() in LAST:
        return x.to(memory_format=LAST[x.dim()])
    if name == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if name == "slice":
        return torch.stack([x, x], -1)[..., 0]
    if name == "expanded" and x.dim() > 1:
        return x[:1].expand_as(x)
    return x


# granularity, options, shape, axis
PLACES: list[tuple[str, dict[str, Any], tuple[int, ...], int]] = [
    ("tensor", {}, (7,), 0),
    ("tensor", {}, (), 0),
    ("tensor", {}, (1, 1), 0),
    ("tensor", {}, (3, 5, 7, 9), 0),
    ("tensor", {}, (2, 3, 41, 97), 0),
    ("channel", {}, (5,), 0),
    ("channel", {}, (6, 35), 0),
    ("channel", {}, (4, 3, 5, 7), 0),
    ("channel", {}, (4, 6, 3, 3), 1),
    ("channel", {}, (4, 6), 1),
    ("channel", {}, (4, 6), -1),
    ("channel", {}, (2, 9001), 0),
    ("group", {"group_size": 16}, (3, 50), 0),
    ("group", {"group_size": 16}, (3, 48), 0),
    ("group", {"group_size": 7}, (4, 3, 5, 3), 0),
    ("group", {"group_size": 64}, (3, 20), 0),
    ("group", {"group_size": 16}, (4, 50), 1),
    ("group", {"group_size": 9000}, (2, 20001), 0),
]
MEMORY = ("plain", "channels_last", "transposed", "slice", "expanded")


def place_id(place: tuple[Any, ...]) -> str:
    return f"{place[0]}-{'x'.join(map(str, place[2]))}-{place[3]}"


def leaf(x: Tensor) -> Tensor:
    """A leaf with the strides of `x`."""
    return x.detach().requires_grad_()


def both(run: Callable[[], list[Tensor | None]], monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor | None, Tensor | None]]:
    """What the kernels give, and what torch's operators do."""
    ours = run()
    with monkeypatch.context() as patch:
        patch.setenv("LQ_BACKEND", "reference")
        return list(zip(ours, run(), strict=True))


def assert_bits(pairs: list[tuple[Tensor | None, Tensor | None]]) -> None:
    for one, two in pairs:
        assert one is not None
        assert two is not None
        assert one.dtype == two.dtype
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)


def qparams(x: Tensor, spec: QuantSpec, axis: int) -> tuple[Tensor, Tensor]:
    """Of a range that clips some of `x`."""
    rows = to_groups(x.float(), spec, axis)
    scale, zero_point = calc_qparams(rows.amin(1) * 0.6, rows.amax(1) * 0.6, spec)
    return scale, zero_point


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("place", PLACES, ids=place_id)
def test_straight_through_is_torchs(place, memory, dtype, monkeypatch):
    granularity, options, shape, axis = place
    torch.manual_seed(0)
    for bits, signed, symmetric in FORMATS:
        spec = QuantSpec(bits, "int", signed, symmetric, granularity, **options)
        x, grad = grid(memory, torch.randn(shape).to(dtype)), torch.randn(shape).to(dtype)
        scale, zero_point = qparams(x, spec, axis)

        def run(x=x, grad=grad, scale=scale, zero_point=zero_point, spec=spec) -> list[Tensor | None]:
            given = leaf(x)
            out = fake_quantize(given, scale, zero_point, spec, axis)
            out.backward(grad)
            return [out.detach(), given.grad]

        assert_bits(both(run, monkeypatch))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("place", [place for place in PLACES if place[2]], ids=place_id)
def test_learned_scales_are_torchs(place, memory, dtype, monkeypatch):
    granularity, options, shape, axis = place
    torch.manual_seed(0)
    for bits, signed, symmetric in FORMATS:
        spec = QuantSpec(bits, "int", signed, symmetric, granularity, **options)
        x, grad = grid(memory, torch.randn(shape).to(dtype)), torch.randn(shape).to(dtype)
        scale, zero_point = qparams(x, spec, axis)

        def run(x=x, grad=grad, scale=scale, zero_point=zero_point, spec=spec) -> list[Tensor | None]:
            given = [leaf(x), leaf(scale), leaf(zero_point + 0.3)]
            out = lsq_fake_quantize(*given, spec, axis)
            out.backward(grad)
            return [out.detach(), *(value.grad for value in given)]

        out, by_x, by_scale, by_zero = both(run, monkeypatch)
        assert_bits([out, by_x])
        for one, two in (by_scale, by_zero):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4 * float(two.abs().max()) + 1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "spec",
    [QuantSpec(bits, "int", True, symmetric, "token", dynamic=True) for bits in (3, 8) for symmetric in (True, False)]
    + [QuantSpec(8, symmetric=False, granularity="tensor", dynamic=True)],
    ids=spec_id,
)
@pytest.mark.parametrize(("shape", "axis"), [((3, 17), -1), ((2, 5, 8), -1), ((2, 3, 5, 7), -3), ((2, 9001), -1), ((7,), -1)])
def test_dynamic_ranges_are_torchs(shape, axis, spec, dtype, monkeypatch):
    torch.manual_seed(0)
    for memory in MEMORY:
        x, grad = grid(memory, (torch.randn(shape) * torch.rand(shape[:1] + (1,) * (len(shape) - 1))).to(dtype)), torch.randn(shape)

        def run(x=x, grad=grad) -> list[Tensor | None]:
            given = leaf(x)
            out = dynamic_fake_quantize(given, spec, axis)
            out.backward(grad.to(dtype))
            return [out.detach(), given.grad]

        assert_bits(both(run, monkeypatch))


def test_a_row_that_is_not_finite_is_nan_and_no_other(monkeypatch):
    spec = QuantSpec(8, granularity="token", dynamic=True)
    x = torch.randn(4, 33)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    out = dynamic_fake_quantize(x, spec)
    assert out[1:3].isnan().all()
    assert torch.equal(out[[0, 3]], dynamic_fake_quantize(x[[0, 3]], spec))


def test_what_is_not_finite_is_torchs():
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 3e38, 5.0])
    spec, scale, zero_point = QuantSpec(8, symmetric=False, granularity="tensor"), torch.tensor([0.1]), torch.tensor([10]).int()
    ours, theirs = leaf(x.clone()), leaf(x.clone())
    got = fake_quantize(ours, scale, zero_point, spec)
    want = torch.fake_quantize_per_tensor_affine(theirs, scale, zero_point, *qrange(spec))
    got.sum().backward()
    want.sum().backward()
    assert torch.equal(got, want)
    assert torch.equal(ours.grad, theirs.grad)
    # by channels, torch's operator casts what overflows to an integer, which C leaves open: here it is the same as for one scale
    rows = fake_quantize(x[None], scale, zero_point, QuantSpec(8, symmetric=False))
    assert torch.equal(rows[0], got)
    learned = lsq_fake_quantize(x, scale, zero_point.float(), spec)
    assert learned[0].isnan()
    assert torch.equal(learned[1:], got[1:])


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (2, 0, 3, 3)])
def test_nothing_stays_nothing(shape):
    for spec in (QuantSpec(8, granularity="tensor"), QuantSpec(8), QuantSpec(8, granularity="group", group_size=4)):
        count = {"tensor": 1, "channel": shape[0], "group": shape[0] * (0 if len(shape) < 2 or 0 in shape[1:] else 1)}
        if spec.granularity == "group" and len(shape) < 2:
            continue
        x = torch.empty(shape, requires_grad=True)
        scale, zero_point = torch.ones(count[spec.granularity]), torch.zeros(count[spec.granularity]).int()
        fake_quantize(x, scale, zero_point, spec).sum().backward()
        assert x.grad.shape == shape
    assert dynamic_fake_quantize(torch.empty(shape), QuantSpec(8, granularity="tensor", dynamic=True)).shape == shape


@pytest.mark.parametrize("memory", ["plain", "channels_last"])
def test_the_memory_format_stays(memory):
    x = leaf(grid(memory, torch.randn(2, 3, 4, 5)))
    for spec in (QuantSpec(8, granularity="tensor"), QuantSpec(8)):
        out = fake_quantize(x, *qparams(x.detach(), spec, 0), spec)
        assert out.stride() == x.stride()
        (by_x,) = torch.autograd.grad(out, x, torch.randn_like(x))
        assert by_x.stride() == x.stride()


# --- observers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("observer", "options"), [("minmax", {}), ("moving_average", {"momentum": 0.03}), ("mse", {"steps": 5})])
@pytest.mark.parametrize("symmetric", [True, False])
def test_observing_in_one_pass_is_observing(symmetric, observer, options, dtype, monkeypatch):
    """The state, outputs and gradients are those of the observers' own code."""
    spec = QuantSpec(8, "int", symmetric, symmetric, "tensor")
    batches = [torch.randn(4, 3, 8, 9).mul(1 + turn / 3).add(0.2).to(dtype) for turn in range(5)]

    def run() -> list[Tensor | None]:
        quantizer, found = FakeQuantize(spec, observer=observer, observer_options=options), []
        quantizer.observing = quantizer.quantizing = True
        for batch in batches:
            given = leaf(batch)
            out = quantizer(given)
            out.sum().backward()
            found += [out.detach(), given.grad, *(value.clone() for value in quantizer.state_dict().values())]
        assert quantizer.has_range
        assert not quantizer._stale
        return found

    assert_bits(both(run, monkeypatch))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "signed", "symmetric"), FORMATS)
def test_following_a_weight_in_one_pass_is_following(bits, signed, symmetric, dtype, monkeypatch):
    torch.manual_seed(0)
    for granularity, options, shape, axis in PLACES:
        weight = torch.randn(shape).to(dtype)
        if weight.dim() < 2:
            continue
        spec = QuantSpec(bits, "int", signed, symmetric, granularity, **options)

        def run(weight=weight, spec=spec, axis=axis) -> list[Tensor | None]:
            quantizer = FakeQuantize(spec, weight.shape, axis=axis)
            quantizer.observing = quantizer.quantizing = True
            given = leaf(weight)
            out = quantizer(given)
            out.backward(torch.ones_like(out))
            return [out.detach(), given.grad, quantizer.scale, quantizer.zero_point]

        assert_bits(both(run, monkeypatch))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nothing_changes_if_the_batch_is_not_finite(value):
    quantizer = FakeQuantize(QuantSpec(8, granularity="tensor"), name="fc.input")
    quantizer.observing = quantizer.quantizing = True
    quantizer(torch.randn(50))
    before = copy.deepcopy(quantizer.state_dict())
    wrong = torch.randn(50)
    wrong[17] = value
    with pytest.raises(ValueError, match=r"fc\.input: 1 of 50 values are nan or inf"):
        quantizer(wrong)
    assert_same_state(quantizer.state_dict(), before)
    weight = FakeQuantize(QuantSpec(), (5, 10), axis=0, name="fc.weight")
    weight.observing = weight.quantizing = True
    with pytest.raises(ValueError, match=r"fc\.weight: 1 of 50"):
        weight(wrong.view(5, 10))
    assert not weight.has_range


# --- threads and instruction sets -----------------------------------------------------------------------------------


def everything(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    found = []
    x, grad = torch.randn(40, 3, 50, 61).to(dtype), torch.randn(40, 3, 50, 61).to(dtype)
    for spec in (
        QuantSpec(4, symmetric=False, granularity="tensor"),
        QuantSpec(4),
        QuantSpec(4, granularity="group", group_size=100),
    ):
        scale, zero_point = qparams(x, spec, 0)
        given = [leaf(x), leaf(scale), leaf(zero_point.float())]
        lsq_fake_quantize(*given, spec).backward(grad)
        plain = leaf(x)
        out = fake_quantize(plain, scale, zero_point, spec)
        out.backward(grad)
        quantizer = FakeQuantize(spec, x.shape, axis=0)
        quantizer.observing = quantizer.quantizing = True
        found += [*(value.grad for value in given), out.detach(), plain.grad, quantizer(x), quantizer.scale, quantizer.zero_point]
    return [*found, dynamic_fake_quantize(x, QuantSpec(8, granularity="token", dynamic=True))]


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(dtype):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = everything(dtype)
        torch.set_num_threads(3)
        more = everything(dtype)
    finally:
        torch.set_num_threads(before)
    assert_bits(list(zip(one, more, strict=True)))


@pytest.mark.parametrize("isa", native.LEVELS)
def test_instruction_sets_agree(isa):
    best = everything(torch.float32)
    try:
        native.use(isa)
        found = everything(torch.float32)
    finally:
        native.use(native.LEVELS[-1])
    for one, two in zip(best, found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert_bits([(one, two) for one, two in zip(best, found, strict=True) if one.numel() == 40 * 3 * 50 * 61])


# --- what is saved --------------------------------------------------------------------------------------------------

SCHEMES = {
    "static": QuantScheme(weight=QuantSpec(4), input=QuantSpec(4, symmetric=False, granularity="tensor")),
    "dynamic": QuantScheme(
        weight=QuantSpec(4, granularity="group", group_size=32), input=QuantSpec(8, granularity="token", dynamic=True)
    ),
    "one scale": QuantScheme(weight=QuantSpec(4, granularity="tensor"), input=QuantSpec(8, granularity="tensor")),
}
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(256, 128), (6, 20, 256)),
    "conv": (lambda: nn.Conv2d(8, 16, 3, padding=1), (8, 8, 16, 16)),
    "grouped conv": (lambda: nn.Conv2d(8, 16, 3, groups=4), (8, 8, 16, 16)),
    "transposed": (lambda: nn.ConvTranspose2d(8, 16, 3), (8, 8, 16, 16)),
    "normed": (lambda: nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16)), (8, 8, 16, 16)),
    "attention": (lambda: Attention(), (4, 9, 128)),
}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(128, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


def fake_layer(kind: str, scheme: str, method: str = "ste") -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    model, found = nn.Sequential(make()), SCHEMES[scheme]
    found = replace(found, weight=replace(found.weight, bits=METHODS[method].bits or 4))
    prepare(model, Recipe(found, edges=None), method=method)
    set_flags(model, observing=True, following=True, quantizing=True)
    if kind == "normed":
        with torch.no_grad():  # a negative factor flips its channel's weights
            model[0][1].weight[3] = -1.0
    model(torch.randn(shape))
    return model, torch.randn(shape)


def gradients(model: nn.Module, x: Tensor, run: Callable[..., Tensor] | None = None) -> list[Tensor | None]:
    given = leaf(x.clone())
    found = (run or model)(given)
    found.square().sum().backward()
    grads = [given.grad, *(parameter.grad for parameter in model.parameters())]
    model.zero_grad()
    return [found.detach(), *(grad for grad in grads if grad is not None)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_are_those_of_saved_copies(kind, scheme, method):
    model, x = fake_layer(kind, scheme, method)
    other = copy.deepcopy(model)
    ours = gradients(model, x)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):  # others' hooks see all tensors
        theirs = gradients(other, x)
    assert len(ours) > 2
    assert_bits(list(zip(ours, theirs, strict=True)))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_are_the_references(kind, scheme, monkeypatch):
    model, x = fake_layer(kind, scheme)
    copies = iter([model, copy.deepcopy(model)])
    assert_bits(both(lambda: gradients(next(copies), x), monkeypatch))


def kept(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward pass leaves allocated beside its output."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        out = model(x)
    events = profile.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]") - out.numel() * 4


@pytest.mark.parametrize(  # other methods round in torch's operators
    ("kind", "scheme", "method"),
    thinned(["linear", "conv", "normed"], ["static", "dynamic"], ["ste", "lsq", "lsq+", "ewgs"], of=3),
)
def test_a_layer_keeps_no_copy_of_its_input_or_weight(kind, scheme, method, monkeypatch):
    model, x = fake_layer(kind, scheme, method)
    weight = next(parameter for name, parameter in model.named_parameters() if name.endswith("weight"))
    x = leaf(x) * 1  # as a layer before it gives it
    plain = kept(nn.Sequential(LAYERS[kind][0]()), x)
    # scales and flags; where a BatchNorm flips channels, the flipped weight is another tensor, before and after quantization
    room = 16384 + 2 * weight.numel() * 4 * (kind == "normed")
    assert kept(model, x) - plain < room < x.numel() * 4
    monkeypatch.setenv("LQ_BACKEND", "reference")
    assert kept(model, x) - plain > x.numel() * 4


def test_nothing_is_remembered_of_what_is_gone():
    before = len(cpu_fake_quant._SOURCES)
    model, x = fake_layer("linear", "static")
    out = model(leaf(x))
    assert len(cpu_fake_quant._SOURCES) == before
    out.sum().backward()
    with torch.no_grad():
        quantized = fake_quantize(x, torch.ones(1), torch.zeros(1).int(), QuantSpec(granularity="tensor"))
    assert cpu_fake_quant.source_of(quantized) is None


@pytest.mark.parametrize("what", ["input", "weight"])
def test_what_is_changed_before_the_backward_pass_is_an_error(what):
    model, x = fake_layer("linear", "dynamic")
    given = leaf(x) * 1
    out = model(given)
    with torch.no_grad():
        (given if what == "input" else model[0].weight).mul_(2)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*as they do in float"):
        out.sum().backward()


def test_observers_may_go_on_before_the_backward_pass():
    """Two batches forward, then both backward, as in pipelines: each with the range that it was quantized with."""
    gradients_of = []
    for together in (True, False):
        model, x = fake_layer("linear", "static")
        first, second = leaf(x), leaf(x * 3)
        out = model(first)
        if not together:
            out.sum().backward()
        other = model(second)
        if together:
            out.sum().backward()
        other.sum().backward()
        gradients_of.append([first.grad, second.grad, model[0].weight.grad])
    assert_bits(list(zip(*gradients_of, strict=True)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_second_derivatives_are_the_references(kind, method, monkeypatch):
    model, x = fake_layer(kind, "static", method)
    copies = iter([model, copy.deepcopy(model)])

    def run() -> list[Tensor | None]:
        net, given = next(copies), leaf(x.clone())
        (by_x,) = torch.autograd.grad(net(given).square().sum(), given, create_graph=True)
        by_x.square().sum().backward()
        return [by_x.detach(), given.grad, *(parameter.grad for parameter in net.parameters() if parameter.grad is not None)]

    for one, two in both(run, monkeypatch):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks(reentrant):
    model, x = fake_layer("linear", "static")
    other = copy.deepcopy(model)
    ours = gradients(model, x, lambda given: checkpoint(model, given, use_reentrant=reentrant))
    assert_bits(list(zip(ours, gradients(other, x), strict=True)))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_autocast(kind, monkeypatch):
    model, x = fake_layer(kind, "static")
    copies = iter([model, copy.deepcopy(model)])

    def run() -> list[Tensor | None]:
        with torch.autocast("cpu", torch.bfloat16):
            return gradients(next(copies), x)

    assert_bits(both(run, monkeypatch))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_compiled_training_is_one_graph_and_follows_its_ranges(scheme, method):
    model, x = fake_layer("normed", scheme, method)
    other = copy.deepcopy(model)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for turn in range(3):
        ours, theirs = gradients(model, x * (1 + turn)), gradients(other, x * (1 + turn), compiled)
        for one, two in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-3)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_compiled_training_finds_what_is_not_finite():
    model, x = fake_layer("linear", "static")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x)
    x[0, 0, 0] = torch.nan
    with pytest.raises(RuntimeError, match="nan or inf"):
        compiled(x)
    torch._dynamo.reset()


def test_functional_transforms_take_torchs_path():
    model, x = fake_layer("linear", "static")
    set_flags(model, observing=False, following=False)
    by_x = torch.func.grad(lambda given: model(given).square().sum())(x)
    torch.testing.assert_close(by_x, gradients(model, x)[1])


def test_the_environment_takes_another_path(monkeypatch):
    x = torch.randn(3)
    assert fake.takes(x)
    monkeypatch.setenv("LQ_BACKEND", "reference")
    assert not fake.takes(x)
    assert not fake.takes(x.double())
