from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.algorithms.gptq import gptq
from lightning_quant.blocks import find_blocks
from lightning_quant.grids import output_error
from lightning_quant.numerics import calc_qparams, dequantize, qparams_shape, quantize, to_groups
from lightning_quant.spec import QuantSpec
from lightning_quant.surgery import packed_modules

SPECS = [
    QuantSpec(4),
    QuantSpec(3, symmetric=False),
    QuantSpec(4, granularity="tensor"),
    QuantSpec(4, granularity="group", group_size=16),
    QuantSpec(2, granularity="group", group_size=32, symmetric=False),
    QuantSpec(3, granularity="group", group_size=24, symmetric=False),  # ragged
]


def qparams(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    rows = to_groups(weight, spec)
    scale, zero_point = calc_qparams(rows.amin(1), rows.amax(1), spec)
    shape = qparams_shape(weight.shape, spec)
    return scale.reshape(shape), zero_point.reshape(shape)


def nearest(weight: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    return dequantize(quantize(weight, scale, zero_point, spec), scale, zero_point, spec)


def correlated(samples: int, columns: int) -> Tensor:
    return torch.randn(samples, columns) @ torch.randn(columns, columns) * torch.logspace(-1, 1, columns)


@pytest.mark.parametrize("samples", [500, 30, 1])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label.replace(" ", "-"))
def test_on_the_grid_and_never_worse_than_nearest(spec: QuantSpec, samples: int) -> None:
    weight, x = torch.randn(24, 100), correlated(samples, 100)
    scale, zero_point = qparams(weight, spec)
    rounded = gptq(weight, x.T @ x, scale, zero_point, spec, block_size=32)
    assert torch.allclose(nearest(rounded, scale, zero_point, spec), rounded, rtol=0, atol=1e-6)
    ours, plain = (output_error(weight, each, x.T @ x) for each in (rounded, nearest(weight, scale, zero_point, spec)))
    assert (ours <= plain).all()
    if samples == 500:
        assert ours.sum() < 0.8 * plain.sum()


def test_against_the_plain_algorithm_in_float64() -> None:
    """Section 3.3 without blocks: after each column the rest moves along the inverse Hessian."""
    spec, weight, x = QuantSpec(4, granularity="group", group_size=8), torch.randn(6, 24), correlated(200, 24)
    scale, zero_point = qparams(weight, spec)
    hessian = (x.T @ x).double()
    order = hessian.diagonal().argsort(descending=True)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    left = damped[order][:, order]
    work, expected = weight.double()[:, order].clone(), torch.empty(6, 24, dtype=torch.float64)
    steps = scale.double().repeat_interleave(8, dim=1)[:, order]
    for index in range(24):
        inverse = torch.linalg.inv(left[index:, index:])
        value = (work[:, index] / steps[:, index]).round().clamp(-8, 7) * steps[:, index]
        expected[:, order[index]] = value
        error = (work[:, index] - value) / inverse[0, 0]
        work[:, index:] -= error[:, None] * inverse[0]
    rounded = gptq(weight, x.T @ x, scale, zero_point, spec, block_size=7)
    plain = nearest(weight, scale, zero_point, spec)
    hessian = hessian.float()
    better = output_error(weight, expected.float(), hessian) < output_error(weight, plain, hessian)
    wanted = torch.where(better[:, None], expected.float(), plain)
    assert torch.isclose(rounded, wanted, atol=1e-5).float().mean() > 0.97  # ties may fall the other way in float32
    errors = [output_error(weight, each, hessian).sum().item() for each in (rounded, wanted)]
    assert errors[0] == pytest.approx(errors[1], rel=0.03)


def test_dead_inputs_and_no_inputs() -> None:
    spec, weight, x = QuantSpec(4), torch.randn(8, 20), correlated(50, 20)
    x[:, ::3] = 0
    scale, zero_point = qparams(weight, spec)
    rounded = gptq(weight, x.T @ x, scale, zero_point, spec)
    plain = nearest(weight, scale, zero_point, spec)
    assert torch.equal(rounded[:, ::3], plain[:, ::3])
    assert torch.equal(gptq(weight, torch.zeros(20, 20), scale, zero_point, spec), plain)
    with pytest.raises(ValueError, match="no inverse"):
        gptq(weight, torch.full((20, 20), torch.nan), scale, zero_point, spec)


class Blocks(nn.Module):
    """An embedding, repeated blocks with keyword arguments, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True) for _ in range(3))
        self.head = nn.Linear(16, 30)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return self.head(x)


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(72, 5)
    )


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=3, **sizes))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=3, n_head=4))


def tokens() -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 30, (4, 12), generator=generator) for _ in range(6)]


MODELS: dict[str, tuple[Any, Any]] = {
    "blocks": (Blocks, tokens),
    "llama": (llama, lambda: [{"input_ids": batch} for batch in tokens()]),
    "gpt2": (gpt2, lambda: [{"input_ids": batch} for batch in tokens()]),
    "conv": (conv_net, lambda: [torch.randn(8, 3, 10, 10) for _ in range(3)]),
}


def logits(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        out = model(**batch) if isinstance(batch, dict) else model(batch)
    return out if isinstance(out, Tensor) else out.logits


@pytest.mark.parametrize("scheme", ["w3a16", "w2a16", "w4a4"])
@pytest.mark.parametrize("name", MODELS)
def test_models_come_closer_to_the_float_one(name: str, scheme: str) -> None:
    make, data = MODELS[name]
    torch.manual_seed(0)
    model, batches = make().eval(), data()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    options: dict[str, Any] = {"group_size": 16} if scheme != "w4a4" else {"edges": None}
    errors = {}
    for algorithms in ([], ["gptq"]):
        qmodel = lq.quantize(model, lq.Recipe(scheme, algorithms=algorithms, **options), batches)
        errors[bool(algorithms)] = sum((logits(qmodel, batch) - logits(model, batch)).square().sum().item() for batch in batches)
    assert errors[True] < errors[False]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert packed_modules(qmodel)
    notes = {row.name: row.note for row in lq.summary(qmodel).rows}
    if name == "conv":
        assert "gptq: rounded to nearest, not for grouped convolutions" in notes["2"]
        assert "gptq" not in notes["0"]
    if name == "blocks":
        assert find_blocks(model) == [["layers.0", "layers.1", "layers.2"]]
        assert "gptq" not in notes["layers.1.linear1"]


def test_algorithms_without_data_are_refused() -> None:
    with pytest.raises(ValueError, match="gptq.* need data"):
        lq.quantize(nn.Sequential(nn.Linear(8, 8)), lq.Recipe("w4a16", algorithms=["gptq"]))
