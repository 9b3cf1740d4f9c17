from __future__ import annotations

import itertools
import math
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_quant as lq
from lightning_quant.mixed import Choice, Sensitivity
from lightning_quant.spec import get_preset
from tests.digits import Classifier, Digits, trainer
from tests.test_language_models import llama, tokens

WIDTHS = ["w2a16", "w3a16", "w4a16", "w8a16"]
DEAD = 5  # a hidden unit that is always 0: weights that read it change nothing, but the ranges that hold them


class Mlp(L.LightningModule):
    """Five linear layers, four of the same size."""

    def __init__(self) -> None:
        super().__init__()
        layers = [layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.ReLU())]
        self.net = nn.Sequential(*layers, nn.Linear(64, 10))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.flatten(1))

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.calls += 1
        out = self(batch[0])
        loss = nn.functional.cross_entropy(out, batch[1])
        self.log_dict({"val_loss": loss, "accuracy": (out.argmax(1) == batch[1]).float().mean()})
        return loss


def digits() -> Digits:
    data = Digits()
    data.setup("fit")
    return data


def train(model: nn.Module, steps: int = 150) -> None:
    images, labels = digits().train.tensors
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(steps):
        start = 128 * step % 1152
        loss = nn.functional.cross_entropy(model(images[start : start + 128]), labels[start : start + 128])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def plant(before: nn.Linear, after: nn.Linear) -> None:
    """Outliers in `after`, on a unit of `before` that a ReLU keeps at 0: the function stays."""
    with torch.no_grad():
        before.bias[DEAD] = -100.0
        after.weight[:, DEAD] = 40.0


@pytest.fixture(scope="module")
def mlp_state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Mlp()
    train(model)
    return model.state_dict()


@pytest.fixture
def mlp(mlp_state: dict[str, Tensor]) -> Mlp:
    model = Mlp()
    model.load_state_dict(mlp_state)
    return model


def val_batches() -> list[tuple[Tensor, Tensor]]:
    images, labels = digits().val.tensors
    return [(images[start : start + 125], labels[start : start + 125]) for start in range(0, 500, 125)]


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def mean_loss(model: nn.Module) -> float:
    with torch.no_grad():
        return sum(cross_entropy(model.eval(), batch).item() for batch in val_batches()) / 4


def only(name: str, recipe: str) -> lq.Recipe:
    return lq.Recipe(schemes={name: recipe})


def noise_ratio(model: nn.Module, qmodel: nn.Module, inputs: list[Any], call: Any) -> float:
    model.eval()
    with torch.no_grad():
        pairs = [(call(model, value).double(), call(qmodel, value).double()) for value in inputs]
    return sum((q - f).square().sum().item() for f, q in pairs) / sum(f.square().sum().item() for f, _ in pairs)


# --- the planted layer, and what a cost is --------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["sqnr", "loss", "accuracy", "val_loss"])
def test_a_layer_with_outliers_ranks_first(mlp: Mlp, by: str) -> None:
    before = mean_loss(mlp)
    plant(mlp.net[2], mlp.net[4])
    assert abs(mean_loss(mlp) - before) < 0.1
    mlp.train()
    mlp.net[3].eval()
    state = {name: value.clone() for name, value in mlp.state_dict().items()}
    mode = {"accuracy": "max", "val_loss": "min"}.get(by)
    found = lq.sensitivity(mlp, ["w4a16", "w3a16"], datamodule=Digits(), trainer=trainer(), by=by, metric_mode=mode)
    ranked = list(found.layers())
    assert ranked[0] == "net.4"
    assert set(ranked) == {"net.0", "net.2", "net.4", "net.6", "net.8"}
    assert found.table(1).splitlines()[2].split()[0] == "net.4"
    assert str(found).count("net.") == 10
    # and the model is as it was
    assert type(mlp) is Mlp
    assert [type(part) for part in mlp.net] == 4 * [nn.Linear, nn.ReLU] + [nn.Linear]
    assert mlp.training
    assert not mlp.net[3].training
    assert mlp.calls == 0
    assert list(state) == list(mlp.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in mlp.state_dict().items())


