"""The command line: LightningCLI, whose checkpoints are found by name and bring their options."""

import argparse
import hashlib
import io
import sys
from collections.abc import Mapping
from typing import Any, Literal

import torch
import yaml
from jsonargparse.typing import restricted_number_type
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from cifar_resnet.callbacks import NetworkSummary, PredictionCollector
from cifar_resnet.checkpoint import AtomicCheckpointIO, completed_epochs, load_weights
from cifar_resnet.figures import PredictedImages
from cifar_resnet.messages import one_line_errors, print_once, relative, silence_lightning
from cifar_resnet.options import (
    Source,
    check_callbacks,
    check_options,
    compare_with_checkpoint,
    find_source,
    first_look,
)
from cifar_resnet.report import write_report
from cifar_resnet.runs import RunFolder, describe_run

ORDER = "A later option overrides an earlier one, and a --config what stands before it."
GPU_FOUND = CUDAAccelerator.is_available() or MPSAccelerator.is_available()
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<=", 2**32 - 1)])


class CheckpointName(argparse.Action):
    """Passes `--ckpt` over: `first_look` has read it, and no saved configuration is to have it."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        pass


class CLI(LightningCLI):
    """Runs a command of sys.argv: fit, validate or test.

    The methods stand in the order in which Lightning calls them. Of the options, `config` holds
    plain data, `config_init` the objects that are made of them.

    Args:
        model_class: The LightningModule; its signature gives the options `--model...`.
        datamodule_class: The LightningDataModule; its signature gives `--data...`.
        callback_options: Callbacks whose signatures give options, by the prefix of their options.
        **kwargs: Others of `LightningCLI`, such as `trainer_defaults`.
    """

    source: Source | None = None  # the checkpoint that the command begins with

    def __init__(
        self,
        model_class: type[LightningModule],
        datamodule_class: type[LightningDataModule],
        callback_options: Mapping[str, type[Callback]],
        **kwargs: Any,
    ) -> None:
        self.callback_options = callback_options
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A log file shows each epoch at once, and any class name, whatever its encoding.
            sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
        silence_lightning()
        common = {"allow_abbrev": False, "exit_on_error": False}
        commands = {name: {"description": ORDER, **common} for name in self.subcommands()}
        with one_line_errors():
            super().__init__(
                model_class,
                datamodule_class,
                save_config_callback=None,  # RunFolder saves it
                parser_kwargs=common | commands,
                auto_configure_optimizers=False,
                **kwargs,
            )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The commands, each with the arguments of the Trainer's method that are no options."""
        hidden = {"ckpt_path", "weights_only", "verbose"}
        every = LightningCLI.subcommands()
        return {name: every[name] | hidden for name in ("fit", "validate", "test")}

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--seed_everything",
            type=Seed,
            default=self.seed_everything_default,
            help="Decides the weights at the start, the order of the images and their augmentation",
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--ckpt",
            action=CheckpointName,
            nargs="?",
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
        for name, callback in self.callback_options.items():
            parser.add_lightning_class_args(callback, name)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses the options; those of the checkpoint, if there is one, are their defaults."""
        start = first_look(sys.argv[1:], self.subcommands())
        if start.ckpt is None:
            self.config = parser.parse_args()
            check_options(self.config[self.config.subcommand], start)
            return
        command = start.command
        defaults = parser.parse_args([command])[command].as_dict()
        self.source = source = find_source(command, start.ckpt, start.root, defaults)
        # What the checkpoint was trained with, to compare; and what lies under the given options.
        trained = parser.parse_object({command: source.trained_with})
        base = parser.parse_object({command: source.run_options or source.trained_with})
        self.config = parser.parse_args(namespace=base)
        print_once(f"Checkpoint: {relative(source.path)}")
        if command == "fit" and source.run_options is None:
            print_once(
                "Note: the checkpoint is not in a run's folder: options of the trainer and of "
                "checkpoints are the defaults, unless given"
            )
        config = self.config[command]
        check_options(config, start)
        compare_with_checkpoint(command, config, trained[command], source.checkpoint)

    def before_instantiate_classes(self) -> None:
        """Sets the defaults that depend on the hardware."""
        trainer = self.config[self.subcommand].trainer
        if trainer.precision is None and not trainer.plugins:
            trainer.precision = native_precision(trainer.accelerator)
            print_once(f"Precision: {trainer.precision}, which the hardware computes natively")
        if trainer.accelerator == "auto" and not GPU_FOUND:
            print_once("No GPU found: running on the CPU")

    def instantiate_classes(self) -> None:
        self.collector = PredictionCollector(self.config[self.subcommand].mirror)
        super().instantiate_classes()
        if self.source and self.subcommand != "fit":
            load_weights(self.model, self.source.checkpoint)
            self.model.class_names = self.source.checkpoint["class_names"]

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
        kwargs["enable_model_summary"] = False  # Lightning's own
        if given.logger in (None, True):
            kwargs["logger"] = False  # RunFolder makes it
        if self.config[self.subcommand].data.val_size == 0:
            kwargs["limit_val_batches"] = 0
        return super().instantiate_trainer(**kwargs)

    def own_callbacks(self) -> list[Callback]:
        """What a command needs beside the defaults and the callbacks of the user."""
        if self.subcommand != "fit":
            return [self.collector]
        options = yaml.safe_load(self.parser.dump(self.config, skip_unset=False))["fit"]
        trainer, callbacks = options["trainer"], list[Callback]()
        if not trainer["fast_dev_run"]:
            resumed = self.source.run if self.source else None
            epochs = completed_epochs(self.source.checkpoint) if self.source and resumed else 0
            callbacks.append(RunFolder(options, resumed, epochs))
        if trainer["enable_model_summary"] is not False:
            callbacks.append(NetworkSummary(max_depth=2))
        return callbacks

    def fit(self, model: LightningModule, datamodule: LightningDataModule) -> None:
        self.trainer.fit(model, datamodule, ckpt_path=self.source.path if self.source else None)

    def test(self, model: LightningModule, datamodule: LightningDataModule) -> None:
        self.trainer.test(model, datamodule, verbose=False)
        self.report("test", datamodule.test_set.images)  # type: ignore[attr-defined]

    def validate(self, model: LightningModule, datamodule: LightningDataModule) -> None:
        self.trainer.validate(model, datamodule, verbose=False)
        self.report("val", datamodule.val_set.images)  # type: ignore[attr-defined]

    def report(self, stage: Literal["test", "val"], images: torch.Tensor) -> None:
        """Prints how good the network is, and writes that beside the checkpoint."""
        assert self.source
        if not self.trainer.is_global_zero:
            return
        path, collector = self.source.path, self.collector
        predicted = PredictedImages(images, *collector.result, self.model.class_names)
        metadata = {
            "checkpoint": str(path),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            **describe_run(self.trainer),
        }
        if collector.mirrored is not None:
            correct = collector.mirrored.argmax(dim=1) == predicted.labels
            metadata["acc_mirrored"] = int(correct.sum()) / len(correct)
        files = write_report(path.parent, stage, predicted, metadata)
        print(f"Written to {relative(path.parent)}/: {', '.join(files)}")


def as_list(option: Any) -> list[Any]:
    """An option of the Trainer that may be one object, a list or None."""
    if option is None:
        return []
    return [*option] if isinstance(option, list) else [option]


def own_plugins(given: list[Any]) -> list[Any]:
    """Atomic checkpoints; in a SLURM job also its ranks, unless torchrun or a plugin sets them."""
    in_job = SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()
    if not in_job or any(isinstance(plugin, ClusterEnvironment) for plugin in given):
        return [AtomicCheckpointIO()]
    # Lightning would save, and resume from, half an epoch; recipes/slurm.sh requeues.
    return [AtomicCheckpointIO(), SLURMEnvironment(auto_requeue=False)]


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
