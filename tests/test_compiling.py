from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import lightning_quant as lq
from lightning_quant.kernels import onednn
from tests.helpers import assert_close

pytestmark = [
    pytest.mark.skipif(not onednn.is_exact(), reason="no exact int8 arithmetic on this CPU"),
    pytest.mark.xdist_group("compile"),
]


class Residual(nn.Module):
    """conv-relu-conv, added to its input, twice; then a strided convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.pairs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)) for _ in range(2)
        )
        self.down = nn.Conv2d(8, 12, 3, stride=2, groups=2)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for pair in self.pairs:
            x = torch.relu(pair(x) + x)
        return self.head(torch.relu(self.down(x)).mean((2, 3)))


X = torch.randn(4, 3, 10, 10)


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def quantized(recipe: Any = "w8a8", model: nn.Module | None = None, x: Tensor = X) -> nn.Module:
    torch.manual_seed(0)
    return lq.quantize(model or Residual(), recipe, [x])


def compiled(model: nn.Module, *args: Tensor, **options: Any) -> tuple[Tensor, str]:
    """The output, and the code that ran."""
    with torch.no_grad():
        out, codes = run_and_get_code(lq.compile(model, fullgraph=True, **options), *args)
    return out, "\n".join(codes)


def call(code: str) -> str:
    """What is run, without the kernels' sources and imports."""
    return code[code.index("def call(") :]


@torch.no_grad()
def test_a_residual_chain_stays_in_int8():
    model = quantized()
    keys = list(model.state_dict())
    out, code = compiled(model, X)
    assert_close(out, model(X), 2e-2)  # the code of a value next to a tie may be its neighbour's
    run = call(code)
    assert "convolution(" not in run
    assert "lightning_quant" not in run
    convs = re.findall(r"(qconv\w*_pointwise\.\w+)\(.*?torch\.(uint8|float32)", run)
    # the first of a pair writes codes; the second adds to the residual; what the stem and the last one write is read as floats
    assert sum(kind == "uint8" for _, kind in convs) == 2
    assert sum("binary" in name for name, _ in convs) == 2
    assert len(convs) == 6
    assert "qlinear_pointwise" in run
    assert list(model.state_dict()) == keys


@pytest.mark.slow
@torch.no_grad()
def test_other_batches_and_the_eager_model_afterwards():
    model = quantized()
    wanted = model(X)
    fast = lq.compile(model)
    fast(X)
    more = torch.randn(7, 3, 10, 10)
    assert_close(fast(more), model(more), 2e-2)
    assert torch.equal(model(X), wanted)
    with torch.inference_mode():
        assert_close(fast(X), wanted, 2e-2)


@torch.no_grad()
def test_a_residual_that_is_read_again_is_kept():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = torch.relu(self.first(x))
            z = torch.relu(self.second(y) + y)
            return self.second(x) + x, z, z + y

    model = quantized(model=Twice())
    given = X.clone()
    with torch.no_grad():
        found = lq.compile(model)(given)
    assert torch.equal(given, X)
    assert_close(found, model(X), 2e-2)


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["w4a4", pytest.param("w8a8-dynamic", marks=pytest.mark.slow), "w4a16"])
def test_what_is_no_8_bit_static_model_computes_the_same(recipe):
    model = quantized(recipe)
    out, code = compiled(model, X)
    assert_close(out, model(X), 1e-5 if recipe != "w4a4" else 0.1)
    assert ("qconv_pointwise" in call(code)) == (recipe == "w4a4")


@pytest.mark.slow
@torch.no_grad()
def test_bfloat16_and_one_dimension():
    model = quantized(model=nn.Sequential(nn.Conv1d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv1d(6, 5, 3)), x=torch.randn(2, 4, 12))
    x = torch.randn(2, 4, 12)
    out, code = compiled(model, x)
    assert_close(out, model(x), 2e-2)
    assert "convolution(" not in call(code)
    out, _ = compiled(model.to(torch.bfloat16), x.bfloat16())
    assert out.dtype == torch.bfloat16
    assert_close(out, model(x.bfloat16()), 2e-2)


@pytest.mark.slow
def test_with_gradients_the_layers_run_as_they_are():
    model = quantized()
    leaves = X.clone().requires_grad_(), X.clone().requires_grad_()
    found, wanted = lq.compile(model)(leaves[0]), model(leaves[1])
    assert_close(found, wanted)
    for out in (found, wanted):
        out.sum().backward()
    assert_close(leaves[0].grad, leaves[1].grad)


@pytest.mark.slow
@torch.no_grad()
def test_another_backend_is_left_alone(monkeypatch):
    monkeypatch.setenv("LQ_BACKEND", "reference")
    model = quantized()
    out, code = compiled(model, X)
    assert torch.equal(out, model(X))
    assert "onednn" not in call(code)


@torch.no_grad()
def test_plain_compile_and_export_take_the_operators():
    model = quantized()
    wanted = model(X)
    assert torch.equal(torch.compile(model, fullgraph=True)(X), wanted)
    exported = torch.export.export(model, (X,))
    assert any("lightning_quant.conv" in str(node.target) for node in exported.graph.nodes)
    assert torch.equal(exported.module()(X), wanted)


def test_an_unknown_option_is_named():
    with pytest.raises(ValueError, match="'max_autotunes'"):
        lq.compile(quantized(), max_autotunes=True)


@pytest.mark.slow
def test_the_cache_of_compiled_code_is_not_fooled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with torch.no_grad():
        for seed in (0, 1):
            torch._dynamo.reset()
            torch.manual_seed(seed)
            model = lq.quantize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), "w8a8", [X])
            assert_close(lq.compile(model)(X), model(X), 2e-2)
