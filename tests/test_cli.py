from __future__ import annotations

import importlib
import os
import shutil
import site
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_quant as lq
from lightning_quant.cli import main
from lightning_quant.surgery import is_packed, is_prepared
from tests.digits import Classifier, Digits, trainer

ROOT = Path(lq.__file__).parents[1]
COMMAND = Path(sys.executable).with_name("lightning-quant")
QUIET: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
QAT: dict[str, Any] = {"class_path": "lightning_quant.QATCallback", "init_args": {"recipe": "w8a8"}}
Run = Callable[..., tuple[int, str, str]]


def config(**changes: Any) -> dict[str, Any]:
    checkpoint = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"dirpath": "saved", "save_last": True}}
    return {
        "seed_everything": 0,
        "trainer": {**QUIET, "max_epochs": 2, "limit_train_batches": 8, "callbacks": [QAT, checkpoint]},
        "model": {"class_path": "tests.digits.Classifier"},
        "data": {"class_path": "tests.digits.Digits"},
        **changes,
    }


def with_callback(**init_args: Any) -> dict[str, Any]:
    callback = {"class_path": "lightning_quant.QATCallback", "init_args": init_args}
    return config(trainer={**QUIET, "fast_dev_run": True, "callbacks": [callback]})


def without_callback() -> dict[str, Any]:
    return config(trainer=QUIET)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process, in an empty folder; gives the exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["lightning-quant"])

    def call(subcommand: str, settings: dict[str, Any], *args: str) -> tuple[int, str, str]:
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
        capfd.readouterr()
        try:
            main([subcommand, "--config", "config.yaml", *args])
            code = 0
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        return code, *capfd.readouterr()

    return call


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two short fits through the Trainer left: `qat.ckpt`, `float.ckpt`, `packed.ckpt` and the folder `packed`."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    for name, callbacks in (("float", []), ("qat", [lq.QATCallback("w8a8")])):
        host = trainer(2, *callbacks)
        host.fit(Classifier(lr=0.01), datamodule=Digits())
        host.save_checkpoint(folder / f"{name}.ckpt")
    qmodel = host.quantize()
    lq.save_quantized(qmodel, folder / "packed")
    host.validate(qmodel, datamodule=Digits(), verbose=False)
    host.save_checkpoint(folder / "packed.ckpt", weights_only=True)
    return folder


def measured(model: Any) -> float:
    return trainer().validate(model, datamodule=Digits(), verbose=False)[0]["accuracy"]


def printed(out: str) -> float:
    """The accuracy in Lightning's table."""
    return float(next(line for line in out.splitlines() if "accuracy" in line).split()[-2])


# --- the whole way --------------------------------------------------------------------------------------------------


def test_the_console_command_takes_classes_from_the_current_folder(tmp_path: Path) -> None:
    shutil.copy(ROOT / "examples/lightning/digits_net.py", tmp_path / "mine.py")
    settings = config(model={"class_path": "mine.DigitsNet"}, data={"class_path": "mine.DigitsData"})
    del settings["trainer"]["logger"]  # the default logger's folder gets the config
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))

    def command(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([COMMAND, *args], cwd=tmp_path, capture_output=True, text=True, check=False)

    fitted = command("fit", "--config", "config.yaml")
    assert fitted.returncode == 0, fitted.stderr
    used = yaml.safe_load((tmp_path / "lightning_logs/version_0/config_used.yaml").read_text())
    assert used["trainer"]["callbacks"][0]["init_args"]["recipe"] == "w8a8"
    assert (tmp_path / "saved/last.ckpt").is_file()
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == settings

    refused = command("quantize", "--config", "config.yaml", "--recipe", "w9a9")
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
    assert "quantize.recipe" in refused.stderr


def test_without_jsonargparse_the_error_says_what_to_install(tmp_path: Path) -> None:
    for folder in map(Path, site.getsitepackages()):
        for entry in folder.iterdir() if folder.is_dir() else ():
            if "jsonargparse" not in entry.name and not (tmp_path / entry.name).exists():
                (tmp_path / entry.name).symlink_to(entry)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    code = "from lightning_quant.cli import main; main(['fit'])"
    told = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, env=env, check=False)
    assert told.returncode == 1
    assert 'pip install "lightning-quant[cli]"' in told.stderr
    assert "Traceback" not in told.stderr


