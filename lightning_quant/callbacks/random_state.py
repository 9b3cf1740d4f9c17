"""`RandomStateCallback`: random states in checkpoints, so that a resumed run draws what it would have drawn."""

from __future__ import annotations

import random
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn

from lightning_quant.calibration import has_ranks


def _get() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators, in what `torch.load(weights_only=True)` reads."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert isinstance(keys, np.ndarray)
    return {
        "python": [version, list(words), gauss],
        "numpy": [str(kind), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def _set(state: dict[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"][: torch.cuda.device_count()]])


class RandomStateCallback(L.Callback):
    """Saves the random states of Python, NumPy and torch in checkpoints and restores them on resume, on every rank its own.

    Lightning does not. With it dropout, augmentation in the main process and a `DataLoader`'s shuffling go on as if the run had
    never stopped: from checkpoints at the end of an epoch or of its validation, and within an epoch with a stateful data loader
    (torchdata's `StatefulDataLoader`). It does not help where Lightning itself does not go on as before: it forgets the state of a
    stateful loader in a checkpoint of `ModelCheckpoint(save_on_train_epoch_end=True)`, and skips the validation that was
    still to come if `every_n_train_steps` saved on an epoch's last batch.

    Example:
        >>> trainer = L.Trainer(callbacks=[RandomStateCallback()], logger=False, enable_checkpointing=False, max_epochs=1)
    """

    def __init__(self) -> None:
        super().__init__()
        self._saved: list[dict[str, Any]] | None = None

    def state_dict(self) -> dict[str, Any]:
        states = [_get()]
        if has_ranks():
            states = states * dist.get_world_size()
            dist.all_gather_object(states, _get())
        return {"ranks": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict["ranks"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._saved = None  # trainer.validate(ckpt_path=...) loads callbacks' states, too

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        states, self._saved = self._saved, None
        if states is None:
            return
        if len(states) != trainer.world_size:
            rank_zero_warn(
                f"RandomStateCallback: the checkpoint holds the random states of {len(states)} ranks, and this run has "
                f"{trainer.world_size}: they are not restored, and the run will not go on exactly as before"
            )
            return
        _set(states[trainer.global_rank])
        loop = trainer.fit_loop
        batches = loop.epoch_loop
        epoch_done = batches.restarted_on_train_batch_end and batches.batch_progress.is_last_batch
        if loop.resumed_on_epoch_end or (loop.restarted_mid_epoch and epoch_done):
            # the next epoch's iterator was made before this hook, with other numbers; an unbroken run makes it now
            assert loop._data_fetcher is not None
            iter(loop._data_fetcher)
