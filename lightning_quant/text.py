"""Causal language models in Lightning: `TextDataModule` packs text to windows, `CausalLMModule` trains and measures."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.text import Perplexity

from lightning_quant.optimizers import make_optimizer
from lightning_quant.precision import QuantPrecision
from lightning_quant.pretrained import load_pretrained
from lightning_quant.qlora import as_dtype

Range = Sequence[int | None]


class Windows(Dataset):
    """Fixed windows of a stream of tokens; what does not fill the last one is left out.

    Args:
        ids: int64 `[tokens]`.
        window: tokens in a window.
    """

    def __init__(self, ids: Tensor, window: int) -> None:
        self.ids = ids[: len(ids) // window * window].view(-1, window)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def read_texts(source: Any, column: str = "text") -> Iterable[str]:
    """Documents of a source: a file or several, strings, or a `datasets` object with that column."""
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"the text file {str(path)!r} does not exist")
        return [path.read_text(encoding="utf-8")]
    if column in (getattr(source, "column_names", None) or ()):
        return (row[column] for row in source)
    found: list[str] = []
    for each in source:
        found += read_texts(each, column) if isinstance(each, os.PathLike) or (isinstance(each, str) and _is_file(each)) else [each]
    return found


def _is_file(text: str) -> bool:
    return len(text) < 4096 and "\n" not in text and Path(text).is_file()


class TextDataModule(L.LightningDataModule):
    """Text in windows of equal length, for causal language models.

    Documents are joined, with the tokenizer's end of text between them, and cut. Batches are
    `{"input_ids": int64 [batch, window], "labels": the same}`.

    Args:
        tokenizer: transformers' tokenizer, or a folder with one.
        train, validation, test: a text file, a list of files or of documents, or a `datasets` object.
        window: tokens in a window.
        batch_size: windows in a batch.
        calibration_windows: windows of the training text, evenly spaced, that `trainer.quantize` sees.
        train_range, validation_range, test_range: which tokens of the source to take, `[from, to]`, as in a slice.
        column: of a `datasets` object.
        num_workers: of the loaders.

    The order in training is drawn from torch's random state: `seed_everything` repeats it, `RandomStateCallback` resumes it.

    Raises:
        MisconfigurationException: a source is too short for one window.
        FileNotFoundError: a file does not exist.

    Example:
        >>> class Letters:
        ...     eos_token_id = None
        ...     def __call__(self, text, **options):
        ...         return {"input_ids": [ord(letter) % 32 for letter in text]}
        >>> data = TextDataModule(Letters(), train=["a text of some letters"], window=4, batch_size=2)
        >>> data.setup("fit")
        >>> next(iter(data.train_dataloader()))["input_ids"].shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        tokenizer: Any,
        train: Any = None,
        validation: Any = None,
        test: Any = None,
        *,
        window: int = 512,
        batch_size: int = 1,
        calibration_windows: int = 64,
        train_range: Range = (None, None),
        validation_range: Range = (None, None),
        test_range: Range = (None, None),
        column: str = "text",
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("window", window), ("batch_size", batch_size), ("calibration_windows", calibration_windows)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise MisconfigurationException(f"TextDataModule {name}={value!r}: an int from 1 on")
        self.tokenizer, self.window, self.batch_size, self.calibration_windows = tokenizer, window, batch_size, calibration_windows
        self.sources = {"train": (train, train_range), "validation": (validation, validation_range), "test": (test, test_range)}
        self.column, self.num_workers = column, num_workers
        self.windows: dict[str, Windows] = {}

    def setup(self, stage: str) -> None:
        wanted = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",)}.get(stage, ())
        for name in wanted:
            self._windows(name)

    def _windows(self, name: str) -> Windows | None:
        source, (start, stop) = self.sources[name]
        if source is None:
            return None
        if name not in self.windows:
            ids = self._tokenize(source)[start:stop]
            if len(ids) < self.window:
                raise MisconfigurationException(
                    f"TextDataModule {name}: {len(ids)} tokens are less than one window of {self.window}: give more text, or a "
                    f"smaller window"
                )
            self.windows[name] = Windows(ids, self.window)
        return self.windows[name]

    def _tokenize(self, source: Any) -> Tensor:
        if isinstance(self.tokenizer, (str, os.PathLike)):
            from transformers import AutoTokenizer

            self.tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
        parts: list[int] = []
        end = self.tokenizer.eos_token_id
        for text in read_texts(source, self.column):
            if parts and end is not None:
                parts.append(end)
            parts += self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor(parts, dtype=torch.int64)

    def _loader(self, name: str) -> Any:
        windows = self._windows(name)
        if windows is None:
            return []
        return DataLoader(windows, self.batch_size, shuffle=name == "train", num_workers=self.num_workers)

    def train_dataloader(self) -> Any:
        return self._loader("train")

    def val_dataloader(self) -> Any:
        return self._loader("validation")

    def test_dataloader(self) -> Any:
        return self._loader("test")

    def calibration_dataloader(self) -> Any:
        """Windows of the training text for `trainer.quantize`, the same in every run."""
        windows = self._windows("train")
        if windows is None:
            raise MisconfigurationException("TextDataModule has no train= to calibrate on")
        count = min(self.calibration_windows, len(windows))
        chosen = torch.arange(count) * len(windows) // count
        return DataLoader(torch.utils.data.Subset(windows, chosen.tolist()), batch_size=self.batch_size)


