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

from cifar_resnet.messages import UserError

STATE_DICT_KEYS = ("state_dict", "net", "model", "model_state_dict")
REPLACEMENTS = (
    (r"^((module|_orig_mod|model|net|network)\.)+", ""),
    (r"^conv1\.", "conv."),
    (r"^bn1\.", "bn."),
    (r"^linear\.", "fc."),
    (r"\.shortcut\.", ".downsample."),
)
ENDS = {"conv.weight", "bn.weight", "fc.weight"}  # stem and head, by which a network is known


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
        UserError: If these are not the weights of one such network.
    """
    state_dict = find_state_dict(content)
    keys = {own_name(key): key for key in state_dict}
    weights = {name: state_dict[key] for name, key in keys.items()}
    options = infer_options(weights)
    is_foreign = keys["conv.weight"].endswith("conv1.weight")
    if is_foreign and (options["preactivation"] or options["block"] == "bottleneck"):
        raise UserError(
            "of another project, whose preactivation or bottleneck blocks may compute something "
            "else than this project's"
        )
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


def find_state_dict(content: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The state dict that `content` is, or has under one of its keys, or of their keys.

    Raises:
        UserError: If there is none, or if one cannot tell which of several is meant.
    """
    inner = [value for value in content.values() if isinstance(value, Mapping)]
    nested = [value for mapping in inner for value in mapping.values()]
    usual = [[content.get(key)] for key in STATE_DICT_KEYS]
    places: list[list[Any]] = [[content], *usual, inner, nested]
    networks = ([value for value in place if is_network(value)] for place in places)
    found = next(filter(None, networks), [])
    if len(found) != 1:
        keys = shorten(", ".join(map(str, content)) or "none", 100, placeholder=" …")
        raise UserError(f"not a network of this project, or several of them: its keys are {keys}")
    return found[0]


def is_network(value: Any) -> bool:
    """Whether this is a mapping with a stem and a head, in which no two keys mean one layer."""
    names = [own_name(str(key)) for key in value] if isinstance(value, Mapping) else []
    return ENDS.issubset(names) and len(names) == len(set(names))


def own_name(key: str) -> str:
    """This project's name for a key: `conv.weight` for `module.conv1.weight`."""
    for pattern, replacement in REPLACEMENTS:
        key = re.sub(pattern, replacement, key)
    return key


def infer_options(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The options of `ResNetModule` that the weights' shapes imply."""
    blocks = {tuple(name.split(".")[:2]) for name in weights if name.startswith("layer")}
    stages = [stage for stage, _ in blocks]
    shortcuts = [v for k, v in weights.items() if re.search(r"downsample\.(0\.)?weight$", k)]
    kernels = {tuple(weight.shape[2:]) for weight in shortcuts}
    bottleneck = any(name.endswith("conv3.weight") for name in weights)
    return {
        "layers": [stages.count(f"layer{stage}") for stage in (1, 2, 3)],
        "num_classes": len(weights["fc.weight"]),
        "shortcut": "pad" if not kernels else "conv1x1" if kernels == {(1, 1)} else "conv3x3",
        # The network's own BN then comes right before the head.
        "preactivation": weights["bn.weight"].shape == weights["fc.weight"].shape[1:],
        "block": "bottleneck" if bottleneck else "basic",
        "width": len(weights["conv.weight"]),
        "normalize": False,
        **{
            f"input_{name}": weights[name].flatten().tolist()
            for name in ("mean", "std")
            if name in weights
        },
    }


def permute_channels(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts weights for akamaster's option A to weights for this project's.

    Where a shortcut widens, akamaster's puts half of the new channels before the old ones and half
    behind them, this project's puts all behind. What makes or takes a stage's channels is permuted;
    the network then computes the same. A weight of a wrong shape stays as it is.
    """
    order = {"layer1": torch.arange(len(weights["conv.weight"]))}
    for narrow, wide in (("layer1", "layer2"), ("layer2", "layer3")):
        old = order[narrow]
        half = len(old) // 2
        left, middle, right = torch.arange(2 * len(old)).split([half, len(old), len(old) - half])
        order[wide] = torch.cat([middle[old], left, right])
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
