"""The command line: trains, validates, tests and applies a residual network on CIFAR-10.

    python train.py fit                 # 80 epochs on CIFAR-10; runs go to lightning_logs/
    python train.py fit --ckpt last     # resumes the newest run
    python train.py test --ckpt         # tests the best checkpoint of the newest run
    python train.py fit --help          # every option

Every option can also stand in a YAML file given with --config, as those in recipes/ do. What stands
later on the command line overrides what stands before it.
"""

import argparse
import hashlib
import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from cifar_datamodule import CIFARDataModule
from cifar_resnet.callbacks import (
    CurrentLimits,
    CycleLengthCheck,
    EpochSummary,
    NetworkSummary,
    PredictionCollector,
    ResumeHint,
    TensorBoardImages,
    TerminateOnNaN,
)
from cifar_resnet.checkpoint import (
    AtomicCheckpointIO,
    BestCheckpoint,
    EpochCheckpoint,
    PeriodicCheckpoint,
    completed_epochs,
    known_options,
    load_weights,
    read_checkpoint,
)
from cifar_resnet.figures import PredictedImages
from cifar_resnet.messages import (
    CommandParser,
    UserError,
    one_line_errors,
    print_once,
    relative,
    silence_lightning,
)
from cifar_resnet.options import (
    changed_options,
    check_callbacks,
    check_model_options,
    check_options,
    check_resume,
    check_split,
)
from cifar_resnet.report import write_report
from cifar_resnet.runs import LOGS, RunFolder, describe_run, find_checkpoint
from resnet_module import ResNet, ResNetModule

ORDER = "A later option overrides an earlier one, and so does a --config: flags go behind it."
GPU_FOUND = CUDAAccelerator.is_available() or MPSAccelerator.is_available()


