from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.activations import Budget
from lightning_quant.algorithms import ALGORITHMS
from lightning_quant.algorithms.base import Algorithm
from lightning_quant.blocks import Layout, Path, Unit, find_blocks, find_layout, units
from lightning_quant.calibration import evaluating, run_batches
from lightning_quant.surgery import fake_modules, packed_modules, prepare
from tests.chains import MODELS, Block, Data, Lit, Loop, make, plain


def prepared(model: nn.Module, batches: list[Any]) -> tuple[nn.Module, Layout]:
    prepare(model, lq.Recipe("w4a16", group_size=8), training=False)
    with evaluating(model):
        return model, find_layout(model, lambda: run_batches(model, batches, 1))


def walk(model: nn.Module, layout: Layout, batches: list[Any], path: Path) -> list[Unit]:
    """All units, their layers put on their grids on the way."""
    visited = []
    with evaluating(model), Budget() as budget:
        for unit in units(model, lambda: run_batches(model, batches, 9), layout, budget, path=path, collect=lambda unit: None):
            visited.append(unit)
            for module in unit.modules.values():
                if not any(part is not module and hasattr(part, "setup") for part in module.modules()):
                    module.settle(module.to_packed())
        assert budget.used == 0
    return visited


@pytest.mark.parametrize("path", ["quantized", "float", "both"])
@pytest.mark.parametrize("name", MODELS)
def test_every_layer_is_visited_once(name: str, path: Path) -> None:
    model, batches = make(name)
    model, layout = prepared(model, batches)
    assert [len(chain.blocks) for chain in layout.chains] == MODELS[name][2]
    visited = walk(model, layout, batches, path)
    names = [name for unit in visited for name in unit.modules]
    assert sorted(names) == sorted(fake_modules(model))
    assert len(visited) == layout.count(path == "both")
    if path == "both":
        assert all(unit.calls is not None for unit in visited)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name, (_, _, chains) in MODELS.items() if chains])
def test_what_units_are_called_with_is_what_the_model_calls_them_with(name: str) -> None:
    """Replayed in float, every block returns what it returns in the whole model, in every batch."""
    model, batches = make(name)
    model, layout = prepared(model, batches)
    wanted: dict[str, list[Tensor]] = {}
    for chain in layout.chains:
        for block in chain.blocks:
            model.get_submodule(block).register_forward_hook(
                lambda _, args, out, block=block, leaf=chain.leaf: wanted.setdefault(block, []).append(
                    torch.utils._pytree.tree_leaves(out)[leaf].clone()
                )
            )
    run_batches(model, batches, 9)
    truth = {block: list(values) for block, values in wanted.items()}
    with Budget() as budget:
        for unit in units(model, lambda: run_batches(model, batches, 9), layout, budget, path="both", collect=lambda unit: None):
            assert unit.targets is not None
            for index, value in enumerate(truth.pop(unit.name, [])):
                assert torch.allclose(unit.targets[index], value, atol=1e-6)  # float targets
                assert torch.allclose(unit.output(index), value, atol=1e-6)  # nothing is rounded here, but to no effect
                assert torch.equal(unit.output(index), unit.output(index))
            for module in unit.modules.values():
                module.settled = True  # as if its weights were on their grids
    assert not truth


