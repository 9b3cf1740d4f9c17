"""Experts in fused 3-D parameters: taken apart for post-training quantization, left alone in training, never skipped in silence."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_quant as lq
from lightning_quant.nn.base import Unsupported
from lightning_quant.nn.experts import UnfusedExperts, find_layout, holds_experts, unfuse
from lightning_quant.spec import QuantSpec
from lightning_quant.surgery import fake_modules, packed_modules, prepare
from tests.digits import trainer
from tests.helpers import assert_close, own_activation, own_codes, own_qparams, own_values, segments
from tests.test_language_models import Causal

transformers = pytest.importorskip("transformers")

VOCABULARY, EXPERTS, HIDDEN = 60, 6, 48
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "num_experts_per_tok": 2,
}
QWEN = {"num_experts": EXPERTS, "moe_intermediate_size": 40, "decoder_sparse_step": 1}


def build(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **options})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for part in model.modules():
        if holds_experts(part):  # biases start at 0, and weights so small that no gate is ever clamped
            for value in part.parameters():
                nn.init.normal_(value, std=0.3)
    return model


def mixtral(**options: Any) -> nn.Module:
    return build("Mixtral", num_local_experts=EXPERTS, **options)


MODELS = {
    "mixtral": mixtral,
    "qwen2_moe": lambda: build("Qwen2Moe", shared_expert_intermediate_size=32, **QWEN),
    "qwen3_moe": lambda: build("Qwen3Moe", head_dim=12, **QWEN),
    "gpt_oss": lambda: build("GptOss", num_local_experts=EXPERTS, head_dim=12),  # transposed, interleaved, with biases
}
EVERY = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
# everything but the experts
REST = ["re:.*(self_attn|shared_expert)"]
LAYERS = [f"{index}.{name}" for index in range(EXPERTS) for name in ("gate_up_proj", "down_proj")]


def tokens(count: int = 4, length: int = 12) -> Tensor:
    return torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(1))


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: part for name, part in model.named_modules() if name.endswith(".experts")}


def routed(count: int = 30) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(count, HIDDEN), torch.rand(count, EXPERTS).topk(2).indices, torch.rand(count, 2)


def reached(model: nn.Module, name: str, batch: Tensor) -> set[int]:
    seen: set[int] = set()
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.update(args[1].flatten().tolist()))
    with torch.no_grad():
        model(batch)
    hook.remove()
    return seen


def on_grid(weight: Tensor, spec: QuantSpec) -> Tensor:
    """A matrix `[out, in]` quantized and dequantized without the package."""
    flat, values = weight.detach().float().flatten().numpy(), []
    for part in segments(*weight.shape, spec):
        scale, zero_point = own_qparams(flat[part], spec)
        values.append(torch.from_numpy(own_values(own_codes(flat[part], scale, zero_point, spec), scale, zero_point, spec)))
    return torch.cat(values).view(weight.shape)


# --- taken apart ----------------------------------------------------------------------------------------------------


@EVERY
@torch.no_grad()
def test_unfused_is_what_fused_is(make: Any) -> None:
    model = make()
    want = model(tokens()).logits
    for name, fused in list(experts_of(model).items()):
        experts = unfuse(fused)
        assert [path for path, part in experts.named_modules() if isinstance(part, nn.Linear)] == LAYERS
        storages = {value.untyped_storage().data_ptr() for value in fused.parameters()}
        assert {value.untyped_storage().data_ptr() for value in experts.parameters()} == storages
        assert_close(experts(*routed()), fused(*routed()))
        model.set_submodule(name, experts)
    assert_close(model(tokens()).logits, want)


class Fused(nn.Module):
    """Experts as a user may write them."""

    def __init__(self, *, gated: bool = True, limit: float | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.num_experts, self.limit, self.gated = EXPERTS, limit, gated
        first = nn.Parameter(torch.randn(EXPERTS, 40 * (1 + gated), HIDDEN, dtype=dtype) / 7)
        self.register_parameter("gate_up_proj" if gated else "up_proj", first)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 40, dtype=dtype) / 7)
        self.register_parameter("down_proj_bias", None)
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for token, (chosen, weights) in enumerate(zip(top_k_index, top_k_weights)):
            for index, weight in zip(chosen, weights):
                if self.gated:
                    gate, up = F.linear(hidden_states[token], self.gate_up_proj[index]).chunk(2)
                    up = up if self.limit is None else up.clamp(-self.limit, self.limit)
                    values = self.act_fn(gate) * up
                else:
                    values = self.act_fn(F.linear(hidden_states[token], self.up_proj[index]))
                out[token] += weight * F.linear(values, self.down_proj[index])
        return out


class Mixture(nn.Module):
    """A block with a linear router; what is left of transformers' models when their attention is gone."""

    def __init__(self, experts: nn.Module | None = None) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = Fused() if experts is None else experts
        self.head = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        return self.head(self.experts(x, chosen, weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [True, False])
@torch.no_grad()
def test_experts_of_no_library(gated: bool, dtype: torch.dtype) -> None:
    fused, (x, chosen, weights) = Fused(gated=gated, dtype=dtype), routed()
    args = (x.to(dtype), chosen, weights.to(dtype))
    assert_close(unfuse(fused)(*args), fused(*args), 1e-5 if dtype == torch.float32 else 2e-2)


@torch.no_grad()
def test_experts_that_no_token_is_sent_to_do_not_run() -> None:
    experts, ran = unfuse(Fused()), []
    for index in range(EXPERTS):
        experts.get_submodule(f"{index}.down_proj").register_forward_hook(lambda *_, index=index: ran.append(index))
    x, _, weights = routed(3)
    experts(x, torch.tensor([[1, 4], [4, 1], [1, EXPERTS]]), weights)  # an index beyond the last is none
    assert ran == [1, 4]


def test_gradients_reach_the_experts() -> None:
    x, chosen, weights = routed()
    fused = Fused()
    experts = unfuse(fused)
    experts(x, chosen, weights).square().sum().backward()
    fused(x, chosen, weights).square().sum().backward()
    got = torch.stack([experts.get_submodule(f"{index}.down_proj").weight.grad for index in range(EXPERTS)])
    assert_close(got, fused.down_proj.grad)


def test_bf16_model_with_float32_routing() -> None:
    fused = unfuse(Fused(dtype=torch.bfloat16))
    x, chosen, weights = routed()
    assert fused(x.bfloat16(), chosen, weights).dtype == torch.bfloat16


class Batched(Fused):
    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        return hidden_states


def with_scale() -> nn.Module:
    fused = Fused()
    fused.register_parameter("down_proj_scale", nn.Parameter(torch.ones(EXPERTS)))
    return fused


def of_other_shape() -> nn.Module:
    fused = Fused()
    fused.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 41))
    return fused


