"""The network against the papers' parameter counts and plain transcriptions."""

from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet

from resnet_module import (
    ACTIVATIONS,
    BLOCKS,
    BasicBlock,
    BlockOptions,
    Bottleneck,
    PreActBlock,
    PreActBottleneck,
    ResNet,
)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


class OriginalResNet(nn.Module):
    """The network of the original script, [3, 3, 3] blocks, transcribed."""

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
        blocks = [resnet.BasicBlock(inputs, outputs, stride, downsample)]
        blocks += [resnet.BasicBlock(outputs, outputs) for _ in range(2)]
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
def test_same_logits_as_the_original_network(training: bool) -> None:
    original, network = OriginalResNet().double(), ResNet().double()
    randomize(original)
    network.load_state_dict(original.state_dict())
    images = torch.rand(4, 3, 32, 32, dtype=torch.float64)
    expected = original.train(training)(images)
    torch.testing.assert_close(network.train(training)(images), expected)


@pytest.mark.parametrize(
    ("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)]
)
def test_option_a_parameter_counts(depth: int, millions: float) -> None:
    n = (depth - 2) // 6
    count = parameters(ResNet((n, n, n), shortcut="pad")) / 1e6
    assert round(count, 1 if depth == 110 else 2) == millions


def test_resnet_164_has_the_papers_parameters() -> None:
    """He et al. 2016: 1.7 M, with 1×1 projections; summed up layer by layer."""
    expected = 3 * 9 * 16 + 2 * 256 + (256 + 1) * 10  # stem, last BN, head
    for inputs, channels in ((16, 16), (64, 32), (128, 64)):
        outputs = 4 * channels
        for given in [inputs] + 17 * [outputs]:
            expected += 2 * (given + channels + channels)  # BN
            expected += given * channels + 9 * channels**2 + channels * outputs
        expected += inputs * outputs  # the shortcut of the stage's first block
    network = ResNet((18, 18, 18), 10, "conv1x1", preactivation=True, block="bottleneck")
    assert parameters(network) == expected == 1_703_258


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize(("shortcut", "kernel"), [("conv3x3", 9), ("conv1x1", 1)])
def test_projection_shortcuts_add_their_convolutions_and_bn(
    shortcut: Any, kernel: int, block: Any
) -> None:
    without = parameters(ResNet(shortcut="pad", block=block))
    shapes = {"basic": [(16, 32), (32, 64)], "bottleneck": [(16, 64), (64, 128), (128, 256)]}[block]
    convolutions = kernel * sum(old * new for old, new in shapes)
    bn = 2 * sum(new for _, new in shapes)
    assert parameters(ResNet(shortcut=shortcut, block=block)) - without == convolutions + bn
    # He et al. 2016: convolutions only, and BN of what a convolution is given, not of its result.
    bare = parameters(ResNet(shortcut="pad", preactivation=True, block=block))
    network = ResNet(shortcut=shortcut, preactivation=True, block=block)
    assert parameters(network) - bare == convolutions


@pytest.mark.parametrize("shortcut", ["conv3x3", "conv1x1", "pad", "pool"])
@pytest.mark.parametrize(("block", "preactivation"), BLOCKS)
@pytest.mark.parametrize("side", [32, 33])
def test_logits_of_any_size_from_32(
    shortcut: Any, block: Any, preactivation: bool, side: int
) -> None:
    network = ResNet((2, 1, 1), 7, shortcut, preactivation, block, width=4)
    assert network(torch.rand(2, 3, side, side + 7)).shape == (2, 7)


@pytest.mark.parametrize(("block", "expansion", "depth"), [("basic", 1, 14), ("bottleneck", 4, 20)])
def test_stages_halve_the_image_and_double_the_channels(
    block: Any, expansion: int, depth: int
) -> None:
    network = ResNet((1, 2, 3), width=8, block=block)  # as deep as n = 2: 6n + 2 or 9n + 2
    assert [len(stage) for stage in (network.layer1, network.layer2, network.layer3)] == [1, 2, 3]
    layers = [n for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert sum("downsample" not in name for name in layers) == depth
    x = network.conv(torch.rand(1, 3, 32, 32))
    for stage, channels, side in [
        (network.layer1, 8, 32),
        (network.layer2, 16, 16),
        (network.layer3, 32, 8),
    ]:
        x = stage(x)
        assert x.shape == (1, expansion * channels, side, side)


@pytest.mark.parametrize(
    ("kind", "narrowed"),
    [
        ("pad", lambda x: x[:, :, ::2, ::2]),
        ("pool", lambda x: F.interpolate(x, scale_factor=0.5, mode="area")),
    ],
)
def test_shortcut_without_parameters_pads_with_zeros(kind: Any, narrowed: Any) -> None:
    x = torch.rand(2, 16, 8, 8)
    out = ResNet(shortcut=kind).layer2[0].downsample(x)
    torch.testing.assert_close(out[:, :16], narrowed(x))
    assert out.shape == (2, 32, 4, 4)
    assert not out[:, 16:].any()


@pytest.mark.parametrize(
    ("ours", "torchvisions"),
    [(BasicBlock, resnet.BasicBlock), (Bottleneck, resnet.Bottleneck)],
)
@pytest.mark.parametrize(("name", "module"), [("relu", nn.ReLU()), ("silu", nn.SiLU())])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_block_is_torchvisions(
    ours: Any, torchvisions: Any, name: str, module: nn.Module, training: bool, stride: int
) -> None:
    outputs = 4 * ours.expansion
    inputs = outputs if stride == 1 else 6
    block = ours(inputs, 4, stride, BlockOptions("conv1x1", ACTIVATIONS[name]))
    randomize(block)
    projection = nn.Sequential(nn.Conv2d(6, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs))
    expected = torchvisions(inputs, 4, stride, None if stride == 1 else projection)
    expected.relu = module
    expected.load_state_dict(block.state_dict())
    x = torch.randn(3, inputs, 8, 8)
    torch.testing.assert_close(block.train(training)(x), expected.train(training)(x))


@pytest.mark.parametrize(("block", "preactivation"), BLOCKS)
def test_network_with_silu_has_no_relu(
    block: Any, preactivation: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    silu = Mock(side_effect=F.silu)
    monkeypatch.setitem(ACTIVATIONS, "silu", silu)
    monkeypatch.setitem(ACTIVATIONS, "relu", Mock(side_effect=AssertionError))
    monkeypatch.setattr(F, "relu", Mock(side_effect=AssertionError))
    network = ResNet((1, 1, 1), 10, "pad", preactivation, block, width=4, activation="silu")
    network(torch.rand(2, 3, 32, 32))
    # One behind each norm, as long as shortcuts have none.
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert silu.call_count == len(norms)


@pytest.mark.parametrize(
    ("block", "strides"), [(PreActBlock, (2, 1)), (PreActBottleneck, (1, 2, 1))]
)
def test_preactivation_block_follows_the_paper(block: Any, strides: tuple[int, ...]) -> None:
    """BN, ReLU, convolution for each convolution; the bottleneck's stride is on its 3×3."""
    module = block(6, 4, 2, BlockOptions("conv1x1", F.relu)).double()
    randomize(module)
    x = torch.randn(3, 6, 8, 8, dtype=torch.float64)

    def bn_relu(x: Tensor, bn: nn.BatchNorm2d) -> Tensor:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        x = (x - mean[:, None, None]) / (var[:, None, None] + bn.eps).sqrt()
        return (x * bn.weight[:, None, None] + bn.bias[:, None, None]).clamp(min=0)

    out = x
    for i, stride in enumerate(strides, start=1):
        weight = module.get_parameter(f"conv{i}.weight")
        out = bn_relu(out, module.get_submodule(f"bn{i}"))
        out = F.conv2d(out, weight, stride=stride, padding=weight.shape[2] // 2)
    projected = F.conv2d(bn_relu(x, module.bn1), module.downsample.weight, stride=2)
    torch.testing.assert_close(module(x), out + projected)


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
