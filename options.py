"""Refuses options that cannot be, each in one sentence, before anything is read or written."""

import difflib
import math
import re
import traceback
import warnings
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.cli import LightningArgumentParser, ReduceLROnPlateau
from torch import nn
from torch.optim import Optimizer

from checkpoints import fail
from cifar_datamodule import BUILT_IN

LARGE = 10**9
# What Lightning takes without a word and fails on later, or never: least and most, and what else.
RANGES: dict[str, tuple[float, ...]] = {
    "seed_everything": (0, 2**32 - 1),
    "trainer.devices": (1, 1024, -1),
    "trainer.num_nodes": (1, 1024),
    "trainer.fast_dev_run": (0, LARGE),
    "trainer.max_epochs": (1, LARGE, -1),
    "trainer.min_epochs": (0, LARGE),
    "trainer.max_steps": (1, LARGE, -1),
    "trainer.min_steps": (0, LARGE),
    "trainer.limit_train_batches": (1e-9, LARGE),
    "trainer.limit_val_batches": (0, LARGE),
    "trainer.limit_test_batches": (1e-9, LARGE),
    "trainer.limit_predict_batches": (1e-9, LARGE),
    "trainer.overfit_batches": (0, LARGE),
    "trainer.val_check_interval": (1e-9, LARGE),
    "trainer.check_val_every_n_epoch": (1, LARGE),
    "trainer.num_sanity_val_steps": (-1, LARGE),
    "trainer.log_every_n_steps": (0, LARGE),
    "trainer.accumulate_grad_batches": (1, LARGE),
    "trainer.gradient_clip_val": (0, LARGE),
    "trainer.reload_dataloaders_every_n_epochs": (0, LARGE),
    "cuda_graphs.steps": (0, 10_000),
    "pictures.every_n_epochs": (0, LARGE),
}
CHECKPOINT_RANGES = {
    "save_top_k": (-1, LARGE),
    "every_n_epochs": (0, LARGE),
    "every_n_train_steps": (0, LARGE),
}
SHOWN = 80  # characters of a value in a message
# Where Lightning finds what is wrong with an option once it knows the data.
LATE = ("lightning.pytorch.loops", "lightning.pytorch.trainer")
MOST_STEPS = 1000  # of a scheduler that is tried out

UNKNOWN = re.compile(
    r"unrecognized arguments: ?([^=\s]*)|not accept option '([^']+)'|Option '([^']+)' is not accept"
)
MISSING = re.compile(r"the following arguments are required: ([^\n]+)")
AMBIGUOUS = re.compile(r"Multiple subclasses with name ([^\n]+)")
LINKED = re.compile(r'Linked "(\S+)" must be given via "(\S+)"\.')
NESTED = re.compile(r"NestedArg\(key='.*', val='?(.*?)'?\)$")
KEY = re.compile(r'Parser key "([^"]+)"')
EXPECTED = re.compile(r"Expected (?!a path )(?:an? )?([^\n]+?)(?:\. Got value|: |\n|$)")
GIVEN = re.compile(r"Given value: (.*?)(?:\. Got value|\n|$)")
VALUE = re.compile(r"(?:Got value|import path string): (.*?)(?:\. Got value|\n|$)")


