"""The command line: a checkpoint's options under explicit flags, reports, errors in one line."""

import hashlib
import inspect
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import SMALL_DIGITS, TINY, DigitsRun, Outcome, Run
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.cli import LightningCLI
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LRScheduler

import train
from cifar_datamodule import CIFARDataModule
from cifar_resnet import cli
from cifar_resnet.checkpoint import read_checkpoint
from cifar_resnet.cli import native_precision
from cifar_resnet.figures import FIGURES
from cifar_resnet.images import evaluation_view
from cifar_resnet.runs import read_scalars
from resnet_module import ResNet, ResNetModule

PROJECT = Path(train.__file__).parent
STOPPING = "--trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor=val/acc"
PLATEAU = (
    "--model.lr_scheduler lightning.pytorch.cli.ReduceLROnPlateau "
    "--model.lr_scheduler.monitor val/acc"
)


def config_of(version: int = 0) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(
        Path(f"lightning_logs/version_{version}/config.yaml").read_text()
    )
    return config


def error_of(outcome: Outcome) -> str:
    """The one line in which a command ended."""
    assert outcome.code == 1, outcome.out + outcome.err
    assert "Traceback" not in outcome.err
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    return line


def test_checkpoint_brings_its_options(run: Run, best: Path) -> None:
    """Data, network and scaling need not be given again; explicit flags override the data's."""
    outcome = run("test", "--ckpt", str(best))
    assert outcome.code == 0, outcome.err
    report = json.loads(best.with_name("test.json").read_text())
    assert report["images"] == 360
    assert report["data"]["evaluation"] == "zoom"
    assert f"test/acc {report['acc']:.4f}" in outcome.out
    assert report["acc"] > 0.15  # it has learnt something in its three epochs
    assert run("test", "--ckpt", str(best), "--data.evaluation=native").code == 0
    native = json.loads(best.with_name("test.json").read_text())
    assert native["data"]["evaluation"] == "native"
    assert native["loss"] != report["loss"]


def test_reports_lie_beside_the_checkpoint(run: Run, best: Path) -> None:
    """The mirrored accuracy is that of the mean of both probabilities."""
    assert run("test", "--ckpt", str(best), "--mirror").code == 0
    assert run("validate", "--ckpt", str(best)).code == 0
    names = {path.name for path in best.parent.iterdir()} - {"best.ckpt"}
    files = ("predictions.csv", *(f"{name}.png" for name in FIGURES))
    assert names == {"test.json", "validate.json", *files, *(f"validate_{name}" for name in files)}
    test, validation = (
        json.loads(best.with_name(f"{n}.json").read_text()) for n in ("test", "validate")
    )
    assert "acc_mirrored" not in validation
    assert (test["images"], validation["images"]) == (360, 200)
    assert test["sha256"] == hashlib.sha256(best.read_bytes()).hexdigest()

    checkpoint = read_checkpoint(best)
    module, data = (c.from_checkpoint(checkpoint) for c in (ResNetModule, CIFARDataModule))
    data.setup("test")
    images = evaluation_view(data.test_set.images / 255, data.evaluation)
    with torch.no_grad():
        mean = (module(images).softmax(1) + module(images.flip(3)).softmax(1)) / 2
    expected = float((mean.argmax(1) == data.test_set.labels).double().mean())
    assert test["acc_mirrored"] == pytest.approx(expected)
    assert test["acc_mirrored"] != test["acc"]


def test_optimizer_that_is_gone_hinders_no_test(run: Run, best: Path) -> None:
    checkpoint = torch.load(best, weights_only=True)
    for name in ("optimizer", "lr_scheduler"):
        checkpoint["hyper_parameters"][name] = {"class_path": "gone", "init_args": {"lr": 1}}
    torch.save(checkpoint, best)
    outcome = run("test", "--ckpt", str(best))
    assert outcome.code == 0, outcome.err


def halve_each_epoch(optimizer: Optimizer) -> LRScheduler:
    return ExponentialLR(optimizer, gamma=0.5)


def test_scheduler_may_be_a_function(run: Run) -> None:
    schedule = f"--model.lr_scheduler={__name__}.halve_each_epoch"
    outcome = run("fit", *SMALL_DIGITS, "--trainer.max_epochs=2", schedule)
    assert outcome.code == 0, outcome.err
    assert [rate for _, rate in read_scalars(Path("lightning_logs/version_0"))["lr"]] == [
        pytest.approx(rate) for rate in (1e-3, 5e-4)
    ]
    resumed = run("fit", "--ckpt=last", "--trainer.max_epochs=3")
    assert resumed.code == 0, resumed.err


