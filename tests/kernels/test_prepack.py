from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.kernels import onednn, prepack
from lightning_quant.kernels.prepack import count, forget, prepacked

X = torch.randn(2, 6, 9, 9)


class Doubled:
    def __init__(self, words: Tensor, scale: Tensor) -> None:
        self.values = words * 2 * scale


class Maker:
    """Counts how often it had to build."""

    def __init__(self) -> None:
        self.built = 0

    def __call__(self, words: Tensor, scale: Tensor, key: object = "key") -> Doubled:
        def build() -> Doubled:
            self.built += 1
            return Doubled(words, scale)

        return prepacked(build, key, words, scale)


@pytest.fixture
def make() -> Maker:
    gc.collect()
    return Maker()


def tensors(start: float = 0.0) -> tuple[Tensor, Tensor]:
    return torch.arange(6.0) + start, torch.tensor([0.5])


def test_built_once(make):
    words, scale = tensors()
    first = make(words, scale)
    assert make(words, scale) is first
    assert make.built == 1
    assert make(words, scale, "another key") is not first


def test_equal_content_is_shared_and_other_content_is_not(make):
    words, scale = tensors()
    first = make(words, scale)
    assert make(words.clone(), scale.clone()) is first
    assert make(words + 1, scale) is not first
    assert make(words, scale + 1) is not first
    assert make.built == 3


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("inference", [False, True])
def test_changes_in_place_are_seen(make, which, inference):
    with torch.inference_mode(inference):
        given = tuple(tensor.clone() for tensor in tensors(10.0))
        assert given[0].is_inference() == inference
        before = make(*given).values.clone()
        again = make(*given).values
        assert make.built == 1
        assert torch.equal(again, before)
        given[which].add_(1)
        assert torch.equal(make(*given).values, given[0] * 2 * given[1])
    assert make.built == 2


def test_a_tensor_with_new_memory_is_seen(make):
    words, scale = tensors(20.0)
    parameter = nn.Parameter(words, requires_grad=False)
    make(parameter, scale)
    parameter.data = words + 1
    assert torch.equal(make(parameter, scale).values, (words + 1) * 2 * scale)


def test_made_in_inference_mode_is_an_ordinary_tensor(make):
    words, scale = tensors(30.0)
    with torch.inference_mode():
        found = make(words, scale)
    assert not found.values.is_inference()


def test_freed_with_the_last_tensor(make):
    before = count()
    words, scale = tensors(40.0)
    twin = words.clone()
    make(words, scale)
    make(twin, scale)
    assert count() == before + 1
    del words
    gc.collect()
    assert count() == before + 1
    del twin
    gc.collect()
    assert count() == before
    assert not [row for row in prepack._by_tensor.values() if row[0]() is None]


def test_forget(make):
    before = count()
    words, scale = tensors(50.0)
    make(words, scale)
    forget(words, None, scale)
    gc.collect()
    assert count() == before
    make(words, scale)
    assert make.built == 2


def packed_conv() -> nn.Module:
    return lq.quantize(nn.Sequential(nn.Conv2d(6, 5, 3)), "w8a8", [X])


needs_onednn = pytest.mark.skipif(not onednn.is_exact(), reason="no exact int8 arithmetic on this CPU")


@needs_onednn
@torch.no_grad()
@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_copies_of_a_module_share(how):
    gc.collect()
    before = count()
    model = packed_conv()
    keys = set(model.state_dict())
    out = model(X)
    twin = how(model)
    assert torch.equal(twin(X), out)
    assert count() == before + 1
    assert set(model.state_dict()) == set(twin.state_dict()) == keys
    twin[0].weight_scale.mul_(2)
    assert not torch.allclose(twin(X), out)
    assert torch.equal(model(X), out)
    assert count() == before + 2
    del model, twin
    gc.collect()
    assert count() == before


@needs_onednn
@torch.no_grad()
def test_loading_and_moving_a_module():
    gc.collect()
    before = count()
    model, other = packed_conv(), packed_conv()
    mine, its = model(X), other(X)
    assert not torch.allclose(mine, its)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(X), its)
    gc.collect()
    assert count() == before + 1
    del other
    model.to("meta")
    gc.collect()
    assert count() == before


def test_storages_stay_resizable():
    """FSDP frees and refills the storages of parameters."""
    words = torch.ones(8, dtype=torch.int32)
    prepacked(lambda: Doubled(words, words), "resizable", words)
    words.untyped_storage().resize_(0)
    assert words.untyped_storage().size() == 0
