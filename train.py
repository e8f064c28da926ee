"""The command line: trains, validates, tests, applies and exports a residual network on CIFAR.

    python train.py fit                         # 80 epochs on CIFAR-10; runs go to lightning_logs/
    python train.py fit --ckpt last             # goes on with the newest run
    python train.py test                        # the best checkpoint of the newest run
    python train.py predict --images cat.jpg    # what it sees in your own images
    python train.py export --output model.onnx  # a file that runs without this project
    python train.py fit --help                  # every option

Every option can also stand in a YAML file given with --config, as those in recipes/ do.
"""

import hashlib
import json
import logging
import signal
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    # Ctrl-C while torch is being imported, which takes seconds.
    signal.signal(signal.SIGINT, lambda number, frame: sys.exit(128 + number))

import torch
import yaml
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

import report
from callbacks import (
    Pictures,
    Progress,
    Report,
    SaveRun,
    SayTimeOnCPU,
    Throughput,
    circumstances,
    global_batch,
    gpu_found,
    say,
    shown,
)
from checkpoints import (
    WholeFiles,
    epochs_behind,
    fail,
    find_checkpoint,
    flatten,
    is_network,
    read_checkpoint,
    stored_options,
    write,
)
from cifar_datamodule import CIFARDataModule
from cuda_graphs import CUDAGraphs
from export import Pixels, check_output, export
from interruptions import Interruptions, signals_exit
from options import (
    Parser,
    check_callbacks,
    check_optimizer,
    check_validation,
    check_values,
    explained,
    refused,
)
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


# No part of what a run is compared by.
UNTOLD = ("root", "eval_batch_size", "num_workers", "images", "urls", "seed", "num_classes")


class Trainer(LightningTrainer):
    """Lightning's Trainer with a verb more."""

    def export(
        self,
        model: ResNetModule,
        datamodule: CIFARDataModule,
        output: str = "model.onnx",
        pixels: Pixels = "uint8",
    ) -> None:
        """Write the network to a file that runs without this project.

        Args:
            model: The trained network.
            datamodule: The data that it was trained on.
            output: The file: .onnx for ONNX Runtime and its like, .pt2 for torch.export.
            pixels: What it takes: uint8 images, or float32 ones in [0, 1].
        """
        path = check_output(output)
        difference = export(model, datamodule, path, pixels)
        say(
            f"Exported: {path}, {path.stat().st_size / 2**20:.1f} MiB: {pixels} images "
            f"(N, 3, {datamodule.image_size}, {datamodule.image_size}) to probabilities of "
            f"{len(model.class_names)} classes. From PyTorch, on test images, it differs by "
            f"{difference:.1e} at most."
        )