class Parser(LightningArgumentParser):
    """Says in one sentence what is wrong, where jsonargparse prints the whole usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # jsonargparse tries something out
            super().error(message, ex)
        fail(in_one_sentence(message, getattr(ex, "subcommand_parser", None) or self))


def in_one_sentence(message: str, parser: LightningArgumentParser) -> str:
    """What a message of jsonargparse comes to: the name, the value, and what is allowed."""
    keys = list(dict.fromkeys(KEY.findall(message)))
    name = ".".join(keys)
    if len(keys) < 2 and (unknown := UNKNOWN.search(message)):
        return unknown_option(unknown[unknown.lastindex or 0], name, parser)
    if keys and (missing := MISSING.search(message)):
        return f"{name} needs {missing[1]}"
    if keys and (ambiguous := AMBIGUOUS.search(message)):
        return f"{name} is ambiguous: {ambiguous[1]}"
    innermost = message[message.rfind("Parser key") :] if keys else message
    value = GIVEN.search(innermost) or VALUE.search(innermost)
    if keys and value and (kinds := EXPECTED.findall(innermost[: value.end()])):
        allowed = " or ".join(dict.fromkeys(map(plain, kinds)))
        nested = NESTED.match(value[1])  # an option of a class, as class and option in one
        given = nested[1] if nested else shortened(value[1])
        return f"{name} is {given!r}: it takes {allowed}"
    message = message.replace("Unexpected config:", "the config holds no options:")
    message = LINKED.sub(r"\1 is no option: it follows from \2", message)
    return shortened(message.replace("Parser key ", ""), 4 * SHOWN)


def unknown_option(name: str, inside: str, parser: LightningArgumentParser) -> str:
    """Says so, and which option may be meant; `inside` is what it was given to, if not a parser."""
    dashes = "--" if name.startswith("--") else ""
    known = [option.removeprefix("--") for option in parser._option_string_actions]
    close = difflib.get_close_matches(name.removeprefix(dashes), known, n=1)
    hint = f" (do you mean {dashes}{close[0]}?)" if close and not inside else ""
    command = parser.prog.replace(" [options]", "")
    full = f"{inside}.{name}" if inside else name or "''"
    return f"there is no option {shortened(full)}{hint}: see python {command} --help"


def plain(kind: str) -> str:
    """`int` for `<class 'int'>`, `a, b` for `typing.Literal['a', 'b']`, null for NoneType."""
    kind = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", kind.strip())
    kind = re.sub(r"typing\.Literal\[(.*)\]", lambda found: found[1].replace("'", ""), kind)
    if kind.startswith("dot import"):
        return "the name of a class"
    return "null" if kind == "NoneType" else re.sub(r"\b(?:\w+\.)+(?=[A-Z])", "", kind)


def shortened(text: Any, length: int = SHOWN) -> str:
    words = " ".join(str(text).split())
    return words if len(words) <= length else f"{words[:length]} …"


def leaves(config: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """All the values of a configuration, with their names."""
    if isinstance(config, dict):
        for key, value in config.items():
            yield from leaves(value, f"{name}.{key}" if name else str(key))
    elif isinstance(config, list | tuple):
        for index, value in enumerate(config):
            yield from leaves(value, f"{name}[{index}]")
    else:
        yield name, config


def check_values(config: dict[str, Any], checkpoints: list[str]) -> None:
    """Fails on values that nothing can be done with, and on Trainer's that are out of range."""
    for section in ("trainer", "model", "data", "cuda_graphs", "pictures", *checkpoints):
        if not isinstance(config[section], dict):
            fail(f"{section} is {shortened(config[section])}: it takes options")
    ranges = RANGES | {f"{c}.{key}": r for c in checkpoints for key, r in CHECKPOINT_RANGES.items()}
    for name, value in leaves(config):
        if isinstance(value, str) and not value.isprintable():
            fail(f"{name} is {shortened(ascii(value))}: it holds characters that cannot be printed")
        number = as_number(value)
        if number is None:
            continue
        if not math.isfinite(number):
            fail(f"{name} is {value}: it must be a finite number")
        if name in ranges:
            check_range(name, number, *ranges[name])
    for checkpoint in checkpoints:
        mode = config[checkpoint]["mode"]
        if mode not in ("min", "max"):
            fail(f"{checkpoint}.mode is {shortened(mode)}: choose min or max")


