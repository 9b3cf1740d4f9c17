"""Pairs are found by what a model computes: each case says which there are, and scaling all of them must not change its output."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.calibration import set_flags
from lightning_quant.pairs import Pair, find_pairs, scale_pair
from lightning_quant.recipe import Recipe
from lightning_quant.surgery import prepare
from tests.helpers import assert_close, assert_same_state, quantizers

# feeder -> consumers
Found = dict[str, tuple[str, ...]]

VOCABULARY, HEADS = 60, 12
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": HEADS,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def names(pairs: list[Pair]) -> Found:
    assert len({pair.feeder for pair in pairs}) == len(pairs)
    return {pair.feeder: pair.consumers for pair in pairs}


def randomize(model: nn.Module) -> nn.Module:
    """Weights that leave nothing out: norms far from one, biases far from zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            vector = parameter.dim() == 1
            parameter.copy_(torch.randn_like(parameter) * (0.5 if vector else 0.2) + (0.3 if vector else 0.0))
    return model.eval()


def scale_all(model: nn.Module, pairs: list[Pair]) -> None:
    """Random factors in [0.2, 5] on every pair."""
    for pair in pairs:
        module = model.get_submodule(pair.feeder)
        bias = getattr(module, "bias", None)
        size = len(module.weight) if bias is None else len(bias)
        scale_pair(model, pair, 5 ** torch.empty(size).uniform_(-1, 1))


def check(model: nn.Module, run: Callable[[], Any], want: Found, tol: float = 1e-4) -> list[Pair]:
    """The pairs are the wanted ones, searching changes nothing, and scaling every pair changes parameters, but not the output."""
    model.eval()
    storage = {name: value.data_ptr() for name, value in model.named_parameters()}
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        output = run()
    pairs = find_pairs(model, run)
    assert names(pairs) == want
    assert_same_state(model.state_dict(), before)
    assert storage == {name: value.data_ptr() for name, value in model.named_parameters()}
    scale_all(model, pairs)
    for pair in pairs:
        for name in (pair.feeder, *pair.consumers):
            assert not torch.equal(model.get_submodule(name).weight, before[f"{name}.weight"])
    with torch.no_grad():
        assert_close(run(), output, tol)
    return pairs


# --- transformers ---------------------------------------------------------------------------------------------------