class PeriodicCheckpoint(ModelCheckpoint):
    """Lightning's, that can save as often as last_checkpoint does."""

    @property
    def state_key(self) -> str:
        key = super().state_key
        # As it always was, but where it would be that of last_checkpoint.
        return key if self._every_n_epochs == 1 else key.replace("Periodic", "Model", 1)


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
            kind = PeriodicCheckpoint if name == "periodic_checkpoint" else ModelCheckpoint
            parser.add_lightning_class_args(kind, name)
            parser.set_defaults({f"{name}.{k}": v for k, v in {**COMMON, **defaults}.items()})
        parser.add_lightning_class_args(CUDAGraphs, "cuda_graphs")
        parser.add_lightning_class_args(Pictures, "pictures")
        parser.link_arguments(
            "data", "model.num_classes", compute_fn=self.count_classes, apply_on="instantiate"
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return LightningCLI.subcommands() | {"export": {"model", "datamodule"}}

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand in ("validate", "test"):
            parser.set_defaults({"verbose": False})  # the report says it better
            parser.add_argument(
                "--mirror",
                type=bool,
                nargs="?",
                const=True,
                default=False,
                help="Show each image mirrored, too, and report the accuracy of the means of both "
                "probabilities beside the plain one.",
            )
        if subcommand == "predict":
            parser.add_argument(
                "--images",
                type=str,
                nargs="+",
                help="Your own images: files, folders and patterns such as '*.png'. "
                "Without any, the test images are predicted.",
            )
            parser.add_argument(
                "--output",
                type=str | None,
                help="Where the predictions of your own images are written, too: .csv or .json.",
            )
        return parser

    def count_classes(self, data: CIFARDataModule) -> int:
        """The number of logits: the checkpoint's, for its data need not be there."""
        options = stored_options(self.content)["model"] if self.checkpoint else {}
        return options.get("num_classes") or data.num_classes

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        try:
            self._parse(parser, args)
        except OSError:
            raise
        except UnicodeDecodeError as error:
            fail(f"a config file is no text in UTF-8: {error}")
        except Exception as error:  # a config file can hold anything
            fail(f"the options cannot be read: {explained(error)}")

    def _parse(self, parser: LightningArgumentParser, args: ArgsType) -> None:
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
            if "seed_everything" in options:  # given now, it decides the data's as well
                self._parser(command).set_defaults({"data.seed": None})
        super().parse_arguments(parser, args)
        check_values(self.config[command].as_dict(), list(CHECKPOINTS))
        self._settle(self.config[command], command, "trainer.precision" in options)
        self._check(self.config[command], command)

    def _settle(self, config: Any, command: str, precision_given: bool) -> None:
        """Decides what the options leave open."""
        if self.accelerator is None:
            config.trainer.accelerator = "auto"  # as printed: what is saved holds on any machine
        if config.trainer.precision is None and not config.trainer.plugins:
            config.trainer.precision = native_precision(self.accelerator)
            say(f"Precision: {config.trainer.precision}, by what the hardware computes natively")
        elif command == "fit" and self.checkpoint and not precision_given:
            say(f"Precision: {config.trainer.precision}, as in the run so far")
        if self.checkpoint and is_network(self.content) and config.model.input_mean is None:
            say("Input scaling: none, as far as known (or give --model.input_mean and input_std)")
        # The checkpoint is no part of what is saved, and LightningCLI would read its options again,
        # over those given explicitly.
        config.ckpt = None
        if "ckpt_path" in config:
            config.ckpt_path = None
        if command == "predict":
            config.data.images = config.images or config.data.images

    def _check(self, config: Any, command: str) -> None:
        """Refuses what cannot be done, before anything is."""
        if config.get("weights_only") is False:
            fail("weights_only is False, but a checkpoint is never read as code: leave it out")
        if command == "fit":
            check_validation(config)
        if self.checkpoint and not is_network(self.content):
            self._check_scaling(config)
        if command == "fit" and self.checkpoint:
            self._check_resume(config)
        if command == "predict" and config.output:
            check_table(config.output, config.data.images)
        if command == "export":
            try:
                check_output(config.output)
            except ValueError as error:
                fail(str(error))

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
            try:
                run_options = yaml.safe_load(config_file.read_text())
                for section in ("seed_everything", "trainer", *CHECKPOINTS):
                    options[section] = run_options[section]
                for section in {"cuda_graphs", "pictures"} & {*run_options}:
                    options[section] = run_options[section]
            except (yaml.YAMLError, ValueError, TypeError, LookupError) as error:
                fail(f"{config_file} is damaged: {explained(error)}")
            # From an earlier checkpoint a new run branches off; the old one stays as it is.
            self.run = folder.parent if checkpoint.name == "last.ckpt" else None
        defaults, subparser = flatten(options), self._parser(command)
        try:
            subparser.parse_object(defaults, defaults=False)  # defaults are not checked
            subparser.set_defaults(defaults)
        except Exception as error:  # whatever the file holds
            fail(f"{checkpoint} has options that cannot be used: {explained(error)}")

    def _check_scaling(self, config: Any) -> None:
        stored = stored_options(self.content)["model"]
        for name in ("normalize", "input_mean", "input_std"):
            given = json.dumps(config.model[name])
            if given != json.dumps(stored.get(name)):
                fail(
                    f"model.{name} is {given}, but the checkpoint brings its own scaling: leave it "
                    "out (it is for a bare network)"
                )

    def _check_resume(self, config: Any) -> None:
        """Refuses what a resumed run would ignore, before anything is written."""
        done, epochs = epochs_behind(self.content), config.trainer.max_epochs
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
        except Exception as error:  # of all classes that an option can name
            fail(explained(error))
        if self.subcommand == "fit":
            config = self.config["fit"]
            chosen = {
                name: in_one_word(config.model[name]) for name in ("optimizer", "lr_scheduler")
            }
            check_optimizer(self.model, config.trainer.max_epochs, chosen)
        options = {self.config_init[self.subcommand][name]: name for name in CHECKPOINTS}
        check_callbacks(self.trainer, self.model, options)
        if self.checkpoint and is_network(self.content):
            self.model.load_network(self.content["state_dict"], self.checkpoint)
        elif self.subcommand == "export":
            self.model.on_load_checkpoint(self.content)
            self.model.load_state_dict(self.content["state_dict"])

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        kwargs.pop("mirror", None)  # the report's
        if self.checkpoint and not is_network(self.content) and subcommand != "export":
            kwargs["ckpt_path"] = str(self.checkpoint)
            kwargs["weights_only"] = True  # whatever the environment says
        return kwargs

    def instantiate_trainer(self, **kwargs: Any) -> LightningTrainer:
        config = self.config[self.subcommand].trainer
        config_init = self.config_init[self.subcommand]
        callbacks = as_list(config_init.trainer.callbacks)
        own_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
        if config.enable_progress_bar is not False and not own_bar:
            callbacks.append(Progress())
        self.report = Report(bool(self.config[self.subcommand].get("mirror")))
        callbacks += (
            [Interruptions(), SayTimeOnCPU(), Throughput()]
            if self.subcommand == "fit"
            else [self.report]
        )
        kwargs["callbacks"] = callbacks
        if self.datamodule.val_size == 0 or config.limit_val_batches == 0:
            # Without validation the last is the best.
            config_init.best_checkpoint.monitor = None
        if config.logger in (None, True):
            kwargs["logger"] = self.subcommand == "fit" and TensorBoardLogger(
                # Absolute, for a resumed best_checkpoint forgets its score if its folder differs.
                self.run.parents[1]
                if self.run
                else Path(config.default_root_dir or ".").absolute(),
                name=self.run.parent.name if self.run else LOGS,
                version=self.run.name if self.run else None,
                default_hp_metric=False,
                # Epochs that are trained once more replace those that a killed run has logged.
                purge_step=epochs_behind(self.content) + 1 if self.run else None,
            )
        plugins = as_list(config_init.trainer.plugins)
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, WholeFiles()]
        if self.subcommand == "predict" and config.devices == "auto":
            kwargs["devices"] = 1
        if self.accelerator is None and not gpu_found():
            kwargs["accelerator"] = "cpu"
            if self.subcommand != "fit":  # which says so itself, with the time that it will take
                say("No GPU found: running on the CPU")
        return super().instantiate_trainer(**kwargs)

    def _instantiate_trainer(
        self, config: dict[str, Any], callbacks: list[Callback]
    ) -> LightningTrainer:
        try:
            return super()._instantiate_trainer(config, callbacks)
        except Exception as error:  # of what Lightning tries: devices, plugins, loggers, ...
            fail(f"trainer cannot be set up: {explained(error)}")

    def before_fit(self) -> None:
        self.start = time.perf_counter()

    def after_fit(self) -> None:
        """Writes the run's entry in TensorBoard's HPARAMS, and says how it went."""
        if not self.trainer.is_global_zero:
            return
        minutes = (time.perf_counter() - self.start) / 60
        best = self.config_init["fit"].best_checkpoint
        epoch = 0
        if best.best_model_path:
            epoch = read_checkpoint(Path(best.best_model_path))["epoch"] + 1
        score = best.best_model_score
        logger = self.trainer.logger
        if isinstance(logger, TensorBoardLogger):
            last = self.trainer.callback_metrics.get("train/acc")
            metrics: dict[str, Any] = {"hp/train/acc": last}
            if score is not None:
                metrics = {f"hp/best_{best.monitor}": score, "hp/best_epoch": epoch}
            logger.log_hyperparams(self._options_that_matter(), metrics)
            logger.finalize("success")  # once more: the entry is not lost
        if best.best_model_path:
            path = shown(Path(best.best_model_path))
            accuracy = "" if score is None else f" ({best.monitor} {score:.4f})"
            say(
                f"Trained for {minutes:.1f} min. Best checkpoint: {path}{accuracy}, after epoch "
                f"{epoch}. Test it: python train.py test --ckpt {path}"
            )
        if isinstance(logger, TensorBoardLogger):
            say(f"See the run: tensorboard --logdir {shown(Path(logger.save_dir) / logger.name)}")

    def _options_that_matter(self) -> dict[str, Any]:
        """What runs are compared by: no folders, no loaders, and optimizers in one word."""
        config = self.config["fit"]
        options = {
            name: value
            for section in (config.data, config.model)
            for name, value in vars(section).items()
            if name not in UNTOLD
        }
        for name in ("optimizer", "lr_scheduler"):
            options[name] = in_one_word(options[name])
        optimizer = self.trainer.optimizers[0]
        return {
            **options,
            # A cycle has a rate of its own, and no use for the optimizer's.
            "lr": optimizer.param_groups[0].get("max_lr", optimizer.defaults["lr"]),
            "epochs": config.trainer.max_epochs,
            "precision": config.trainer.precision,
            "global_batch": global_batch(self.trainer),
            "seed": config.seed_everything,
        }

    def after_test(self) -> None:
        self._write_report("test")

    def after_validate(self) -> None:
        self._write_report("val")

    def _write_report(self, stage: str) -> None:
        """Says how good the network is, and writes that beside the checkpoint."""
        if not self.trainer.is_global_zero:
            return
        assert self.checkpoint is not None
        data, extra = self.datamodule, {}
        if self.report.mirrored:
            probabilities, labels = self.report.mirrored
            extra["acc_mirrored"] = int((probabilities.argmax(1) == labels).sum()) / len(labels)
        files = report.write_all(
            self.checkpoint.parent,
            stage,
            (data.test_set if stage == "test" else data.val_set).images,
            *self.report.result,
            self.model.class_names,
            {**self._circumstances(), **extra},
        )
        say(f"Written to {shown(self.checkpoint.parent)}/: {', '.join(files)}")

    def _circumstances(self) -> dict[str, Any]:
        assert self.checkpoint is not None
        return {
            "command": self.subcommand,
            "checkpoint": {
                "path": str(self.checkpoint),
                "sha256": hashlib.sha256(self.checkpoint.read_bytes()).hexdigest(),
            },
            **circumstances(self.trainer),
        }

    def predict(self, images: Any = None, output: str | None = None, **kwargs: Any) -> None:
        """Predicts one's own images, or writes predictions.csv: a line for each test image."""
        if self.trainer.world_size > 1:
            fail("predict writes one file, in one process: give --trainer.devices 1")
        assert self.checkpoint is not None
        batches: Any = self.trainer.predict(**kwargs)
        probabilities, data = torch.cat(batches), self.datamodule
        if data.images is not None:
            return self._say_predictions(probabilities)
        path = self.checkpoint.parent / "predictions.csv"
        # With limit_predict_batches there are fewer probabilities than labels.
        labels = data.test_set.labels[: len(probabilities)]
        rows = report.prediction_rows(probabilities, labels, self.model.class_names)
        write(path, report.as_csv(rows))
        say(f"Predictions: {path}")

    def _say_predictions(self, probabilities: torch.Tensor) -> None:
        """Shows the predictions of one's own images; exits with 1 if a file could not be read."""
        data, output = self.datamodule, self.config["predict"].output
        rows = [
            {"file": str(file), **best}
            for file, best in zip(
                data.files, report.ranking(probabilities, self.model.class_names), strict=False
            )
        ]
        report.show_predictions(rows)
        if output:
            text = report.as_json(rows) if output.endswith(".json") else report.flat_csv(rows)
            write(Path(output), text)
            say(f"Written: {output}")
        for remark in data.remarks:
            print(f"note: {remark}", file=sys.stderr)
        for reason in data.unreadable:
            print(f"error: {reason}", file=sys.stderr)
        if data.unreadable:
            sys.exit(1)