def test_options_and_seed_survive_a_checkpoint_that_has_lost_its_run(run: Run) -> None:
    """As YAML 1e-05 would come back as text; an emoji in ASCII is nothing that YAML reads."""
    options = ["--model.optimizer=SGD", "--model.optimizer.weight_decay=1e-05", "--data.root=🐶"]
    options.append("--seed_everything=1")
    run("fit", *SMALL_DIGITS, *options, "--trainer.max_epochs=1")
    shutil.copy("lightning_logs/version_0/checkpoints/last.ckpt", "mine.ckpt")
    resumed = run("fit", "--ckpt=mine.ckpt", "--trainer.max_epochs=2")
    assert resumed.code == 0, resumed.err
    assert "options of the trainer and of checkpoints" in resumed.out
    assert config_of(1)["seed_everything"] == 1
    last = read_checkpoint(Path("lightning_logs/version_1/checkpoints/last.ckpt"))
    assert last["hyper_parameters"]["optimizer"]["init_args"]["weight_decay"] == 1e-05
    data = last["datamodule_hyper_parameters"]
    assert (data["root"], data["seed"]) == ("🐶", 1)


def test_slurm_gives_ranks_unless_torchrun_or_the_user_does(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[list[str]] = []

    def stop(cli: Any, plugins: list[Any], **kwargs: Any) -> None:
        given.append([type(plugin).__name__ for plugin in plugins])
        assert not any(getattr(plugin, "auto_requeue", False) for plugin in plugins)
        sys.exit()

    monkeypatch.setattr(LightningCLI, "instantiate_trainer", stop)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    run("fit", *SMALL_DIGITS)
    run("fit", *SMALL_DIGITS, "--trainer.plugins=LightningEnvironment")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    run("fit", *SMALL_DIGITS)
    ours = "AtomicCheckpointIO"
    assert given == [[ours, "SLURMEnvironment"], ["LightningEnvironment", ours], [ours]]


def test_changed_data_are_reported(run: Run, digits_run: DigitsRun) -> None:
    shutil.copytree(digits_run.folder, "run")
    starts = json.loads(Path("run/run.json").read_text())
    starts[-1]["data"]["checksum"] = "sha256:0"
    Path("run/run.json").write_text(json.dumps(starts))
    options = ["--data.augmentation=pad"]
    for epochs, expected in ((4, True), (5, False)):
        limit = f"--trainer.max_epochs={epochs}"
        outcome = run("fit", "--ckpt=run/checkpoints/last.ckpt", limit, *options)
        option = "Note: data.augmentation is pad, and was zoom so far in this run"
        for note in (option, "Note: the images are not those"):
            assert (note in outcome.out) == expected


def test_checkpoint_in_a_configuration_is_refused(run: Run, best: Path) -> None:
    Path("c.yaml").write_text("ckpt: last")
    for command in (["fit"], ["test", "--ckpt", str(best)]):
        line = error_of(run(*command, "--config=c.yaml"))
        assert "ckpt is 'last' in a configuration: give it as --ckpt" in line
    Path("c.yaml").write_text("ckpt: null")  # as every run's configuration has it
    assert run("test", "--ckpt", str(best), "--config=c.yaml").code == 0


def test_printed_configuration_is_what_would_run(
    run: Run, digits_run: DigitsRun, tmp_path: Path
) -> None:
    """Options of the checkpoint under the given flags, wherever these stand."""
    last = str(digits_run.best.with_name("last.ckpt"))
    printed = run("fit", "--data.flip=false", "--ckpt", last, "--print_config")
    assert printed.code == 0, printed.err
    config = yaml.safe_load(printed.out)
    assert (config["model"]["width"], config["data"]["flip"]) == (4, False)
    assert (config["trainer"]["max_epochs"], config["ckpt"]) == (3, None)
    Path("printed.yaml").write_text(printed.out)
    again = run("fit", "--config=printed.yaml", "--trainer.max_epochs=1")
    assert again.code == 0, again.err
    assert config_of()["data"] == config["data"]


def test_flags_reach_into_a_runs_callbacks_and_scheduler(run: Run) -> None:
    callback = "--trainer.callbacks"
    stopping = [f"{callback}=EarlyStopping", f"{callback}.monitor=val/loss", f"{callback}.mode=min"]
    options = [*SMALL_DIGITS, "--trainer.max_epochs=1", "--data.val_size=200", *stopping]
    assert run("fit", *options).code == 0
    more = [f"{callback}.patience=7", "--ckpt", "last", f"{callback}+=LearningRateMonitor"]
    printed = yaml.safe_load(run("fit", *more, "--print_config").out)
    first, second = printed["trainer"]["callbacks"]
    assert first["init_args"]["patience"] == 7
    assert first["init_args"]["monitor"] == "val/loss"
    assert second["class_path"].endswith("LearningRateMonitor")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.lr_scheduler.gamma=0.5"], "lr_scheduler.init_args.gamma is 0.5"),
        (["--model.lr_scheduler=null"], "model.lr_scheduler.class_path is None, but"),
        (["--model.optimizer.lr=0.1"], "model.optimizer.init_args.lr is 0.1, but"),
        (["--model.activation=silu"], "model.activation is silu, but"),
    ],
)
def test_a_run_that_would_go_on_otherwise_is_refused(
    run: Run, digits_run: DigitsRun, options: list[str], message: str
) -> None:
    shutil.copytree(digits_run.folder, "run")
    before = Path("run/config.yaml").read_bytes()
    resumed = run("fit", "--ckpt=run/checkpoints/last.ckpt", "--trainer.max_epochs=4", *options)
    assert message in error_of(resumed)
    assert Path("run/config.yaml").read_bytes() == before


