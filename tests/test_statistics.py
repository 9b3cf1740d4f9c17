from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.serialization import build_packed
from lightning_quant.statistics import SAMPLES, collecting, put_weight_matrix, weight_matrix, why_no_rows
from lightning_quant.surgery import fake_modules, prepare
from tests.helpers import assert_same_state
from tests.launching import launch
from tests.statistics_worker import RECIPES, run, task

KINDS = ("hessian", "total", "count", "low", "high", "rows")


def collected(model: nn.Module, batches: list[Tensor], recipe: Any = "w8a16", **options: Any) -> dict[str, dict[str, Tensor]]:
    prepare(model.eval(), recipe, training=False)
    with torch.no_grad(), collecting(fake_modules(model), options.pop("kinds", KINDS), options.pop("quantized", False)) as found:
        for batch in batches:
            model(batch)
    return found


def test_sums_and_ends_are_those_of_all_rows() -> None:
    batches = [torch.randn(5, 3, 12) * (1 + index) for index in range(4)]
    found = collected(nn.Sequential(nn.Linear(12, 4)), batches)
    x = torch.cat(batches).reshape(-1, 12)
    assert torch.allclose(found["hessian"]["0"], x.T @ x, rtol=1e-5, atol=1e-4)
    assert torch.allclose(found["total"]["0"], x.sum(0), atol=1e-4)
    assert found["count"]["0"] == 60
    assert torch.equal(found["low"]["0"], x.amin(0))
    assert torch.equal(found["high"]["0"], x.amax(0))


CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "1d": (nn.Conv1d(6, 5, 3, stride=2, padding=1, dilation=2), (2, 6, 20)),
    "2d": (nn.Conv2d(6, 5, (3, 2), stride=(1, 2), padding=(1, 0)), (2, 6, 9, 8)),
    "same": (nn.Conv2d(6, 5, 3, padding="same", dilation=2), (2, 6, 9, 8)),
    "reflect": (nn.Conv2d(6, 5, 3, padding=1, padding_mode="reflect"), (2, 6, 9, 8)),
    "circular 1d": (nn.Conv1d(6, 5, 4, padding=2, padding_mode="circular"), (2, 6, 20)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_is_its_weight_matrix_times_rows(name: str) -> None:
    """The Hessian gives the squared output without bias: sum (w x)^2 = w H w^T."""
    conv, shape = CONVOLUTIONS[name]
    x = torch.randn(shape)
    conv.bias.data.zero_()
    out = conv(x).movedim(1, 0).flatten(1)
    model = nn.Sequential(conv)
    found = collected(model, [x])
    weight = weight_matrix(model[0])
    energy = ((weight @ found["hessian"]["0"]) * weight).sum(1)
    assert torch.allclose(energy, out.square().sum(1), rtol=1e-4)
    assert found["low"]["0"].shape == (6,)


def test_rows_are_of_all_batches_and_no_more_than_wanted() -> None:
    batches = [torch.full((200, 4), float(index)) for index in range(9)]
    found = collected(nn.Sequential(nn.Linear(4, 2)), batches)
    rows = found["rows"]["0"]
    assert SAMPLES // 2 <= len(rows) <= SAMPLES + SAMPLES // 9
    assert {value.item() for value in rows[:, 0]} == set(range(9))
    counts = torch.bincount(rows[:, 0].long())
    assert counts.max() <= 4 * counts.min()


def test_one_tensor_given_to_several_layers_is_measured_for_each() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.conv = nn.Linear(6, 6), nn.Linear(6, 3), nn.Conv1d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x).sum() + self.k(x).sum() + self.conv(x).sum()

    x = torch.randn(2, 6, 6)
    found = collected(Three(), [x])
    last, channels = x.reshape(-1, 6), x.movedim(1, -1).reshape(-1, 6)
    for name, rows in (("q", last), ("k", last), ("conv", channels)):
        assert torch.allclose(found["hessian"][name], rows.T @ rows, atol=1e-4)
        assert torch.equal(found["high"][name], rows.amax(0))


def test_quantized_inputs_where_they_are_known() -> None:
    x = torch.randn(20, 8)
    found = collected(nn.Sequential(nn.Linear(8, 4)), [x], "w8a8-dynamic", quantized=True)
    scale = x.abs().amax(1, keepdim=True) / 127
    rows = (x / scale).round().clamp(-128, 127) * scale
    assert torch.allclose(found["hessian"]["0"], rows.T @ rows, rtol=1e-4, atol=1e-4)
    static = collected(nn.Sequential(nn.Linear(8, 4)), [x], "w8a8", quantized=True)  # no range yet
    assert torch.allclose(static["hessian"]["0"], x.T @ x, atol=1e-4)