@pytest.mark.parametrize("recipe", ["w3a16", "w8a8", "w8a8-dynamic"])
def test_a_cost_is_that_of_quantizing_the_layer_alone(trained: Classifier, recipe: str) -> None:
    net, inputs = trained.net.eval(), [batch[0] for batch in val_batches()]
    found = lq.sensitivity(net, [recipe], batches=inputs)
    names = ["stem.0", "conv1", "conv2", "shortcut.0", "head"]
    assert [choice.layer for choice in found.choices] == names
    for choice in found.choices:
        alone = lq.quantize(net, only(choice.layer, recipe), inputs, calibration_batches=4)
        assert choice.cost == pytest.approx(noise_ratio(net, alone, inputs, lambda model, x: model(x)), rel=5e-3)
        row = lq.summary(alone).rows[0]
        assert (choice.bits, choice.bytes, choice.float_bytes) == (row.bits, row.bytes_after, row.bytes_before)


@pytest.mark.parametrize("edges", [False, True])
def test_costs_by_loss_in_the_loop_and_without(trained: Classifier, edges: bool) -> None:
    recipe = "w4a4" if edges else lq.Recipe("w3a16", group_size=16)
    loader = DataLoader(TensorDataset(*digits().val.tensors), 125)
    trained.eval()
    # its validation_step returns nothing, its training_step the loss
    found = lq.sensitivity(trained, [recipe], dataloaders=loader, by="loss")
    direct = lq.sensitivity(trained, [recipe], batches=val_batches(), forward=cross_entropy, by="loss")
    assert found.baseline == pytest.approx(mean_loss(trained), rel=1e-5)
    schemes = {}
    for choice, other in zip(found.choices, direct.choices, strict=True):
        assert choice.cost == pytest.approx(other.cost, abs=1e-6)
        schemes.update(choice.schemes)
        alone = lq.quantize(trained, lq.Recipe(schemes=choice.schemes), val_batches(), forward=lambda model, batch: model(batch[0]))
        assert choice.cost == pytest.approx(mean_loss(alone) - found.baseline, abs=2e-5)
    if edges:
        assert {name: scheme.weight.bits for name, scheme in schemes.items()} == {
            "net.stem.0": 8,
            "net.conv1": 4,
            "net.conv2": 4,
            "net.shortcut.0": 4,
            "net.head": 8,
        }


def test_a_language_model() -> None:
    torch.manual_seed(0)
    model = llama().eval()
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.v_proj.weight[DEAD] = 0.0
        attention.o_proj.weight[:, DEAD] = 3.0
    batches = [{"input_ids": tokens(), "labels": tokens()}]
    costs = {}
    for by in ("sqnr", "loss"):
        found = lq.sensitivity(model, ["w4a16", "w8a16"], batches=batches, by=by)
        assert len(found.choices) == 28
        costs[by] = {choice.layer: choice.cost for choice in found.choices if choice.recipe == "w4a16"}
        if by == "sqnr":
            assert next(iter(found.layers())) == "model.layers.0.self_attn.o_proj"
    for name in ("model.layers.1.mlp.down_proj", "model.layers.0.self_attn.o_proj"):
        alone = lq.quantize(model, only(name, "w4a16"))
        want = noise_ratio(model, alone, batches, lambda model, batch: model(**batch).logits)
        assert costs["sqnr"][name] == pytest.approx(want, rel=1e-3)
        with torch.no_grad():
            loss = alone(**batches[0]).loss.item() - model(**batches[0]).loss.item()
        assert costs["loss"][name] == pytest.approx(loss, abs=2e-6)
    recipe = lq.allocate(found, "6 bits")
    assert {scheme.weight.bits for scheme in recipe.schemes.values() if scheme} <= {4, 8}
    assert len(lq.summary(lq.quantize(model, recipe)).rows) > 7


def test_steps_that_draw_noise_or_write_into_their_batch(mlp: Mlp) -> None:
    def noisy(model: nn.Module, batch: list[Any]) -> Tensor:
        images = batch.pop(0)
        images += 0.1 * torch.randn_like(images)
        return nn.functional.cross_entropy(model(images), batch.pop(0))

    batches = [[*batch] for batch in val_batches()]
    torch.manual_seed(3)
    found = lq.sensitivity(mlp, ["w8a16", lq.Recipe("w8a16", group_size=16)], batches=batches, forward=noisy, by="loss")
    assert all(abs(choice.cost) < 1e-3 for choice in found.choices)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), after)
    assert [len(batch) for batch in batches] == [2] * 4
    assert all(torch.equal(one[0], two[0]) for one, two in zip(batches, val_batches()))


