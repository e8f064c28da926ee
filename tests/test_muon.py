"""ConvMuon against torch's Muon and SGD, and its state."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Muon, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from cifar_resnet.muon import ConvMuon, orthogonalize


def train(optimizer: Optimizer, parameters: list[nn.Parameter], gradients: list[Tensor]) -> None:
    """Takes a step for each gradient, of which each parameter gets the numbers in another order."""
    for gradient in gradients:
        for shift, parameter in enumerate(parameters):
            parameter.grad = gradient.roll(shift).view_as(parameter).clone()
        optimizer.step()


def parameter(*shape: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


@pytest.fixture
def gradients() -> list[Tensor]:
    return list(torch.randn((5, 288), generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("cycled", [False, True])
def test_kernels_move_as_torchs_muon_moves_matrices(gradients: list[Tensor], cycled: bool) -> None:
    shapes = ((8, 4, 3, 3), (4, 8, 3, 3), (8, 4, 3, 3))
    kernels = [parameter(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    matrices = [nn.Parameter(kernel.detach().flatten(1).clone()) for kernel in kernels]
    options = {"muon_lr": 0.1, "muon_momentum": 0.6, "weight_decay": 0.5}  # of the rest alone
    ours = ConvMuon([parameter(8, 3, 3, 3), *kernels], muon_steps=5, **options)
    if cycled:
        OneCycleLR(ours, max_lr=0.1, total_steps=10, div_factor=1)
    momentum = 0.95 if cycled else 0.6  # OneCycleLR begins with its max_momentum
    torchs = Muon(matrices, lr=0.1, momentum=momentum, weight_decay=0, ns_steps=5)
    for gradient in gradients:
        train(ours, kernels, [gradient])
        for matrix in matrices:
            matrix.data.mul_(len(matrix) ** 0.5 / matrix.norm())
        train(torchs, matrices, [gradient])
    for seed, (kernel, matrix) in enumerate(zip(kernels, matrices, strict=True)):
        difference = (kernel.flatten(1) - matrix).norm() / matrix.norm()
        assert difference < 0.01  # torch computes the update in bf16
        far = parameter(*matrix.shape, seed=seed)
        assert (kernel.flatten(1) - far * len(far) ** 0.5 / far.norm()).norm() > 0.1


def test_other_parameters_move_as_by_torchs_sgd(gradients: list[Tensor]) -> None:
    shapes = ((16, 2, 3, 3), (288,), (8, 36))  # the first convolution is one of them
    ours, torchs = ([parameter(*shape) for shape in shapes] for _ in range(2))
    train(ConvMuon(ours, sgd_lr=0.1, sgd_momentum=0.8, weight_decay=0.01), ours, gradients)
    sgd = SGD(torchs, lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.01)
    train(sgd, torchs, gradients)
    assert all(torch.equal(a, b) for a, b in zip(ours, torchs, strict=True))


@pytest.mark.parametrize("shape", [(16, 27), (64, 16)])
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    matrix = orthogonalize(1e3 * parameter(*shape), steps=5)
    assert matrix.shape == shape
    values = torch.linalg.svdvals(matrix)
    assert values.min() > 0.5
    assert values.max() < 1.5


def test_state_that_is_loaded_goes_on_alike(gradients: list[Tensor]) -> None:
    whole = [parameter(16, 2, 3, 3), parameter(8, 4, 3, 3), parameter(288)]
    optimizer = ConvMuon(whole)
    train(optimizer, whole, gradients[:2])
    halves = copy.deepcopy(whole)
    resumed = ConvMuon(halves)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, whole, gradients[2:])
    train(resumed, halves, gradients[2:])
    assert all(torch.equal(a, b) for a, b in zip(whole, halves, strict=True))
