from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from lightning_quant.nn import QMODULES
from lightning_quant.nn.base import QuantizedModule
from lightning_quant.plan import plan_model
from lightning_quant.recipe import Recipe
from lightning_quant.spec import PRESETS
from lightning_quant.surgery import (
    convert,
    fake_modules,
    get_info,
    is_packed,
    is_prepared,
    packed_modules,
    prepare,
)
from tests.helpers import assert_close, assert_same_state, calibrate


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(10, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3))


def conv_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def quantized(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, QuantizedModule)}


class Language(nn.Module):
    """An embedding, a body and an output head, tied or not."""

    def __init__(self, tied: bool, head: str = "lm_head") -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(20, 8), nn.Linear(8, 8)
        self.head_name = head
        self.add_module(head, nn.Linear(8, 20, bias=False))
        if tied:
            self.get_submodule(head).weight = self.embed.weight

    def forward(self, index: Tensor) -> Tensor:
        return self.get_submodule(self.head_name)(self.body(self.embed(index)).relu())


class WithGetter(Language):
    def __init__(self) -> None:
        super().__init__(tied=False, head="decoder")

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder


class Experts(nn.Module):
    """A weight of its own, in three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.gate_up.sum(0)


INDEX = torch.tensor([[1, 2, 3], [4, 5, 19]])


# --- what is skipped ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "skipped"),
    [
        ({"scheme": "w8a16", "ignore": ["0"]}, {"0": "ignored by '0'"}),
        ({"scheme": "w8a16", "ignore": ["re:[02]"]}, {"0": "ignored by 're:[02]'", "2": "ignored by 're:[02]'"}),
        ({"scheme": "w8a16", "schemes": {"2": None}}, {"2": "left in float by '2'"}),
        ({"schemes": {"0": "w8a16"}}, {"2": "no default scheme", "4": "no default scheme"}),
        ({"scheme": "w8a16", "schemes": {"0": "w4a16"}, "ignore": ["0"]}, {"0": "ignored by '0'"}),
    ],
)
def test_skipped_modules_have_a_reason(recipe, skipped):
    model = prepare(mlp(), recipe)
    found = get_info(model).skipped
    assert set(found) == set(skipped)
    assert all(reason in found[name] for name, reason in skipped.items())
    assert quantized(model) == {"0", "2", "4"} - set(skipped)


@pytest.mark.parametrize(
    ("build", "name", "reason"),
    [
        (Experts, "0", "no quantized Experts (gate_up)"),
        (lambda: nn.RNN(8, 8), "0", "no quantized RNN"),
        (lambda: nn.Bilinear(8, 8, 8), "0", "no quantized Bilinear (weight)"),
        (lambda: nn.Embedding(20, 8), "0", "unless a pattern of the recipe names it"),
        (lambda: nn.EmbeddingBag(20, 8), "0", "unless a pattern of the recipe names it"),
        (lambda: parametrizations.weight_norm(nn.Linear(8, 8)), "0", "remove_parametrizations"),
        (lambda: parametrizations.orthogonal(nn.Linear(8, 8)), "0", "remove_parametrizations"),
        (lambda: nn.utils.weight_norm(nn.Linear(8, 8)), "0", "weight_norm"),
        (lambda: nn.utils.weight_norm(nn.LSTM(8, 8), "weight_ih_l0"), "0", "weight_norm"),
    ],
    ids=["experts", "rnn", "bilinear", "table", "bag", "weight-norm", "orthogonal", "old-weight-norm", "lstm-old-weight-norm"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_unsupported_modules_have_a_reason(build, name, reason):
    model = prepare(nn.Sequential(build(), nn.Linear(8, 3)), "w8a16")
    assert reason in get_info(model).skipped[name]
    assert quantized(model) == {"1"}


@pytest.mark.parametrize(
    ("options", "reason"), [({"max_norm": 1.0}, "max_norm"), ({"sparse": True}, "sparse gradients")], ids=["max_norm", "sparse"]
)
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_tables_that_cannot_be_quantized(kind, options, reason):
    model = nn.Sequential(kind(20, 8, **options), nn.Linear(8, 3))
    prepare(model, {"scheme": "w8a16", "schemes": {"0": "w8a16"}})
    assert reason in get_info(model).skipped["0"]


def test_pruned_modules_are_quantized_as_pruned():
    model, x = mlp(), torch.randn(5, 10)
    prune.l1_unstructured(model[0], "weight", 0.5)
    prepare(model, "w8a16")
    calibrate(model, lambda: model(x))
    assert "0" in quantized(model)
    packed = convert(model)
    assert_close(packed(x), model(x))
    assert (packed[0].weight == 0).float().mean() >= 0.5


def test_modules_without_a_shape_raise():
    with pytest.raises(ValueError, match="1: its weight has no shape yet"):
        prepare(nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(3)), "w8a16")


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [("head", "'body.lm_head'"), ("block.fc1", "'blocks.fc1'"), ("re:nothing", None), ("Conv2d", None)],
)
def test_a_pattern_that_matches_nothing_warns(pattern, hint):
    model = nn.ModuleDict({"blocks": nn.ModuleDict({"fc1": nn.Linear(3, 3)}), "body": nn.ModuleDict({"lm_head": nn.Linear(3, 3)})})
    for recipe in ({"scheme": "w8a16", "ignore": [pattern]}, {"scheme": "w8a16", "schemes": {pattern: "w4a16"}}):
        with pytest.warns(UserWarning, match="matches no module") as caught:
            prepare(copy.deepcopy(model), recipe)
        assert len(caught) == 1
        text = str(caught[0].message)
        assert repr(pattern) in text
        assert (hint in text) if hint else ("did you mean" not in text)


def test_patterns_that_match_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(mlp(), {"scheme": "w8a16", "ignore": ["0", "ReLU"], "schemes": {"re:[24]": "w4a16"}})


@pytest.mark.parametrize(
    ("build", "recipe", "told"),
    [
        (mlp, {"scheme": "w8a16", "ignore": ["*"]}, "ignored by '*'"),
        (mlp, {}, "no default scheme"),
        (lambda: nn.Sequential(nn.ReLU()), "w8a16", "no module has a weight matrix"),
        (lambda: nn.Sequential(Experts()), "w8a16", "gate_up"),
        (lambda: nn.Sequential(nn.Embedding(3, 3)), "w8a16", "unless a pattern"),
    ],
)
def test_a_recipe_that_quantizes_nothing_raises(build, recipe, told):
    model = build()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="quantizes nothing") as error:
        prepare(model, recipe)
    assert told in str(error.value)
    assert [type(module) for module in model.modules()] == kinds


def test_an_unknown_method_lists_the_valid_ones():
    model = mlp()
    with pytest.raises(ValueError, match=r"'adaround'.*ste, lsq"):
        prepare(model, "w8a16", method="adaround")
    assert not is_prepared(model)


def test_a_model_is_prepared_and_packed_once():
    model = prepare(mlp(), "w8a16")
    with pytest.raises(ValueError, match="prepared for quantization already"):
        prepare(model, "w8a16")
    packed = convert(calibrate(model, lambda: None))
    with pytest.raises(ValueError, match="packed already"):
        prepare(packed, "w8a16")
    for other in (packed, mlp()):
        with pytest.raises(ValueError, match="prepare the model first"):
            convert(other)


def test_planning_changes_nothing():
    model = mlp()
    state, kinds = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    plan = plan_model(model, Recipe("w4a4", ignore=["2"]))
    assert [match.name for match in plan.matches] == ["0", "4"]
    assert plan.skipped == {"2": "ignored by '2'"}
    assert [type(module) for module in model.modules()] == kinds
    assert_same_state(model.state_dict(), state)
    assert get_info(model) is None


# --- heads, ties, edges ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [lambda: Language(False), lambda: Language(True, "out"), WithGetter])
def test_output_heads_stay_float_unless_named(build):
    model = build()
    head = model.head_name
    prepare(model, "w8a16")
    assert quantized(model) == {"body"}
    assert "output head" in get_info(model).skipped[head]
    model = prepare(build(), {"scheme": "w8a16", "schemes": {head: "w4a16", "embed": "w4a16"}})
    assert quantized(model) == {"body", head, "embed"}


def test_a_tied_weight_that_both_readers_quantize_is_packed_once():
    model = Language(tied=True)
    prepare(model, {"scheme": "w8a16", "schemes": {"embed": "w4a16", "lm_head": "w4a16"}})
    assert model.embed.weight is model.lm_head.weight
    calibrate(model, lambda: model(INDEX))
    packed = convert(model)
    assert packed.embed.weight_packed is packed.lm_head.weight_packed
    assert packed.embed.weight_scale is packed.lm_head.weight_scale
    assert_close(packed(INDEX), model(INDEX))
    copied = copy.deepcopy(packed)
    assert copied.embed.weight_packed is copied.lm_head.weight_packed


@pytest.mark.parametrize("name", ["embed", "lm_head"])
def test_a_tied_weight_that_one_reader_quantizes_is_noted(name):
    other = {"embed": "lm_head", "lm_head": "embed"}[name]
    model = Language(tied=True)
    prepare(model, {"schemes": {name: "w4a16"}})
    assert quantized(model) == {name}
    assert f"also read by {other!r}, which stays in float" in get_info(model).notes[name]
    calibrate(model, lambda: model(INDEX))
    packed = convert(model)
    assert packed.get_submodule(other).weight.dtype == torch.float32
    assert_close(packed(INDEX), model(INDEX))


def test_a_tied_weight_of_two_schemes_raises():
    model = Language(tied=True)
    with pytest.raises(ValueError, match=r"share one weight.*'embed'.*'lm_head'"):
        prepare(model, {"schemes": {"embed": "w4a16", "lm_head": "w8a16"}})
    assert not is_prepared(model)


def test_untied_weights_are_packed_apart():
    model = Language(tied=False)
    prepare(model, {"schemes": {"embed": "w4a16", "lm_head": "w8a16"}})
    packed = convert(calibrate(model, lambda: model(INDEX)))
    assert packed.embed.weight_packed is not packed.lm_head.weight_packed


def test_one_module_under_two_names_stays_one():
    shared = nn.Linear(10, 10)
    model, x = nn.Sequential(shared, nn.ReLU(), shared), torch.randn(3, 10)
    prepare(model, "w8a8")
    assert model[0] is model[2]
    packed = convert(calibrate(model, lambda: model(x)))
    assert packed[0] is packed[2]
    assert_close(packed(x), model(x))


@pytest.mark.parametrize("preset", PRESETS)
def test_edges(preset):
    model = prepare(mlp(), preset)
    edges = PRESETS[preset].edges
    inner, outer = PRESETS[preset].scheme, PRESETS[edges or preset].scheme
    assert [model[index].scheme for index in (0, 2, 4)] == [outer, inner, outer]
    notes = get_info(model).notes
    assert ("first layer" in notes.get("0", ""), "last layer" in notes.get("4", "")) == (bool(edges), bool(edges))


def test_edges_may_be_turned_off_named_and_are_not_for_two_layers():
    inner = PRESETS["w4a4"].scheme
    model = prepare(mlp(), Recipe("w4a4", edges=None))
    assert {model[index].scheme for index in (0, 2, 4)} == {inner}
    model = prepare(mlp(), Recipe("w4a4", schemes={"0": "w8a16"}))
    assert [model[index].scheme for index in (0, 2, 4)] == [PRESETS["w8a16"].scheme, inner, PRESETS["w8a8"].scheme]
    model = prepare(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "w4a4")
    assert {module.scheme for module in model} == {inner}


class Backwards(nn.Module):
    """Registered in another order than it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.middle, self.first = nn.Linear(4, 2), nn.Linear(4, 4), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