def test_fit_quantize_validate(run: Run, tmp_path: Path) -> None:
    assert run("fit", config())[0] == 0
    code, out, err = run("quantize", config(), "--ckpt_path", "last", "--output", "packed")
    assert code == 0, err
    assert "BatchNorm" in out
    row = next(line for line in out.splitlines() if line.startswith("accuracy")).split()
    expected = lq.load_quantized(Classifier(), tmp_path / "packed")
    trained = lq.load_from_checkpoint(Classifier, tmp_path / "saved/last.ckpt")
    x = torch.rand(8, 1, 8, 8)
    assert torch.equal(expected(x), lq.convert(trained)(x))
    plain = Classifier()
    state = torch.load(tmp_path / "saved/last.ckpt", weights_only=True)["state_dict"]
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    assert [float(cell) for cell in row[1:3]] == pytest.approx([measured(plain), measured(expected)], abs=1e-4)
    code, out, err = run("validate", config(), "--ckpt_path", "packed")
    assert code == 0, err
    assert printed(out) == pytest.approx(measured(expected))


def test_float_checkpoint_with_a_nested_recipe(run: Run, saved: Path, tmp_path: Path) -> None:
    recipe = {"scheme": "w4a16", "group_size": 16, "ignore": ["net.head"]}
    settings = {**without_callback(), "recipe": recipe, "ckpt_path": str(saved / "float.ckpt"), "output": "out", "compare": False}
    code, out, err = run("quantize", settings)
    assert code == 0, err
    assert "latency" not in out
    packed = lq.load_quantized(Classifier(), tmp_path / "out")
    source = lq.load_from_checkpoint(Classifier, saved / "float.ckpt")
    x = torch.rand(8, 1, 8, 8)
    assert torch.equal(packed(x), lq.quantize(source, recipe)(x))


def test_dry_run_and_fast_dev_run_save_nothing(run: Run, tmp_path: Path) -> None:
    settings = {**without_callback(), "recipe": "w8a8", "output": "out"}
    code, out, _ = run("quantize", settings, "--dry_run", "true")
    assert code == 0
    assert "to be folded" in out
    code, out, err = run("quantize", settings, "--trainer.fast_dev_run", "true")
    assert code == 0, err
    assert "BatchNorm folded" in out
    assert "saved" not in out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["packed", "packed.ckpt", "qat.ckpt"])
@pytest.mark.parametrize("callback", [False, True])
def test_evaluation_in_the_structure_of_the_checkpoint(run: Run, saved: Path, name: str, callback: bool) -> None:
    settings = config() if callback else without_callback()
    code, out, err = run("validate", settings, "--ckpt_path", str(saved / name))
    assert code == 0, err
    assert printed(out) == pytest.approx(measured(lq.load_quantized(Classifier(), saved / "packed")), abs=0.0021)
    assert printed(out) > 0.3  # ten classes: not the untrained model


def test_test_and_predict_run_the_packed_model(run: Run, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "seen_net.py").write_text(
        "from tests.digits import Classifier, Digits\n"
        "class Seen(Classifier):\n"
        "    def test_step(self, batch, batch_idx):\n"
        "        print('test', type(self.net.head).__name__)\n"
        "    def predict_step(self, batch, batch_idx):\n"
        "        print('predict', type(self.net.head).__name__)\n"
        "class Data(Digits):\n"
        "    def val_dataloader(self):\n"
        "        from torch.utils.data import DataLoader\n"
        "        return DataLoader(self.val, batch_size=250)\n"
        "    test_dataloader = predict_dataloader = val_dataloader\n"
    )
    settings = config(model={"class_path": "seen_net.Seen"}, data={"class_path": "seen_net.Data"})
    for subcommand in ("test", "predict"):
        code, out, err = run(subcommand, settings, "--ckpt_path", str(saved / "packed"))
        assert code == 0, err
        assert out.splitlines().count(f"{subcommand} PackedLinear") == 2