class CausalLMModule(L.LightningModule):
    """Trains a causal language model of transformers, and measures its perplexity.

    Logs `train_loss`, `val_loss`, `val_perplexity`, `test_loss` and `test_perplexity`. With `QuantPrecision` and a folder, the
    model is packed as its weights are read, and is never in memory in float.

    Args:
        model: the model, or a folder that `save_pretrained` wrote.
        lr: the highest learning rate; it rises over `warmup` and falls to 0 by a cosine.
        optimizer: a name of `make_optimizer`.
        weight_decay: of the optimizer.
        warmup: the share of the training in which the rate rises.
        dtype: of weights that are read from a folder and stay in float, such as `"bfloat16"`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> net = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        ...                                    num_attention_heads=2))
        >>> CausalLMModule(net, lr=1e-3)(torch.zeros(1, 4, dtype=torch.int64)).logits.shape
        torch.Size([1, 4, 50])
    """

    def __init__(
        self,
        model: Any,
        *,
        lr: float = 2e-4,
        optimizer: str = "adamw",
        weight_decay: float = 0.0,
        warmup: float = 0.03,
        dtype: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["model"] if isinstance(model, nn.Module) else [])
        self.lr, self.optimizer, self.weight_decay, self.warmup, self.dtype_name = lr, optimizer, weight_decay, warmup, dtype
        self.folder = None if isinstance(model, nn.Module) else Path(model)
        self.model: Any = model if isinstance(model, nn.Module) else None
        if self.folder is not None and not (self.folder / "config.json").is_file():
            raise FileNotFoundError(f"CausalLMModule model={str(model)!r}: no config.json there; give a folder of save_pretrained")
        self.perplexities = nn.ModuleDict({"val": Perplexity(ignore_index=-100), "test": Perplexity(ignore_index=-100)})

    def configure_model(self) -> None:
        if self.model is not None:
            return
        assert self.folder is not None
        trainer = self._trainer
        plugin = trainer.precision_plugin if trainer is not None else None
        if isinstance(plugin, QuantPrecision):
            self.model = load_pretrained(self.folder, plugin.recipe, dtype=self.dtype_name, backend=plugin.backend).train()
            return
        from transformers import AutoModelForCausalLM

        dtype = "auto" if self.dtype_name is None else as_dtype(self.dtype_name)
        self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=dtype).train()

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        return self.model(input_ids=input_ids, use_cache=False, **options)

    def _loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, and the logits and labels that belong together."""
        known = {key: value for key, value in batch.items() if key != "labels"}
        labels = batch.get("labels", batch["input_ids"])[:, 1:]
        logits = self(**known).logits[:, :-1].float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        return loss, logits, labels

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(batch)[0]
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss

    def _evaluate(self, batch: dict[str, Tensor], stage: str) -> None:
        loss, logits, labels = self._loss(batch)
        metric = self.perplexities[stage]
        metric.update(logits, labels)  # type: ignore[operator]
        size = len(batch["input_ids"])
        self.log(f"{stage}_loss", loss, batch_size=size, sync_dist=True)
        self.log(f"{stage}_perplexity", metric, prog_bar=True, batch_size=size)  # type: ignore[arg-type]

    def on_validation_epoch_start(self) -> None:
        self._reset("val")

    def on_test_epoch_start(self) -> None:
        self._reset("test")

    def _reset(self, stage: str) -> None:
        """What an evaluation in inference mode has left in a metric could not be updated in a fit."""
        self.perplexities[stage].reset()  # type: ignore[operator]

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        known = {key: value for key, value in batch.items() if key != "labels"}
        logits: Tensor = self(**known).logits
        return logits

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self, self.optimizer, lr=self.lr, weight_decay=self.weight_decay)
        steps = self.trainer.estimated_stepping_batches
        if not 0 < steps < float("inf"):
            return optimizer
        rise = max(int(steps * self.warmup), 1)
        parts = [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / rise, total_iters=rise),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(int(steps) - rise, 1)),
        ]
        schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, parts, [rise])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @torch.no_grad()
    def generate(self, prompt: str, tokenizer: Any, max_new_tokens: int = 40, **options: Any) -> str:
        """Continue a prompt; returns what was added to it. `options` are those of transformers' `generate`."""
        training = self.model.training
        self.model.eval()
        given = tokenizer(prompt, return_tensors="pt").to(self.device)
        options = {"do_sample": False, "pad_token_id": tokenizer.eos_token_id, **options}
        out = self.model.generate(**given, max_new_tokens=max_new_tokens, **options)
        self.model.train(training)
        text: str = tokenizer.decode(out[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
        return text
