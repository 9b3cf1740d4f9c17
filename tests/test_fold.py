from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.fold import find_flow, fold_norm
from lightning_quant.recipe import Recipe
from lightning_quant.surgery import convert, get_info, prepare
from tests.helpers import assert_close, assert_same, assert_same_state, calibrate, quantizers

NORMS = nn.modules.batchnorm._BatchNorm


class Block(nn.Module):
    """A residual block whose BatchNorms are registered in another order than they run."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm_b, self.norm_a = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.conv_a, self.conv_b = nn.Conv2d(width, out, 3, padding=1, bias=False), nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Sequential(nn.Conv2d(width, out, 1), nn.BatchNorm2d(out)) if width != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm_a(self.conv_a(x)))
        return F.relu(self.norm_b(self.conv_b(out)) + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)
        self.norm = nn.BatchNorm2d(4)
        self.stem = nn.Conv2d(3, 4, 3)
        self.blocks = nn.Sequential(Block(4, 4), Block(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.norm(self.stem(x)))).mean((2, 3)))


class Branching(ResNet):
    """Control flow that depends on data: it cannot be traced as a whole."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        return self.head(self.blocks(F.relu(x) if x.sum() > -1e9 else x).mean((2, 3)))


class Branches(nn.Module):
    """No part of it can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e9:
            return x
        return self.norm(self.conv(x))


class Odd(nn.Module):
    """A convolution and a BatchNorm that are used in a way that forbids folding."""

    def __init__(self, use: Callable[[Odd, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


def used_twice(m: Odd, x: Tensor) -> Tensor:
    out = m.conv(x)
    return m.norm(out) + out


def functional(m: Odd, x: Tensor) -> Tensor:
    return F.batch_norm(m.conv(x), m.norm.running_mean, m.norm.running_var, m.norm.weight, m.norm.bias)


ODD: dict[str, Callable[[Odd, Tensor], Tensor]] = {
    "output used twice": used_twice,
    "output used in place first": lambda m, x: m.norm(F.relu_(m.conv(x))),
    "two norms of one output": lambda m, x: (lambda out: m.norm(out) + m.other(out))(m.conv(x)),
    "shared convolution": lambda m, x: m.norm(m.conv(m.conv(x))),
    "shared norm": lambda m, x: m.norm(m.conv(m.norm(x))),
    "shared convolution, two norms": lambda m, x: m.other(m.conv(m.norm(m.conv(x)))),
    "functional batch norm": functional,
    "output reshaped": lambda m, x: m.norm(m.conv(x).flip(1)),
    "norm first": lambda m, x: m.conv(m.norm(x)),
    "never called": lambda m, x: m.conv(x),
}
RESNET_PAIRS = {
    ("stem", "norm"),
    *((f"blocks.{i}.conv_{j}", f"blocks.{i}.norm_{j}") for i in (0, 1) for j in "ab"),
    ("blocks.1.shortcut.0", "blocks.1.shortcut.1"),
}


def images(channels: int = 3) -> Tensor:
    return torch.randn(4, channels, 8, 7)


def trained(model: nn.Module) -> nn.Module:
    """With statistics and affine parameters that are not 0 and 1."""
    for module in model.modules():
        if isinstance(module, NORMS):
            module.running_mean.normal_()
            module.running_var.uniform_(0.3, 3)
            if module.affine:
                nn.init.normal_(module.weight, 1, 0.5)
                nn.init.normal_(module.bias)
    return model


def test_pairs_of_a_resnet_are_those_that_run():
    flow = find_flow(ResNet())
    assert set(flow.pairs) == RESNET_PAIRS
    assert not flow.reasons
    assert [name for name in flow.order if "conv" in name or name in ("stem", "head")] == [
        *("stem", "blocks.0.conv_a", "blocks.0.conv_b", "blocks.1.conv_a", "blocks.1.conv_b", "head")
    ]


def test_untraceable_models_are_run():
    model, x = Branching(), images()
    alone = find_flow(model)
    assert alone.pairs == []  # blocks that trace alone may be used otherwise by their parent
    assert "example_input_array" in alone.reasons["norm"]
    ran = find_flow(model, lambda: model(x))
    assert set(ran.pairs) == RESNET_PAIRS
    assert not ran.reasons
    assert ran.order[0] == "stem"
    assert ran.order[-1] == "head"

    model = Branches()
    assert find_flow(model).pairs == []
    assert find_flow(model, lambda: model(x)).pairs == [("conv", "norm")]


@pytest.mark.parametrize("called", [True, False])
@pytest.mark.parametrize("name", ODD)
def test_what_must_not_be_folded_is_listed(name, called):
    model, x = Odd(ODD[name]), images()
    flow = find_flow(model, (lambda: model(x)) if called else None)
    assert flow.pairs == []
    assert set(flow.reasons) == {"norm", "other"}
    assert all(flow.reasons.values())


@pytest.mark.parametrize("called", [True, False])
def test_a_norm_without_statistics_is_not_folded(called):
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)), images()
    flow = find_flow(model, (lambda: model(x)) if called else None)
    assert flow.pairs == []
    assert "running statistics" in flow.reasons["1"]


def test_norms_of_linear_layers_need_two_dimensions():
    """On `[batch, 6, 6]`, BatchNorm1d normalises the tokens, and not the features of the linear layer before it."""
    model, x = trained(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))).eval(), torch.randn(5, 6, 4)
    assert find_flow(model, lambda: model(x[:, 0])).pairs == [("0", "1")]
    flow = find_flow(model, lambda: model(x))
    assert flow.pairs == []
    assert flow.reasons["1"]


def test_a_linear_layers_tokens_are_not_folded_for_good():
    model, x = trained(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))).eval(), torch.randn(5, 6, 4)
    want = model(x)
    prepare(model, "w8a16", training=False, call=lambda: model(x))
    assert_close(model(x), want)


def test_a_list_of_pairs_overrides():
    model = ResNet()
    flow = find_flow(model, pairs=[("stem", "norm")])
    assert flow.pairs == [("stem", "norm")]
    assert set(flow.reasons) == {norm for _, norm in RESNET_PAIRS} - {"norm"}
    assert all("list of pairs" in reason for reason in flow.reasons.values())
    assert find_flow(model, pairs=[]).pairs == []
    with_list = prepare(copy.deepcopy(model), Recipe("w8a16", fold=[("stem", "norm")]))
    assert get_info(with_list).folded == {"norm": "stem"}


@pytest.mark.parametrize(
    ("pairs", "told"),
    [
        ([("stem", "nrom")], "'nrom'"),
        ([("stem",)], "'stem'"),
        ([("head", "norm")], "Linear and BatchNorm2d do not fit"),
        ([("norm", "stem")], "BatchNorm2d and Conv2d do not fit"),
        ([("stem", "blocks.1.norm_a")], "do not fit"),
    ],
)
def test_wrong_lists_raise(pairs, told):
    model = ResNet()
    with pytest.raises(ValueError, match="fold pair") as error:
        find_flow(model, pairs=pairs)
    assert told in str(error.value)
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="fold pair"):
        prepare(model, Recipe("w8a16", fold=pairs))
    assert [type(module) for module in model.modules()] == before


class Remembering(Branching):
    """Writes into itself on every forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        self.count = getattr(self, "count", 0) + 1
        return super().forward(x)


