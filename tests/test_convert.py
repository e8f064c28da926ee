"""Other projects' networks, transcribed, compute the same after conversion; the rest is refused."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet

from cifar_resnet.checkpoint import read_checkpoint
from cifar_resnet.convert import convert_state_dict
from cifar_resnet.messages import UserError
from resnet_module import BLOCKS, ResNet, ResNetModule

LAYERS = (2, 3, 1)
ADAM = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(1)}}, "param_groups": [{}]}


class AkamasterBlock(nn.Module):
    def __init__(self, old: int, new: int, stride: int, option: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(old, new, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(new)
        self.conv2 = nn.Conv2d(new, new, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(new)
        self.side = (new - old) // 2
        self.shortcut = nn.Sequential()
        if option == "B" and old != new:
            self.shortcut = nn.Sequential(
                nn.Conv2d(old, new, 1, stride, bias=False), nn.BatchNorm2d(new)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        if self.side and not self.shortcut:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.side, self.side))
        return (out + self.shortcut(x)).relu()


class AkamasterNet(nn.Module):
    """Option A puts zeros on both sides of the old channels."""

    def __init__(self, option: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        stages = []
        for old, new, blocks in zip((16, 16, 32), (16, 32, 64), LAYERS, strict=True):
            rest = [AkamasterBlock(new, new, 1, option) for _ in range(blocks - 1)]
            stages.append(nn.Sequential(AkamasterBlock(old, new, new // old, option), *rest))
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)).relu())))
        return self.linear(F.avg_pool2d(x, x.shape[3]).flatten(1))


class ChenyaofoNet(nn.Module):
    """Its blocks are torchvision's."""

    def __init__(self, block: Any = resnet.BasicBlock) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        stages, old = [], 16
        for width, blocks in zip((16, 32, 64), LAYERS, strict=True):
            new, stride = width * block.expansion, 1 if width == 16 else 2
            projection = nn.Sequential(
                nn.Conv2d(old, new, 1, stride, bias=False), nn.BatchNorm2d(new)
            )
            first = block(old, width, stride, None if old == new else projection)
            stages.append(nn.Sequential(first, *(block(new, width) for _ in range(blocks - 1))))
            old = new
        self.layer1, self.layer2, self.layer3 = stages
        self.fc = nn.Linear(old, 100)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)).relu())))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def randomised(network: nn.Module) -> nn.Module:
    """In eval mode, with statistics that show any exchange of channels."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.running_mean = torch.randn(module.num_features)
            module.running_var = torch.rand(module.num_features) + 0.5
    return network.eval()


def own_network(checkpoint: Mapping[str, Any]) -> ResNet:
    """The network that a converted checkpoint describes, in eval mode."""
    names = ("layers", "num_classes", "shortcut", "preactivation", "block", "width")
    network = ResNet(**{name: checkpoint["hyper_parameters"][name] for name in names})
    weights = checkpoint["state_dict"].items()
    network.load_state_dict({key.removeprefix("network."): value for key, value in weights})
    assert all(key.startswith("network.") for key in checkpoint["state_dict"])
    return network.eval()


@pytest.mark.parametrize(
    ("build", "shortcut"),
    [
        (lambda: AkamasterNet("A"), "pad"),
        (lambda: AkamasterNet("B"), "conv1x1"),
        (lambda: ChenyaofoNet(), "conv1x1"),
    ],
    ids=["akamaster A", "akamaster B", "chenyaofo"],
)
def test_converted_networks_compute_the_same(build: Callable[[], nn.Module], shortcut: str) -> None:
    network = randomised(build())
    checkpoint = convert_state_dict(network.state_dict())
    options = checkpoint["hyper_parameters"]
    assert (options["shortcut"], options["normalize"]) == (shortcut, False)
    assert checkpoint["datamodule_hyper_parameters"] == {"augmentation": "pad"}
    assert checkpoint["class_names"] == []
    images = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        expected, found = network(images), own_network(checkpoint)(images)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def small_network(**options: Any) -> ResNet:
    return ResNet(**{"layers": (1, 2, 1), "num_classes": 3, "width": 4, **options})


@pytest.mark.parametrize("shortcut", ["conv3x3", "conv1x1", "pad"])
@pytest.mark.parametrize(("block", "preactivation"), BLOCKS)
def test_own_networks_are_unchanged(shortcut: str, block: str, preactivation: bool) -> None:
    network = small_network(shortcut=shortcut, preactivation=preactivation, block=block)
    checkpoint = convert_state_dict(network.state_dict())
    options = checkpoint["hyper_parameters"]
    assert (options["shortcut"], options["normalize"]) == (shortcut, False)
    # The data module's own defaults: such networks were trained on enlarged images.
    assert checkpoint["datamodule_hyper_parameters"] == {}
    found = own_network(checkpoint).state_dict()
    assert all(torch.equal(found[key], value) for key, value in network.state_dict().items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {f"_orig_mod.{key}": value for key, value in weights.items()},
        lambda weights: {f"model.net.network.{key}": value for key, value in weights.items()},
        lambda weights: {"net": weights, "acc": 95.2, "epoch": 199},
        lambda weights: {"ema": dict.fromkeys(weights, torch.zeros(1)), "state_dict": weights},
        lambda weights: {"weights": weights, "args": {"depth": 20}, "optimizer": ADAM},
        lambda weights: {"checkpoint": {"net": weights, "acc": 93.1}, "optimizer": ADAM},
        lambda weights: {"state_dict": weights, "optimizer_states": [ADAM], "callbacks": {"a": {}}},
    ],
    ids=["module", "_orig_mod", "names", "net", "beside", "other key", "nested", "Lightning"],
)
def test_wrappers_are_removed(wrap: Callable[[dict[str, Tensor]], dict[str, Any]]) -> None:
    weights = AkamasterNet("A").state_dict()
    content = wrap({f"module.{key}": value for key, value in weights.items()})
    found, expected = convert_state_dict(content), convert_state_dict(weights)
    values, expected_values = found.pop("state_dict"), expected.pop("state_dict")
    assert found == expected
    assert list(values) == list(expected_values)
    assert all(torch.equal(values[key], value) for key, value in expected_values.items())


@pytest.mark.parametrize(
    "weights",
    [
        lambda network: torch.compile(network).state_dict(),
        lambda network: {**dict(network.named_parameters()), **dict(network.named_buffers())},
        lambda network: network.half().state_dict(),
    ],
    ids=["torch.compile", "parameters", "half"],
)
def test_saved_weights_give_the_networks_logits(
    tmp_path: Path, weights: Callable[[nn.Module], Mapping[str, Tensor]]
) -> None:
    network = randomised(AkamasterNet("B"))
    torch.save({"net": weights(network), "acc": 93.1}, tmp_path / "net.pth")
    module = ResNetModule.from_checkpoint(read_checkpoint(tmp_path / "net.pth"))
    images = torch.rand(4, 3, 32, 32)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        expected = network.float()(images)
        torch.testing.assert_close(module(images), expected, atol=1e-5, rtol=1e-5)


def test_the_modules_own_state_dict_keeps_its_scaling() -> None:
    scaling: dict[str, Any] = {"input_mean": (0.5, 0.25, 0.125), "input_std": (0.25, 0.5, 1.0)}
    module = ResNetModule(**scaling, layers=(1, 1, 1), width=4, num_classes=3)
    checkpoint = convert_state_dict(module.state_dict())
    options = checkpoint["hyper_parameters"]
    assert {name: tuple(options[name]) for name in scaling} == scaling
    assert all(isinstance(value, float) for name in scaling for value in options[name])
    again = ResNetModule(**options)
    again.load_state_dict(checkpoint["state_dict"])
    assert all(torch.equal(again.state_dict()[k], v) for k, v in module.state_dict().items())


def changed(*without: str, **more: Tensor) -> dict[str, Tensor]:
    weights = AkamasterNet("A").state_dict()
    kept = {key: value for key, value in weights.items() if not key.startswith(without)}
    return {**kept, **{key.replace("__", "."): value for key, value in more.items()}}


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        ({"features.0.weight": torch.zeros(64, 3, 3, 3)}, "features.0.weight"),
        ({"teacher": changed(), "student": changed(), "epoch": 1}, "teacher, student, epoch"),
        ({"teacher": {"net": changed()}, "student": {"net": changed()}}, "teacher, student"),
        (
            {"both": {f"{net}{k}": v for net in ("net.", "model.") for k, v in changed().items()}},
            "both",
        ),
        ({}, "none"),
    ],
)
def test_what_is_not_one_network_is_refused(content: dict[str, Any], keys: str) -> None:
    with pytest.raises(UserError, match=r"^not a network of this project, or several") as error:
        convert_state_dict(content)
    assert str(error.value).endswith(f": its keys are {keys}")


@pytest.mark.parametrize(
    "weights",
    [
        ChenyaofoNet(resnet.Bottleneck).state_dict(),
        changed(bn1__weight=torch.zeros(64)),
    ],
    ids=["bottleneck", "preactivation"],
)
def test_other_projects_blocks_that_may_differ_are_refused(weights: dict[str, Tensor]) -> None:
    with pytest.raises(UserError, match=r"^of another project, whose preactivation or bottleneck"):
        convert_state_dict(weights)


@pytest.mark.parametrize(
    ("weights", "name"),
    [
        (changed("layer3"), "layer3.0.conv1.weight"),
        (changed(layer2__0__bn2__bias=torch.zeros(2)), "layer2.0.bn2.bias"),
        (changed(linear__weight=torch.zeros(2)), "fc.weight"),
    ],
)
def test_weights_that_do_not_fit_are_named_by_the_loader(
    weights: dict[str, Tensor], name: str
) -> None:
    with pytest.raises(UserError, match=rf"network\.{name}"):
        ResNetModule.from_checkpoint(convert_state_dict(weights))
