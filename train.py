"""The command line: trains, validates, tests and applies a residual network on CIFAR.

    python train.py fit                 # 80 epochs on CIFAR-10; runs go to lightning_logs/
    python train.py fit --ckpt last     # goes on with the newest run
    python train.py test                # the best checkpoint of the newest run
    python train.py fit --help          # every option

Every option can also stand in a YAML file given with --config, as those in recipes/ do.
"""

import copy
import csv
import json
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from callbacks import Throughput
from cifar_datamodule import CIFARDataModule
from cuda_graphs import CUDAGraphs
from resnet_module import ResNetModule

LOGS = "lightning_logs"
# Constant file names: `best` and `last` of a run are found without a record of them.
COMMON = {"auto_insert_metric_name": False, "enable_version_counter": False}
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "best_checkpoint": {"filename": "best", "monitor": "val/acc", "mode": "max"},
    "last_checkpoint": {"filename": "last", "save_on_train_epoch_end": True},
    "periodic_checkpoint": {
        "filename": "epoch_{epoch}",
        "every_n_epochs": 20,
        "save_top_k": -1,
        "save_on_train_epoch_end": True,
    },
}


class CLI(LightningCLI):
    """LightningCLI with checkpoints that are found by name and bring their own options."""

    checkpoint: Path | None = None
    content: dict[str, Any]  # of the checkpoint
    run: Path | None = None  # the folder of the run that fit goes on with

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--ckpt",
            type=str | None,
            nargs="?",
            const="auto",
            help="Checkpoint: a path, or `best` or `last` of the newest run in lightning_logs. "
            "Without a value it is `last` for fit, which goes on with that run, and `best` for the "
            "others, which is also their default. They take a bare network's state_dict as well.",
        )
        for name, defaults in CHECKPOINTS.items():
            parser.add_lightning_class_args(ModelCheckpoint, name)
            parser.set_defaults({f"{name}.{k}": v for k, v in {**COMMON, **defaults}.items()})
        parser.add_lightning_class_args(CUDAGraphs, "cuda_graphs")
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses twice: first for the checkpoint, whose options are then this call's defaults."""
        if any(arg.startswith("--print_config") for arg in sys.argv):
            # What is printed holds on any machine; a file that names the GPU would insist on one.
            for subparser in self._subcommand_parsers.values():
                subparser.set_defaults({"trainer.accelerator": "auto"})
            super().parse_arguments(parser, args)  # prints, and ends here
        given = parser.parse_args(defaults=False)
        command, options = given.subcommand, given[given.subcommand]
        self.accelerator = options.get("trainer.accelerator")
        if self.accelerator in ("gpu", "cuda", "mps") and not gpu_found():
            fail(
                f"trainer.accelerator is {self.accelerator!r}, but no GPU was found: "
                "leave the option out, or give --trainer.accelerator cpu"
            )
        name = options.get("ckpt") or options.get("ckpt_path")
        if name or command != "fit":
            root = Path(options.get("trainer.default_root_dir") or ".")
            self._take_options(find_checkpoint(name, command, root / LOGS), command)
        super().parse_arguments(parser, args)
        config = self.config[command]
        if self.accelerator is None:
            config.trainer.accelerator = "auto"  # as printed: what is saved holds on any machine
        if config.trainer.precision is None and not config.trainer.plugins:
            config.trainer.precision = native_precision(self.accelerator)
            say(f"Precision: {config.trainer.precision}, by what the hardware computes natively")
        elif command == "fit" and self.checkpoint and "trainer.precision" not in options:
            say(f"Precision: {config.trainer.precision}, as in the run so far")
        # The checkpoint is no part of what is saved, and LightningCLI would read its options again,
        # over those given explicitly.
        config.ckpt = config.ckpt_path = None
        if command == "fit" and self.checkpoint:
            self._check_resume(config)

    def _take_options(self, checkpoint: Path, command: str) -> None:
        """Makes the options of a checkpoint, and of its run for fit, the parser's defaults."""
        say(f"Checkpoint: {checkpoint}")
        self.checkpoint, self.content = checkpoint, read_checkpoint(checkpoint)
        if command == "fit" and is_network(self.content):
            fail(f"{checkpoint} holds a bare network, which fit cannot go on with; test can use it")
        options = stored_options(self.content)
        folder = checkpoint.absolute().parent
        config_file = folder.parent / "config.yaml"
        if command == "fit" and folder.name == "checkpoints" and config_file.is_file():
            run_options = yaml.safe_load(config_file.read_text())
            for section in ("seed_everything", "trainer", *CHECKPOINTS):
                options[section] = run_options[section]
            # From an earlier checkpoint a new run branches off; the old one stays as it is.
            self.run = folder.parent if checkpoint.name == "last.ckpt" else None
        self._parser(command).set_defaults(flatten(options))

    def _check_resume(self, config: Any) -> None:
        """Refuses what a resumed run would ignore, before anything is written."""
        done, epochs = self.content["epoch"] + 1, config.trainer.max_epochs
        if epochs is not None and 0 <= epochs < done:
            fail(f"trainer.max_epochs is {epochs}, but the checkpoint has {done} epochs behind it")
        for name in ("optimizer", "lr_scheduler"):
            stored = self.content["hyper_parameters"].get(name)
            given = config.model[name]
            # As JSON, which makes no difference between the tuples and lists of the two.
            if stored and json.dumps(stored) != json.dumps(given and given.as_dict()):
                fail(f"model.{name} cannot be changed in a run: its state is the checkpoint's")

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        if self.subcommand != "fit" or config.trainer.logger is False:
            self.save_config_callback = None  # it would write config.yaml into the working folder

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            fail(str(error))
        if self.checkpoint and is_network(self.content):
            self.model.load_network(self.content.get("state_dict", self.content), self.checkpoint)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if self.checkpoint and not is_network(self.content):
            kwargs["ckpt_path"] = str(self.checkpoint)
        return kwargs

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config[self.subcommand].trainer
        if self.datamodule.val_size == 0 or config.limit_val_batches == 0:
            # Without validation the last is the best.
            self.config_init[self.subcommand].best_checkpoint.monitor = None
        if config.logger in (None, True):
            kwargs["logger"] = self.subcommand == "fit" and TensorBoardLogger(
                # Absolute, for a resumed best_checkpoint forgets its score if its folder differs.
                self.run.parents[1]
                if self.run
                else Path(config.default_root_dir or ".").absolute(),
                name=self.run.parent.name if self.run else LOGS,
                version=self.run.name if self.run else None,
                default_hp_metric=False,
            )
        if self.subcommand == "predict" and config.devices == "auto":
            kwargs["devices"] = 1
        if self.accelerator is None and not gpu_found():
            kwargs["accelerator"] = "cpu"
            if self.subcommand != "fit":  # which says so itself, with the time that it will take
                say("No GPU found: running on the CPU")
        return super().instantiate_trainer(**kwargs)

    def after_fit(self) -> None:
        """Writes the run's entry in TensorBoard's HPARAMS and says where the best checkpoint is."""
        best = self.config_init["fit"].best_checkpoint
        score = best.best_model_score
        if isinstance(self.trainer.logger, TensorBoardLogger):
            last = self.trainer.callback_metrics.get("train/acc")
            options = {**self.model.hparams, **self.datamodule.hparams}
            options.pop("_instantiator")
            self.trainer.logger.log_hyperparams(
                options,
                {"hp/train/acc": last} if score is None else {f"hp/best_{best.monitor}": score},
            )
            self.trainer.logger.finalize("success")  # once more: the entry is not lost
        if best.best_model_path:
            path = Path(best.best_model_path)
            path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
            accuracy = "" if score is None else f" ({best.monitor} {score:.4f})"
            say(f"Best checkpoint: {path}{accuracy}. Test it: python train.py test --ckpt {path}")

    def predict(self, **kwargs: Any) -> None:
        """Writes predictions.csv beside the checkpoint: one line for each test image."""
        if self.trainer.world_size > 1:
            fail("predict writes one file, in one process: give --trainer.devices 1")
        assert self.checkpoint is not None
        batches: Any = self.trainer.predict(**kwargs)
        probabilities = torch.cat(batches)
        names, labels = self.datamodule.class_names, self.datamodule.test_set.labels
        path = self.checkpoint.parent / "predictions.csv"
        half_written = path.with_suffix(".tmp")
        with half_written.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["index", "true", "predicted", "probability"])
            # With limit_predict_batches there are fewer probabilities than labels.
            for index, (label, row) in enumerate(zip(labels, probabilities, strict=False)):
                top = int(row.argmax())
                rows.writerow([index, names[label], names[top], f"{row[top]:.4f}"])
        half_written.replace(path)
        say(f"Predictions: {path}")