def test_sums_are_float32_under_autocast() -> None:
    model = prepare(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval(), "w8a16", training=False)
    seen: list[Tensor] = []
    model[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad(), collecting(fake_modules(model), KINDS, False) as found, torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(100, 8))
    assert seen[0].dtype == torch.bfloat16
    x = seen[0].float()
    assert found["hessian"]["1"].dtype == torch.float32
    assert torch.allclose(found["hessian"]["1"], x.T @ x, rtol=1e-5, atol=1e-5)


def test_what_is_no_matrix_is_left_out_with_a_reason() -> None:
    model = nn.ModuleDict(
        {"lstm": nn.LSTM(8, 8), "group": nn.Conv2d(8, 8, 3, groups=2), "up": nn.ConvTranspose2d(8, 4, 2), "plain": nn.Linear(8, 4)}
    )
    fakes = fake_modules(prepare(model, "w8a16", training=False))
    reasons = {name: why_no_rows(module) for name, module in fakes.items()}
    assert reasons["plain"] == ""
    assert "more than one weight" in reasons["lstm"]
    assert all("not for" in reasons[name] for name in ("group", "up"))
    with torch.no_grad(), collecting(fakes, KINDS, False) as found:
        model["lstm"](torch.randn(3, 2, 8))
        model["group"](torch.randn(1, 8, 4, 4))
    assert found == {}


def test_a_new_weight_has_storage_of_its_own() -> None:
    linear = nn.Sequential(nn.Linear(6, 4))
    before = linear[0].weight.detach()  # another model's, say
    value = before.clone()
    fake = prepare(linear, "w8a16", training=False)[0]
    put_weight_matrix(fake, weight_matrix(fake) * 2)
    assert torch.equal(before, value)
    assert torch.equal(fake.weight, value * 2)


# --- ranks ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return launch("tests.statistics_worker", tmp_path_factory.mktemp("ranks"))


@pytest.mark.xdist_group("ddp")
def test_hessians_are_sums_over_ranks(ranks: list[dict[str, Any]]) -> None:
    alone = run(0, 1)
    assert set(alone["hessians"]) == set(ranks[0]["hessians"]) == set(ranks[1]["hessians"])
    assert "blocks.0.expert.2" in alone["hessians"]  # which only the second rank reaches
    for name, value in alone["hessians"].items():
        assert torch.equal(ranks[0]["hessians"][name], ranks[1]["hessians"][name])
        assert torch.allclose(ranks[0]["hessians"][name], value, rtol=1e-4, atol=1e-4), name


@pytest.mark.xdist_group("ddp")
@pytest.mark.parametrize("name", RECIPES)
def test_ranks_come_to_one_result_and_share_a_work_dir(name: str, ranks: list[dict[str, Any]]) -> None:
    assert_same_state(ranks[0][name], ranks[1][name])
    for rank in ranks:
        assert_same_state(rank[f"{name} again"], rank[name])


@pytest.mark.xdist_group("ddp")
@pytest.mark.parametrize("name", RECIPES)
def test_two_ranks_do_as_well_as_one_process(name: str, ranks: list[dict[str, Any]]) -> None:
    """Sums over ranks are those of one process; what is learned step by step sees other batches, and ends as near."""
    make, data = task(name)
    errors = {}
    for where, state in (("two", ranks[0][name]), ("one", run_one(name)), ("nearest", nearest(name))):
        packed = build_packed(make(), state, where)
        errors[where] = sum((packed(x) - make()(x)).square().mean().item() for x in data(0, 1))
    assert errors["two"] < 1.25 * errors["one"]
    assert (
        errors["two"] < (1.2 if name in ("autoround", "block_ap", "adaround") else 1.0) * errors["nearest"]
    )  # a few steps on two blocks


def run_one(name: str) -> dict[str, Tensor]:
    make, data = task(name)
    return lq.quantize(make(), RECIPES[name], data(0, 1)).state_dict()


def nearest(name: str) -> dict[str, Tensor]:
    make, data = task(name)
    recipe = {**RECIPES[name].to_dict(), "algorithms": [], "algorithm_options": {}}
    return lq.quantize(make(), recipe, data(0, 1)).state_dict()


def test_algorithms_leave_the_random_state_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(2)
    torch.manual_seed(7)
    recipe = lq.Recipe("w4a16", group_size=8, algorithms=["awq", "gptq"])
    lq.quantize(nn.Sequential(nn.Linear(8, 8)), recipe, [torch.zeros(2, 8) + 1])
    torch.manual_seed(7)
    assert torch.equal(torch.rand(2), expected)
