"""Checkpoints: how they are written, which one is meant, what it holds, what options it brings.

A checkpoint is a whole one of this project, or a bare network: a state_dict, as it is or under that
name.
"""

import contextlib
import io
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.fabric.plugins import TorchCheckpointIO

HALF_WRITTEN = ".part"  # the ending of a file that is being written


class WholeFiles(TorchCheckpointIO):
    """Writes checkpoints whole or not at all: beside their target, to the disk, then renamed.

    Their folder is made once, at the start of training: if it goes, so has the run that was in it,
    and a new one in its place would hide that.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Writes a checkpoint.

        Raises:
            OSError: If that can't be done; what was there before is still there then.
        """
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write(Path(path), content.getbuffer())


def write(path: Path, content: bytes | memoryview | str) -> None:
    """Writes a whole file or none: a reader finds the old or the new one, even after a power cut.

    Raises:
        OSError: In one sentence, if it can't be written.
    """
    half_written = path.with_name(path.name + HALF_WRITTEN)
    try:
        with half_written.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        half_written.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        reason = f"{error.strerror}{still_there(path)}"
        raise OSError(f"{path} could not be written: {reason}") from error
    finally:
        with contextlib.suppress(OSError):
            half_written.unlink(missing_ok=True)


def still_there(path: Path) -> str:
    """What a user wants to know of a file that could not be written."""
    if path.is_file():
        return "; the one from before is still there, whole"
    return "" if path.parent.is_dir() else f", for its folder {path.parent} is gone"


def sync_folder(folder: Path) -> None:
    """Has the disk remember the names in a folder; some systems don't let one ask for it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# Of a whole checkpoint; a network's weights alone are less.
PARTS = {
    "state_dict": dict,
    "hyper_parameters": dict,
    "datamodule_hyper_parameters": dict,
    "class_names": list,
    "epoch": int,
    "global_step": int,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
}


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
    for name, kind in PARTS.items():
        if name in content and not isinstance(content[name], kind):
            fail(f"{path} is damaged: its {name} is a {type(content[name]).__name__}")
    if not is_network(content):
        check_whole(path, content)
        return content
    network = content.get("state_dict", content)
    # Nothing is known of another bare network: it is taken to be one that was trained on [0, 1].
    plain = {"state_dict": network, "options": {"model": {"normalize": False}}}
    return published(network) or plain


def published(network: dict[str, Any]) -> dict[str, Any] | None:
    """A published CIFAR network under this project's names, with its options; None if it is none.

    The names are those of the CIFAR networks that are published most: conv1, bn1, layer1.0.conv1,
    …, linear, perhaps under `module.`. Their shortcuts are option A, which has no parameters, and
    put the old channels in the middle of the new ones.
    """
    bare = {str(name).removeprefix("module."): value for name, value in network.items()}
    if not {"conv1.weight", "linear.weight"} <= bare.keys():
        return None
    theirs = {"conv1": "conv", "bn1": "bn", "linear": "fc"}
    state_dict, blocks = {}, {"layer1": {""}, "layer2": {""}, "layer3": {""}}
    for name, value in bare.items():
        part, _, rest = name.partition(".")
        state_dict[f"{theirs.get(part, part)}.{rest}"] = value
        if part in blocks:
            blocks[part].add(rest.partition(".")[0])
    layers = [len(numbers) - 1 for numbers in blocks.values()]
    if 0 in layers:
        return None
    model = {"layers": layers, "shortcut": "pad", "normalize": False}
    # Native images, as they are tested on where they come from.
    return {
        "state_dict": with_old_channels_first(state_dict),
        "options": {"model": model, "data": {"augmentation": "pad"}},
    }


def with_old_channels_first(network: dict[str, Any]) -> dict[str, Any]:
    """The same function of the image with this project's shortcuts, which put new channels last.

    Only the order of the channels differs, so that the weights have to follow it.
    """
    stem, before = network["conv.weight"], {"layer2": "layer1", "layer3": "layer2"}
    order = {"layer1": torch.arange(len(stem) if torch.is_tensor(stem) and stem.dim() else 0)}
    for stage, narrower in before.items():
        old, side = order[narrower], len(order[narrower]) // 2
        new = torch.arange(2 * len(old))
        order[stage] = torch.cat([side + old, new[:side], new[3 * side :]])
    moved = {}
    for name, value in network.items():
        part, block, layer = [*name.split("."), "", ""][:3]
        if part == "fc" and block == "weight":
            value = rearranged(value, 1, order["layer3"])
        elif part in order and layer == "conv1":
            value = rearranged(value, 1, order[before.get(part, part) if block == "0" else part])
        elif part in order and layer in ("conv2", "bn2"):
            value = rearranged(value, 0, order[part])
        moved[name] = value
    return moved


def rearranged(value: Any, dim: int, order: torch.Tensor) -> Any:
    """A tensor with the channels of a dimension in another order; what does not fit stays."""
    if torch.is_tensor(value) and value.dim() > dim and value.shape[dim] == len(order):
        return value.index_select(dim, order)
    return value


def check_whole(path: Path, content: dict[str, Any]) -> None:
    """Refuses what is not of this project, or lacks what every use of it needs."""
    if "class_names" not in content:
        fail(f"{path} is a checkpoint of another project")
    for name in ("state_dict", "hyper_parameters", "epoch"):
        if name not in content:
            fail(f"{path} is damaged: it has no {name}")
    if not all(isinstance(name, str) for name in content["class_names"]):
        fail(f"{path} is damaged: its class_names are no names")


def is_network(checkpoint: dict[str, Any]) -> bool:
    """Whether this is a bare network's state_dict, as it is or under that name."""
    return "pytorch-lightning_version" not in checkpoint


def epochs_behind(checkpoint: dict[str, Any]) -> int:
    """The number of whole epochs that a checkpoint of this project has behind it."""
    return checkpoint["epoch"] + ("interrupted_epoch" not in checkpoint)


def stored_options(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The options that a checkpoint was trained with, by section.

    A bare network's are those that `read_checkpoint` supposes.
    """
    if is_network(checkpoint):
        return checkpoint["options"]
    return {
        "model": checkpoint["hyper_parameters"],
        "data": checkpoint.get("datamodule_hyper_parameters", {}),
    }


def flatten(options: dict[str, Any]) -> dict[str, Any]:
    """Parser defaults {"section.name": value}, without what the parser itself derives."""
    derived = ("model._instantiator", "data._instantiator", "model.num_classes", "data.images")
    flat = {
        f"{section}.{name}": value
        for section, values in options.items()
        if isinstance(values, dict)
        for name, value in values.items()
    }
    plain = {name: value for name, value in options.items() if not isinstance(value, dict)}
    return {name: value for name, value in {**flat, **plain}.items() if name not in derived}


def fail(message: str, exit_code: int = 2) -> NoReturn:
    """Ends the command with one line on stderr."""
    line = " ".join(message.split())
    printable = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    print(f"error: {printable}", file=sys.stderr)
    sys.exit(exit_code)