def test_run_of_version_0_1_0_resumes(run: Run) -> None:
    """Its configuration has options that are gone."""
    shutil.copytree(PROJECT / "tests/run_0.1.0", "lightning_logs/version_0")
    assert "mode" in config_of()["best_checkpoint"]
    resumed = run("fit", "--ckpt=last", "--trainer.max_epochs=2")
    assert resumed.code == 0, resumed.err
    assert "Epoch 2/2" in resumed.out
    assert "Note: " not in resumed.out
    assert run("test", "--ckpt=last").code == 0


@pytest.mark.parametrize("where", ["make_shortcut", "ResNetModule.training_step"])
@pytest.mark.parametrize("kind", [AttributeError, TypeError, KeyError])
def test_bugs_keep_their_traceback(
    run: Run, monkeypatch: pytest.MonkeyPatch, kind: type[Exception], where: str
) -> None:
    def bug(*args: Any) -> None:
        raise kind("a bug")

    monkeypatch.setattr(f"resnet_module.{where}", bug)
    with pytest.raises(kind, match="a bug"):
        run("fit", *SMALL_DIGITS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("fit --model.width 0", 'Parser key "model.width": Not of type PositiveInt'),
        ("fit --model.input_mean [0,0,0]", "input_mean and input_std belong together"),
        ("fit --data.dataset cifar11", "dataset is 'cifar11': choose cifar10, cifar100, svhn"),
        ("fit --trainer.accelerator gpu", "No supported gpu backend found"),
        ("fit --config broken.yaml", "Problems parsing config"),
        ("fit --ckpt", "has a last.ckpt"),
        ("test", "has a best.ckpt"),
        (f"fit {STOPPING}", "EarlyStopping.monitor is val/acc, and mode min would keep the worst"),
        (f"fit {PLATEAU}", "model.lr_scheduler.monitor is val/acc, and mode min would keep the"),
        ("fit --seed_everything true", "seed_everything"),
        ("fit --seed_everything 5000000000", "seed_everything"),
        ("fit --ckpt=", "ckpt is '': that is a folder"),  # a script's variable that is not set
        ("test --ckpt nowhere.ckpt", "ckpt is 'nowhere.ckpt': there is no such file"),
        ("test --ckpt .", "ckpt is '.': that is a folder"),
        ("validate --ckpt older.ckpt --data.val_size 0", "no image was"),
        ("validate --ckpt older.ckpt --data.val_size 9", "val_size is 9, but the checkpoint was"),
        ("fit --ckpt older.ckpt --data.val_size 9", "data.val_size is 9, but the checkpoint was"),
        ("test --ckpt older.ckpt --trainer.limit_test_batches 0", "no image was tested"),
        ("validate --ckpt older.ckpt --trainer.limit_val_batches 0", "no image was"),
        ("test --ckpt older.ckpt --model.width 8", "model.width is 8, but the checkpoint"),
        ("test --ckpt older.ckpt --model.normalize false", "model.normalize is False, but"),
    ],
)
def test_errors_are_one_line(run: Run, options: str, message: str) -> None:
    Path("broken.yaml").write_text("model: {")
    shutil.copy(PROJECT / "tests/older.ckpt", "older.ckpt")
    assert message in error_of(run(*options.split()))
    assert not Path("lightning_logs").exists()


