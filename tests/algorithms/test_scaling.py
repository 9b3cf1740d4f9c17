"""SmoothQuant and AWQ: what they do to scales, and that the float function stays the same."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.activations import Budget
from lightning_quant.algorithms import ALGORITHMS
from lightning_quant.algorithms.awq import awq_scale
from lightning_quant.algorithms.smoothquant import smooth_scale
from lightning_quant.blocks import Unit, find_layout, units
from lightning_quant.calibration import evaluating, run_batches
from lightning_quant.grids import minmax_qparams, nearest, output_error
from lightning_quant.spec import QuantSpec
from lightning_quant.statistics import collecting
from lightning_quant.surgery import packed_modules
from tests.test_pairs import SIZES, VOCABULARY, randomize

TRANSFORMS = ["smoothquant", "awq"]


def decoder(name: str, **more: Any) -> nn.Module:
    import transformers

    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**SIZES, **more))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=48, n_layer=2, n_head=4))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {key: value for key, value in SIZES.items() if key not in ("num_key_value_heads", "head_dim")}
    return BertForMaskedLM(BertConfig(**sizes))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8))


def ids() -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, VOCABULARY, (4, 16), generator=generator)} for _ in range(4)]


def images() -> list[Any]:
    return [{"pixel_values": torch.randn(4, 3, 16, 16)} for _ in range(4)]


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Any]]]] = {
    **{name: (lambda name=name: decoder(name), ids) for name in ("Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Gemma2")},  # type: ignore[misc]
    "gpt2": (gpt2, ids),
    "bert": (bert, ids),
    "vit": (vit, images),
}


def outputs(model: nn.Module, batches: list[Any]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(**batch).logits for batch in batches])


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("algorithm", TRANSFORMS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_float_function_stays_the_same(name: str, algorithm: str, explicit: bool) -> None:
    make, data = ARCHITECTURES[name]
    torch.manual_seed(0)
    model, batches = randomize(make()), data()
    before = outputs(model, batches)
    lq.prepare(model, "w8a8-dynamic", training=False)
    weights = {key: value.clone() for key, value in model.named_parameters() if key.endswith("weight")}
    entry, shared = ALGORITHMS[algorithm], {}  # type: ignore[var-annotated]

    @contextlib.contextmanager
    def collect(unit: Unit) -> Iterator[None]:
        with collecting(unit.modules, {"low", "high", *entry.statistics}, False) as found:
            yield
        unit.statistics = found

    with evaluating(model), Budget() as budget:
        layout = find_layout(model, lambda: run_batches(model, batches, 1))
        for unit in units(model, lambda: run_batches(model, batches, 4), layout, budget, path="float", collect=collect):
            unit.shared = shared
            entry.apply(unit, explicit=explicit)
    after = outputs(model, batches)
    assert (after - before).abs().max() <= 1e-4 * before.abs().max()
    now = dict(model.named_parameters())
    moved = [key for key, value in weights.items() if not torch.equal(now[key], value)]
    assert len(moved) >= 4, "nothing was rescaled"


def test_the_formula_of_smoothquant() -> None:
    inputs, weights = torch.tensor([100.0, 1.0, 0.0]), torch.tensor([0.5, 2.0, 1.0])
    for alpha in (0.0, 0.3, 1.0):
        wanted = inputs[:2] ** alpha / weights[:2] ** (1 - alpha)
        assert torch.allclose(smooth_scale(inputs, weights, alpha)[:2], wanted)
        assert smooth_scale(inputs, weights, alpha)[2] == 1


def outliers(samples: int, columns: int) -> Tensor:
    x = torch.randn(samples, columns)
    x[:, :3] *= 60
    return x


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic"])
def test_smoothquant_helps_where_activations_have_outliers(scheme: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 8)).eval()
    with torch.no_grad():
        net[0].weight[:3] = 60.0
        net[1].weight[:, :3] /= 60
    data = [torch.randn(64, 32) for _ in range(4)]
    errors = []
    for algorithms in ([], ["smoothquant"]):
        qnet = lq.quantize(net, lq.Recipe(scheme, algorithms=algorithms), data)
        errors.append(sum((qnet(x) - net(x)).square().sum().item() for x in data))
    assert errors[1] < 0.3 * errors[0]
    assert qnet[3].pre_scale.shape == (32,), "a GELU takes no scale: the layer keeps it"


def test_an_explicit_scale_is_saved_and_loaded(tmp_path: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)).eval()
    data = [outliers(64, 16) for _ in range(4)]
    qnet = lq.quantize(net, lq.Recipe("w8a8", algorithms=["smoothquant"]), data)
    assert qnet[0].pre_scale is not None
    lq.save_quantized(qnet, tmp_path / "packed")
    again = lq.load_quantized(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)), tmp_path / "packed")
    assert torch.equal(again(data[0]), qnet(data[0]))
    third = lq.quantize(net, "w8a8", data)
    third.load_state_dict(qnet.state_dict())
    assert torch.equal(third(data[0]), qnet(data[0]))


def test_awq_scales_up_what_matters_and_lowers_the_error() -> None:
    torch.manual_seed(0)
    spec = QuantSpec(3, symmetric=False, granularity="group", group_size=16)
    weight, x = torch.randn(24, 64), torch.randn(400, 64)
    x[:, 5] *= 40
    products, channel = x.T @ x, torch.arange(64)
    scale = awq_scale([weight], [products], [spec], channel)
    assert scale.argmax() == 5

    def error(scale: Tensor) -> float:
        scaled = weight * scale
        return output_error(weight, nearest(scaled, *minmax_qparams(scaled, spec), spec) / scale, products).sum().item()

    assert error(scale) < 0.7 * error(torch.ones(64))
    repeated = awq_scale([weight], [products], [spec], channel // 2)
    assert repeated.shape == (32,)
    assert repeated.argmax() == 2


@pytest.mark.parametrize("algorithm", TRANSFORMS)
def test_models_lose_less(algorithm: str) -> None:
    make, data = ARCHITECTURES["Llama"]
    torch.manual_seed(0)
    model, batches = randomize(make()), data()
    recipe: dict[str, Any] = {"awq": {"scheme": "w3a16", "group_size": 16}, "smoothquant": {"scheme": "w8a8"}}[algorithm]
    errors = []
    for algorithms in ([], [algorithm]):
        qmodel = lq.quantize(model, lq.Recipe(algorithms=algorithms, **recipe), batches)
        errors.append((outputs(qmodel, batches) - outputs(model, batches)).square().sum().item())
    assert errors[1] < errors[0]
    assert packed_modules(qmodel)


def test_layers_that_cannot_be_rescaled_are_noted() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.lstm, self.head = nn.Conv1d(4, 8, 3), nn.LSTM(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(self.conv(x).movedim(1, -1))[0])

    qnet = lq.quantize(Net().eval(), lq.Recipe("w4a16", group_size=8, algorithms=["awq"]), [torch.randn(2, 4, 12)])
    notes = {row.name: row.note for row in lq.summary(qnet).rows}
    assert "awq: not rescaled, it has more than one weight" in notes["lstm"]
    assert "not rescaled, nothing before it can take the inverse" in notes["conv"]


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_a_wrong_alpha_is_refused(alpha: float) -> None:
    recipe = lq.Recipe("w8a8", algorithms=["smoothquant"], algorithm_options={"smoothquant": {"alpha": alpha}})
    with pytest.raises(ValueError, match="alpha"):
        lq.quantize(nn.Sequential(nn.Linear(4, 4)), recipe, [torch.randn(2, 4)])
