"""Losses against formulas written out in float64, and the rows that count."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_quant.distillation import LOSSES, Pair, layer_rows, output_rows, pair_loss, row_mask

TEMPERATURE = 3.0


def _softmax(x: np.ndarray) -> np.ndarray:
    exps = np.exp(x - x.max(-1, keepdims=True))
    return exps / exps.sum(-1, keepdims=True)


def own_kl(student: np.ndarray, teacher: np.ndarray) -> float:
    p, q = _softmax(teacher / TEMPERATURE), _softmax(student / TEMPERATURE)
    return float(TEMPERATURE**2 * (p * np.log(p / q)).sum(-1).mean())


def own_mse(student: np.ndarray, teacher: np.ndarray) -> float:
    return float(((student - teacher) ** 2).mean())


def own_features(student: np.ndarray, teacher: np.ndarray) -> float:
    size = (teacher**2).sum(-1)
    assert (size > 0.01 * np.median(size)).all()
    return float((((student - teacher) ** 2).sum(-1) / size).mean())


def own_cosine(student: np.ndarray, teacher: np.ndarray) -> float:
    length = np.sqrt((student**2).sum(-1) * (teacher**2).sum(-1))
    return float((1 - (student * teacher).sum(-1) / length).mean())


OWN = {"kl": own_kl, "mse": own_mse, "features": own_features, "cosine": own_cosine}


def two(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return 2 * torch.randn(*shape, generator=generator), 2 * torch.randn(*shape, generator=generator)


def loss(name: str, student: Tensor, teacher: Tensor, shifted: bool = False, **call: Tensor) -> Tensor:
    return pair_loss(name, Pair("net", student, teacher, call, shifted), temperature=TEMPERATURE)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [(5, 7), (2, 4, 7), (2, 7, 3, 3)], ids=str)
def test_a_loss_is_its_formula(name: str, shape: tuple[int, ...]) -> None:
    student, teacher = two(*shape)
    rows = (student, teacher)
    if len(shape) == 4:  # classes in dimension 1; of a layer a sample is a row
        of_output = LOSSES[name].of == "output"
        rows = tuple(x.permute(0, 2, 3, 1) if of_output else x.flatten(1) for x in rows)
    expected = OWN[name](*(x.reshape(-1, x.shape[-1]).double().numpy() for x in rows))
    assert loss(name, student, teacher).item() == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_least_where_both_agree(name: str) -> None:
    student, teacher = two(6, 5)
    assert loss(name, teacher, teacher).item() == pytest.approx(0, abs=1e-6)
    moved = student.clone().requires_grad_()
    loss(name, moved, teacher).backward()
    assert loss(name, student - 0.1 * moved.grad, teacher) < loss(name, student, teacher)
    assert loss(name, student.bfloat16(), teacher.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_that_of_the_formula(name: str) -> None:
    student, teacher = (x.double().requires_grad_() for x in two(3, 4))
    function = LOSSES[name].function
    assert torch.autograd.gradcheck(lambda x: function(x, teacher.detach(), 2.0), (student,))


@pytest.mark.parametrize("temperature", [1.0, 8.0])
def test_the_gradient_of_kl_keeps_its_size(temperature: float) -> None:
    student, teacher = two(64, 10)
    student.mul_(0.05).requires_grad_()
    pair_loss("kl", Pair("", student, 0.05 * teacher, {}), temperature=temperature).backward()
    # for small logits: (student - teacher) / (classes * rows), without their means (arXiv:1503.02531, equation 4)
    difference = student.detach() - 0.05 * teacher
    expected = (difference - difference.mean(-1, keepdim=True)) / student.numel()
    assert torch.nn.functional.cosine_similarity(student.grad.flatten(), expected.flatten(), dim=0) > 0.99
    assert student.grad.norm() / expected.norm() == pytest.approx(1, abs=0.1)


def test_masked_classes_count_nothing() -> None:
    student, teacher = two(4, 6)
    cut = [x.index_fill(-1, torch.tensor([1]), -torch.inf).requires_grad_() for x in (student, teacher)]
    kept = [x[:, [0, 2, 3, 4, 5]] for x in (student, teacher)]
    found = loss("kl", *cut)
    found.backward()
    assert found.item() == pytest.approx(loss("kl", *kept).item(), rel=1e-6)
    assert torch.isfinite(cut[0].grad).all()


def test_massive_tokens_are_not_all_that_counts() -> None:
    teacher = torch.ones(1, 4, 8)
    teacher[:, 0] = 1000
    near, far = teacher.clone(), teacher.clone()
    near[:, 0] *= 1.01
    far[:, 1:] *= 1.5
    assert loss("features", near, teacher) < 0.01 * loss("features", far, teacher)


# --- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_padding_does_not_count(name: str) -> None:
    student, teacher = two(2, 5, 6)
    attention = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    kept = attention.bool()
    found = loss(name, student, teacher, attention_mask=attention)
    assert found.item() == pytest.approx(loss(name, student[kept][None], teacher[kept][None]).item(), rel=1e-6)
    # nothing left: a loss of 0 with a gradient, not nan
    student.requires_grad_()
    empty = loss(name, student, teacher, attention_mask=torch.zeros_like(attention))
    empty.backward()
    assert empty.item() == 0
    assert not student.grad.any()


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_ignored_labels_do_not_count(name: str, shifted: bool) -> None:
    student, teacher = two(2, 5, 6)
    labels = torch.tensor([[-100, 3, 4, 5, 1], [-100, -100, 2, 1, -100]])
    kept = torch.tensor([[0, 1, 1, 1, 1], [0, 0, 1, 1, 0]]).bool()
    if shifted:  # row t predicts label t + 1; nothing follows the last
        kept = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 0, 0]]).bool()
    if LOSSES[name].of == "layers":
        kept = torch.ones(2, 5).bool()
    found = loss(name, student, teacher, shifted, labels=labels)
    assert found.item() == pytest.approx(loss(name, student[kept][None], teacher[kept][None]).item(), rel=1e-6)


MASKS: dict[str, tuple[dict[str, Any], tuple[int, ...], list[bool] | None]] = {
    "labels of classes": ({"labels": torch.tensor([1, -100, 2])}, (3,), [True, False, True]),
    "labels of another shape": ({"labels": torch.tensor([1, -100, 2])}, (3, 4), None),
    "labels that are numbers": ({"labels": torch.tensor([1.0, 2.0, 3.0])}, (3,), None),
    "an additive mask": ({"attention_mask": torch.tensor([0.0, -math.inf, 0.0])}, (3,), None),
    "no tensor": ({"labels": [1, 2, 3]}, (3,), None),
    "nothing": ({}, (3,), None),
}


@pytest.mark.parametrize("case", MASKS)
def test_only_a_mask_of_these_rows_is_one(case: str) -> None:
    call, shape, expected = MASKS[case]
    mask = row_mask(call, torch.Size(shape), labels=True, shifted=False)
    assert (None if mask is None else mask.tolist()) == expected


def test_classes_and_features_are_found() -> None:
    assert output_rows(torch.zeros(2, 5, 3, 4)).shape == (2, 3, 4, 5)
    assert output_rows(torch.zeros(2, 5, 3), class_dim=1).shape == (2, 3, 5)
    assert layer_rows(torch.zeros(7)).shape == (7, 1)
    assert layer_rows(torch.zeros(2, 3, 4)).shape == (2, 3, 4)


def test_bad_pairs_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"net: the student's output has shape \[2, 3\], the teacher's \[2, 4\]"):
        loss("mse", torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="use loss='mse'"):
        loss("kl", torch.zeros(2, 1), torch.zeros(2, 1))
