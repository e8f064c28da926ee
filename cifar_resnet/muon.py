"""Muon for convolutions: `--model.optimizer cifar_resnet.muon.ConvMuon`, for short runs."""

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import SGD

from cifar_resnet.messages import UserError

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic Newton-Schulz iteration


def orthogonalize(matrices: Tensor, steps: int) -> Tensor:
    """Brings the singular values of matrices (..., rows, columns) near 1.

    Each of the `steps` is a Newton-Schulz iteration.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


class ConvMuon(SGD):
    """Muon (Jordan et al. 2024) for all convolutions but the first, Nesterov SGD for the rest.

    A kernel is seen as a matrix with a row for each output channel, and its update is its
    orthogonalized momentum (kellerjordan.github.io/posts/muon). As in the code of airbench
    (github.com/KellerJordan/cifar10-airbench) a kernel's norm stays the root of its number of rows:
    the batch normalisation that follows cancels the norm, so that the learning rate is how much of
    the kernel a step replaces. (In a preactivation block none follows the last convolution.)
    `torch.optim.Muon` takes matrices only.

    The first parameter group has the kernels, the second the rest: a scheduler may be given a rate
    for each, as in `max_lr: [0.08, 0.2]`. A step leaves the kernels without gradients.

    Args:
        params: All parameters of a network, in their order.
        muon_lr: Learning rate of the kernels.
        muon_momentum: Momentum of the kernels.
        muon_steps: Newton-Schulz iterations for each update.
        sgd_lr: Learning rate of the rest.
        sgd_momentum: Momentum of the rest.
        weight_decay: L2 penalty of the rest.

    Raises:
        UserError: If one of them is negative, or there are no steps.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        muon_lr: float = 0.08,
        muon_momentum: float = 0.6,
        muon_steps: int = 3,
        sgd_lr: float = 0.2,
        sgd_momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        # SGD checks the others. No types of jsonargparse: a checkpoint would hold them, as code.
        if muon_steps < 1 or sgd_lr < 0 or sgd_momentum < 0:
            raise UserError(
                f"muon_steps is {muon_steps}, sgd_lr {sgd_lr}, sgd_momentum {sgd_momentum}: steps "
                "must be 1 or more, rate and momentum 0 or more"
            )
        params = list(params)
        kernels = [p for p in params if p.ndim == 4][1:]
        rest = [p for p in params if all(p is not kernel for kernel in kernels)]
        muon = {"params": kernels, "steps": muon_steps}
        sgd = {"params": rest, "lr": sgd_lr, "momentum": sgd_momentum, "nesterov": True}
        super().__init__([muon, sgd], muon_lr, muon_momentum, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        muon, alike = self.param_groups[0], defaultdict[torch.Size, list[Tensor]](list)
        for kernel in muon["params"]:
            if kernel.grad is not None:
                alike[kernel.shape].append(kernel)
        for kernels in alike.values():
            self._update(kernels, muon["lr"], muon["momentum"], muon["steps"])
        super().step()
        return loss

    def _update(self, kernels: list[Tensor], lr: float, momentum: float, steps: int) -> None:
        """Updates kernels of one shape at once: a GPU would spend its time starting operations."""
        updates = []
        for kernel in kernels:
            state, grad = self.state[kernel], kernel.grad
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(kernel)
            buffer = state["momentum_buffer"].mul_(momentum).add_(grad)
            updates.append(buffer.mul(momentum).add_(grad))
        directions = orthogonalize(torch.stack(updates).flatten(2), steps)
        matrices = torch.stack(kernels).flatten(2)
        scale = len(kernels[0]) ** 0.5 / matrices.norm(dim=(1, 2), keepdim=True)
        matrices = scale * matrices - lr * directions
        for kernel, matrix in zip(kernels, matrices, strict=True):
            kernel.copy_(matrix.view_as(kernel))
            kernel.grad = None  # SGD leaves the kernel as it is