class SayTimeOnCPU(Callback):
    """Says how long training will take where the CPU has to do it."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.device.type != "cpu":
            return
        seconds = seconds_per_step(trainer, pl_module) * trainer.num_training_batches
        epochs = (trainer.max_epochs or 0) - trainer.current_epoch
        total = f", {seconds * epochs / 60:.0f} min for {epochs} epochs" if epochs > 0 else ""
        reason = "" if gpu_found() else "No GPU found: "
        say(f"{reason}training on the CPU, about {seconds:.0f} s per epoch{total}")


def seconds_per_step(trainer: Trainer, module: Any) -> float:
    """Times forward and backward of a copy of the network, on a batch of noise."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    network = copy.deepcopy(module.network)
    noise = torch.Generator().manual_seed(0)  # leaves the run's own random numbers alone
    images = torch.rand(data.batch_size, 3, data.image_size, data.image_size, generator=noise)
    images = trainer.precision_plugin.convert_input(images)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        with trainer.precision_plugin.forward_context():
            loss = network(images).sum()
        loss.backward()
        times.append(time.perf_counter() - start)
    return min(times)


def gpu_found() -> bool:
    return CUDAAccelerator.is_available() or MPSAccelerator.is_available()


def native_precision(accelerator: str | None) -> Literal["bf16-mixed", "32-true"]:
    """bf16 where the device computes in it, float32 where it cannot or would emulate it."""
    if accelerator != "cpu" and CUDAAccelerator.is_available():
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif accelerator != "cpu" and MPSAccelerator.is_available():
        bf16 = False
    else:
        # Not every torch that serves has it; without it bf16 is the user's to choose.
        features: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        bf16 = bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    return "bf16-mixed" if bf16 else "32-true"