class Forking(Backwards):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if float(x.sum()) > -1e9 else -x)


def test_edges_are_the_first_and_last_to_run():
    model = prepare(Backwards(), "w4a4")
    wide, narrow = PRESETS["w8a8"].scheme, PRESETS["w4a4"].scheme
    assert (model.first.scheme, model.middle.scheme, model.last.scheme) == (wide, narrow, wide)
    model, x = Forking(), torch.randn(2, 3)
    prepare(model, "w4a4", call=lambda: model(x))
    assert (model.first.scheme, model.middle.scheme, model.last.scheme) == (wide, narrow, wide)


# --- attention ------------------------------------------------------------------------------------------------------


def test_an_ignored_attention_keeps_its_out_proj_float():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 8)})
    x = torch.randn(3, 2, 8)
    want = model["attn"](x, x, x)[0]
    prepare(model, {"scheme": "w2a16", "ignore": ["attn"]})
    assert quantized(model) == {"fc"}
    assert "without calling it" in get_info(model).skipped["attn.out_proj"]
    calibrate(model, lambda: None)
    packed = convert(model)
    assert torch.equal(packed["attn"](x, x, x)[0], want)


def test_an_attention_may_keep_only_its_out_proj_float():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    x = torch.randn(3, 2, 8)
    prepare(model, {"scheme": "w4a16", "ignore": ["*.out_proj"]})
    assert quantized(model) == {"attn"}
    calibrate(model, lambda: None)
    packed = convert(model)
    assert not isinstance(packed["attn"].out_proj, QuantizedModule)
    assert_close(packed["attn"](x, x, x)[0], model["attn"](x, x, x)[0])


