"""The command line: what a user types, sees and finds on the disk."""

import csv
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import SMALL_DIGITS, TINY, Run, pack
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torchvision.datasets import CIFAR10

import train
from resnet_module import ResNet

PROJECT = Path(train.__file__).parent
no_gpu = pytest.mark.skipif(train.gpu_found(), reason="there is a GPU")


def accuracy(out: str) -> float:
    found = re.search(r"test/acc\W+([\d.]+)", out)
    assert found, out
    return float(found[1])


def load(path: str) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def fit_digits(run: Run, *options: str) -> str:
    outcome = run("fit", *SMALL_DIGITS, "--trainer.max_epochs=2", *options)
    assert outcome.code == 0, outcome.err
    return outcome.out


def test_fit_leaves_a_complete_run(run: Run) -> None:
    out = fit_digits(run, "--periodic_checkpoint.every_n_epochs=2")
    folder = Path("lightning_logs/version_0")
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {"best.ckpt", "last.ckpt", "epoch_1.ckpt"}
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["trainer"]["max_epochs"] == 2
    assert config["data"]["val_size"] == 200
    assert config["model"]["optimizer"]["class_path"] == "torch.optim.Adam"
    assert yaml.safe_load((folder / "hparams.yaml").read_text())["width"] == 4

    best = "lightning_logs/version_0/checkpoints/best.ckpt"
    assert f"python train.py test --ckpt {best}" in out
    events = EventAccumulator(str(folder)).Reload()
    accuracies = [point.value for point in events.Scalars("val/acc")]
    assert len(accuracies) == 2
    assert f"(val/acc {max(accuracies):.4f})" in out
    assert {"train/loss", "train/acc", "val/loss", "lr"} <= set(events.Tags()["scalars"])
    assert [p.value for p in events.Scalars("hp/best_val/acc")] == pytest.approx([max(accuracies)])
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_test_takes_the_newest_best_and_its_options(run: Run) -> None:
    fit_digits(run)
    fit_digits(run, "--data.augmentation=pad", "--model.shortcut=pad")
    for name in (2, 10):  # the newest is the tenth, not the one that sorts last
        Path("lightning_logs/version_1").rename(f"lightning_logs/version_{name}")
        Path(f"lightning_logs/version_{name}").rename("lightning_logs/version_1")
    Path("lightning_logs/version_1").rename("lightning_logs/version_10")
    Path("lightning_logs/version_11").mkdir()  # a run without a checkpoint yet
    newest = "lightning_logs/version_10/checkpoints/best.ckpt"

    plain = run("test")
    assert plain.code == 0, plain.err
    assert f"Checkpoint: {newest}" in plain.out
    for form in (["--ckpt"], ["--ckpt", "best"], ["--ckpt", newest], ["--ckpt_path", newest]):
        same = run("test", *form)
        assert f"Checkpoint: {newest}" in same.out
        assert accuracy(same.out) == accuracy(plain.out)
    last = run("validate", "--ckpt", "last")
    assert "version_10/checkpoints/last.ckpt" in last.out
    assert "val/acc" in last.out
    # Evaluation makes no run of its own.
    assert len(list(Path("lightning_logs").iterdir())) == 3
    assert not Path("config.yaml").exists()


def test_explicit_options_win_over_the_checkpoints(run: Run) -> None:
    fit_digits(run, "--data.augmentation=zoom", "--data.eval_batch_size=360")
    seen: list[tuple[int, ...]] = []

    def spy(self: Any, batch: Any, index: int, hook: Any = train.CIFARDataModule) -> Any:
        images, labels = original(self, batch, index)
        seen.append(tuple(images.shape))
        return images, labels

    original = train.CIFARDataModule.on_after_batch_transfer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.CIFARDataModule, "on_after_batch_transfer", spy)
        run("test")
        run("test", "--data.evaluation=native", "--data.eval_batch_size=100")
        Path("native.yaml").write_text("data:\n  evaluation: crop\n  eval_batch_size: 360\n")
        run("test", "--config", "native.yaml")
    assert seen == [(360, 3, 40, 40), *[(100, 3, 32, 32)] * 3, (60, 3, 32, 32), (360, 3, 32, 32)]
    misfit = run("test", "--model.width=8")
    assert misfit.code == 1
    assert "does not fit the network" in misfit.err
    assert "Traceback" not in misfit.err