@pytest.mark.parametrize("kind", [ResNet, Branching, Remembering])
def test_searching_leaves_no_trace(kind):
    model, x = trained(kind()), images()
    model.train()
    model.blocks[0].norm_a.eval()
    model.stem.register_forward_hook(lambda *args: None)
    state = copy.deepcopy(model.state_dict())

    def attributes() -> list[dict[str, Any]]:
        return [
            {key: (value, len(value) if isinstance(value, dict) else 0) for key, value in m.__dict__.items()}
            for m in model.modules()
        ]

    before = attributes()
    find_flow(model, lambda: model(x))
    for one, two in zip(before, attributes(), strict=True):
        assert set(one) == set(two)
        for key in one:
            assert one[key][0] is two[key][0], key
            assert one[key][1] == two[key][1], key
    assert_same_state(model.state_dict(), state)
    assert not model.blocks[0].norm_a.training
    assert model.stem.training
    assert torch.is_grad_enabled()


FOLDABLE: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "Conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)), (5, 3, 9)),
    "Conv2d": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6)), (5, 4, 6, 5)),
    "Conv2d-no-affine": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)), (5, 3, 6, 5)),
    "Conv3d": (lambda: nn.Sequential(nn.Conv3d(3, 4, 2), nn.BatchNorm3d(4)), (5, 3, 3, 4, 3)),
    "ConvTranspose1d": (lambda: nn.Sequential(nn.ConvTranspose1d(3, 4, 3), nn.BatchNorm1d(4)), (5, 3, 6)),
    "ConvTranspose2d": (lambda: nn.Sequential(nn.ConvTranspose2d(6, 4, 3, stride=2), nn.BatchNorm2d(4)), (5, 6, 4, 3)),
    "ConvTranspose2d-groups": (
        lambda: nn.Sequential(nn.ConvTranspose2d(6, 4, 3, groups=2, bias=False), nn.BatchNorm2d(4)),
        (5, 6, 4, 3),
    ),
    "ConvTranspose3d": (lambda: nn.Sequential(nn.ConvTranspose3d(6, 4, 2, groups=2), nn.BatchNorm3d(4)), (5, 6, 2, 3, 2)),
    "Linear": (lambda: nn.Sequential(nn.Linear(7, 4), nn.BatchNorm1d(4)), (5, 7)),
    "Linear-no-bias": (lambda: nn.Sequential(nn.Linear(7, 4, bias=False), nn.BatchNorm1d(4, eps=0.1)), (5, 7)),
}
foldable = pytest.mark.parametrize("name", FOLDABLE)