def as_number(value: Any) -> float | None:
    """A number, or text that is one."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None
    except OverflowError:  # an int beyond all floats
        return math.inf


def check_range(name: str, value: float, least: float, most: float, *others: float) -> None:
    if not (least <= value <= most or value in others):
        first = "more than 0, up" if 0 < least < 1 else f"from {least:g}"
        also = "".join(f", or {other:g}" for other in others)
        fail(f"{name} is {value:g}: it must be {first} to {most:,}{also}")


def check_validation(config: Any) -> None:
    """Fails where validation would come too late, or between gradients that wait for others.

    That is, for known data: after the last batch of an epoch, or where the best checkpoint, which
    is saved then, would lose what batches before it have accumulated.
    """
    interval, data = config.trainer.val_check_interval, config.data
    once = not isinstance(interval, int | float) or (type(interval) is float and interval == 1)
    if once or data.dataset not in BUILT_IN or data.batch_size < 1:
        return
    batches = math.ceil((BUILT_IN[data.dataset][1] - data.val_size) / data.batch_size)
    every = interval if isinstance(interval, int) else max(1, int(batches * interval))
    together = config.trainer.accumulate_grad_batches
    if together > 1 and every % together:
        fail(
            f"trainer.val_check_interval is {interval}, every {every} batches: it must be a "
            f"multiple of trainer.accumulate_grad_batches, {together}"
        )
    if not isinstance(interval, int):
        return
    if config.trainer.check_val_every_n_epoch and data.val_size and interval > max(batches, 1):
        fail(f"trainer.val_check_interval is {interval}: an epoch has {batches} batches")


def check_optimizer(module: Any, epochs: int | None, shown: dict[str, str]) -> None:
    """Tries the optimizer and the scheduler out, on stand-ins for the parameters.

    Args:
        module: The `ResNetModule`.
        epochs: How many are trained; -1 or None where nobody knows.
        shown: What `optimizer` and `lr_scheduler` are called in a message.
    """
    doubles = [nn.Parameter(torch.zeros([1] * p.dim())) for p in module.parameters()]
    for double in doubles:
        double.grad = torch.ones_like(double)
    part = "optimizer"
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        try:
            optimizer = module.optimizer(doubles)
            take_step(optimizer)
            if not rate(optimizer) > 0:
                raise ValueError(f"lr is {rate(optimizer):g}: it must be more than 0")
            part = "lr_scheduler"
            if module.lr_scheduler is not None:
                steps = min(epochs or 2, MOST_STEPS) if module.lr_interval == "epoch" else 2
                try_scheduler(module, optimizer, steps)
        except Exception as error:  # torch's optimizers and schedulers refuse in many ways
            fail(f"model.{part} is {shown[part]}: {explained(error)}")


def rate(optimizer: Optimizer) -> float:
    return float(optimizer.param_groups[0]["lr"])


def take_step(optimizer: Optimizer) -> None:
    optimizer.step(lambda: 1.0)  # LBFGS wants a closure, and Lightning gives one


def try_scheduler(module: Any, optimizer: Optimizer, steps: int) -> None:
    scheduler = module.schedule(optimizer, max(steps, MOST_STEPS))
    if isinstance(scheduler, ReduceLROnPlateau) and scheduler.monitor not in metrics_of(module):
        raise ValueError(not_logged(scheduler.monitor, module))
    for step in range(steps - 1):  # with the rate after the last nothing is trained
        scheduler.step(*([1.0] if isinstance(scheduler, ReduceLROnPlateau) else []))
        if not 0 <= rate(optimizer) < math.inf:
            raise ValueError(f"lr is {rate(optimizer):g} after {step + 1} steps")


def metrics_of(module: Any) -> list[str]:
    """What is logged, for callbacks to look at; a metric of your own belongs here or into these."""
    return ["lr", "loss", "images_per_second", *module.train_metrics, *module.val_metrics]


def not_logged(monitor: str, module: Any) -> str:
    return f"monitor is {shortened(monitor)}: choose {', '.join(metrics_of(module))}"


def check_callbacks(
    trainer: Trainer, module: LightningModule, options: dict[Callback, str]
) -> None:
    """Fails on a callback that would itself, later; `options` names those that are options."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name = options.get(callback, f"{type(callback).__name__} in trainer.callbacks")
        monitor = getattr(callback, "monitor", None)
        known = metrics_of(module)
        if monitor and monitor not in known and not str(monitor).startswith("val_class/"):
            fail(f"{name}: {not_logged(monitor, module)}")
        if isinstance(callback, ModelCheckpoint):
            try:
                callback.format_checkpoint_name({name: torch.tensor(0) for name in known})
            except Exception as error:  # str.format fails in many ways
                fail(f"{name}.filename is {callback.filename!r}: {explained(error)}")
        left = callback.time_remaining() if isinstance(callback, Timer) else None
        if left is not None and left <= 0:
            fail("trainer.max_time is no time at all: it must be more than 0")


def explained(error: Exception) -> str:
    """An exception's message, with its kind where that says more."""
    plain_kinds = (ValueError, MisconfigurationException, OSError)
    message = shortened(error, 4 * SHOWN)
    if isinstance(error, plain_kinds) and message:
        return message
    return f"{type(error).__name__}{f': {message}' if message else ''}"


def refused(error: Exception) -> str | None:
    """The sentence for what Lightning refuses as it runs; None for a bug: its traceback counts."""
    if isinstance(error, MisconfigurationException | OSError | FloatingPointError):
        return str(error)
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [str(frame.f_globals.get("__name__")) for frame in frames]
    if not modules[-1].startswith(("lightning.", "torch.")):
        return None
    for module, frame in zip(modules, frames, strict=True):
        if module.endswith(".checkpoint_connector") and "resto" in frame.f_code.co_name:
            return f"the checkpoint cannot be restored: {explained(error)}"
    if isinstance(error, ValueError) and modules[-1].startswith(LATE):
        return str(error)
    return None