def build(name: str, config: str, **options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return randomize(getattr(transformers, name)(getattr(transformers, config)(**options)))


def llama_like(family: str, config: str | None = None, **options: Any) -> nn.Module:
    return build(f"{family}ForCausalLM", config or f"{family}Config", **{**SIZES, **options})


def gpt2() -> nn.Module:
    sizes = {"n_positions": 32, "n_embd": 48, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
    return build("GPT2LMHeadModel", "GPT2Config", vocab_size=VOCABULARY, **sizes)


def bert() -> nn.Module:
    sizes = {key: value for key, value in SIZES.items() if key not in ("num_key_value_heads", "head_dim")}
    return build("BertForSequenceClassification", "BertConfig", **sizes)


def vit() -> nn.Module:
    sizes = {key: SIZES[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    return build("ViTForImageClassification", "ViTConfig", image_size=16, patch_size=4, num_labels=3, **sizes)


def layers(found: Found, path: str, **rest: tuple[str, ...]) -> Found:
    """What is found in each of two layers, and elsewhere."""
    both = {f"{path}.{i}.{name}": tuple(f"{path}.{i}.{one}" for one in many) for i in (0, 1) for name, many in found.items()}
    return {**both, **{name.replace("__", "."): many for name, many in rest.items()}}


ATTENTION: Found = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.v_proj": ("self_attn.o_proj",),
}
GATED: Found = {
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up_proj": ("mlp.down_proj",),
}
SANDWICH: Found = {  # post norms are read by the residual stream alone
    "pre_feedforward_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up_proj": ("mlp.down_proj",),
}
HEAD = {"model__norm": ("lm_head",)}
MODELS: dict[str, tuple[Callable[[], nn.Module], Found]] = {
    "llama": (lambda: llama_like("Llama"), layers(ATTENTION | GATED, "model.layers", **HEAD)),
    "llama-tied": (lambda: llama_like("Llama", tie_word_embeddings=True), layers(ATTENTION | GATED, "model.layers")),
    "qwen2": (lambda: llama_like("Qwen2"), layers(ATTENTION | GATED, "model.layers", **HEAD)),
    "qwen3": (lambda: llama_like("Qwen3"), layers(ATTENTION | GATED, "model.layers", **HEAD)),
    "mistral": (lambda: llama_like("Mistral"), layers(ATTENTION | GATED, "model.layers", **HEAD)),
    "gemma-mqa": (lambda: llama_like("Gemma", num_key_value_heads=1), layers(ATTENTION | GATED, "model.layers")),
    "gemma2": (lambda: llama_like("Gemma2"), layers(ATTENTION | SANDWICH, "model.layers")),
    "gemma3": (lambda: llama_like("Gemma3", "Gemma3TextConfig"), layers(ATTENTION | SANDWICH, "model.layers")),
    "phi3": (
        lambda: llama_like("Phi3"),
        layers(
            {
                "input_layernorm": ("self_attn.qkv_proj",),
                "self_attn.qkv_proj": ("self_attn.o_proj",),
                "post_attention_layernorm": ("mlp.gate_up_proj",),
                "mlp.gate_up_proj": ("mlp.down_proj",),
            },
            "model.layers",
            **HEAD,
        ),
    ),
    # experts in fused parameters cannot be compensated, so the norm in front of them is left alone
    "mixtral": (lambda: llama_like("Mixtral", num_local_experts=4), layers(ATTENTION, "model.layers", **HEAD)),
    "gpt2": (
        gpt2,
        layers({"ln_1": ("attn.c_attn",), "attn.c_attn": ("attn.c_proj",), "ln_2": ("mlp.c_fc",)}, "transformer.h"),
    ),
    "bert": (
        bert,
        layers(
            {"attention.self.value": ("attention.output.dense",)},
            "bert.encoder.layer",
            # behind the last layer nothing is residual
            bert__encoder__layer__1__output__LayerNorm=("bert.pooler.dense",),
        ),
    ),
    "vit": (
        vit,
        layers(
            {
                "layernorm_before": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
                "attention.v_proj": ("attention.o_proj",),
                "layernorm_after": ("mlp.fc1",),
            },
            "vit.layers",
            vit__layernorm=("classifier",),
        ),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_pairs_of_transformers(name: str) -> None:
    make, want = MODELS[name]
    model = make()
    x = torch.randn(2, 3, 16, 16) if name == "vit" else torch.randint(0, VOCABULARY, (2, 12))
    pairs = check(model, lambda: model(x).logits, want)
    kinds = {pair.kind for pair in pairs if "norm" in pair.feeder.lower() or ".ln_" in pair.feeder}
    assert kinds == ({"norm+1"} if name.startswith("gemma") else {"norm"})
    assert all(pair.kind == "linear" for pair in pairs if "proj" in pair.feeder or "value" in pair.feeder)


def channels(name: str, ending: str) -> list[Tensor]:
    model = MODELS[name][0]()
    x = torch.randint(0, VOCABULARY, (1, 8))
    pairs = find_pairs(model, lambda: model(x).logits)
    return [pair.channel for pair in pairs if pair.feeder.endswith(ending)]


@pytest.mark.parametrize(
    ("name", "feeder", "heads"),
    [
        ("llama", "v_proj", [0, 0, 1, 1]),
        ("gemma-mqa", "v_proj", [0, 0, 0, 0]),
        ("gpt2", "c_attn", [8, 9, 10, 11]),
        ("phi3", "qkv_proj", [6, 6, 7, 7]),
    ],
)
def test_channels_behind_attention(name: str, feeder: str, heads: list[int]) -> None:
    want = torch.cat([torch.arange(HEADS) + head * HEADS for head in heads])
    for channel in channels(name, feeder):
        assert channel.dtype == torch.int64
        assert torch.equal(channel, want)


def test_channels_of_a_gated_unit_are_its_second_half() -> None:
    assert torch.equal(channels("phi3", "gate_up_proj")[0], torch.arange(80, 160))


def test_other_channels_of_a_fused_projection_stay() -> None:
    model = gpt2()
    x = torch.randint(0, VOCABULARY, (1, 8))
    pair = next(pair for pair in find_pairs(model, lambda: model(x).logits) if pair.feeder.endswith("c_attn"))
    module = model.get_submodule(pair.feeder)
    before = module.weight.detach().clone()
    scale_pair(model, pair, torch.full((144,), 2.0))
    assert torch.equal(module.weight[:, :96], before[:, :96])
    assert torch.equal(module.weight[:, 96:], before[:, 96:] / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    make, want = MODELS[name]
    model = make().to(dtype)
    x = torch.randint(0, VOCABULARY, (1, 8))
    assert names(find_pairs(model, lambda: model(x).logits)) == want


def test_a_block_alone() -> None:
    model = MODELS["llama"][0]()
    block, calls = model.model.layers[0], []
    handle = block.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        model(torch.randint(0, VOCABULARY, (1, 8)), use_cache=False)
    handle.remove()
    ((args, kwargs),) = calls
    check(block, lambda: block(*args, **kwargs), ATTENTION | GATED)


# --- small networks -------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Modules by name, and how they are put together."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        self._forward = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, x)


def mlp(activation: Callable[[Tensor], Tensor], **modules: nn.Module) -> Net:
    return Net(lambda m, x: m.b(activation(m.a(x))), a=nn.Linear(6, 10), b=nn.Linear(10, 4), **modules)


def convs(activation: Callable[[Tensor], Tensor]) -> Net:
    return Net(lambda m, x: m.b(activation(m.a(x))), a=nn.Conv2d(3, 8, 3, padding=1), b=nn.Conv2d(8, 4, 3))


IMAGE, ROWS = (2, 3, 8, 8), (5, 6)
PAIR: Found = {"a": ("b",)}
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Found]] = {
    "relu": (lambda: mlp(F.relu), (30, 6), PAIR),
    "leaky-relu": (lambda: mlp(F.leaky_relu), ROWS, PAIR),
    "in-place-relu": (lambda: mlp(lambda x: F.relu(x, inplace=True)), (30, 6), PAIR),
    "no-activation": (lambda: mlp(lambda x: x), ROWS, PAIR),
    "relu-shows-few-channels": (lambda: mlp(F.relu), (1, 6), PAIR),
    "gelu": (lambda: mlp(F.gelu), ROWS, {}),
    "silu": (lambda: mlp(F.silu), ROWS, {}),
    "elu": (lambda: mlp(F.elu), ROWS, {}),
    "softmax": (lambda: mlp(lambda x: x.softmax(-1)), ROWS, {}),
    "residual": (lambda: Net(lambda m, x: (x := m.a(x)) + m.b(x), a=nn.Linear(6, 6), b=nn.Linear(6, 6)), ROWS, {}),
    "input-is-written-to-later": (
        lambda: Net(lambda m, x: m.b(x := m.a(x)) + 0 * x.zero_().sum(), a=nn.Linear(6, 10), b=nn.Linear(10, 4)),
        ROWS,
        PAIR,
    ),
    "output-is-read": (lambda: Net(lambda m, x: (x := m.a(x), m.b(x)), a=nn.Linear(6, 6), b=nn.Linear(6, 6)), ROWS, {}),
    "two-consumers": (
        lambda: Net(lambda m, x: m.b(x := m.a(x)) + m.c(x), a=nn.LayerNorm(6), b=nn.Linear(6, 4), c=nn.Linear(6, 4)),
        ROWS,
        {"a": ("b", "c")},
    ),
    "consumer-without-effect-on-the-output": (
        lambda: Net(lambda m, x: m.b(x := m.a(x)) + 0 * m.c(x.sin()), a=nn.LayerNorm(6), b=nn.Linear(6, 4), c=nn.Linear(6, 4)),
        ROWS,
        {},
    ),
    "chunked-gate": (
        lambda: Net(lambda m, x: m.b((x := m.a(x).chunk(2, -1))[0].sigmoid() * x[1]), a=nn.Linear(6, 20), b=nn.Linear(10, 4)),
        ROWS,
        PAIR,
    ),
    "used-twice": (lambda: Net(lambda m, x: m.b(m.a(m.a(x))), a=nn.Linear(6, 6), b=nn.Linear(6, 4)), ROWS, {}),
    "consumer-used-twice": (
        lambda: Net(lambda m, x: m.b(F.relu(m.a(x))) + m.b(F.relu(-m.a(x))), a=nn.Linear(6, 10), b=nn.Linear(10, 4)),
        (30, 6),
        PAIR,
    ),
    "rms-norm": (lambda: Net(lambda m, x: m.b(m.a(x)), a=nn.RMSNorm(6), b=nn.Linear(6, 4)), ROWS, PAIR),
    "prelu-is-no-norm": (lambda: Net(lambda m, x: m.b(m.a(x)), a=nn.PReLU(6), b=nn.Linear(6, 4)), ROWS, {}),
    "conv": (lambda: convs(F.relu), IMAGE, PAIR),
    "conv-relu6": (lambda: convs(F.relu6), IMAGE, {}),
    "conv-pool": (lambda: convs(lambda x: F.max_pool2d(F.relu(x), 2)), IMAGE, PAIR),
    "conv-residual": (
        lambda: Net(lambda m, x: (x := F.relu(m.a(x))) + m.b(x), a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 8, 3, padding=1)),
        IMAGE,
        {},
    ),
    "conv-flatten-linear": (
        lambda: Net(lambda m, x: m.b(F.relu(m.a(x)).flatten(1)), a=nn.Conv2d(3, 4, 5), b=nn.Linear(64, 3)),
        (6, 3, 8, 8),
        PAIR,
    ),
    "mobile-net": (  # depthwise, as consumer and as feeder
        lambda: Net(
            lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))),
            a=nn.Conv2d(3, 8, 1),
            b=nn.Conv2d(8, 8, 3, groups=8),
            c=nn.Conv2d(8, 4, 1),
        ),
        IMAGE,
        {"a": ("b",), "b": ("c",)},
    ),
    "scale-runs-through-a-depthwise-layer": (
        lambda: Net(
            lambda m, x: m.c(F.relu(m.b(m.a(x)))),
            a=nn.Conv2d(3, 8, 1),
            b=nn.Conv2d(8, 8, 3, groups=8, bias=False),
            c=nn.Conv2d(8, 4, 1),
        ),
        IMAGE,
        {"a": ("b",), "b": ("c",)},
    ),
    "grouped": (
        lambda: Net(
            lambda m, x: m.c(m.b(m.a(x))),
            a=nn.Conv2d(3, 8, 1),
            b=nn.Conv2d(8, 6, 3, groups=2),
            c=nn.ConvTranspose2d(6, 4, 2, groups=2),
        ),
        IMAGE,
        {"a": ("b",), "b": ("c",)},
    ),
    "transposed": (
        lambda: Net(lambda m, x: m.b(m.a(x)), a=nn.ConvTranspose2d(3, 8, 2), b=nn.ConvTranspose2d(8, 6, 2, groups=2)),
        IMAGE,
        PAIR,
    ),
    "transposed-groups-feed": (
        lambda: Net(
            lambda m, x: m.b(m.a(m.s(x))), s=nn.Conv2d(3, 4, 1), a=nn.ConvTranspose2d(4, 6, 2, groups=2), b=nn.Conv2d(6, 2, 1)
        ),
        IMAGE,
        {"s": ("a",), "a": ("b",)},
    ),
    "batch-norm": (
        lambda: Net(lambda m, x: m.b(F.relu(m.a(x))), a=nn.BatchNorm2d(3), b=nn.Conv2d(3, 4, 3)),
        IMAGE,
        PAIR,
    ),
    "group-norm": (lambda: Net(lambda m, x: m.b(m.a(x)), a=nn.GroupNorm(1, 3), b=nn.Conv2d(3, 4, 3)), IMAGE, PAIR),
    "unbatched-conv1d": (
        lambda: Net(lambda m, x: m.b(F.relu(m.a(x))), a=nn.Conv1d(3, 8, 3), b=nn.Conv1d(8, 4, 3)),
        (3, 20),
        PAIR,
    ),
    "encoder-layer": (  # the in-projection of attention is no layer of its own
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True),
        (4, 9, 8),
        {"norm2": ("linear1",), "linear1": ("linear2",)},
    ),
    "encoder-layer-gelu": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True, activation="gelu"),
        (4, 9, 8),
        {"norm2": ("linear1",)},
    ),
    "encoder-layer-post-norm": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        (4, 9, 8),
        {"linear1": ("linear2",)},
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_pairs_of_small_networks(name: str) -> None:
    make, shape, want = NETWORKS[name]
    torch.manual_seed(1)
    net, x = randomize(make()), torch.randn(shape)
    check(net, lambda: net(x), want)