@foldable
def test_folding_keeps_the_function(name):
    build, shape = FOLDABLE[name]
    model, x = trained(build()).eval(), torch.randn(shape)
    want = model(x)
    fold_norm(model[0], model[1])
    assert_close(model[0](x), want)


@foldable
def test_ptq_folds_for_good(name):
    build, shape = FOLDABLE[name]
    model, x = trained(build()).eval(), torch.randn(shape)
    want = model(x)
    prepare(model, "w8a16", training=False, call=lambda: model(x))
    assert type(model[1]) is nn.Identity
    assert_close(model(x), want)
    assert get_info(model).folded == {"1": "0"}


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-dynamic", "w4a16", "w2a16", "nf4", "fp8"])
@foldable
def test_a_trained_pair_is_what_runs(name, recipe):
    build, shape = FOLDABLE[name]
    model, x = trained(build()), torch.randn(shape)
    plain = copy.deepcopy(model).eval()
    names = [(key, value.shape) for key, value in model.named_parameters()]
    prepare(model, recipe, training=True, call=lambda: model(x))
    assert [(key, value.shape) for key, value in model.named_parameters()] == names
    assert_close(model.eval()(x), plain(x), 2e-6)

    calibrate(model, lambda: model(x))
    model.train()
    for quantizer in quantizers(model):
        quantizer.observing = True
    before = model[1].running_mean.clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) * torch.linspace(-1, 1, model(x).numel()).view_as(model(x))).mean().backward()
        for key, value in model.named_parameters():
            # a bias in front of a BatchNorm has no effect in training
            assert value.grad is not None, key
            assert key == "0.bias" or value.grad.abs().sum() > 0, key
        optimizer.step()
    assert not torch.equal(model[1].running_mean, before)

    for quantizer in quantizers(model):
        quantizer.observing = False
    model.eval()
    model[0].observe_weights()
    packed = convert(model)
    assert_close(packed(x), model(x))
    assert not [module for module in packed.modules() if isinstance(module, NORMS)]
    assert isinstance(model[1], NORMS)


def test_the_weight_is_quantized_with_its_norm_folded_in():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)))
    exact = model[0].weight.detach() * (model[1].weight / (model[1].running_var + model[1].eps).sqrt()).detach().view(-1, 1, 1, 1)
    prepare(model, "w8a16")
    packed = convert(calibrate(model, lambda: None))
    torch.testing.assert_close(packed[0].weight_scale.flatten(), exact.abs().amax((1, 2, 3)) / 127.5)
    step = packed[0].weight_scale.view(-1, 1, 1, 1)
    assert ((packed[0].weight - exact).abs() <= 0.501 * step).all()


@pytest.mark.parametrize("method", ["ste", "lsq"])
def test_scales_stay_right_while_the_statistics_move(method):
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)))
    x = torch.randn(2, 3, 8, 8)
    prepare(model, "w4a16", method=method, call=lambda: model(x))
    calibrate(model, lambda: model(x))
    errors = []
    for factor in (1.0, 1e4):
        with torch.no_grad():
            model[1].running_var.mul_(factor)
        want = model[1](nn.functional.conv2d(x, model[0].weight))
        errors.append(((model(x) - want).norm() / (want - want.mean((0, 2, 3), keepdim=True)).norm()).item())
        assert_close(convert(model)(x), model(x))
    assert errors[1] == pytest.approx(errors[0], rel=0.05)


