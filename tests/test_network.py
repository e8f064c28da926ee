"""The network against the papers' parameter counts and plain transcriptions."""

from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet

from resnet_module import ACTIVATIONS, BasicBlock, PreActBlock, ResNet


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


class NoteBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, down: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = down

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.downsample:
            residual = self.downsample(x)
        out += residual
        return self.relu(out)


class NoteResNet(nn.Module):
    """The network of the note that this project grew from, [3, 3, 3] blocks, transcribed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self.make_layer(16, 16, 1)
        self.layer2 = self.make_layer(16, 32, 2)
        self.layer3 = self.make_layer(32, 64, 2)
        self.avg_pool = nn.AvgPool2d(8)
        self.fc = nn.Linear(64, 10)

    def make_layer(self, inputs: int, outputs: int, stride: int) -> nn.Sequential:
        downsample = None
        if stride != 1 or inputs != outputs:
            downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
            )
        blocks = [NoteBlock(inputs, outputs, stride, downsample)]
        blocks += [NoteBlock(outputs, outputs, 1, None) for _ in range(2)]
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn(self.conv(x)))
        out = self.avg_pool(self.layer3(self.layer2(self.layer1(out))))
        return self.fc(out.view(out.size(0), -1))


def randomize(module: nn.Module) -> None:
    """Gives every parameter and statistic a value of its own, so that none can go unnoticed."""
    generator = torch.Generator().manual_seed(1)
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            noise = torch.rand(value.shape, generator=generator)
            value.copy_(noise + 0.5 if "bn" in name or "running_var" in name else noise - 0.5)


@pytest.mark.parametrize("training", [False, True])
def test_same_logits_as_the_notes_network(training: bool) -> None:
    note, network = NoteResNet().double(), ResNet().double()
    randomize(note)
    network.load_state_dict(note.state_dict())
    images = torch.rand(4, 3, 32, 32, dtype=torch.float64)
    expected = note.train(training)(images)
    torch.testing.assert_close(network.train(training)(images), expected)


@pytest.mark.parametrize(
    ("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)]
)
def test_option_a_parameter_counts(depth: int, millions: float) -> None:
    n = (depth - 2) // 6
    count = parameters(ResNet((n, n, n), shortcut="pad")) / 1e6
    assert round(count, 1 if depth == 110 else 2) == millions


@pytest.mark.parametrize(("shortcut", "kernel"), [("conv3x3", 9), ("conv1x1", 1)])
def test_projection_shortcuts_add_their_convolutions_and_bn(shortcut: Any, kernel: int) -> None:
    without = parameters(ResNet(shortcut="pad"))
    convolutions = kernel * (16 * 32 + 32 * 64)
    assert parameters(ResNet(shortcut=shortcut)) - without == convolutions + 2 * (32 + 64)
    # He et al. 2016: convolutions only, and BN of what a convolution is given, not of its result.
    bare = parameters(ResNet(shortcut="pad", preactivation=True))
    assert parameters(ResNet(shortcut=shortcut, preactivation=True)) - bare == convolutions


def test_unknown_shortcut_is_refused() -> None:
    shortcut: Any = "A"
    with pytest.raises(KeyError, match="A"):
        ResNet(shortcut=shortcut)


@pytest.mark.parametrize("shortcut", ["conv3x3", "conv1x1", "pad", "pool"])
@pytest.mark.parametrize("preactivation", [False, True])
@pytest.mark.parametrize("side", [32, 33, 40, 64])
def test_logits_of_any_size_from_32(shortcut: Any, preactivation: bool, side: int) -> None:
    network = ResNet((2, 1, 1), 7, shortcut, preactivation, width=4)
    assert network(torch.rand(2, 3, side, side + 3)).shape == (2, 7)


def test_stages_halve_the_image_and_double_the_channels() -> None:
    network = ResNet((1, 2, 3), width=8)
    assert [len(stage) for stage in (network.layer1, network.layer2, network.layer3)] == [1, 2, 3]
    x = network.conv(torch.rand(1, 3, 32, 32))
    for stage, shape in [
        (network.layer1, (1, 8, 32, 32)),
        (network.layer2, (1, 16, 16, 16)),
        (network.layer3, (1, 32, 8, 8)),
    ]:
        x = stage(x)
        assert x.shape == shape


def test_pooling_is_global() -> None:
    network = ResNet((1, 1, 1), width=4).eval()
    images = torch.rand(2, 3, 48, 40)
    maps: list[Tensor] = []
    network.layer3.register_forward_hook(lambda _, __, output: maps.append(output))
    logits = network(images)
    torch.testing.assert_close(logits, network.fc(F.adaptive_avg_pool2d(maps[0], 1).flatten(1)))


def test_option_a_subsamples_and_pads_with_zeros() -> None:
    shortcut = ResNet(shortcut="pad").layer2[0].downsample
    x = torch.rand(2, 16, 8, 8)
    out = shortcut(x)
    assert torch.equal(out[:, :16], x[:, :, ::2, ::2])
    assert out.shape == (2, 32, 4, 4)
    assert not out[:, 16:].any()


def test_pool_averages_2x2_pixels_and_pads_with_zeros() -> None:
    shortcut = ResNet(shortcut="pool").layer2[0].downsample
    x = torch.rand(2, 16, 8, 8)
    out = shortcut(x)
    torch.testing.assert_close(out[:, :16], F.interpolate(x, scale_factor=0.5, mode="area"))
    assert out.shape == (2, 32, 4, 4)
    assert not out[:, 16:].any()


@pytest.mark.parametrize(("name", "module"), [("relu", nn.ReLU()), ("silu", nn.SiLU())])
@pytest.mark.parametrize("training", [True, False])
def test_block_is_torchvisions(name: str, module: nn.Module, training: bool) -> None:
    block = BasicBlock(8, 8, 1, "pad", ACTIVATIONS[name])
    randomize(block)
    expected = resnet.BasicBlock(8, 8)
    expected.relu = module
    expected.load_state_dict(block.state_dict())
    x = torch.randn(3, 8, 8, 8)
    torch.testing.assert_close(block.train(training)(x), expected.train(training)(x))


@pytest.mark.parametrize("preactivation", [False, True])
def test_network_with_silu_has_no_relu(
    preactivation: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    silu = Mock(side_effect=F.silu)
    monkeypatch.setitem(ACTIVATIONS, "silu", silu)
    monkeypatch.setitem(ACTIVATIONS, "relu", Mock(side_effect=AssertionError))
    monkeypatch.setattr(F, "relu", Mock(side_effect=AssertionError))
    network = ResNet((1, 1, 1), preactivation=preactivation, width=4, activation="silu")
    network(torch.rand(2, 3, 32, 32))
    assert silu.call_count == 1 + 2 * 3


def test_preactivation_block_follows_the_paper() -> None:
    block = PreActBlock(4, 8, 2, "conv1x1", F.relu).double()
    randomize(block)
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64)

    def bn_relu(x: Tensor, bn: nn.BatchNorm2d) -> Tensor:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        x = (x - mean[:, None, None]) / (var[:, None, None] + bn.eps).sqrt()
        return (x * bn.weight[:, None, None] + bn.bias[:, None, None]).clamp(min=0)

    activated = bn_relu(x, block.bn1)
    out = F.conv2d(activated, block.conv1.weight, stride=2, padding=1)
    out = F.conv2d(bn_relu(out, block.bn2), block.conv2.weight, padding=1)
    projected = F.conv2d(activated, block.downsample.weight, stride=2)
    torch.testing.assert_close(block(x), out + projected)


def test_preactivation_network_normalises_before_pooling() -> None:
    network = ResNet((1, 1, 1), preactivation=True, width=4)
    assert network.bn.num_features == 16
    features: list[Tensor] = []
    network.fc.register_forward_hook(lambda _, inputs, __: features.append(inputs[0]))
    with torch.no_grad():
        network.bn.weight.zero_()
        network.bn.bias.fill_(-1)  # ReLU follows, so nothing is left
        network(torch.rand(2, 3, 32, 32))
    assert not features[0].any()