# --- identity -------------------------------------------------------------------------------------------------------


def networks() -> dict[str, tuple[nn.Module, Any]]:
    return {
        "mlp": (mlp(), torch.randn(5, 10)),
        "conv": (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)),
            torch.randn(5, 3, 6, 6),
        ),
        "language": (Language(True), INDEX),
    }


@pytest.mark.parametrize("method", ["ste", "lsq"])
@pytest.mark.parametrize("name", networks())
def test_prepare_keeps_identity(name, method):
    model, x = networks()[name]
    model.eval()
    ran: list[str] = []
    for key, module in model.named_modules():
        module.register_forward_hook(lambda *args, key=key: ran.append(key))
    ids = {key: id(module) for key, module in model.named_modules()}
    parameters = {key: id(value) for key, value in model.named_parameters()}
    state = copy.deepcopy(model.state_dict())
    model(x)
    wanted, ran[:] = list(ran), []
    assert prepare(model, "w8a8", method=method) is model
    assert {key: id(dict(model.named_modules())[key]) for key in ids} == ids
    assert [key for key, _ in model.named_parameters() if key in parameters] == list(parameters)
    assert {key: id(dict(model.named_parameters())[key]) for key in parameters} == parameters
    assert_same_state({key: model.state_dict()[key] for key in state}, state)
    model(x)
    assert [key for key in ran if key in wanted] == wanted
    if method == "ste":
        assert [key for key, _ in model.named_parameters()] == list(parameters)