def check_table(output: str, images: list[str] | None) -> None:
    """Refuses what predictions cannot be written to, before they are made."""
    path = Path(output)
    if path.suffix not in (".csv", ".json"):
        fail(f"output is {output!r}: its ending must be .csv or .json")
    if not path.parent.is_dir():
        fail(f"output is {output!r}: there is no folder {str(path.parent)!r}")
    if not images:
        fail(f"output is {output!r}, but there are no images: give --images")


def as_list(option: Any) -> list[Any]:
    """What Lightning takes as one, as many or as none."""
    return option if isinstance(option, list) else [] if option is None else [option]


def in_one_word(choice: Any) -> str:
    """`StepLR(step_size=20, gamma=0.33)` for the configuration of a scheduler or an optimizer."""
    if choice is None:
        return "none"
    listed = ", ".join(
        f"{name}={value:.6g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in choice.get("init_args", {}).items()
        if value is not None and value is not False and name != "last_epoch"
    )
    return f"{choice['class_path'].split('.')[-1]}({listed})"


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


def main() -> None:
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # batches lie in memory
    warnings.filterwarnings("ignore", ".*Total length of `list`.*")  # with val_size 0
    warnings.filterwarnings("ignore", ".*dirpath has changed.*")
    warnings.filterwarnings("ignore", ".*exists and is not empty.*")
    warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")  # its sampler is
    warnings.filterwarnings("ignore", ".*training_step. returned .None.*")  # of CUDAGraphs
    warnings.filterwarnings("ignore", ".*not supported by the model summary.*")  # bf16-mixed
    warnings.filterwarnings("ignore", ".*LeafSpec.*")  # Lightning 2.6 with newer torch
    warnings.filterwarnings("ignore", ".*No complete tensor found.*")  # of torch.export, on one CPU
    warnings.filterwarnings("ignore", ".*torch.jit.trace.*")  # what draws TensorBoard's graph
    lightning_log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    untold = ("litlogger", "`weights_only` was not set")  # an advert, and its own default
    lightning_log.addFilter(lambda record: not any(x in record.getMessage() for x in untold))
    try:
        with signals_exit():
            CLI(
                ResNetModule,
                CIFARDataModule,
                SaveRun,
                trainer_class=Trainer,
                parser_class=Parser,
                trainer_defaults={
                    "accelerator": "gpu",
                    "max_epochs": 80,
                    "log_every_n_steps": 10,
                },
                seed_everything_default=0,
                auto_configure_optimizers=False,
            )
    except Exception as error:
        sentence = refused(error)
        if sentence is None:
            raise
        fail(sentence, exit_code=1)


if __name__ == "__main__":
    main()