@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_an_encoder_that_would_nest_its_padded_input() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net, x = randomize(nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)), torch.randn(4, 9, 8)
    padding = torch.arange(9).expand(4, 9) > torch.tensor([[8], [5], [3], [8]])

    def run() -> Tensor:
        return net(x, src_key_padding_mask=padding)[~padding]

    check(net, run, {f"layers.{i}.linear1": (f"layers.{i}.linear2",) for i in (0, 1)})


def test_an_activation_that_the_example_shows_one_half_of() -> None:
    for activation, want in ((F.elu, {}), (F.relu, PAIR)):
        net, x = randomize(mlp(activation)), torch.randn(ROWS)
        nn.init.constant_(net.a.bias, 20.0)
        with torch.no_grad():
            assert (net.a(x) > 0).all()
        check(net, lambda net=net, x=x: net(x), want)


def test_conv_channels_spread_over_a_flattened_input() -> None:
    make, shape, _ = NETWORKS["conv-flatten-linear"]
    net, x = randomize(make()), torch.randn(shape)
    (pair,) = find_pairs(net, lambda: net(x))
    assert torch.equal(pair.channel, torch.arange(4).repeat_interleave(16))


def test_more_channels_than_one_run_can_tell_apart() -> None:
    order = torch.randperm(1500)
    net = Net(lambda m, x: m.b(F.relu(m.a(x))[:, order]), a=nn.Linear(4, 1500), b=nn.Linear(1500, 2))
    x = torch.randn(50, 4)
    (pair,) = check(net, lambda: net(x), PAIR)
    assert torch.equal(pair.channel, order)