def test_hyperparameters_that_a_script_saved_are_the_configured_class_s(run: Run, tmp_path: Path) -> None:
    shutil.copy(ROOT / "examples/lightning/digits_net.py", tmp_path / "wide.py")
    sys.path.insert(0, str(tmp_path))
    host = trainer()
    host.strategy.connect(importlib.import_module("wide").DigitsNet(width=8))
    host.save_checkpoint(tmp_path / "narrow.ckpt", weights_only=True)
    settings = {"trainer": QUIET, "model": {"class_path": "wide.DigitsNet"}, "recipe": "w8a16"}
    code, out, err = run("summary", settings, "--ckpt_path", "narrow.ckpt")
    assert code == 0, err
    weights = next(line for line in out.splitlines() if line.startswith("net.0 ")).split("channel")[1].split()[1]
    assert int(weights) == 8 * 9 * 4


# --- summary --------------------------------------------------------------------------------------------------------


def test_summary_runs_nothing(run: Run, saved: Path) -> None:
    for settings, args, scheme in (
        (without_callback(), ["--recipe", "w4a16"], "int4"),
        (config(), [], "int8"),  # the configured callback's recipe
        (without_callback(), ["--ckpt_path", str(saved / "qat.ckpt")], "int8"),
        (without_callback(), ["--ckpt_path", str(saved / "packed")], "int8"),
        (without_callback(), ["--ckpt_path", str(saved / "float.ckpt"), "--recipe", "w3a16"], "int3"),
    ):
        del settings["data"]
        code, out, err = run("summary", settings, *args)
        assert code == 0, err
        assert f"w: {scheme}" in out
        assert "whole model: " in out


# --- what is refused ------------------------------------------------------------------------------------------------

CALLBACK = "fit.trainer.callbacks"