@pytest.mark.parametrize("recipe", ["w8a8", "w4a16"])
@pytest.mark.parametrize("name", ["Conv2d", "ConvTranspose2d-groups", "Linear"])
def test_channels_of_scale_zero_work_and_learn(name, recipe):
    build, shape = FOLDABLE[name]
    model, x = trained(build()), torch.randn(shape)
    with torch.no_grad():
        model[1].weight[1] = 0
    prepare(model, recipe)
    calibrate(model, lambda: model(x))
    out = model(x)
    assert_close(out.select(1, 1), model[1].bias[1].expand_as(out.select(1, 1)))
    assert_close(convert(model)(x), out)
    model.train()
    model(x).square().mean().backward()
    assert all(value.grad.isfinite().all() for value in model.parameters())
    assert model[1].weight.grad[1].abs() > 0
    with torch.no_grad():
        model[1].weight -= model[1].weight.grad
    assert model[1].weight[1] != 0
    model.eval()
    model[0].observe_weights()
    assert_close(convert(model)(x), model(x))


def test_a_resnet_trains_and_converts():
    model, x = trained(ResNet()), images()
    names = [name for name, _ in model.named_parameters()]
    before = copy.deepcopy(model.state_dict())
    prepare(model, "w8a8")
    assert [name for name, _ in model.named_parameters()] == names
    assert_same({name: model.state_dict()[name] for name in before}, before)
    assert get_info(model).folded == {norm: conv for conv, norm in RESNET_PAIRS}
    calibrate(model, lambda: model(x))
    model.train()
    model(x).square().sum().backward()
    assert all(value.grad is not None for value in model.parameters())
    packed = convert(model)
    # static ranges that rounding noise crosses move a code of an input, not the whole output
    assert_close(packed(x), model.eval()(x), 1e-3)
    assert not [module for module in packed.modules() if isinstance(module, NORMS)]


def test_a_quantized_output_keeps_its_norm_apart():
    token = {"bits": 8, "granularity": "token", "dynamic": True}
    model, x = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))), images()
    prepare(model, {"scheme": {"weight": {}, "output": token}})
    assert "quantized in front of it" in get_info(model).skipped["1"]
    packed = convert(calibrate(model, lambda: model(x)))
    assert isinstance(packed[1], nn.BatchNorm2d)
    assert_close(packed(x), model(x))


def test_a_float_convolution_keeps_its_norm():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    prepare(model, {"scheme": "w8a16", "ignore": ["0"]}, training=False)
    assert isinstance(model[1], nn.BatchNorm2d)
    assert "0 stays in float" in get_info(model).skipped["1"]


def test_three_dimensional_inputs_of_a_folded_linear_layer_raise():
    model = prepare(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), Recipe("w8a16", fold=[("0", "1")]))
    with pytest.raises(ValueError, match=r"0\.weight.*3 dimensions.*fold="):
        model(torch.randn(5, 6, 4))


class Reads(nn.Module):
    """A block whose parent also reads its convolution, in a forward that does not trace."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.seq = how, nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        y = self.seq[0](x)
        if self.how == "added":
            return self.seq[1](y) + y
        if self.how == "returned":
            return y, self.seq[1](y)
        return self.seq[1](y) + nn.functional.conv2d(x, self.seq[0].weight)


class NormAct(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input).relu()


def hooked(where: int) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model[where].register_forward_hook(lambda module, args, out: out * 2)
    return model


def sharing() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize("called", [True, False])
@pytest.mark.parametrize(
    "build",
    [
        *(lambda how=how: Reads(how) for how in ("added", "returned", "weight")),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), NormAct(4)),
        lambda: hooked(0),
        lambda: hooked(1),
        sharing,
    ],
    ids=["added", "returned", "weight", "norm-act", "conv-hook", "norm-hook", "shared-weight"],
)
def test_ptq_never_changes_the_function(build, called):
    model, x = trained(build()).eval(), images()
    want = model(x)
    prepare(model, "w8a16", training=False, call=(lambda: model(x)) if called else None)
    assert_close(model(x), want)
    assert any("not folded" in reason for reason in get_info(model).skipped.values())