@pytest.mark.parametrize(
    ("accelerator", "gpu", "cpu", "precision"),
    [
        ("auto", None, None, "32-true"),
        ("auto", None, "amx_bf16", "bf16-mixed"),
        ("gpu", "with bf16", None, "bf16-mixed"),
        ("auto", "without", "avx512_bf16", "32-true"),
        ("auto", "Apple's", "avx512_bf16", "32-true"),
        ("cpu", "with bf16", None, "32-true"),
    ],
)
def test_default_precision_is_what_the_device_computes_in(
    accelerator: str,
    gpu: str | None,
    cpu: str | None,
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = gpu in ("with bf16", "without")
    for kind, found in ((CUDAAccelerator, cuda), (MPSAccelerator, gpu == "Apple's")):
        monkeypatch.setattr(kind, "is_available", lambda found=found: found)

    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return including_emulation or gpu == "with bf16"

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, cpu: True})
    assert native_precision(accelerator) == precision


def test_run_without_a_precision_takes_the_devices(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "native_precision", lambda accelerator: "bf16-mixed")
    options = ["--trainer.precision=null", "--trainer.limit_train_batches=1"]
    outcome = run("fit", *SMALL_DIGITS, *options, "--trainer.max_epochs=1")
    assert outcome.code == 0, outcome.err
    assert "No GPU found: running on the CPU" in outcome.out
    assert "Precision: bf16-mixed, which the hardware computes natively\n" in outcome.out
    (start,) = json.loads(Path("lightning_logs/version_0/run.json").read_text())
    assert start["precision"] == "bf16-mixed"


def test_data_of_other_classes_is_refused(run: Run, best: Path) -> None:
    state = torch.load(best, weights_only=True)
    torch.save(state | {"class_names": [*"abcdefghij"]}, best)
    outcome = run("test", "--ckpt", str(best))
    assert "trained on the classes ['a', " in error_of(outcome)


def test_bare_network_is_tested_with_a_given_scaling(run: Run) -> None:
    torch.manual_seed(0)
    network = ResNet((1, 1, 1), width=4)
    torch.save({"net": network.state_dict(), "acc": 93.1}, "bare.pkl")
    scaling = ["--model.input_mean=[0.5,0.5,0.5]", "--model.input_std=[0.2,0.2,0.2]"]
    outcome = run("test", "--ckpt=bare.pkl", "--data.dataset=digits", *scaling)
    assert outcome.code == 0, outcome.err
    loss = json.loads(Path("test.json").read_text())["loss"]
    assert run("test", "--ckpt=bare.pkl", "--data.dataset=digits").code == 0
    assert json.loads(Path("test.json").read_text())["loss"] != loss
    assert "holds weights only" in error_of(run("fit", "--ckpt=bare.pkl"))


def test_weights_without_training_state_are_tested_with_their_options(run: Run, best: Path) -> None:
    """As ModelCheckpoint(save_weights_only=True) leaves them."""
    assert run("test", "--ckpt", str(best)).code == 0
    whole = json.loads(Path("test.json").read_text())
    state = torch.load(best, weights_only=True)
    training = ("callbacks", "optimizer_states", "lr_schedulers")
    torch.save({name: value for name, value in state.items() if name not in training}, best)
    assert run("test", "--ckpt", str(best)).code == 0
    alone = json.loads(Path("test.json").read_text())
    assert (alone["loss"], alone["acc"]) == (whole["loss"], whole["acc"])
    assert "holds weights only" in error_of(run("fit", "--ckpt", str(best)))


RECIPES = sorted((PROJECT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=[recipe.stem for recipe in RECIPES])
def test_recipe_trains(run: Run, cifar10: Path, recipe: Path) -> None:
    short = [*TINY, "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
    options = ["--data.val_size=50", "--config", str(recipe), f"--data.root={cifar10}", *short]
    outcome = run("fit", *options)
    assert outcome.code == 0, outcome.err
    last = read_checkpoint(Path("lightning_logs/version_0/checkpoints/last.ckpt"))
    assert last["global_step"] == 2


def test_help_lists_every_option(run: Run) -> None:
    listed = set(re.findall(r"^  --([\w.]+)", run("fit", "--help").out, re.MULTILINE))
    for prefix, kinds in (("model", (ResNetModule, ResNet)), ("data", (CIFARDataModule,))):
        names = {name for kind in kinds for name in inspect.signature(kind).parameters}
        # Of ResNetModule's signature `network` stands for ResNet's; two follow from other options.
        expected = {f"{prefix}.{name}" for name in names - {"network", "num_classes", "seed"}}
        found = {name for name in listed if re.fullmatch(rf"{prefix}\.\w+", name)}
        assert found - {f"{prefix}.help"} == expected
    assert {"ckpt", "mirror"} < listed