@pytest.mark.parametrize(
    ("subcommand", "settings", "key", "told"),
    [
        ("fit", with_callback(method="magic"), CALLBACK, "'ste', 'lsq'"),
        ("fit", with_callback(quantize_from="late"), CALLBACK, "float"),
        ("fit", with_callback(freeze_bn_at=1.5), CALLBACK, "float in 0..1"),
        ("fit", with_callback(quantize_from=-1), CALLBACK, "'quantize_from'"),
        ("fit", with_callback(bits={1: 4}), CALLBACK, "from 0 on"),
        ("fit", with_callback(frozen=1), CALLBACK, "frozen"),
        ("fit", with_callback(recipe="w9a9"), CALLBACK, "w8a8-dynamic"),
        ("fit", with_callback(recipe="missing.yaml"), CALLBACK, "missing.yaml"),
        ("fit", with_callback(recipe={"scheme": "w8a8", "bogus": 1}), CALLBACK, "weight_observer_options"),
        ("fit", with_callback(recipe={"scheme": "w8a8", "bits": "four"}), CALLBACK, "bits='four'"),
        ("fit", with_callback(recipe={"scheme": "w8a8", "ignore": 3}), CALLBACK, "'recipe'"),
        ("fit", with_callback(recipe={"schemes": {"net.head": "w9a9"}}), CALLBACK, "w8a8-dynamic"),
        ("fit", config(trainer={"callbacks": [{"class_path": "lightning_quant.QATCallbac"}]}), CALLBACK, "QATCallbac"),
        ("fit", config(model={"class_path": "tests.digits.Nothing"}), "fit.model", "Nothing"),
        ("fit", config(trainer={**QUIET, "max_epochs": "x"}), "fit.trainer.max_epochs", "int"),
        ("fit", config(trainer={**QUIET, "max_epochs": -7}), "fit.trainer", "non-negative"),
        ("quantize", {**config(), "recipe": "w9a9"}, "quantize.recipe", "w8a8-dynamic"),
        ("quantize", {**config(), "recipe": {"bogus": 1}}, "quantize.recipe", "weight_observer_options"),
        ("quantize", {**config(), "recipe": {"scheme": "w8a8", "bits": 9}}, "quantize.recipe", "bits=9"),
        ("quantize", {**config(), "recipe": 3}, "quantize.recipe", "str"),
        ("quantize", config(), "quantize.recipe", "w8a8-dynamic"),
        ("quantize", {**config(), "recipe": "w8a8", "calibration_batches": 0}, "quantize.calibration_batches", "positive"),
        ("quantize", {**config(), "recipe": "w8a8", "output": "config.yaml"}, "quantize.output", "is a file"),
        ("quantize", {**config(), "ckpt_path": "none.ckpt"}, "quantize.ckpt_path", "does not exist"),
        ("quantize", {**config(), "ckpt_path": "last"}, "quantize.ckpt_path", "save_last=True"),
        ("validate", {**config(), "ckpt_path": "none.ckpt"}, "validate.ckpt_path", "does not exist"),
        ("summary", {**without_callback(), "recipe": "w9a9"}, "summary.recipe", "w8a8-dynamic"),
        ("summary", without_callback(), "summary.recipe", "give a recipe"),
    ],
)
def test_bad_values_end_with_their_key(run: Run, subcommand: str, settings: dict[str, Any], key: str, told: str) -> None:
    code, _, err = run(subcommand, settings)
    message = err[err.index("error: ") :]
    assert code == 2
    assert f'Parser key "{key}"' in message
    assert told in message
    assert "Traceback" not in err


def test_a_schedule_that_the_trainer_refuses_ends_without_a_traceback(run: Run) -> None:
    settings = with_callback(recipe="w8a8", freeze_observers_at=0)
    code, _, err = run("fit", settings)
    assert code == 2
    assert "freeze_observers_at=0" in err
    assert "Traceback" not in err


def test_packed_checkpoints_and_second_recipes_are_refused(run: Run, saved: Path) -> None:
    code, _, err = run("quantize", config(), "--ckpt_path", str(saved / "packed.ckpt"))
    assert (code, "quantized already" in err) == (2, True)
    code, _, err = run("quantize", config(), "--ckpt_path", str(saved / "qat.ckpt"), "--recipe", "w4a4")
    assert (code, 'key "quantize.recipe"' in err) == (2, True)


def root(error: BaseException) -> BaseException:
    return error if error.__cause__ is None else root(error.__cause__)


def test_errors_of_the_user_s_own_code_keep_their_traceback(run: Run, tmp_path: Path) -> None:
    (tmp_path / "broken_net.py").write_text(
        "from tests.digits import Classifier\n"
        "class Init(Classifier):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.nothing.at_all\n"
        "class Step(Classifier):\n"
        "    def training_step(self, batch, batch_idx):\n"
        "        raise ValueError('planted')\n"
    )
    with pytest.raises(ValueError, match="nothing") as caught:
        run("fit", config(model={"class_path": "broken_net.Init"}))
    assert isinstance(root(caught.value), AttributeError)
    with pytest.raises(ValueError, match="planted"):
        run("fit", config(model={"class_path": "broken_net.Step"}))


def test_print_config(run: Run) -> None:
    code, out, _ = run("quantize", {**config(), "recipe": {"scheme": "w8a8", "ignore": ["net.head"]}}, "--print_config")
    assert code == 0
    assert yaml.safe_load(out)["recipe"] == {"scheme": "w8a8", "ignore": ["net.head"]}