def spread() -> nn.Module:
    fused = Fused()
    fused._is_expert_parallel = True  # type: ignore[assignment]
    return fused


OTHERS = {
    "another gate": (lambda: Fused(limit=0.5), "Fused computes something else"),
    "another call": (Batched, r"its forward takes \(hidden_states\)"),
    "another parameter": (with_scale, "its parameters are gate_up_proj, down_proj, down_proj_scale"),
    "another shape": (of_other_shape, r"its gate_up_proj is \[6, 80, 48\], its down_proj \[6, 48, 41\]"),
    "expert parallel": (spread, "spread over ranks"),
}


@pytest.mark.parametrize(("make", "reason"), OTHERS.values(), ids=OTHERS)
def test_another_structure_is_listed_with_the_reason(make: Any, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        unfuse(make())
    model = Mixture(make())
    told = lq.summary(lq.quantize(model, "w8a16"))
    assert [row.name for row in told.rows] == ["head"]
    plain = reason.replace("\\", "")
    assert plain in told.skipped["experts"]
    assert "router" in told.skipped["gate"]


def test_experts_that_share_a_parameter_stay_fused() -> None:
    model = nn.Sequential(Mixture(), Mixture())
    model[1].experts.down_proj = model[0].experts.down_proj
    told = lq.quantize(model, "w8a16", dry_run=True)
    assert "share a parameter" in told.skipped["0.experts"]
    assert "share a parameter" in told.skipped["1.experts"]


def test_uninitialised_weights_do_not_matter() -> None:
    fused = Fused()
    nn.init.constant_(fused.down_proj, float("nan"))
    assert isinstance(unfuse(fused), UnfusedExperts)


# --- quantized ------------------------------------------------------------------------------------------------------


@EVERY
@torch.no_grad()
def test_w4a16_is_the_fused_parameter_on_its_grid(make: Any) -> None:
    model = make()
    recipe = lq.Recipe("w4a16", group_size=16, symmetric=False, ignore=REST)
    qmodel = lq.quantize(model, recipe)
    spec, reference = recipe.scheme.weight, copy.deepcopy(model)
    for fused in experts_of(reference).values():
        for value in (fused.gate_up_proj, fused.down_proj):
            for index in range(EXPERTS):
                matrix = value[index].T if fused.is_transposed else value[index]
                rounded = on_grid(matrix, spec).float()
                value[index] = rounded.T if fused.is_transposed else rounded
    want, plain = reference(tokens()).logits, model(tokens()).logits
    assert (want - plain).abs().max() > 1e-2  # rounding shows
    assert_close(qmodel(tokens()).logits, want, 1e-4)


@torch.no_grad()
def test_w8a8_dynamic_against_a_hand_written_mixture() -> None:
    model = mixtral()
    recipe = lq.Recipe("w8a8-dynamic", ignore=REST)
    quantized = lq.quantize(model, recipe).model.layers[1].mlp.experts
    fused, (x, chosen, weights) = model.model.layers[1].mlp.experts, routed()
    ups, downs = ([on_grid(matrix, recipe.scheme.weight) for matrix in value] for value in (fused.gate_up_proj, fused.down_proj))
    want = torch.zeros(x.shape, dtype=torch.float64)

    def rounded(row: Tensor) -> Tensor:
        return own_activation(row[None], recipe.scheme.input, None, None)[0]

    for token in range(len(x)):
        for index, weight in zip(chosen[token].tolist(), weights[token].tolist()):
            gate, up = (ups[index] @ rounded(x[token])).chunk(2)
            want[token] += weight * (downs[index] @ rounded((F.silu(gate) * up).float()))
    # an activation on a rounding tie may fall to either side
    assert_close(quantized(x, chosen, weights), want, 5e-3)


@pytest.mark.parametrize(
    ("name", "recipe"),
    [*((name, recipe) for name in MODELS for recipe in ("w8a8", "w4a16")), *(("mixtral", x) for x in ("w4a4", "nf4", "fp8"))],
)
@torch.no_grad()
def test_quantize_save_and_reload(name: str, recipe: str, tmp_path: Path) -> None:
    make = MODELS[name]
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    qmodel = lq.quantize(model, recipe, [tokens()])
    assert sum(".experts." in name for name in packed_modules(qmodel)) == 2 * len(LAYERS)
    want, got = model(tokens()).logits, qmodel(tokens()).logits
    assert (got - want).norm() / want.norm() < (0.9 if recipe in ("w4a16", "w4a4", "nf4") else 0.4)  # routers change their minds
    # the model given is as it was: still fused, to the bit
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    lq.save_quantized(qmodel, tmp_path)
    skeleton = make()
    again = lq.load_quantized(skeleton, tmp_path)
    assert torch.equal(again(tokens()).logits, got)
    assert str(lq.summary(again)) == str(lq.summary(qmodel))
    assert not any(isinstance(part, UnfusedExperts) for part in skeleton.modules())
    assert torch.equal(copy.deepcopy(again)(tokens()).logits, got)
    assert again.generate(tokens(1), max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 15)


@torch.no_grad()
def test_the_summary_counts_every_expert() -> None:
    model = mixtral()
    planned, told = lq.quantize(model, "w4a16", dry_run=True), lq.summary(lq.quantize(model, "w4a16"))
    assert planned == told
    rows = {row.name: row for row in told.rows}
    assert [name for name in rows if ".experts." in name] == [
        f"model.layers.{layer}.mlp.experts.{name}" for layer in range(2) for name in LAYERS
    ]
    assert told.bytes_before == sum(value.nbytes for value in [*model.parameters(), *model.buffers()])
    assert rows["model.layers.0.mlp.experts.5.down_proj"].bytes_before == HIDDEN * 40 * 4
    assert told.skipped["model.layers.0.mlp.gate"] == "router of a mixture of experts: stays in float"


def test_a_dry_run_leaves_the_model_alone() -> None:
    model = mixtral()
    modules = {name: type(part) for name, part in model.named_modules()}
    parameters = [(name, value.data_ptr(), value._version) for name, value in model.named_parameters()]
    lq.quantize(model, "w8a8", [tokens()], dry_run=True)
    assert {name: type(part) for name, part in model.named_modules()} == modules
    assert [(name, value.data_ptr(), value._version) for name, value in model.named_parameters()] == parameters


# --- recipes --------------------------------------------------------------------------------------------------------


def schemes(recipe: lq.Recipe) -> dict[str, str]:
    told = lq.quantize(mixtral(num_hidden_layers=1), recipe, dry_run=True)
    prefix = "model.layers.0.mlp.experts."
    return {row.name.removeprefix(prefix): row.scheme.split()[1] for row in told.rows if row.name.startswith(prefix)}


@pytest.mark.filterwarnings("error:the recipe's pattern")
def test_patterns_name_experts() -> None:
    one = schemes(lq.Recipe("w8a16", schemes={"*.experts.3.down_proj": "w4a16"}, ignore=["*.experts.5.*"]))
    assert one == {name: "int4" if name == "3.down_proj" else "int8" for name in LAYERS if not name.startswith("5.")}
    whole = schemes(lq.Recipe("w8a16", schemes={"*.experts.2": "w4a16", "MixtralExperts": "w3a16"}))
    assert whole == {name: "int4" if name.startswith("2.") else "int3" for name in LAYERS}
    assert set(schemes(lq.Recipe(schemes={"*.experts": "w4a16"})).values()) == {"int4"}


@pytest.mark.parametrize("pattern", ["*.experts.*", "*.experts", "MixtralExperts", "re:.*experts[.][0-9]+[.]"])
@pytest.mark.filterwarnings("error:the recipe's pattern")
def test_experts_that_all_stay_in_float_stay_fused(pattern: str, tmp_path: Path) -> None:
    model = mixtral()
    qmodel = lq.quantize(model, lq.Recipe("w8a16", ignore=[pattern]))
    for name, experts in experts_of(qmodel).items():
        assert type(experts) is type(model.get_submodule(name))
        assert lq.summary(qmodel).skipped[name] == f"ignored by {pattern!r}"
    lq.save_quantized(qmodel, tmp_path)
    assert_close(lq.load_quantized(mixtral(), tmp_path)(tokens()).logits, qmodel(tokens()).logits)


def test_experts_half_in_float_reload(tmp_path: Path) -> None:
    recipe = lq.Recipe("w4a16", ignore=["*.experts.3.*", "*.gate_up_proj", "*.0.mlp.experts"])
    qmodel = lq.quantize(mixtral(), recipe)
    told = lq.summary(qmodel)
    assert told.skipped["model.layers.1.mlp.experts.3.down_proj"] == "ignored by '*.experts.3.*'"
    assert told.skipped["model.layers.0.mlp.experts"] == "ignored by '*.0.mlp.experts'"
    lq.save_quantized(qmodel, tmp_path)
    skeleton = mixtral()
    before = {name: value.clone() for name, value in skeleton.state_dict().items()}
    nn.init.zeros_(skeleton.model.layers[1].mlp.experts.gate_up_proj)
    again = lq.load_quantized(skeleton, tmp_path)
    assert list(again.state_dict()) == list(qmodel.state_dict())
    assert_close(again(tokens()).logits, qmodel(tokens()).logits)
    storages = {value.untyped_storage().data_ptr() for value in skeleton.parameters()}
    assert not any(value.untyped_storage().data_ptr() in storages for value in again.parameters())
    assert list(before) == list(skeleton.state_dict())


def test_the_last_layer_is_the_last_layer_of_all_experts() -> None:
    told = lq.quantize(mixtral(), "w4a4", [tokens()], dry_run=True)
    edges = {row.name: row.note for row in told.rows if row.note}
    last = [f"model.layers.1.mlp.experts.{index}.down_proj" for index in range(EXPERTS)]
    assert list(edges) == ["model.layers.0.self_attn.q_proj", *last]
    assert all("int8" in row.scheme for row in told.rows if row.name in last)


def test_routers_stay_in_float() -> None:
    for make in MODELS.values():
        skipped = lq.quantize(make(), "w8a16", dry_run=True).skipped
        assert sum(reason == "router of a mixture of experts: stays in float" for reason in skipped.values()) == 2
    model = Mixture()
    assert [row.name for row in lq.quantize(model, "w8a16", dry_run=True).rows] == [*(f"experts.{x}" for x in LAYERS), "head"]
    named = lq.quantize(model, lq.Recipe("w8a16", schemes={"gate": "w8a16"}), dry_run=True)
    assert named.rows[0].name == "gate"  # a linear one, where a pattern asks for it


def test_training_leaves_fused_experts_in_float() -> None:
    model = prepare(mixtral(), "w8a8-dynamic")
    assert not any("experts" in name for name in fake_modules(model))
    assert "post-training quantization (lq.quantize) does them" in lq.summary(model).skipped["model.layers.0.mlp.experts"]
    model = prepare(mixtral(), "w8a8-dynamic", training=False)
    assert sum(".experts." in name for name in fake_modules(model)) == 2 * len(LAYERS)


# --- calibration ----------------------------------------------------------------------------------------------------

FIRST = "model.layers.0.mlp.experts"


@torch.no_grad()
def test_experts_out_of_reach_of_calibration_take_dynamic_activations(tmp_path: Path) -> None:
    model, few = mixtral(), tokens(1, 2)
    hit = reached(model, FIRST, few)
    assert 0 < len(hit) < EXPERTS
    qmodel = lq.quantize(model, "w8a8", [few])
    rows = {row.name: row for row in lq.summary(qmodel).rows}
    for name in LAYERS:
        row = rows[f"{FIRST}.{name}"]
        missed = int(name.partition(".")[0]) not in hit
        assert ("token asym dynamic" in row.scheme) == missed
        assert row.note == ("calibration has not reached it: input dynamic instead of static" if missed else "")
    x, _, weights = routed()
    chosen = torch.tensor(sorted(set(range(EXPERTS)) - hit))[:2].expand(len(x), 2)
    want, got = model.get_submodule(FIRST)(x, chosen, weights), qmodel.get_submodule(FIRST)(x, chosen, weights)
    assert (got - want).norm() / want.norm() < 0.03
    lq.save_quantized(qmodel, tmp_path)
    assert torch.equal(lq.load_quantized(mixtral(), tmp_path)(tokens()).logits, qmodel(tokens()).logits)


@pytest.mark.parametrize("recipe", ["w4a16", "w8a8"])
@torch.no_grad()
def test_gptq_notes_experts_out_of_reach(recipe: str) -> None:
    model, few = mixtral(), tokens(1, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hit = reached(model, FIRST, few)
    qmodel = lq.quantize(model, lq.Recipe(recipe, algorithms=["gptq"]), [few])
    notes = {row.name: row.note for row in lq.summary(qmodel).rows}
    for name in LAYERS:
        missed = int(name.partition(".")[0]) not in hit
        assert ("gptq: rounded to nearest, calibration has not reached it" in notes[f"{FIRST}.{name}"]) == missed
    nearest = lq.quantize(model, recipe, [few]).get_submodule(FIRST)
    for name in LAYERS:
        same = torch.equal(qmodel.get_submodule(f"{FIRST}.{name}").weight_packed, nearest.get_submodule(name).weight_packed)
        assert same == (int(name.partition(".")[0]) not in hit)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_gptq_lowers_the_error_of_experts() -> None:
    model, batch = mixtral(), tokens(16)
    recipe = {"scheme": "w2a16", "ignore": REST}
    want = model(batch).logits
    nearest, rounded = (
        (lq.quantize(model, lq.Recipe(**recipe, algorithms=algorithms), [batch])(batch).logits - want).norm()
        for algorithms in ([], ["gptq"])
    )
    assert rounded < 0.9 * nearest


# --- on disk --------------------------------------------------------------------------------------------------------


def test_a_skeleton_on_the_meta_device(tmp_path: Path) -> None:
    qmodel = lq.quantize(Mixture(), "w4a16")
    lq.save_quantized(qmodel, tmp_path)
    with torch.device("meta"):
        hollow = Mixture()
    x = torch.randn(5, HIDDEN)
    assert torch.equal(lq.load_quantized(hollow, tmp_path)(x), qmodel(x))


def test_a_module_under_two_names_stays_one(tmp_path: Path) -> None:
    def twice() -> nn.Module:
        block = Mixture()
        return nn.Sequential(block, block)

    qmodel = lq.quantize(twice(), "w8a8", [torch.randn(20, HIDDEN)])
    assert qmodel[0].experts is qmodel[1].experts
    lq.save_quantized(qmodel, tmp_path)
    again = lq.load_quantized(twice(), tmp_path)
    assert again[0].experts is again[1].experts
    x = torch.randn(5, HIDDEN)
    assert torch.equal(again(x), qmodel(x))


def test_another_number_of_experts_is_told(tmp_path: Path) -> None:
    lq.save_quantized(lq.quantize(mixtral(), "w8a16"), tmp_path)
    with pytest.raises(ValueError, match=r"it has no module 'model.layers.0.mlp.experts.4.gate_up_proj'"):
        lq.load_quantized(build("Mixtral", num_local_experts=4), tmp_path)
    with pytest.raises(ValueError, match="was not made from this MixtralForCausalLM"):
        lq.load_quantized(build("Mixtral", num_local_experts=EXPERTS + 2), tmp_path)


class Language(Causal):
    def __init__(self) -> None:
        super().__init__(mixtral())

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("loss", self.training_step(batch, batch_idx))


def test_in_a_trainer(tmp_path: Path) -> None:
    model, host, data = Language(), trainer(), DataLoader(tokens(), 2)
    qmodel = host.quantize(model, dataloaders=data, recipe="w8a8")
    assert any(isinstance(part, UnfusedExperts) for part in qmodel.modules())
    assert find_layout(model.net.model.layers[0].mlp.experts).count == EXPERTS
    host.validate(qmodel, data, verbose=False)
    host.save_checkpoint(tmp_path / "packed.ckpt")
    loaded = lq.load_from_checkpoint(Language, tmp_path / "packed.ckpt")
    assert torch.equal(loaded.net(tokens()).logits, qmodel.net(tokens()).logits)
    torch.save(qmodel, tmp_path / "whole.pt")
    again = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert torch.equal(again.net(tokens()).logits, qmodel.net(tokens()).logits)