def test_data_is_read_once(mlp: Mlp) -> None:
    reads: list[int] = []

    def source() -> Any:
        for index, batch in enumerate(val_batches()):
            reads.append(index)
            yield batch[0]

    found = lq.sensitivity(mlp, ["w8a8", "w4a16"], batches=source(), calibration_batches=3)
    assert reads == [0, 1, 2]
    assert found.batches == 3


def test_layers_that_no_batch_reaches_stay_float() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"index": x.argmax(1), "small": x[:, :1], "out": self.used(x)}

    with pytest.warns(UserWarning, match="no batch reached unused"):
        found = lq.sensitivity(Two(), ["w4a16"], batches=[torch.randn(8, 32)])
    assert [choice.layer for choice in found.choices] == ["used"]
    recipe = lq.allocate(found, "4 bits")
    assert list(recipe.schemes) == ["used"]
    assert recipe.scheme is None
    net = nn.ModuleDict({"a": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match="no batch reached any of the layers"):
        lq.sensitivity(net, ["w4a16"], batches=[torch.randn(2, 4)], forward=lambda model, batch: batch)


def test_modules_that_belong_together_get_one_scheme() -> None:
    named = {"lm_head": "w8a16", "*.embed_tokens": "w8a16"}
    recipes = [lq.Recipe("w8a16", schemes=named), lq.Recipe("w4a16", schemes=dict.fromkeys(named, "w4a16")), "w3a16"]
    model = llama(tie_word_embeddings=True)
    found = lq.sensitivity(model, recipes, batches=[tokens()], forward=lambda model, batch: model(input_ids=batch))
    tied = found.layers()["model.embed_tokens"]
    assert [set(choice.schemes) for choice in tied] == 2 * [{"model.embed_tokens", "lm_head"}]
    assert {choice.numel for choice in tied} == {60 * 48}
    assert "lm_head" not in found.layers()
    recipe = lq.allocate(found, "7 bits")
    qmodel = lq.quantize(model, recipe)
    assert recipe.schemes["lm_head"] == recipe.schemes["model.embed_tokens"]
    assert sum(row.bytes_after for row in lq.summary(qmodel).rows if "lm_head" not in row.name) == found.predict(recipe).bytes

    attention = nn.TransformerEncoderLayer(32, 2, 48, batch_first=True)
    found = lq.sensitivity(attention, ["w8a16", "w4a16"], batches=[torch.randn(2, 5, 32)])
    assert list(dict.fromkeys(choice.layer for choice in found.choices)) == ["self_attn", "linear1", "linear2"]
    assert set(found.choices[0].schemes) == {"self_attn", "self_attn.out_proj"}
    assert found.choices[0].numel == 4 * 32 * 32


def test_experts_of_a_layer_get_one_scheme() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(vocab_size=60, num_hidden_layers=1, **sizes))
    found = lq.sensitivity(model, ["w4a16", "w8a16"], batches=[{"input_ids": tokens()}])
    places = [name for name in found.layers() if "experts" in name]
    assert sorted(name.rpartition(".")[0] for name in places) == 2 * ["model.layers.0.mlp.experts.*"]
    assert sum(found.layers()[name][0].numel for name in places) == 3 * 3 * 32 * 48
    rows = lq.summary(lq.quantize(model, lq.allocate(found, "6 bits"))).rows
    assert sum("experts" in row.name for row in rows) == 6
    assert sum(row.bytes_after for row in rows) == found.predict(lq.allocate(found, "6 bits")).bytes


# --- allocation -----------------------------------------------------------------------------------------------------


def synthetic(seed: int, layers: int = 5, names: tuple[str, ...] = ("w2a16", "w4a16", "w8a16")) -> Sensitivity:
    """Random sizes and costs, some of them 0, below 0, or without end."""
    draw = random.Random(seed)
    choices = []
    for index in range(layers):
        numel = draw.choice([64, 100, 256, 1000])
        for name in names:
            scheme = get_preset(name).scheme
            codes = numel * scheme.weight.bits
            cost = draw.choice([draw.random(), draw.random() ** 3, 0.0, -0.1, math.inf if name == "w2a16" else 0.5])
            packed = codes // 8 + draw.randrange(8, 40)
            choices.append(Choice(f"l{index}", "Linear", name, {f"l{index}": scheme}, numel, codes, packed, 4 * numel, cost))
    return Sensitivity("loss", tuple(choices), {name: lq.Recipe(name) for name in names}, 4, 1.0)