def find_checkpoint(name: str | None, command: str, logs: Path) -> Path:
    """The checkpoint called `name`: a path, or `best` or `last` of the newest run that has it."""
    if name in (None, "auto"):
        name = "last" if command == "fit" else "best"
    if name not in ("best", "last"):
        path = Path(str(name))
        return path if path.is_file() else fail(f"ckpt is {name!r}: there is no such file")
    found = list(logs.glob(f"*/checkpoints/{name}.ckpt"))
    if not found:
        fail(
            f"no run in {logs}/ has a {name}.ckpt: "
            "train one with python train.py fit, or give --ckpt PATH"
        )
    return max(found, key=lambda path: (version_number(path), path.stat().st_mtime))


def version_number(checkpoint: Path) -> int:
    """N for a checkpoint of the run version_N, -1 for a run of another name."""
    number = checkpoint.parents[1].name.removeprefix("version_")
    return int(number) if number.isdecimal() else -1


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint of this project, or a bare network's state_dict, holds."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # foreign bytes fail in any way
        fail(f"{path} is no checkpoint, or holds more than plain data ({type(error).__name__})")
    if not isinstance(content, dict):
        fail(f"{path} holds a {type(content).__name__}, not a checkpoint or a state_dict")
    if "pytorch-lightning_version" in content and "class_names" not in content:
        fail(f"{path} is a checkpoint of another project")
    return content


def is_network(checkpoint: dict[str, Any]) -> bool:
    """Whether this is a bare network's state_dict, as it is or under that name."""
    return "pytorch-lightning_version" not in checkpoint


def stored_options(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The options that a checkpoint was trained with, by section.

    A bare network has none: it is taken to be one that was trained on [0, 1].
    """
    if is_network(checkpoint):
        return {"model": {"normalize": False}}
    return {
        "model": checkpoint["hyper_parameters"],
        "data": checkpoint.get("datamodule_hyper_parameters", {}),
    }


def flatten(options: dict[str, Any]) -> dict[str, Any]:
    """Parser defaults {"section.name": value}, without what the parser itself derives."""
    derived = ("model._instantiator", "data._instantiator", "model.num_classes")
    flat = {
        f"{section}.{name}": value
        for section, values in options.items()
        if isinstance(values, dict)
        for name, value in values.items()
    }
    plain = {name: value for name, value in options.items() if not isinstance(value, dict)}
    return {name: value for name, value in {**flat, **plain}.items() if name not in derived}


@rank_zero_only
def say(line: str) -> None:
    print(line, flush=True)


def fail(message: str, exit_code: int = 2) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(exit_code)


def main() -> None:
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # batches lie in memory
    warnings.filterwarnings("ignore", ".*Total length of `list`.*")  # with val_size 0
    warnings.filterwarnings("ignore", ".*dirpath has changed.*")
    warnings.filterwarnings("ignore", ".*exists and is not empty.*")
    warnings.filterwarnings("ignore", ".*training_step. returned .None.*")  # of CUDAGraphs
    warnings.filterwarnings("ignore", ".*not supported by the model summary.*")  # bf16-mixed
    warnings.filterwarnings("ignore", ".*LeafSpec.*")  # Lightning 2.6 with newer torch
    try:
        CLI(
            ResNetModule,
            CIFARDataModule,
            trainer_defaults={
                "accelerator": "gpu",
                "max_epochs": 80,
                "log_every_n_steps": 10,
                "callbacks": [SayTimeOnCPU(), Throughput()],
            },
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            auto_configure_optimizers=False,
        )
    except (MisconfigurationException, OSError) as error:
        fail(str(error), exit_code=1)


if __name__ == "__main__":
    main()