def looks(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """An algorithm "look" that only remembers the Hessians it is given."""
    seen: dict[str, Tensor] = {}
    look = Algorithm(lambda unit: seen.update(unit.statistics["hessian"]), "rounder", ("hessian",))
    monkeypatch.setitem(ALGORITHMS, "look", look)
    return seen


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma", "bert", "t5", "mixtral", "resnet", "nested", "in place", "twice", "keyword"])
def test_statistics_are_of_what_quantized_blocks_produce(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The inputs of a unit's first layer in the packed model are those that its Hessian was made of."""
    seen = looks(monkeypatch)
    model, batches = make(name)
    layout = prepared(*make(name))[1]
    recipe = lq.Recipe("w4a16", group_size=8, algorithms=["look"])
    qmodel = lq.quantize(model, recipe, batches)
    rows: dict[str, list[Tensor]] = {}
    order: list[str] = []
    for full, module in packed_modules(qmodel).items():

        def see(_: nn.Module, args: Any, full: str = full) -> None:
            order.append(full)
            rows.setdefault(full, []).append(args[0].float())

        module.register_forward_pre_hook(see)
    run_batches(qmodel, batches, 9)
    blocks = [block for chain in layout.chains for block in chain.blocks]
    first = {block: next(full for full in order if full.startswith(f"{block}.")) for block in blocks}
    checked = 0
    for full in first.values():
        if rows[full][0].dim() == 4:
            rows[full] = [nn.functional.unfold(x, 3, padding=1).transpose(1, 2) for x in rows[full]]
        x = torch.cat([x.reshape(-1, x.shape[-1]) for x in rows[full]])
        assert torch.allclose(seen[full], x.T @ x, rtol=1e-3, atol=1e-3 * seen[full].abs().max().item())
        checked += 1
    assert checked == sum(MODELS[name][2])
    float_rows: list[Tensor] = []
    last = list(first.values())[-1]
    if name in ("llama", "in place"):
        model.get_submodule(last).register_forward_pre_hook(lambda _, args: float_rows.append(args[0]) or None)
        run_batches(model, batches, 9)
        x = torch.cat([x.reshape(-1, x.shape[-1]) for x in float_rows])
        assert not torch.allclose(seen[last], x.T @ x, rtol=1e-3)  # of float blocks they would be others


def test_a_lightning_module_whose_step_calls_a_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = looks(monkeypatch)
    torch.manual_seed(0)
    model = Lit()
    recipe = lq.Recipe("w4a16", group_size=8, algorithms=["look"])
    qmodel = lq.quantize(model, recipe, datamodule=Data())
    names: list[str] = []
    look = Algorithm(lambda unit: names.append(unit.name), "rounder", ("hessian",))
    monkeypatch.setitem(ALGORITHMS, "look", look)
    lq.quantize(model, recipe, datamodule=Data())
    assert names == ["before net.blocks.0", "net.blocks.0", "net.blocks.1", "net.blocks.2", "the rest"]
    assert set(seen) == set(packed_modules(qmodel))


def test_shuffled_data_are_the_same_in_every_pass() -> None:
    """Float targets come from one pass, inputs from another: the batches must be the same ones."""
    torch.manual_seed(0)
    options = {"autoround": {"iterations": 2}}
    model, recipe = Lit(), lq.Recipe("w4a16", group_size=8, algorithms=["autoround"], algorithm_options=options)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    one = lq.quantize(model, recipe, datamodule=Data())
    assert torch.equal(torch.rand(1), expected)
    torch.manual_seed(1)
    two = lq.quantize(model, recipe, datamodule=Data())
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    generator = torch.Generator().manual_seed(1)
    loader = torch.utils.data.DataLoader(torch.randn(12, 16), 4, shuffle=True, generator=generator)
    lq.quantize(model.net, recipe, loader)


def test_data_that_change_from_pass_to_pass_are_refused() -> None:
    class Random:
        def __iter__(self) -> Any:
            return iter([torch.rand(4, 16, generator=self.source) for _ in range(3)])

        source = torch.Generator().manual_seed(0)

    recipe = lq.Recipe("w4a16", group_size=8, algorithms=["autoround"], algorithm_options={"autoround": {"iterations": 2}})
    with pytest.raises(ValueError, match="differ from pass to pass.*augmentation"):
        lq.quantize(Loop(Block, plain), recipe, Random())


def test_blocks_by_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = make("llama")
    assert find_blocks(model, ["model.layers.*"]) == [[f"model.layers.{index}" for index in range(3)]]
    names: list[str] = []
    monkeypatch.setitem(ALGORITHMS, "look", Algorithm(lambda unit: names.append(unit.name), "rounder", ("hessian",)))
    pattern = ["re:model[.]layers[.][12]$"]
    lq.quantize(model, lq.Recipe("w4a16", group_size=8, algorithms=["look"], blocks=pattern), batches)
    assert names == ["before model.layers.1", "model.layers.1", "model.layers.2"]
    for bad, message in (
        (["lm_head"], "'lm_head' names 1 modules"),
        (["*.mlp"], "are not called once each in every pass"),
        (["model.layers.*", "*.self_attn"], "is in a block of another pattern"),
    ):
        with pytest.raises(ValueError, match=message):
            lq.quantize(model, lq.Recipe("w4a16", group_size=8, algorithms=["look"], blocks=bad), batches)


def test_batches_that_take_another_way_are_refused() -> None:
    class Early(Loop):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for index, block in enumerate(self.blocks[: 1 if len(x) == 1 else 3]):
                x = block(x, torch.full((1,), float(index)))
            return self.head(x)

    class Told(Block):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x) * scale.exp()

    batches = [torch.randn(4, 16), torch.randn(1, 16)]
    recipe = lq.Recipe("w4a16", group_size=8, algorithms=["gptq"])
    with pytest.raises(ValueError, match=r"blocks.1 is called 1 times in 2 batches"):
        lq.quantize(Early(Told, plain), recipe, batches)
    lq.quantize(Early(Told, plain), recipe, batches[:1])


def test_replays_have_the_autocast_of_the_run() -> None:
    """Under autocast a block's input may be bfloat16, which its float32 weights would not take."""

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(16, 16)
            self.two = nn.Sequential(nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x).relu()

    model = nn.Sequential(nn.Linear(16, 16), nn.Sequential(*(Half() for _ in range(2))))

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch)

    data = [torch.randn(4, 16) for _ in range(2)]
    for algorithm, options in (("gptq", {}), ("autoround", {"autoround": {"iterations": 2}})):
        recipe = lq.Recipe("w4a16", group_size=8, algorithms=[algorithm], algorithm_options=options)
        assert len(packed_modules(lq.quantize(model, recipe, data, forward=forward))) == 3