def test_resume_goes_on_in_the_same_run_as_if_never_stopped(run: Run) -> None:
    step = "--model.lr_scheduler.step_size=1"  # so that the scheduler's state matters
    fit_digits(run, step)
    whole = load("lightning_logs/version_0/checkpoints/last.ckpt")
    fit_digits(run, step, "--trainer.max_epochs=1")
    outcome = run("fit", "--ckpt", "last", "--trainer.max_epochs=2")
    assert outcome.code == 0, outcome.err
    assert len(list(Path("lightning_logs").iterdir())) == 2
    resumed = load("lightning_logs/version_1/checkpoints/last.ckpt")
    assert resumed["global_step"] == whole["global_step"]
    for name, value in whole["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], value), name
    moments, expected = (c["optimizer_states"][0]["state"][0]["exp_avg"] for c in (resumed, whole))
    assert torch.equal(moments, expected)
    best = "lightning_logs/version_{}/checkpoints/best.ckpt"
    assert torch.equal(
        load(best.format(0))["state_dict"]["mean"], load(best.format(1))["state_dict"]["mean"]
    )
    assert load(best.format(0))["epoch"] == load(best.format(1))["epoch"]
    steps = [
        p.step for p in EventAccumulator("lightning_logs/version_1").Reload().Scalars("val/acc")
    ]
    assert len(steps) == len(set(steps)) == 2
    config = yaml.safe_load(Path("lightning_logs/version_1/config.yaml").read_text())
    assert config["data"]["dataset"] == "digits"
    assert config["trainer"]["max_epochs"] == 2


def test_same_seed_same_weights(run: Run) -> None:
    for seed in (5, 5, 6):
        fit_digits(run, f"--seed_everything={seed}", "--trainer.max_epochs=1")
    a, b, c = (
        load(f"lightning_logs/version_{i}/checkpoints/last.ckpt")["state_dict"] for i in range(3)
    )
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["network.fc.weight"], c["network.fc.weight"])


def test_last_is_always_the_last_and_best_the_best(run: Run) -> None:
    # A learning rate that destroys the network after its first epoch: the first stays the best.
    Path("step.yaml").write_text(
        "model:\n  lr_scheduler:\n    class_path: torch.optim.lr_scheduler.StepLR\n"
        "    init_args: {step_size: 2, gamma: 1.0e+4}\n"
    )
    fit_digits(run, "--config=step.yaml", "--trainer.max_epochs=4", "--model.optimizer.lr=0.02")
    events = EventAccumulator("lightning_logs/version_0").Reload()
    accuracies = [point.value for point in events.Scalars("val/acc")]
    best = load("lightning_logs/version_0/checkpoints/best.ckpt")
    assert best["epoch"] == accuracies.index(max(accuracies))
    assert load("lightning_logs/version_0/checkpoints/last.ckpt")["epoch"] == 3


def test_without_validation_the_last_is_the_best(run: Run) -> None:
    out = fit_digits(run, "--data.val_size=0")
    assert "best.ckpt, after epoch 2. Test it" in out
    for name in ("best", "last"):
        assert load(f"lightning_logs/version_0/checkpoints/{name}.ckpt")["epoch"] == 1


