"""The maths of distillation: losses on rows of a student's and a teacher's outputs, and which rows count."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

# what torch's and transformers' losses leave out
IGNORE_INDEX = -100


# --- rows -----------------------------------------------------------------------------------------------------------


def output_rows(logits: Tensor, class_dim: int | None = None) -> Tensor:
    """Logits with their classes in the last dimension.

    Args:
        class_dim: where the classes are; by default dimension 1 of four and more dimensions, as in images, else the last one.

    Example:
        >>> output_rows(torch.zeros(2, 5, 8, 8)).shape, output_rows(torch.zeros(2, 8, 5)).shape
        (torch.Size([2, 8, 8, 5]), torch.Size([2, 8, 5]))
    """
    if class_dim is None:
        class_dim = 1 if logits.dim() > 3 else -1
    return logits.movedim(class_dim, -1)


def layer_rows(features: Tensor) -> Tensor:
    """A layer's output in rows: the tokens of `[samples, tokens, features]`, of anything else the samples.

    Example:
        >>> layer_rows(torch.zeros(2, 5, 8)).shape, layer_rows(torch.zeros(2, 3, 4, 4)).shape
        (torch.Size([2, 5, 8]), torch.Size([2, 48]))
    """
    return features if features.dim() == 3 else features.flatten(1) if features.dim() > 1 else features[:, None]


def row_mask(call: Mapping[str, Any], rows: torch.Size, *, labels: bool, shifted: bool) -> Tensor | None:
    """Which rows count, from the keywords that a model was called with; None: all of them.

    Args:
        call: keywords, of which `attention_mask` (integers or bools, 0 for padding) and `labels` are looked at.
        rows: the shape that a mask must have to be for these rows, such as `[samples, tokens]`.
        labels: whether `labels` count: `IGNORE_INDEX` leaves a row out.
        shifted: whether row t predicts label t + 1, as in causal language models of transformers.

    Example:
        >>> call = {"attention_mask": torch.tensor([[1, 1, 0]])}
        >>> row_mask(call, torch.Size([1, 3]), labels=True, shifted=True)
        tensor([[ True,  True, False]])
    """

    def fitting(name: str) -> Tensor | None:
        value = call.get(name)
        fits = isinstance(value, Tensor) and value.shape == rows and not value.is_floating_point()
        return value if fits else None

    mask = None
    if (attention := fitting("attention_mask")) is not None:
        mask = attention != 0
    if labels and (wanted := fitting("labels")) is not None:
        kept = wanted != IGNORE_INDEX
        if shifted:
            kept = torch.cat([kept[:, 1:], torch.zeros_like(kept[:, :1])], dim=1)
        mask = kept if mask is None else mask & kept
    return mask


# --- losses ---------------------------------------------------------------------------------------------------------


def kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The Kullback-Leibler divergence of the student's classes from the teacher's, both softened, times `temperature ** 2`.

    So gradients keep their size whatever the temperature (Hinton et al. 2015, arXiv:1503.02531, section 2).

    Args:
        student, teacher: logits `[rows, classes]`, float32.
        temperature: what logits are divided by.

    Example:
        >>> kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0986123]]), 1.0)  # log 2 - H(1/4, 3/4)
        tensor(0.1308)
    """
    with torch.no_grad():
        logs = (teacher / temperature).log_softmax(-1)
        wanted = logs.exp()
        entropy = -(wanted * logs.clamp(min=torch.finfo(logs.dtype).min)).sum(-1)  # masked logits are -inf
        del logs
    got = (student / temperature).log_softmax(-1).clamp(min=torch.finfo(student.dtype).min)
    return ((-(wanted * got).sum(-1) - entropy) * temperature**2).mean()


def mse(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The mean squared difference of logits (Ba and Caruana 2014, arXiv:1312.6184, section 2.2); no temperature.

    Example:
        >>> mse(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]]), 1.0)
        tensor(2.)
    """
    return (student - teacher).square().mean()


def features(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The squared difference of each row relative to the teacher's mean square in it, averaged over rows; no temperature.

    A few tokens of a language model are hundreds of times larger than the rest (Sun et al. 2024, arXiv:2402.17762, section 2) and
    would be all that counts. Rows that are almost 0 count as a hundredth of the median.

    Example:
        >>> features(torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 2.0]]), 1.0)
        tensor(0.2500)
    """
    size = teacher.square().mean(-1)
    floor = 0.01 * size.median().clamp(min=1e-30)
    return ((student - teacher).square().mean(-1) / size.maximum(floor)).mean()


def cosine(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """One minus the cosine of the angle between rows, averaged; no temperature.

    Example:
        >>> cosine(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0]]), 1.0)
        tensor(0.)
    """
    return (1 - nn.functional.cosine_similarity(student, teacher, dim=-1)).mean()


@dataclass(frozen=True)
class Loss:
    """An entry of `LOSSES`.

    Args:
        function: of rows `[rows, columns]` of the student and the teacher, both float32, and the temperature.
        of: what rows are: the model's output (one row a sample, token or pixel), or a layer's.
    """

    function: Callable[[Tensor, Tensor, float], Tensor]
    of: Literal["output", "layers"]


LOSSES: dict[str, Loss] = {
    "kl": Loss(kl, "output"),
    "mse": Loss(mse, "output"),
    "features": Loss(features, "layers"),
    "cosine": Loss(cosine, "layers"),
}


@dataclass(frozen=True)
class Pair:
    """One output of the student and the teacher's for the same input.

    Args:
        name: of the module, for messages.
        student, teacher: of the same shape.
        call: the keywords of the model's call that it came from.
        shifted: whether its rows predict the next label; see `row_mask`.
    """

    name: str
    student: Tensor
    teacher: Tensor
    call: Mapping[str, Any]
    shifted: bool = False


def pair_loss(name: str, pair: Pair, *, temperature: float = 1.0, class_dim: int | None = None) -> Tensor:
    """One loss of one pair, a scalar; without a row that counts it is 0.

    Args:
        name: a key of `LOSSES`.

    Raises:
        ValueError: shapes differ, or there is only one class.

    Example:
        >>> pair_loss("mse", Pair("head", torch.ones(2, 3), torch.zeros(2, 3), {}))
        tensor(1.)
    """
    loss = LOSSES[name]
    if pair.student.shape != pair.teacher.shape:
        raise ValueError(
            f"{pair.name}: the student's output has shape {list(pair.student.shape)}, the teacher's {list(pair.teacher.shape)}: "
            f"give a teacher with the same outputs, or name {'layers' if loss.of == 'layers' else 'an output'} of the same shape"
        )
    of_output = loss.of == "output"
    make = (lambda x: output_rows(x, class_dim)) if of_output else layer_rows
    student, teacher = make(pair.student.float()), make(pair.teacher.detach().float())
    if name == "kl" and student.shape[-1] < 2:
        raise ValueError(f"{pair.name}: 'kl' compares classes, and there is one (shape {list(pair.student.shape)}): use loss='mse'")
    mask = row_mask(pair.call, student.shape[:-1], labels=of_output, shifted=pair.shifted)
    if mask is None:
        student, teacher = student.reshape(-1, student.shape[-1]), teacher.reshape(-1, teacher.shape[-1])
    else:
        student, teacher = student[mask], teacher[mask]
    return loss.function(student, teacher, temperature) if student.numel() else student.sum()