@pytest.mark.parametrize("method", ["ste", "lsq"])
@pytest.mark.parametrize("recipe", ["w8a8", "w8a16", "w8a8-dynamic", "w4a4"])
@pytest.mark.parametrize("name", networks())
def test_a_float_checkpoint_loads_strictly_into_a_prepared_model(name, recipe, method):
    model, x = networks()[name]
    other = networks()[name][0]
    prepare(model, recipe, method=method)
    model.load_state_dict(other.state_dict(), strict=True)
    assert_close(model.eval()(x), other.eval()(x), 2e-6)


@pytest.mark.parametrize("name", networks())
@pytest.mark.parametrize("method", ["ste", "lsq"])
def test_convert_leaves_the_prepared_model_alone(name, method):
    model, x = networks()[name]
    prepare(model, "w8a8", method=method)
    calibrate(model, lambda: model(x))
    model.train()
    state, want = copy.deepcopy(model.state_dict()), copy.deepcopy(model).eval()(x)
    ids = [id(module) for module in model.modules()]
    packed = convert(model)
    assert packed is not model
    assert is_packed(packed)
    assert not is_prepared(packed)
    assert not packed.training
    assert model.training
    assert is_prepared(model)
    assert [id(module) for module in model.modules()] == ids
    assert not set(ids) & {id(module) for module in packed.modules()}
    assert not {value.data_ptr() for value in model.parameters()} & {value.data_ptr() for value in packed.parameters()}
    for value in packed.parameters():
        value.data.zero_()
    assert_same_state(model.state_dict(), state)
    assert torch.equal(model.eval()(x), want)