def combinations(found: Sensitivity) -> list[tuple[int, int, float]]:
    """(code bits, bytes, cost) of every choice for every layer, float among them."""
    layers: dict[str, list[tuple[int, int, float]]] = {}
    for choice in found.choices:
        layer = layers.setdefault(choice.layer, [(32 * choice.numel, choice.float_bytes, 0.0)])
        layer.append((choice.code_bits, choice.bytes, max(choice.cost, 0.0)))
    return [tuple(map(sum, zip(*picked))) for picked in itertools.product(*layers.values())]  # type: ignore[misc]


@pytest.mark.parametrize("seed", range(4))
def test_allocation_is_the_best_there_is(seed: int) -> None:
    found = synthetic(seed)
    every = combinations(found)
    numel = sum({choice.layer: choice.numel for choice in found.choices}.values())
    for bits in ("2.9", "3.5", "4.25", "6", "9.1"):
        got = found.predict(lq.allocate(found, f"{bits} bits"))
        assert got.bits <= float(bits)
        assert got.cost == pytest.approx(min(cost for codes, _, cost in every if codes <= float(bits) * numel))
        if not any(8 * size <= float(bits) * numel and cost < math.inf for _, size, cost in every):
            with pytest.raises(ValueError, match="no choice is that small"):
                lq.allocate(found, f"{bits} bits", overhead=True)
            continue
        with_scales = found.predict(lq.allocate(found, f"{bits} bits", overhead=True))
        assert 8 * with_scales.bytes <= float(bits) * numel
        assert with_scales.cost == pytest.approx(min(cost for _, size, cost in every if 8 * size <= float(bits) * numel))
        in_bytes = found.predict(lq.allocate(found, int(float(bits) * numel / 8)))
        assert in_bytes == with_scales
    for drop in (0.05, 0.3, 1.0):
        got = found.predict(lq.allocate(found, max_drop=drop))
        assert got.cost <= drop
        assert got.bytes == min(size for _, size, cost in every if cost <= drop)


def test_more_bits_never_cost_more_even_when_states_are_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    found = synthetic(7, layers=12)
    totals = []
    for states in (2**14, 200):
        monkeypatch.setattr(sys.modules["lightning_quant.allocate"], "MAX_STATES", states)
        made = [found.predict(lq.allocate(found, f"{bits / 4} bits")) for bits in range(14, 60)]
        assert all(made.bits <= bits / 4 for made, bits in zip(made, range(14, 60)))
        assert all(one.cost >= two.cost for one, two in itertools.pairwise(made))
        totals.append(sum(one.cost for one in made))
    assert totals[0] <= totals[1] < 1.1 * totals[0]


def test_ignored_layers_stay_float_and_do_not_count() -> None:
    found = synthetic(1)
    recipe = lq.allocate(found, "4 bits", ignore=["l0", "re:l[12]$"])
    assert [recipe.schemes[name] for name in ("l0", "l1", "l2")] == [None] * 3
    kept = {choice.layer: choice for choice in found.choices if choice.layer in ("l3", "l4")}
    used = sum((recipe.schemes[name].weight.bits if recipe.schemes[name] else 32) * kept[name].numel for name in kept)
    assert used <= 4 * sum(choice.numel for choice in kept.values())
    with pytest.warns(UserWarning, match="'nothing' matches no layer"):
        lq.allocate(found, "6 bits", ignore="nothing")
    with pytest.raises(ValueError, match="leaves no layer"):
        lq.allocate(found, "4 bits", ignore="Linear")


def test_a_recipe_names_each_layer_alone() -> None:
    found = synthetic(2)
    odd = {"l0": "a[0]", "l1": "Linear", "l2": "b?", "l3": "b.1", "l4": "b"}
    renamed = []
    for choice in found.choices:
        name = odd[choice.layer]
        renamed.append(replace(choice, layer=name, schemes={name: choice.schemes[choice.layer]}))
    for bits in ("3 bits", "5 bits"):
        plain, recipe = lq.allocate(found, bits), lq.allocate(replace(found, choices=tuple(renamed)), bits)
        assert recipe.lookup("b1", ["Linear"]) == (None, None)
        assert [recipe.lookup(name, ["Linear"])[0] for name in odd.values()] == [plain.schemes[name] for name in odd]
        assert recipe.edges is None


def test_a_module_that_is_the_whole_model() -> None:
    net = nn.Linear(64, 64)
    found = lq.sensitivity(net, ["w4a16", "w8a16"], batches=[torch.randn(8, 64)])
    assert "(root)" in str(found)
    assert lq.quantize(net, lq.allocate(found, "5 bits")).scheme.weight.bits == 4