# --- trainer.quantize(ckpt_path=...) --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qat", "float"])
def test_quantize_takes_a_checkpoint_s_weights_and_leaves_the_model(saved: Path, name: str) -> None:
    model = Classifier()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    recipe = "w8a8" if name == "float" else None
    torch.manual_seed(1)
    qmodel = trainer().quantize(model, Digits(), recipe=recipe, ckpt_path=saved / f"{name}.ckpt", calibration_batches=2)
    source = lq.load_from_checkpoint(Classifier, saved / f"{name}.ckpt")
    torch.manual_seed(1)
    expected = trainer().quantize(source, Digits(), recipe=recipe, calibration_batches=2)
    x = torch.rand(8, 1, 8, 8)
    assert torch.equal(qmodel(x), expected(x))
    assert not is_prepared(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_quantize_best_and_last_of_the_fitted_model(tmp_path: Path) -> None:
    worst = ModelCheckpoint(tmp_path / "worst", monitor="accuracy", mode="min")  # which is not the last
    last = ModelCheckpoint(tmp_path, save_last=True)
    host = trainer(3, lq.QATCallback("w8a8"), worst, last, enable_checkpointing=True, limit_train_batches=8)
    model = Classifier()
    host.fit(model, datamodule=Digits())
    x = torch.rand(8, 1, 8, 8)
    outputs = {}
    for which, path in (("best", worst.best_model_path), ("last", last.last_model_path)):
        outputs[which] = host.quantize(ckpt_path=which)(x)
        assert torch.equal(outputs[which], lq.convert(lq.load_from_checkpoint(Classifier, path))(x))
        assert torch.equal(outputs[which], host.quantize(Classifier(), ckpt_path=path)(x))
    assert torch.equal(outputs["last"], host.quantize()(x))
    assert not torch.equal(outputs["best"], outputs["last"])
    again = trainer(3, ModelCheckpoint(tmp_path, save_last=True), enable_checkpointing=True)  # as in a new process
    assert torch.equal(again.quantize(Classifier(), ckpt_path="last")(x), outputs["last"])


def test_quantize_refuses_what_does_not_fit(saved: Path, tmp_path: Path) -> None:
    host = trainer()
    prepared = lq.load_from_checkpoint(Classifier, saved / "qat.ckpt")
    for path in (saved / "packed.ckpt", saved / "packed"):
        with pytest.raises(ValueError, match="packed model, which is quantized already"):
            host.quantize(Classifier(), ckpt_path=path)
    with pytest.raises(ValueError, match="float model, but the model given is prepared"):
        host.quantize(prepared, ckpt_path=saved / "float.ckpt")
    with pytest.raises(ValueError, match="packed already"):
        host.quantize(host.quantize(prepared), ckpt_path=saved / "qat.ckpt")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        host.quantize(Classifier(), ckpt_path=tmp_path / "none.ckpt")
    with pytest.raises(MisconfigurationException, match="saved no best checkpoint"):
        host.quantize(Classifier(), ckpt_path="best")
    torch.save({"state_dict": {"other": torch.zeros(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="does not fit this Classifier"):
        host.quantize(Classifier(), recipe="w8a16", ckpt_path=tmp_path / "other.ckpt")
    torch.save([1], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="no Lightning checkpoint"):
        host.quantize(Classifier(), recipe="w8a16", ckpt_path=tmp_path / "list.ckpt")


def test_dry_run_of_a_checkpoint_is_its_summary(saved: Path) -> None:
    told = trainer().quantize(Classifier(), ckpt_path=saved / "qat.ckpt", dry_run=True)
    assert told.bytes_before == sum(value.nbytes for value in [*Classifier().parameters(), *Classifier().buffers()])
    assert [row.bytes_after for row in told.rows] == [row.bytes_after for row in lq.summary(packed_of(saved)).rows]


def packed_of(saved: Path) -> Any:
    qmodel = lq.load_quantized(Classifier(), saved / "packed")
    assert is_packed(qmodel)
    return qmodel