def test_a_converted_model_does_not_share_hooks_or_attributes_with_the_prepared_one():
    model, x = mlp(), torch.randn(2, 10)
    ran: list[str] = []
    model[0].register_forward_hook(lambda *args: ran.append("kept"))
    model[0].extra = {"a": [1]}
    prepare(model, "w8a16")
    calibrate(model, lambda: model(x))
    packed = convert(model)
    ran.clear()
    packed[0].register_forward_hook(lambda *args: ran.append("new"))
    packed[0].register_forward_pre_hook(lambda *args: ran.append("new"))
    packed[0].extra["a"].append(2)
    packed(x)
    assert sorted(ran) == ["kept", "new", "new"]
    ran.clear()
    model(x)
    assert ran == ["kept"]
    assert model[0].extra == {"a": [1]}


def test_convert_without_data_names_the_tensor():
    model = prepare(mlp(), "w8a8")
    with pytest.raises(RuntimeError, match=r"0\.input: no range was ever observed"):
        convert(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_a_copy_folds_its_own_norm(copied):
    model, x = networks()["conv"]
    prepare(model, "w8a8")
    calibrate(model, lambda: model(x))
    other = copied(model)
    assert other[0].norm is other[1]
    assert other[0].norm is not model[1]
    want = convert(model)(x)
    with torch.no_grad():
        other[1].bias += 1
    assert torch.equal(convert(model)(x), want)
    assert not torch.allclose(convert(other)(x), want)
    assert get_info(other) == get_info(model)


def test_a_quantizable_root():
    model, x = nn.Linear(10, 3), torch.randn(4, 10)
    prepare(model, "w8a8")
    calibrate(model, lambda: model(x))
    packed = convert(model)
    assert isinstance(packed, QMODULES[nn.Linear].packed)
    assert_close(packed(x), model(x))
    assert get_info(packed).recipe == get_info(model).recipe


def test_info_travels_with_the_model():
    model = prepare(mlp(), Recipe("w8a16", ignore=["0"]), method="lsq")
    packed = convert(calibrate(model, lambda: None))
    for one in (model, packed, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        info = get_info(one)
        assert info.recipe == Recipe("w8a16", ignore=["0"])
        assert info.method == "lsq"
        assert info.skipped == {"0": "ignored by '0'"}
    assert set(fake_modules(model)) == set(packed_modules(packed)) == {"2", "4"}


def test_frozen_weights_stay_frozen():
    model = mlp()
    model[0].requires_grad_(False)
    prepare(model, "w8a8")
    assert not model[0].weight.requires_grad
    assert model[2].weight.requires_grad


def test_the_default_observers():
    def observers(recipe: Recipe, **options: Any) -> tuple[str, str]:
        fake = prepare(mlp(), recipe, **options)[2]
        return type(fake.weight_fake_quant.observer).__name__, type(fake.input_fake_quant.observer).__name__

    assert observers(Recipe("w8a8"), training=True) == ("MinMaxObserver", "MovingAverageObserver")
    assert observers(Recipe("w8a8"), training=False) == ("MinMaxObserver", "MinMaxObserver")
    assert observers(Recipe("w4a4"), training=False) == ("MinMaxObserver", "MSEObserver")
    assert observers(Recipe("w4a4"), training=True, method="lsq") == ("MSEObserver", "MSEObserver")
    chosen = Recipe("w8a8", observer="percentile", observer_options={"percentile": 99}, weight_observer="mse")
    assert observers(chosen) == ("MSEObserver", "PercentileObserver")
    with pytest.raises(ValueError, match="unknown observer 'median'"):
        prepare(mlp(), Recipe("w8a8", observer="median"))