class CLI(LightningCLI):
    """LightningCLI with checkpoints that are found by name and bring their own options.

    The methods stand in the order in which Lightning calls them. Of the options, `config` holds
    plain data, `config_init` the objects that are made of them.
    """

    path: Path | None = None  # of the checkpoint that --ckpt names
    searched: Path | None = None  # where it was looked for, if not given as a path
    checkpoint: dict[str, Any]  # its content
    run: Path | None = None  # the folder of the run that fit resumes

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--ckpt",
            type=str | None,
            nargs="?",
            const="auto",
            help="Checkpoint: a path, or `best` or `last` of the newest run in lightning_logs. "
            "fit resumes from it; without a value it is `last`. The other commands use `best` if "
            "none is given, and take other projects' weights, too.",
        )
        parser.add_argument(
            "--mirror",
            type=bool,
            nargs="?",
            const=True,
            default=False,
            help="For test and validate: show each image mirrored, too, and report the accuracy "
            "of the mean of both probabilities beside the plain one.",
        )
        parser.add_lightning_class_args(BestCheckpoint, "best_checkpoint")
        parser.add_lightning_class_args(PeriodicCheckpoint, "periodic_checkpoint")
        parser.add_lightning_class_args(TensorBoardImages, "pictures")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        ours = {"ckpt_path", "weights_only", "verbose", "return_predictions"}
        commands = LightningCLI.subcommands()
        return {name: commands[name] | ours for name in ("fit", "validate", "test")}

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        with one_line_errors(2, Exception):
            self.config = parser.parse_args(self.with_stored_options(sys.argv[1:]))
            seed = self.config[self.config.subcommand].seed_everything
            if isinstance(seed, bool):  # of which Lightning would make 0 for `true`
                raise ValueError(f"seed_everything is {str(seed).lower()}: give a number")

    def with_stored_options(self, args: list[str]) -> list[str]:
        """Inserts the options of the checkpoint before the arguments, which override them."""
        command = args[0] if args else ""
        name, root = parse_checkpoint_name(args)
        printed = any("--print_config" in arg for arg in args)
        if printed and name:
            raise ValueError("print_config omits a checkpoint's options: see its run's config.yaml")
        only_shown = printed or "-h" in args or "--help" in args
        if command not in self.subcommands() or only_shown or (command == "fit" and name is None):
            return args
        if name in (None, "auto"):
            name = "last" if command == "fit" else "best"
        self.path = find_checkpoint(str(name), root / LOGS)
        self.searched = root if name in ("best", "last") else None
        self.checkpoint = read_checkpoint(self.path)
        print_once(f"Checkpoint: {relative(self.path)}")
        run = self.path.absolute().parent.parent
        if command == "fit" and (run / "run.json").is_file():
            # From an earlier checkpoint a new run branches off; the old one stays as it is.
            self.run = run if self.path.absolute() == run / "checkpoints" / "last.ckpt" else None
            return [command, f"--config={run / 'config.yaml'}", *args[1:]]
        stored = stored_config(self.checkpoint)
        if command == "fit":
            print_once(
                "Note: the checkpoint is not in its run's folder: options of trainer and of "
                "checkpoints are the defaults, unless given"
            )
        else:  # without optimizer and scheduler, whose options may be of an earlier version
            stored["model"] = without_training(stored["model"])
        return [command, f"--config={json.dumps(stored, ensure_ascii=False)}", *args[1:]]

    def before_instantiate_classes(self) -> None:
        """Sets the defaults that depend on the hardware; refuses impossible options."""
        config = self.config[self.subcommand]
        with one_line_errors(2, Exception):
            self.check(config)
        config.ckpt = None  # a saved configuration starts a new run
        if config.trainer.precision is None and not config.trainer.plugins:
            config.trainer.precision = native_precision(config.trainer.accelerator)
            print_once(
                f"Precision: {config.trainer.precision}, which the hardware computes natively"
            )
        if config.trainer.accelerator == "auto" and not GPU_FOUND:
            print_once("No GPU found: running on the CPU")

    def check(self, config: Any) -> None:
        """Refuses impossible options before anything is made or written."""
        if config.ckpt not in (None, parse_checkpoint_name(sys.argv[1:])[0]):
            raise ValueError("ckpt must be given on the command line, not in a configuration")
        if self.path is None and (config.ckpt or self.subcommand != "fit"):
            raise ValueError(f"{self.subcommand} must stand before all options")
        check_options(str(self.subcommand), config)
        if self.path is not None:
            self.check_against_checkpoint(config)

    def check_against_checkpoint(self, config: Any) -> None:
        """Refuses options that the checkpoint does not allow; ends a run that is complete."""
        root = Path(config.trainer.default_root_dir or "").expanduser()
        if self.searched and self.searched.absolute() != root.absolute():
            raise ValueError(
                f"trainer.default_root_dir is {str(root)!r} in a configuration: give it on the "
                "command line as well, where ckpt is looked for, or a path as ckpt"
            )
        options = config.clone(with_meta=False).as_dict()
        if self.subcommand in ("fit", "validate"):
            check_split(options["data"], self.checkpoint)
        if self.subcommand == "fit":
            check_resume(options, self.checkpoint)
            if completed_epochs(self.checkpoint) == config.trainer.max_epochs:
                print_once("The run has all its epochs: give --trainer.max_epochs for more")
                sys.exit(0)
            stored = self.checkpoint["datamodule_hyper_parameters"]
            for name, (before, now) in changed_options(options["data"], stored).items():
                print_once(f"Note: data.{name} is {now}, and was {before} so far in this run")
        elif self.checkpoint["class_names"]:  # of this project
            check_model_options(without_training(options["model"]), self.checkpoint)

    def instantiate_classes(self) -> None:
        self.collector = PredictionCollector(self.config[self.subcommand].mirror)
        with one_line_errors(2, Exception):
            super().instantiate_classes()
            if self.subcommand == "fit":
                self.model.optimizer(self.model.parameters())  # refuses a rate of -1 now
            if self.path is not None:
                load_weights(self.model, self.checkpoint)
                self.model.class_names = self.checkpoint["class_names"]

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        given = self.config_init[self.subcommand].trainer
        callbacks = [*self.own_callbacks(), *as_list(given.callbacks)]
        check_callbacks(callbacks)
        own_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
        if given.enable_progress_bar is None and not own_bar:
            kwargs["enable_progress_bar"] = sys.stdout.isatty()  # not in a log file
            if sys.stdout.isatty():
                callbacks.append(TQDMProgressBar(refresh_rate=10))
        plugins = as_list(given.plugins)
        kwargs |= {"callbacks": callbacks, "plugins": plugins + own_plugins(plugins)}
        try:
            return super().instantiate_trainer(**kwargs, **self.trainer_options())
        except TypeError as error:  # of an option, as `devices: x`: no bug
            raise ValueError(error) from error

    def trainer_options(self) -> dict[str, Any]:
        """Options of the Trainer that follow from others."""
        config = self.config[self.subcommand]
        options: dict[str, Any] = {"enable_model_summary": False}  # Lightning's own
        if config.trainer.logger in (None, True):
            options["logger"] = False  # RunFolder makes it
        if config.data.val_size == 0:
            options["limit_val_batches"] = 0
        return options

    def own_callbacks(self) -> list[Callback]:
        """What a command needs beside the defaults and the callbacks of the user."""
        if self.subcommand != "fit":
            return [self.collector]
        options = yaml.safe_load(self.parser.dump(self.config, skip_none=False))["fit"]
        trainer, callbacks = options["trainer"], list[Callback]()
        if not trainer["fast_dev_run"]:
            epochs = completed_epochs(self.checkpoint) if self.run else 0
            callbacks.append(RunFolder(options, self.run, epochs))
        if trainer["enable_model_summary"] is not False:
            callbacks.append(NetworkSummary(max_depth=2))
        return callbacks

    def fit(self, model: ResNetModule, datamodule: CIFARDataModule) -> None:
        self.trainer.fit(model, datamodule, ckpt_path=self.path)

    def test(self, model: ResNetModule, datamodule: CIFARDataModule) -> None:
        self.trainer.test(model, datamodule, verbose=False)
        self.report("test", datamodule.test_set.images)

    def validate(self, model: ResNetModule, datamodule: CIFARDataModule) -> None:
        self.trainer.validate(model, datamodule, verbose=False)
        self.report("val", datamodule.val_set.images)

    def report(self, stage: Literal["test", "val"], images: torch.Tensor) -> None:
        """Prints how good the network is, and writes that beside the checkpoint."""
        if not self.trainer.is_global_zero or self.path is None:
            return
        metadata = {
            "checkpoint": str(self.path),
            "sha256": hashlib.sha256(self.path.read_bytes()).hexdigest(),
            **describe_run(self.trainer),
        }
        probabilities, labels = self.collector.result
        if self.collector.mirrored is not None:
            correct = self.collector.mirrored.argmax(dim=1) == labels
            metadata["acc_mirrored"] = int(correct.sum()) / len(labels)
        predicted = PredictedImages(images, probabilities, labels, self.model.class_names)
        folder = self.path.parent
        files = write_report(folder, stage, predicted, metadata)
        print(f"Written to {relative(folder)}/: {', '.join(files)}")