def test_observers_and_algorithms_are_kept() -> None:
    given = {"observer": "percentile", "observer_options": {"percentile": 99.0}, "algorithms": ["gptq"]}
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    data = [torch.randn(16, 64)]
    found = lq.sensitivity(net, [lq.Recipe("w8a8", **given), lq.Recipe("w4a16", **given)], batches=data)
    recipe = lq.allocate(found, "6 bits")
    assert (recipe.observer, recipe.observer_options, recipe.algorithms) == ("percentile", {"percentile": 99.0}, ("gptq",))
    assert lq.allocate(found, "6 bits", algorithms=[]).algorithms == ()
    other = lq.sensitivity(net, [lq.Recipe("w8a16", algorithms=["gptq"]), "w4a16"], batches=data)
    with pytest.raises(ValueError, match="different algorithms"):
        lq.allocate(other, "6 bits")
    assert lq.allocate(other, "6 bits", algorithms="gptq").algorithms == ("gptq",)
    with pytest.raises(ValueError, match="differ in observer"):
        lq.sensitivity(net, [lq.Recipe("w8a8", **given), "w4a16"], batches=data)


def test_a_mix_beats_uniform_bits(mlp: Mlp) -> None:
    plant(mlp.net[0], mlp.net[2])
    found = lq.sensitivity(mlp, WIDTHS, datamodule=Digits(), by="sqnr")
    recipe = lq.allocate(found, "3.5 bits")
    mixed = mean_loss(lq.quantize(mlp, recipe))
    assert found.predict(recipe).bits <= 3.5
    names, halves = [f"net.{index}" for index in (0, 2, 4, 6)], []
    for half in random.Random(0).sample(list(itertools.combinations(names, 2)), 4):
        halves.append(mean_loss(lq.quantize(mlp, lq.Recipe("w3a16", schemes=dict.fromkeys(half, "w4a16")))))
    assert mixed < mean_loss(lq.quantize(mlp, "w3a16"))
    assert mixed < sum(halves) / len(halves)
    # the better predicted, the better measured, at the ends at least
    assert found.predict("w2a16").cost > found.predict(recipe).cost > found.predict("w8a16").cost


# --- a metric -------------------------------------------------------------------------------------------------------


class Counts(L.Callback):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.seen.append("validated")


def test_a_metric_keeps_the_trainers_state(trained: Classifier) -> None:
    counts, data = Counts(), Digits()
    mine = trainer(1, counts)
    logged = mine.validate(trained, datamodule=data, verbose=False)[0]["accuracy"]

    def state() -> list[Any]:
        kept = [mine.state.fn, mine.state.status, dict(mine.callback_metrics), mine.callbacks, mine.limit_val_batches]
        return [*kept, mine.datamodule, mine.lightning_module, [*mine.loggers]]

    before = state()
    trained.seen.clear()
    found = lq.sensitivity(trained, ["w2a16", "w8a8"], trainer=mine, by="accuracy", metric_mode="max")
    assert state() == before
    assert mine.lightning_module is trained
    assert mine.datamodule is data
    assert counts.seen == ["validated"]
    assert trained.seen == []
    assert found.baseline == pytest.approx(logged)
    choice = found.layers()["net.conv1"][0]
    alone = lq.quantize(trained, only("net.conv1", "w2a16"))
    got = trainer().validate(alone, datamodule=data, verbose=False)[0]["accuracy"]
    assert choice.cost == pytest.approx(logged - got, abs=2 / 500)


# --- files, plots, errors -------------------------------------------------------------------------------------------


def test_json_and_back(tmp_path: Path) -> None:
    found = synthetic(3)
    assert any(math.isinf(choice.cost) for choice in found.choices)
    found.to_json(tmp_path / "found.json")
    assert "Infinity" not in (tmp_path / "found.json").read_text()
    again = Sensitivity.from_json(tmp_path / "found.json")
    assert again == found
    assert lq.allocate(again, "4 bits") == lq.allocate(found, "4 bits")
    with pytest.raises(ValueError, match="does not exist"):
        Sensitivity.from_json(tmp_path / "no.json")
    (tmp_path / "bad.json").write_text("[1]")
    with pytest.raises(ValueError, match="not written by"):
        Sensitivity.from_json(tmp_path / "bad.json")


