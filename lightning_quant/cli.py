"""`lightning-quant`: `fit`, `validate`, `test`, `predict`, `quantize` and `summary` from a config file, through `LightningCLI`."""

from __future__ import annotations

import contextlib
import copy
import importlib
import os
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.imports import RequirementCache

from lightning_quant.callbacks import QATCallback
from lightning_quant.checkpoint import checkpoint_kind, configured, init_arguments, restore
from lightning_quant.compare import compare as compare_models
from lightning_quant.plan import plan_model
from lightning_quant.recipe import as_recipe
from lightning_quant.report import plan_summary
from lightning_quant.report import summary as summarize
from lightning_quant.serialization import save_quantized
from lightning_quant.surgery import is_packed, is_prepared
from lightning_quant.trainer import Trainer

# what these raise is about tensors: its traceback tells more than a key
_NUMERIC = ("numerics", "packing", "observers", "fake_quant", "kernels", "nn", "fold")
_JSONARGPARSE = RequirementCache("jsonargparse[signatures]>=4.39")


class CommandTrainer(Trainer):
    """`lq.Trainer` with the two methods that the command line adds."""

    def quantize(  # type: ignore[override]
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        recipe: str | dict[str, Any] | None = None,
        calibration_batches: int = 128,
        dry_run: bool = False,
        ckpt_path: str | Path | None = None,
        output: str | Path | None = None,
        compare: bool = True,
        work_dir: str | Path | None = None,
        memory_budget: int | str | None = None,
        progress: bool = True,
    ) -> Any:
        """Quantize and pack a model, print what was done to it and what it cost, and save it.

        Args:
            recipe: a preset's name, a YAML file's path or a mapping of Recipe's fields; a QAT checkpoint has its own.
            calibration_batches: how many batches to use at most, on each rank.
            dry_run: print what would be done, and do nothing.
            ckpt_path: a float or QAT checkpoint, or "last" of the configured ModelCheckpoint; else the model as it is constructed.
            output: the folder to save to, for lq.load_quantized; other files in it are left alone. Not saved under fast_dev_run.
            compare: validate the model in float and quantized, and print both, if there is validation data.
            work_dir: a folder in which the recipe's algorithms keep what is done, so that a run that was killed goes on there.
            memory_budget: how many bytes of activations algorithms keep in memory, such as "500 MB"; the rest goes to files.
            progress: show a bar while algorithms run, where standard error is a terminal.
        """
        if ckpt_path is not None:
            ckpt_path = self._path(ckpt_path)
        # a configured QATCallback prepares models, and loggers would get two validations of one step
        with _only_progress(self):
            model = configured(model)
            options: dict[str, Any] = {"recipe": recipe, "calibration_batches": calibration_batches, "ckpt_path": ckpt_path}
            options.update(work_dir=work_dir, memory_budget=memory_budget, progress=progress)
            result = super().quantize(model, datamodule, dry_run=dry_run, **options)
            if dry_run:
                self._print(result)
                return result
            self._print(summarize(result))
            if output is not None and not getattr(self, "fast_dev_run", False):
                # without a process group yet, every rank is on its own, and only the first may write
                if self.is_global_zero or torch.distributed.is_initialized():
                    save_quantized(result, output)
                self._print(f"saved to {output}")
            if compare and _validates(model, datamodule):
                if ckpt_path is not None:
                    self._load_float(model, ckpt_path)
                compare_models(model, result, trainer=self, datamodule=datamodule)
        return result

    def summary(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        recipe: str | dict[str, Any] | None = None,
        ckpt_path: str | Path | None = None,
    ) -> Any:
        """Print what a recipe would do to the model, or what a checkpoint's did, module by module; nothing is run.

        Args:
            recipe: a preset's name, a YAML file's path or a mapping of Recipe's fields; by default that of the checkpoint, or of
                the configured QATCallback.
            ckpt_path: a QAT or packed checkpoint, "last" of the configured ModelCheckpoint, or a folder of lq.save_quantized.
        """
        if ckpt_path is not None:
            model = restore(model, self._path(ckpt_path))
        if is_packed(model) or is_prepared(model):
            if recipe is not None:
                raise ValueError(f"ckpt_path={str(ckpt_path)!r} is quantized with a recipe of its own: leave recipe out")
            told = summarize(model)
        else:
            callbacks: list[L.Callback] = self.callbacks  # type: ignore[attr-defined]
            chosen = recipe or next((each.recipe for each in callbacks if isinstance(each, QATCallback)), None)
            if chosen is None:
                raise ValueError("recipe=None: give a recipe, a quantized ckpt_path, or a QATCallback in trainer.callbacks")
            model = configured(model)
            told = plan_summary(model, plan_model(model, chosen, training=recipe is None))
        self._print(told)
        return told

    def _print(self, told: object) -> None:
        if self.is_global_zero:
            print(told)

    def _load_float(self, model: L.LightningModule, ckpt_path: str | Path) -> None:
        """What a QAT checkpoint's weights are in float: quantizers are left out, everything else keeps its name."""
        state = torch.load(ckpt_path, map_location="cpu", weights_only=True)["state_dict"]
        model.load_state_dict({name: state[name] for name in model.state_dict() if name in state}, strict=model.strict_loading)