def as_list(option: Any) -> list[Any]:
    """An option of the Trainer that may be one object, a list or None."""
    return [*option] if isinstance(option, list) else [] if option is None else [option]


def own_plugins(given: list[Any]) -> list[Any]:
    """Atomic checkpoints; in a SLURM job also its ranks, unless torchrun or a plugin sets them."""
    in_job = SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()
    if not in_job or any(isinstance(plugin, ClusterEnvironment) for plugin in given):
        return [AtomicCheckpointIO()]
    # Lightning would save, and resume from, half an epoch; recipes/slurm.sh requeues.
    return [AtomicCheckpointIO(), SLURMEnvironment(auto_requeue=False)]


def parse_checkpoint_name(args: list[str]) -> tuple[str | None, Path]:
    """The values of --ckpt and --trainer.default_root_dir, needed before the others are parsed."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--ckpt", nargs="?", const="auto")
    parser.add_argument("--trainer.default_root_dir", dest="root", type=Path, default=Path())
    known, _ = parser.parse_known_args(args)
    return known.ckpt, known.root.expanduser()


def stored_config(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a checkpoint was trained with, as a configuration."""
    model = known_options(checkpoint["hyper_parameters"], ResNetModule, ResNet)
    data = known_options(checkpoint["datamodule_hyper_parameters"], CIFARDataModule)
    model.pop("num_classes", None)  # follows from the data
    seed = data.pop("seed", None)  # follows from seed_everything
    return {"model": model, "data": data} | ({} if seed is None else {"seed_everything": seed})


def without_training(model: Mapping[str, Any]) -> dict[str, Any]:
    """The model's options without those that training alone needs."""
    return {n: value for n, value in model.items() if n not in ("optimizer", "lr_scheduler")}


def native_precision(accelerator: str) -> Literal["bf16-mixed", "32-true"]:
    """bf16 where the device computes in it, float32 where it cannot or would emulate it."""
    if accelerator != "cpu" and CUDAAccelerator.is_available():
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif accelerator != "cpu" and MPSAccelerator.is_available():
        bf16 = False
    else:
        features = torch.cpu.get_capabilities()
        bf16 = bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    return "bf16-mixed" if bf16 else "32-true"


def main() -> None:
    """Runs a command: fit, validate or test."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A log file shows each epoch at once, and any class name, whatever its encoding.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    silence_lightning()
    run_errors = (
        UserError,
        MisconfigurationException,
        OSError,
        ModuleNotFoundError,
    )
    with one_line_errors(1, *run_errors):
        CLI(
            ResNetModule,
            CIFARDataModule,
            save_config_callback=None,  # RunFolder saves it
            parser_class=CommandParser,
            parser_kwargs={name: {"description": ORDER} for name in CLI.subcommands()},
            trainer_defaults={
                "accelerator": "gpu" if GPU_FOUND else "auto",
                "max_epochs": 80,
                "callbacks": [
                    EpochCheckpoint("last"),
                    TerminateOnNaN(),
                    CycleLengthCheck(),
                    CurrentLimits(),
                    ResumeHint(),
                    EpochSummary(),
                ],
            },
            seed_everything_default=0,
            auto_configure_optimizers=False,
        )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # before training, where Lightning sees to it
        sys.exit(130)