def test_plot(mlp: Mlp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    inputs = [batch[0] for batch in val_batches()]
    found = lq.sensitivity(mlp, WIDTHS, batches=inputs)
    figure = lq.plot_sensitivity(found, tmp_path / "found.png")
    assert (tmp_path / "found.png").stat().st_size > 10_000
    curve, bars = figure.axes
    lines = {line.get_label(): line.get_xydata() for line in curve.lines}
    assert list(lines) == ["best mix", *(f"{name} everywhere" for name in WIDTHS)]
    for name in WIDTHS:
        bits, decibels = lines[f"{name} everywhere"][0]
        assert decibels == pytest.approx(-10 * math.log10(found.predict(name).cost))
        reached = max(point[1] for point in lines["best mix"] if point[0] <= bits)
        assert reached >= decibels - 1e-9
    assert [label.get_text() for label in bars.get_yticklabels()] == list(found.layers())
    assert sorted(bar.get_width() for bar in bars.patches) == pytest.approx(sorted(choice.cost for choice in found.choices))
    assert len(lq.plot_sensitivity(synthetic(3, layers=60)).axes[1].get_yticks()) == 40
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="needs matplotlib"):
        lq.plot_sensitivity(found)


@pytest.mark.parametrize(
    ("budget", "told"),
    [
        ({}, "give one of the two"),
        ({"budget": "4 bits", "max_drop": 0.1}, "give one of the two"),
        ({"budget": "4"}, "mean bits a weight as text"),
        ({"budget": 4.0}, "mean bits a weight as text"),
        ({"budget": "1.5 bits"}, r"take from [34].* bits a weight, [\d,]+ bytes to 32 bits a weight, [\d,]+ bytes"),
        ({"budget": 10}, "no choice is that small"),
        ({"budget": "32 bits"}, "every layer would stay float"),
        ({"max_drop": -1.0}, "the smallest possible is 0"),
        ({"max_drop": math.nan}, "the smallest possible is 0"),
    ],
)
def test_budgets_that_are_refused(budget: dict[str, Any], told: str) -> None:
    found = synthetic(5)
    costly = []
    for choice in found.choices:
        costly.append(replace(choice, cost=math.inf if choice.recipe == "w2a16" else abs(choice.cost) + 0.1))
    with pytest.raises(ValueError, match=told):
        lq.allocate(replace(found, choices=tuple(costly)), **budget)


def test_what_is_refused(mlp: Mlp) -> None:
    data = [torch.randn(4, 64)]
    for arguments, told in [
        ({"recipes": "w4a16"}, "give a list of recipes"),
        ({"recipes": []}, "recipes is empty"),
        ({"recipes": ["w5"]}, "unknown recipe 'w5'"),
        ({"by": "accuracy"}, "metric_mode='max' or 'min'"),
        ({"metric_mode": "max"}, "only for a metric"),
        ({"by": "accuracy", "metric_mode": "max"}, "no batches or forward"),
        ({"by": "loss"}, "Tensor holds no loss"),
        ({"batches": None}, "costs are measured on data"),
        ({"batches": []}, "got no batch"),
        ({"calibration_batches": 0}, "must be a positive int"),
        ({"forward": lambda model, batch: model(batch).argmax(1)}, "holds no float tensor"),
        ({"forward": lambda model, batch: 0 * model(batch)}, "zero or not finite"),
        ({"forward": lambda model, batch: model(batch).mean() * math.nan, "by": "loss"}, "loss is nan"),
    ]:
        with pytest.raises(ValueError, match=told):
            lq.sensitivity(mlp, **{"recipes": ["w4a16"], "batches": data, **arguments})
    for arguments, told in [
        ({"by": "speed", "metric_mode": "max"}, "no such metric; it logs val_loss, accuracy"),
        ({"forward": lambda model, batch: model(batch[0]), "by": "loss"}, "holds no loss"),
    ]:
        with pytest.raises(ValueError, match=told):
            lq.sensitivity(mlp, ["w4a16"], datamodule=Digits(), **arguments)
    with pytest.raises(ValueError, match="no LightningModule with a validation_step"):
        lq.sensitivity(mlp.net, ["w4a16"], dataloaders=data, by="accuracy", metric_mode="max")
    with pytest.raises(ValueError, match="packed already"):
        lq.sensitivity(lq.quantize(mlp, "w4a16"), ["w4a16"], batches=data)
    with pytest.raises(ValueError, match=r"net.0: .* was not measured"):
        lq.sensitivity(mlp, ["w4a16"], batches=data).predict(only("net.0", "w8a16"))
    assert type(mlp) is Mlp