def test_any_optimizer_and_scheduler_without_code(run: Run) -> None:
    scheduler = "--model.lr_scheduler=torch.optim.lr_scheduler.CosineAnnealingLR"
    options = [
        "--model.optimizer=SGD",
        "--model.optimizer.lr=0.1",
        "--model.optimizer.momentum=0.9",
    ]
    fit_digits(run, *options, scheduler, "--model.lr_scheduler.T_max=2")
    content = load("lightning_logs/version_0/checkpoints/last.ckpt")
    group = content["optimizer_states"][0]["param_groups"][0]
    assert group["momentum"] == 0.9
    assert content["lr_schedulers"][0]["T_max"] == 2
    assert run("test").code == 0
    Path("lightning_logs/version_0/checkpoints/last.ckpt").rename("moved.ckpt")
    assert run("fit", "--ckpt=moved.ckpt", "--trainer.max_epochs=3").code == 0
    content = load("lightning_logs/version_1/checkpoints/last.ckpt")
    assert content["optimizer_states"][0]["param_groups"][0]["momentum"] == 0.9
    config = yaml.safe_load(Path("lightning_logs/version_1/config.yaml").read_text())
    assert config["model"]["optimizer"]["class_path"] == "torch.optim.SGD"


def test_cifar_is_trained_and_tested_from_its_archive(
    run: Run, cifar10: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(cifar10, CIFAR10, monkeypatch)
    options = ["--data.val_size=50", "--trainer.max_epochs=1", *TINY]
    outcome = run("fit", f"--data.root={cifar10}", *options)
    assert outcome.code == 0, outcome.err
    assert run("test").code == 0
    content = load("lightning_logs/version_0/checkpoints/best.ckpt")
    assert content["class_names"][3] == "class 3"


def test_number_of_classes_comes_from_the_data(run: Run, cifar100: Path) -> None:
    options = ["--data.dataset=cifar100", "--data.val_size=100", "--trainer.max_epochs=1", *TINY]
    assert run("fit", f"--data.root={cifar100}", *options).code == 0
    outcome = run("test")
    assert outcome.code == 0, outcome.err
    content = load("lightning_logs/version_0/checkpoints/best.ckpt")
    assert content["state_dict"]["network.fc.bias"].shape == (100,)
    assert content["hyper_parameters"]["num_classes"] == 100


def test_predict_writes_a_line_per_test_image(run: Run) -> None:
    fit_digits(run)
    outcome = run("predict")
    assert outcome.code == 0, outcome.err
    path = Path("lightning_logs/version_0/checkpoints/predictions.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == list(range(360))
    share = sum(row["true"] == row["predicted"] for row in rows) / 360
    assert share == pytest.approx(accuracy(run("test").out))
    assert all(0.1 <= float(row["probability"]) <= 1 for row in rows)


class PublishedBlock(nn.Module):
    """A block as it is published: a shortcut puts zeros on both sides of the old channels."""

    def __init__(self, old: int, new: int) -> None:
        super().__init__()
        self.stride, self.zeros = new // old, (new - old) // 2
        self.conv1 = nn.Conv2d(old, new, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(new)
        self.conv2 = nn.Conv2d(new, new, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(new)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (
            out + F.pad(x[..., :: self.stride, :: self.stride], [0] * 4 + [self.zeros] * 2)
        ).relu()


class PublishedNetwork(nn.Module):
    """A CIFAR ResNet with the names, and the order of channels, of those that are published."""

    def __init__(self, layers: tuple[int, int, int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        stages = []
        for old, new, blocks in zip((16, 16, 32), (16, 32, 64), layers, strict=True):
            rest = [PublishedBlock(new, new) for _ in range(blocks - 1)]
            stages.append(nn.Sequential(PublishedBlock(old, new), *rest))
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)).relu())))
        return self.linear(x.mean((2, 3)))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_published_network_is_tested_with_its_normalisation(
    run: Run, cifar10: Path, prefix: str
) -> None:
    network = PublishedNetwork((2, 3, 1))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # so that nothing is lost unnoticed
            module.running_mean = torch.empty(module.num_features).uniform_(-1, 1)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    state_dict = {f"{prefix}{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": state_dict, "best_prec1": 91.7}, "resnet.th")
    scaling = ["--model.input_mean=[0.4,0.5,0.6]", "--model.input_std=[0.1,0.2,0.3]"]
    root = [f"--data.root={cifar10}", "--data.val_size=50", "--trainer.precision=32-true"]
    outcome = run("predict", "--ckpt", "resnet.th", *root, *scaling)
    assert outcome.code == 0, outcome.err
    source = CIFAR10(cifar10, train=False)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.1, 0.2, 0.3])
    images = ((torch.from_numpy(source.data) / 255 - mean) / std).permute(0, 3, 1, 2)
    expected = network.eval()(images.float()).softmax(1).amax(1)
    with Path("predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = [float(row["probability"]) for row in rows]
    assert found == pytest.approx(expected.tolist(), abs=1e-4)
    assert rows[0]["true"] == f"class {source.targets[0]}"
    unscaled = run("predict", "--ckpt", "resnet.th", *root)
    assert "Input scaling: none" in unscaled.out
    assert "Input scaling" not in outcome.out

    half = run("predict", "--ckpt", "resnet.th", *root, scaling[0])
    assert half.code == 2
    assert "give both or neither" in half.err


def test_a_whole_checkpoints_scaling_stays(run: Run, best: Path) -> None:
    scaling = ["--model.input_mean=[0.4,0.5,0.6]", "--model.input_std=[0.1,0.2,0.3]"]
    outcome = run("test", "--ckpt", str(best), *scaling)
    assert outcome.code == 2
    unscaled = run("test", "--ckpt", str(best), "--model.normalize=false")
    assert "model.normalize is false, but the checkpoint brings its own" in unscaled.err
    sentence = "model.input_mean is [0.4, 0.5, 0.6], but the checkpoint brings its own scaling"
    assert sentence in outcome.err


def test_bare_network_of_the_note_is_tested_on_zero_to_one(run: Run, cifar10: Path) -> None:
    network = ResNet()
    torch.save(network.state_dict(), "resnet_79.pkl")
    root = [f"--data.root={cifar10}", "--data.val_size=50"]
    outcome = run("test", "--ckpt", "resnet_79.pkl", *root, "--data.evaluation=native")
    assert outcome.code == 0, outcome.err
    network.eval()
    source = CIFAR10(cifar10, train=False)
    images = torch.from_numpy(source.data).permute(0, 3, 1, 2) / 255
    share = (network(images).argmax(1) == torch.tensor(source.targets)).float().mean()
    assert accuracy(outcome.out) == pytest.approx(float(share))

    misfit = run("test", "--ckpt", "resnet_79.pkl", *root, "--model.layers=[5,5,5]")
    assert misfit.code == 1
    assert re.search(r"resnet_79\.pkl does not fit the network: it lacks", misfit.err)
    resumed = run("fit", "--ckpt", "resnet_79.pkl", *root)
    assert resumed.code == 2
    assert "fit cannot go on" in resumed.err


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_random_weights_are_never_tested(run: Run, command: str) -> None:
    for form in ([], ["--ckpt"], ["--ckpt", "last"]):
        outcome = run(command, *form, "--data.dataset=digits")
        assert outcome.code == 2
        assert "no run in lightning_logs/ has a" in outcome.err
        assert "python train.py fit" in outcome.err
    outcome = run(command, "--ckpt", "missing.ckpt")
    assert outcome.code == 2
    assert "'missing.ckpt': there is no such file" in outcome.err


def test_offline_without_data_is_one_clear_message(run: Run, cifar10: Path) -> None:
    outcome = run("fit", "--data.root=empty", "--data.val_size=50")
    assert outcome.code == 1
    lines = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    for part in ("'empty'", "cifar-10-python.tar.gz", "recipes/digits.yaml"):
        assert part in lines[0]
    assert "Traceback" not in outcome.err


@no_gpu
def test_an_explicit_accelerator_is_never_replaced(run: Run) -> None:
    Path("gpu.yaml").write_text("trainer:\n  accelerator: gpu\n")
    for option in ("--trainer.accelerator=gpu", "--config=gpu.yaml"):
        outcome = run("fit", *SMALL_DIGITS, option)
        assert outcome.code == 2
        assert "no GPU was found" in outcome.err


@no_gpu
def test_without_a_gpu_one_line_says_so_with_the_time(run: Run) -> None:
    out = fit_digits(run, "--trainer.max_epochs=1")
    lines = [line for line in out.splitlines() if "No GPU found" in line]
    assert len(lines) == 1
    assert re.search(r"about \d+ s per epoch, \d+ min for 1 epochs", lines[0])


def test_print_config_is_a_config(run: Run) -> None:
    outcome = run("fit", "--print_config")
    config = yaml.safe_load(outcome.out)
    assert config["trainer"]["max_epochs"] == 80
    assert config["data"]["val_size"] == 5000
    assert config["model"]["layers"] == [3, 3, 3]
    assert config["best_checkpoint"]["monitor"] == "val/acc"


@pytest.mark.parametrize(
    "recipe", sorted((PROJECT / "recipes").glob("*.yaml")), ids=lambda p: p.stem
)
def test_recipes_train(run: Run, cifar10: Path, recipe: Path) -> None:
    data = [] if recipe.stem == "digits" else [f"--data.root={cifar10}", "--data.val_size=50"]
    outcome = run("fit", "--config", str(recipe), *data, "--trainer.fast_dev_run=2")
    assert outcome.code == 0, outcome.err
    assert run("fit", "--config", str(recipe), "--print_config").code == 0


def python(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, capture_output=True, text=True, timeout=300
    )


def test_help_names_every_option_and_imports_no_more_than_it_needs(tmp_path: Path) -> None:
    code = (
        "import sys, train\nsys.argv = ['train.py', 'fit', '--help']\ntry: train.main()\n"
        "except SystemExit: print([m for m in ('sklearn', 'tensorboard') if m in sys.modules])"
    )
    outcome = python("-c", code, cwd=PROJECT)
    for option in ("--data.val_size", "--model.preactivation", "--ckpt", "--best_checkpoint.mode"):
        assert option in outcome.stdout
    assert "Training images held out for validation" in outcome.stdout
    assert outcome.stdout.endswith("[]\n")


def test_the_command_as_a_process(tmp_path: Path) -> None:
    script = str(PROJECT / "train.py")
    fit = python(script, "fit", *SMALL_DIGITS, "--trainer.max_epochs=1", cwd=tmp_path)
    assert fit.returncode == 0, fit.stderr
    assert "Best checkpoint: lightning_logs/version_0/checkpoints/best.ckpt" in fit.stdout
    test = python(script, "test", "--ckpt", cwd=tmp_path)
    assert test.returncode == 0, test.stderr
    assert "test/acc" in test.stdout


@pytest.mark.slow
def test_digits_recipe_reaches_98_percent(tmp_path: Path) -> None:
    script, recipe = str(PROJECT / "train.py"), str(PROJECT / "recipes/digits.yaml")
    fit = python(script, "fit", "--config", recipe, cwd=tmp_path)
    assert fit.returncode == 0, fit.stderr
    assert accuracy(python(script, "test", cwd=tmp_path).stdout) >= 0.98


def test_saved_and_printed_configs_serve_again(run: Run) -> None:
    fit_digits(run)
    run("fit", "--ckpt", "last", "--trainer.max_epochs=3")
    again = run("fit", "--config", "lightning_logs/version_0/config.yaml")
    assert again.code == 0, again.err
    assert load("lightning_logs/version_1/checkpoints/last.ckpt")["epoch"] == 2
    printed = run("fit", *SMALL_DIGITS, "--trainer.max_epochs=1", "--print_config").out
    Path("my.yaml").write_text(printed)
    assert run("fit", "--config", "my.yaml").code == 0


def test_an_earlier_checkpoint_starts_a_new_run(run: Run) -> None:
    fit_digits(run, "--periodic_checkpoint.every_n_epochs=2")
    folder = Path("lightning_logs/version_0")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    outcome = run("fit", f"--ckpt={folder}/checkpoints/epoch_1.ckpt", "--trainer.max_epochs=3")
    assert outcome.code == 0, outcome.err
    assert load("lightning_logs/version_1/checkpoints/last.ckpt")["epoch"] == 2
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_a_resumed_run_would_ignore_is_refused(run: Run) -> None:
    fit_digits(run)
    config = Path("lightning_logs/version_0/config.yaml")
    before = config.read_text()
    for option, message in [
        ("--trainer.max_epochs=1", "max_epochs is 1, but the checkpoint has 2 epochs behind it"),
        ("--model.optimizer.lr=0.5", "model.optimizer cannot be changed"),
        ("--model.lr_scheduler.step_size=5", "model.lr_scheduler cannot be changed"),
    ]:
        outcome = run("fit", "--ckpt", "last", option)
        assert outcome.code == 2
        assert message in outcome.err
    assert config.read_text() == before


def test_another_data_sets_classes_are_refused(run: Run, cifar10: Path) -> None:
    fit_digits(run)
    outcome = run("test", "--data.dataset=cifar10", f"--data.root={cifar10}")
    assert outcome.code == 1
    assert "trained on the classes ['0', '1'" in outcome.err
    assert "Traceback" not in outcome.err


def test_last_is_written_in_epochs_without_validation(run: Run) -> None:
    fit_digits(run, "--trainer.max_epochs=3", "--trainer.check_val_every_n_epoch=2")
    assert load("lightning_logs/version_0/checkpoints/last.ckpt")["epoch"] == 2


FEATURES = [
    ({"avx512_bf16": True, "avx512_f": True}, "bf16-mixed"),
    ({"amx_bf16": True}, "bf16-mixed"),
    ({"avx512_bf16": False, "avx512_f": True}, "32-true"),
    ({"bf16": False}, "32-true"),
]


@pytest.mark.parametrize(("features", "precision"), FEATURES)
def test_precision_is_what_the_cpu_computes_natively(
    monkeypatch: pytest.MonkeyPatch, features: dict[str, bool], precision: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    assert train.native_precision("cpu") == precision


@no_gpu
@pytest.mark.parametrize(("features", "precision"), FEATURES[1:3])
def test_precision_is_said_saved_and_kept(
    run: Run, monkeypatch: pytest.MonkeyPatch, features: dict[str, bool], precision: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    out = fit_digits(run, "--trainer.max_steps=1")
    assert out.count("Precision: ") == 1
    assert f"Precision: {precision}, " in out
    config = yaml.safe_load(Path("lightning_logs/version_0/config.yaml").read_text())
    assert config["trainer"]["precision"] == precision

    # A run keeps its precision, whatever machine it goes on with.
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": precision == "32-true"})
    out = run("fit", "--ckpt=last", "--trainer.max_steps=2").out
    assert f"Precision: {precision}, as in the run so far" in out
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)

    other = "32-true" if precision == "bf16-mixed" else "bf16-mixed"
    out = fit_digits(run, f"--trainer.precision={other}", "--trainer.max_steps=1")
    assert "Precision: " not in out
    config = yaml.safe_load(Path("lightning_logs/version_1/config.yaml").read_text())
    assert config["trainer"]["precision"] == other


@pytest.mark.parametrize("bf16", [True, False])
def test_precision_on_a_gpu(monkeypatch: pytest.MonkeyPatch, bf16: bool) -> None:
    monkeypatch.setattr(train.CUDAAccelerator, "is_available", lambda: True)
    other = {"avx512_bf16": not bf16}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: other, raising=False)
    # Emulated bf16 does not count.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    assert train.native_precision(None) == ("bf16-mixed" if bf16 else "32-true")
    assert train.native_precision("cpu") == ("32-true" if bf16 else "bf16-mixed")


def test_precision_where_torch_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert train.native_precision("cpu") == "32-true"


def test_other_precisions_train_on_the_cpu(run: Run) -> None:
    for precision in ("64-true", "bf16-true"):
        fit_digits(run, f"--trainer.precision={precision}", "--trainer.max_steps=2")
