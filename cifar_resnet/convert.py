"""Weights from elsewhere, and bare state dicts of this project, as checkpoints of this project.

Known are the names of this project (conv, bn, layer1.0.conv1, ..., fc), of
github.com/akamaster/pytorch_resnet_cifar10 (conv1, bn1, ..., linear; options A and B) and of
github.com/chenyaofo/pytorch-cifar-models (conv1, bn1, ..., fc; option B).
"""

import re
from collections.abc import Mapping
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor

STATE_DICT_KEYS = ("state_dict", "net", "model", "model_state_dict")
REPLACEMENTS = (
    (r"^((module|_orig_mod|model|net|network)\.)+", ""),
    (r"^conv1\.", "conv."),
    (r"^bn1\.", "bn."),
    (r"^linear\.", "fc."),
    (r"\.shortcut\.", ".downsample."),
)
NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
KNOWN_NAME = re.compile(
    rf"mean|std|conv\.weight|bn\.{NORM}|fc\.(weight|bias)|layer[123]\.\d+\."
    rf"(conv[12]\.weight|bn[12]\.{NORM}|downsample\.(0\.)?weight|downsample\.1\.{NORM})"
)


def convert_state_dict(content: Mapping[str, Any]) -> dict[str, Any]:
    """Converts the content of a file that is not a checkpoint of this project.

    Args:
        content: A state dict, or a mapping that has one under `state_dict`, `net`, `model` or
            `model_state_dict`, or a single one under any other key. It may be nested once more.

    Returns:
        A checkpoint as `read_checkpoint` returns it, with the options that the weights' shapes
        imply. Weights do not show the activation, nor whether a shortcut that has none pools, nor
        what images this project's were trained on: ReLU, `pad` and enlarged ones are assumed.
        `num_batches_tracked` stays missing if the file, as those of PyTorch 0.3, has none.

    Raises:
        ValueError: If these are not the weights of such a network.
    """
    state_dict = find_state_dict(content)
    keys = {own_name(key): key for key in state_dict}
    check_names(keys, state_dict)
    weights = {name: state_dict[key] for name, key in keys.items()}
    options = infer_options(weights)
    is_foreign = keys["conv.weight"].endswith("conv1.weight")
    if is_foreign and options["preactivation"]:
        raise ValueError("not a network of this project: its preactivation blocks may differ")
    if is_foreign and options["shortcut"] == "pad":
        weights = permute_channels(weights)
    return {
        "state_dict": {
            name if name in ("mean", "std") else f"network.{name}": value
            for name, value in weights.items()
        },
        "hyper_parameters": options,
        # Other projects train on images of the original size, not on enlarged ones.
        "datamodule_hyper_parameters": {"augmentation": "pad"} if is_foreign else {},
        "class_names": [],
    }


def find_state_dict(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict that `content` is, or has under one of its keys, or of their keys."""
    if is_state_dict(content):
        return {str(key): value for key, value in content.items()}
    found = [key for key, value in content.items() if is_state_dict(value)]
    usual = [key for key in STATE_DICT_KEYS if key in found]
    outer = [
        key
        for key, value in content.items()
        if isinstance(value, Mapping) and any(map(is_state_dict, value.values()))
    ]
    chosen = usual[:1] or found or outer
    if len(chosen) != 1:
        keys = shorten(", ".join(map(str, content)) or "none", 100, placeholder=" …")
        raise ValueError(
            f"not a network of this project: it has {len(chosen)} state dicts; its keys are {keys}"
        )
    return find_state_dict(content[chosen[0]])


def is_state_dict(value: Any) -> bool:
    """Whether this is a mapping of tensors, and has any."""
    if not isinstance(value, Mapping) or not value:
        return False
    return all(isinstance(tensor, Tensor) for tensor in value.values())


def own_name(key: str) -> str:
    """This project's name for a key: `conv.weight` for `module.conv1.weight`."""
    for pattern, replacement in REPLACEMENTS:
        key = re.sub(pattern, replacement, key)
    return key


def check_names(keys: Mapping[str, str], state_dict: Mapping[str, Tensor]) -> None:
    """Refuses a state dict without a stem, with other layers, or of two networks.

    `keys` are the state dict's keys by this project's names.
    """
    for name, other in (("conv.weight", "conv1.weight"), ("fc.weight", "linear.weight")):
        if name not in keys:
            raise ValueError(
                f"not a network of this project: it has no {name} or {other}; its first key is "
                f"{next(iter(keys.values()))}"
            )
    for key in state_dict:
        name = own_name(key)
        if not KNOWN_NAME.fullmatch(name):
            raise ValueError(f"not a network of this project: it has an unknown {key}")
        if keys[name] != key:
            raise ValueError(f"not a network of this project: it has both {key} and {keys[name]}")


def infer_options(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The options of `ResNetModule` that the weights' shapes imply."""
    blocks = {tuple(name.split(".")[:2]) for name in weights if name.startswith("layer")}
    stages = [stage for stage, _ in blocks]
    shortcuts = [v for k, v in weights.items() if re.search(r"downsample\.(0\.)?weight$", k)]
    kernels = {tuple(weight.shape[2:]) for weight in shortcuts}
    # A tensor of no dimensions is left to the loader, which compares all shapes.
    width, num_classes = (
        len(torch.atleast_1d(weights[name])) for name in ("conv.weight", "fc.weight")
    )
    return {
        "layers": [stages.count(f"layer{stage}") for stage in (1, 2, 3)],
        "num_classes": num_classes,
        "shortcut": "pad" if not kernels else "conv1x1" if kernels == {(1, 1)} else "conv3x3",
        "preactivation": "bn.weight" in weights and weights["bn.weight"].numel() == 4 * width,
        "width": width,
        "normalize": False,
        **{
            f"input_{name}": weights[name].flatten().tolist()
            for name in ("mean", "std")
            if name in weights and weights[name].numel() == 3
        },
    }


def permute_channels(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts weights for akamaster's option A to weights for this project's.

    Where a shortcut widens, akamaster's puts half of the new channels before the old ones and half
    behind them, this project's puts all behind. What makes or takes a stage's channels is permuted;
    the network then computes the same. A weight of a wrong shape stays as it is.
    """
    order = {"layer1": torch.arange(len(torch.atleast_1d(weights["conv.weight"])))}
    for narrow, wide in (("layer1", "layer2"), ("layer2", "layer3")):
        old, new = order[narrow], torch.arange(2 * len(order[narrow]))
        start = len(old) // 2
        order[wide] = torch.cat([start + old, new[:start], new[start + len(old) :]])
    first_inputs = {"layer1": "layer1", "layer2": "layer1", "layer3": "layer2"}
    permuted = dict(weights)
    for name in weights:
        stage, block, layer = [*name.split("."), ""][:3]
        if stage == "fc":
            dim, channels = 1, order["layer3"]
        elif layer == "conv1":
            dim, channels = 1, order[first_inputs[stage] if block == "0" else stage]
        elif layer in ("conv2", "bn2"):
            dim, channels = 0, order[stage]
        else:
            continue
        if weights[name].shape[dim : dim + 1] == channels.shape:
            permuted[name] = weights[name].index_select(dim, channels)
    return permuted