@contextlib.contextmanager
def _only_progress(trainer: L.Trainer) -> Iterator[None]:
    callbacks, loggers = trainer.callbacks, trainer.loggers  # type: ignore[attr-defined]
    trainer.callbacks = [each for each in callbacks if isinstance(each, ProgressBar)]  # type: ignore[attr-defined]
    trainer.loggers = [DummyLogger()]  # steps may use self.logger.experiment
    try:
        yield
    finally:
        trainer.callbacks, trainer.loggers = callbacks, loggers  # type: ignore[attr-defined]


def _validates(model: L.LightningModule, datamodule: L.LightningDataModule | None) -> bool:
    data = model if datamodule is None else datamodule
    return is_overridden("validation_step", model) and (
        is_overridden("val_dataloader", data) or is_overridden("val_dataloader", model)
    )


class Parser(LightningArgumentParser):
    """Names the subcommand in the key of an error."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        subcommand = self.prog.split()[-1]
        if subcommand in QuantCLI.subcommands():
            message = message.replace('Parser key "', f'Parser key "{subcommand}.', 1)
        super().error(message, ex)


class SaveConfig(SaveConfigCallback):
    """Saves the config where a logger has a folder for the run; else the folder would be the current one."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)


class QuantCLI(LightningCLI):
    """`LightningCLI` with `quantize` and `summary`, and with checkpoints of packed models in `validate`, `test` and `predict`.

    Classes are given by `class_path`. A value that a constructor refuses ends like one that the parser refuses: one message with
    its key, exit code 2; `JSONARGPARSE_DEBUG=1` shows the traceback instead.

    Args:
        options: those of `LightningCLI`; by default the model and the datamodule are any class.

    Example:
        >>> sorted(QuantCLI.subcommands())
        ['fit', 'predict', 'quantize', 'summary', 'test', 'validate']
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        options.setdefault("trainer_class", CommandTrainer)
        options.setdefault("parser_class", Parser)
        options.setdefault("save_config_callback", SaveConfig)
        # a "config.yaml" may be the user's own: some loggers' folder is the current one
        options.setdefault("save_config_kwargs", {"config_filename": "config_used.yaml", "overwrite": True})
        super().__init__(*args, **options)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        data = {"model", "datamodule", "dataloaders"}
        return {**LightningCLI.subcommands(), "quantize": data, "summary": data}

    # --- values that are refused after parsing ---

    def before_instantiate_classes(self) -> None:
        """Refuse what needs no model to be refused."""
        config = self.config[self.subcommand]
        if config.get("recipe") is not None:
            try:
                as_recipe(config.recipe)
            except (ValueError, TypeError) as error:
                self._refuse("recipe", str(error), error)
        if config.get("output") is not None and Path(config.output).exists() and not Path(config.output).is_dir():
            self._refuse("output", f"{config.output} is a file: give a folder")
        path = str(config.get("ckpt_path") or "last")
        local = path not in ("best", "last", "hpc", "registry") and not re.match(r"\w+:", path)
        if local and not Path(path).exists():
            self._refuse("ckpt_path", f"{path} does not exist")

    def _parse_ckpt_path(self) -> None:
        """Lightning takes hyperparameters that a script saved for those of the base class; they are of the configured one."""
        config = self.config[self.config.subcommand]
        path, model = config.get("ckpt_path"), config.get("model")
        if path is not None and Path(path).is_file() and model is not None:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            if "_class_path" not in checkpoint.get(L.LightningModule.CHECKPOINT_HYPER_PARAMS_KEY, {}):
                module, _, name = model.class_path.rpartition(".")
                saved = init_arguments(getattr(importlib.import_module(module), name), checkpoint, {})
                told = {"class_path": model.class_path, "init_args": saved}
                self.config = self.parser.parse_object({self.config.subcommand: {"model": told}}, self.config)
                return
        super()._parse_ckpt_path()

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__ is not None:  # the parser wraps whatever a constructor raises
                cause = cause.__cause__
            key, class_path, given = _constructor(cause, self.config[self.subcommand])
            name = _argument(str(cause), given)
            if not key or not (isinstance(cause, (ValueError, MisconfigurationException)) or name == "recipe"):
                raise
            where = f"Problem with given class_path {class_path!r}" if class_path else "Problem with its values"
            self._refuse(key, f"{where}{f', key {name!r}' if name else ''}:\n    {cause}", cause)

    def _run_subcommand(self, subcommand: str) -> None:
        with self._refusing():
            super()._run_subcommand(subcommand)

    @contextlib.contextmanager
    def _refusing(self, key: str = "") -> Iterator[None]:
        """Report what Lightning and this package refuse; an error of the user's own code keeps its traceback."""
        try:
            yield
        except (MisconfigurationException, ValueError, FileNotFoundError) as error:
            *_, (frame, _) = traceback.walk_tb(error.__traceback__)
            package, _, module = frame.f_globals.get("__name__", "").partition(".")
            ours = package == __package__ and not module.startswith(_NUMERIC)
            if not ours and not isinstance(error, MisconfigurationException):
                raise
            config = _values(self.config[self.subcommand])
            options = {name: config.get(name) for name in self._subcommand_method_arguments[str(self.subcommand)]}
            self._refuse(key or _argument(str(error), options), str(error), error)

    def _refuse(self, key: str, message: str, error: BaseException | None = None) -> NoReturn:
        cause = error if isinstance(error, Exception) else None
        self._parser(self.subcommand).error(f'Parser key "{key}":\n  {message}' if key else message, cause)

    # --- checkpoints of quantized models ---

    def _take_structure(self) -> None:
        """Evaluate what a checkpoint holds in its own structure, where the configured model is float."""
        config = self.config_init[self.subcommand]
        path = config.get("ckpt_path")
        if path is None or not Path(path).exists():  # "best", "last", or for Lightning to refuse
            return
        callbacks: list[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        prepares = any(isinstance(each, QATCallback) for each in callbacks)
        kind = checkpoint_kind(path)
        if kind == "packed" or (kind == "fake" and not prepares):
            self.model, config["ckpt_path"] = restore(self.model, path), None

    before_validate = before_test = before_predict = _take_structure


def _constructor(error: BaseException, config: Any) -> tuple[str, str, dict[str, Any]]:
    """The key, the class_path and the arguments of the configured class whose constructor raised; empty if none did."""
    classes: dict[str, tuple[str, str, dict[str, Any]]] = {}
    for key, node in _classes(config):
        classes.setdefault(node["class_path"].rpartition(".")[2], (key, node["class_path"], _values(node.get("init_args") or {})))
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self") if frame.f_code.co_name == "__init__" else None
        if isinstance(owner, L.Trainer):
            return "trainer", "", _values(config["trainer"])
        if owner is not None and type(owner).__name__ in classes:
            return classes[type(owner).__name__]
    return "", "", {}


def _classes(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every `class_path` of a config with its key; the items of a list have that of the list, as in the parser's own errors."""
    if isinstance(node, list):
        for item in node:
            yield from _classes(item, key)
    elif isinstance(node, dict) or type(node).__name__ == "Namespace":
        values = _values(node)
        if isinstance(values.get("class_path"), str):
            yield key, values
        for name, value in values.items():
            yield from _classes(value, f"{key}.{name}".lstrip("."))


def _values(node: Any) -> dict[str, Any]:
    return node if isinstance(node, dict) else vars(node)


def _argument(message: str, given: Any) -> str:
    """The argument that a message is about: it says `name=value`, quotes the name, or is what `as_recipe` says."""
    names = [name for name in given if re.search(rf"\b{re.escape(name)}=|`{re.escape(name)}`", message)]
    if "recipe" in given:
        try:
            as_recipe(given["recipe"])
        except Exception as error:
            if str(error) == message or (given["recipe"] is None and "needs a recipe" in message):
                return "recipe"
        if "leave recipe out" in message:
            return "recipe"
    return names[0] if len(names) == 1 else ""


def main(args: list[str] | None = None) -> None:
    """The console command `lightning-quant`.

    Args:
        args: instead of `sys.argv[1:]`.
    """
    if not _JSONARGPARSE:
        raise SystemExit(f'lightning-quant needs jsonargparse: pip install "lightning-quant[cli]" ({_JSONARGPARSE})')
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:  # as `python -m` does; a console script has only its own folder
        sys.path.insert(0, here)
    QuantCLI(args=copy.copy(args))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # Lightning leaves gloo's group to the end of the process, whose threads may then abort it
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