def test_channels_that_are_zero_follow_their_neighbours() -> None:
    net, x = mlp(F.relu), torch.randn(30, 6)
    with torch.no_grad():
        net.a.weight[[0, 4, 9]] = net.a.bias[[0, 4, 9]] = 0
    (pair,) = check(net, lambda: net(x), PAIR)
    assert torch.equal(pair.channel, torch.arange(10))


class Experts(nn.Module):
    """A norm in front of a router and of experts that see the tokens routed to them."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(8), nn.Linear(8, count)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        y, out = self.norm(x), x.clone()
        weight, choice = self.router(y).softmax(-1).max(-1)
        for index, expert in enumerate(self.experts):
            mask = choice == index
            if mask.any():
                out[mask] = out[mask] + weight[mask, None] * expert(y[mask])
        return out


def test_router_and_experts_are_compensated_together() -> None:
    net, x = randomize(Experts(3)), torch.randn(64, 8)
    want: Found = {"norm": ("router", *(f"experts.{i}.0" for i in range(3)))}
    check(net, lambda: net(x), want | {f"experts.{i}.0": (f"experts.{i}.2",) for i in range(3)})


def test_what_did_not_run_may_be_a_consumer() -> None:
    net, x = randomize(Experts(3)), torch.randn(64, 8)
    with torch.no_grad():
        net.router.bias[2] = -1e3
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pairs = find_pairs(net, lambda: net(x))
    told = [str(warning.message).partition(" did not run")[0] for warning in caught]
    assert told[0] == "norm: left out of the pairs, as experts.2.0"
    assert told[1:] == [f"experts.{i}.0: left out of the pairs, as experts.2.2" for i in (0, 1)]
    assert names(pairs) == {}  # experts.2.2 could read what experts.0.0 feeds, for all that the example shows


# --- state, limits and errors ---------------------------------------------------------------------------------------


def test_consumers_that_are_not_given_forbid_a_pair() -> None:
    make, shape, _ = NETWORKS["two-consumers"]
    net, x = randomize(make()), torch.randn(shape)
    assert names(find_pairs(net, lambda: net(x), {"b": net.b, "c": net.c})) == {"a": ("b", "c")}
    assert find_pairs(net, lambda: net(x), {"b": net.b}) == []


def test_prepared_models_are_probed_in_float_and_keep_their_flags() -> None:
    net = prepare(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4)), "w8a8", training=False)
    x = torch.randn(30, 6)
    set_flags(net, observing=True)
    net.eval()(x)
    set_flags(net, quantizing=True)
    flags = [(part.observing, part.quantizing) for part in quantizers(net)]
    before = copy.deepcopy(net.state_dict())
    pairs = find_pairs(net, lambda: net(x))
    assert names(pairs) == {"0": ("1",), "1": ("3",)}
    assert [(part.observing, part.quantizing) for part in quantizers(net)] == flags
    assert_same_state(net.state_dict(), before)
    set_flags(net, observing=False, quantizing=False)
    with torch.no_grad():
        output = net(x)
        scale_all(net, pairs)
        assert_close(net(x), output, 1e-5)


def test_prepared_conv1d_and_encoder_layer() -> None:
    model = prepare(MODELS["gpt2"][0](), "w8a16", training=False)
    ids = torch.randint(0, VOCABULARY, (1, 8))
    check(model, lambda: model(ids).logits, MODELS["gpt2"][1])
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    layer, x = prepare(randomize(layer), Recipe("w8a16"), training=False), torch.randn(4, 9, 8)
    check(layer, lambda: layer(x), NETWORKS["encoder-layer"][2])


def test_modes_gradients_and_hooks_are_as_before() -> None:
    net, x = randomize(mlp(F.relu, drop=nn.Dropout())), torch.randn(30, 6)
    net.drop.train()
    net.a.weight.requires_grad_(False)
    net(x).sum().backward()
    gradient = net.b.weight.grad
    find_pairs(net, lambda: net(x))
    assert [module.training for module in net.modules()] == [False, False, False, True]
    assert not net.a.weight.requires_grad
    assert net.b.weight.grad is gradient
    assert not any(module._forward_pre_hooks for module in net.modules())
    assert torch.is_grad_enabled()


def test_an_error_in_the_example_leaves_everything_as_it_was() -> None:
    net, x = randomize(mlp(F.relu)).train(), torch.randn(30, 6)
    before, runs = copy.deepcopy(net.state_dict()), 0

    def run() -> Tensor:
        nonlocal runs
        runs += 1
        if runs > 1:
            raise KeyboardInterrupt
        return net(x)

    with pytest.raises(KeyboardInterrupt):
        find_pairs(net, run)
    assert net.training
    assert_same_state(net.state_dict(), before)


def test_a_model_that_checks_its_activations_is_searched_to_the_end() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        if x.abs().max() > 100:
            raise RuntimeError("too large")
        return m.c(F.relu(m.b(x)))

    net, x = randomize(Net(forward, a=nn.LayerNorm(6), b=nn.Linear(6, 10), c=nn.Linear(10, 4))), torch.randn(30, 6)
    before = copy.deepcopy(net.state_dict())
    assert names(find_pairs(net, lambda: net(x))) == {"b": ("c",)}
    assert_same_state(net.state_dict(), before)


def test_a_chaotic_example_gives_no_pair() -> None:
    net, x = mlp(lambda x: F.dropout(F.relu(x), 0.5, training=True)), torch.randn(30, 6)
    with pytest.warns(UserWarning, match="two runs of the example give different outputs"):
        assert find_pairs(net, lambda: net(x)) == []


def test_dropout_in_training_mode_does_not_count() -> None:
    net, x = Net(lambda m, x: m.b(m.drop(m.a(x))), a=nn.Linear(6, 10), b=nn.Linear(10, 4), drop=nn.Dropout()), torch.randn(30, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert names(find_pairs(net.train(), lambda: net(x))) == PAIR


def test_scaling_rebinds_parameters() -> None:
    net, x = randomize(mlp(F.relu)), torch.randn(30, 6)
    alias = copy.deepcopy(net)
    for mine, theirs in zip(net.parameters(), alias.parameters(), strict=True):
        theirs.data = mine.data
    before, identity = copy.deepcopy(net.state_dict()), [id(parameter) for parameter in alias.parameters()]
    (pair,) = find_pairs(alias, lambda: alias(x))
    assert all(mine.data_ptr() == theirs.data_ptr() for mine, theirs in zip(net.parameters(), alias.parameters(), strict=True))
    scale_pair(alias, pair, torch.full((10,), 3.0))
    assert_same_state(net.state_dict(), before)
    assert [id(parameter) for parameter in alias.parameters()] == identity
    assert_close(alias.a.weight, before["a.weight"] / 3)
    assert_close(alias.a.bias, before["a.bias"] / 3)
    assert_close(alias.b.weight, before["b.weight"] * 3)


def test_a_norm_of_one_plus_weight_is_divided_as_a_whole() -> None:
    class Norm(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias)

    net, x = nn.Sequential(Norm(6), nn.Linear(6, 4)), torch.randn(5, 6)
    nn.init.zeros_(net[0].weight)
    (pair,) = check(net, lambda: net(x), {"0": ("1",)})
    assert pair.kind == "norm+1"
    nn.init.zeros_(net[0].weight)
    scale_pair(net, pair, torch.full((6,), 2.0))
    assert torch.equal(net[0].weight, torch.full((6,), -0.5))


def test_errors() -> None:
    net, x = randomize(mlp(F.relu)), torch.randn(30, 6)
    with pytest.raises(ValueError, match=r"'c' \(Linear\) is no linear or convolution layer of the root under this name"):
        find_pairs(net, lambda: net(x), {"c": net.b})
    with pytest.raises(ValueError, match="returned no tensor"):
        find_pairs(net, lambda: None)
    (pair,) = find_pairs(net, lambda: net(x))
    with pytest.raises(ValueError, match=r"a: scale has shape \[4\], but the feeder has 10 channels: pass \[10\]"):
        scale_pair(net, pair, torch.ones(4))
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        scale = torch.ones(10)
        scale[3] = wrong
        with pytest.raises(ValueError, match=rf"a: scale\[3\] is {wrong}, but a factor must be positive and finite"):
            scale_pair(net, pair, scale)
    with pytest.raises(ValueError, match="pair 'a': no module 'a', 'b' in this root"):
        scale_pair(nn.Sequential(nn.Linear(6, 10)), pair, torch.ones(10))
