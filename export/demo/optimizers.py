"""Muon for matrices and convolutions (AdamW gets the other parameters), and the moving average of the weights."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Coefficients of the quintic polynomials, one triple per iteration.
NEWTON_SCHULZ = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Returns the parameters for Muon (matrices, dense convolutions) and for AdamW (all others), tied ones once."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_embedding = any(part in name for part in ("embed", "shared", "lm_head"))
        is_matrix = parameter.ndim == 2 and not is_embedding
        is_convolution = parameter.ndim == 4 and parameter.shape[1] > 1 and ".convs.0." not in name
        (matrices if is_matrix or is_convolution else others).append(parameter)
    return matrices, others


class Muon:
    """SGD with Nesterov momentum whose update is orthogonalised. Matrices of the same shape are updated together."""

    def __init__(self, parameters: Iterable[nn.Parameter], momentum: float = 0.95, weight_decay: float = 0.02) -> None:
        self.momentum, self.weight_decay = momentum, weight_decay
        self.parameters = list(parameters)
        self.buffers = [torch.zeros_like(parameter) for parameter in self.parameters]
        self._groups: dict[tuple[int, int], list[int]] = {}
        for i, parameter in enumerate(self.parameters):
            rows = parameter.shape[0]
            self._groups.setdefault((rows, parameter.numel() // rows), []).append(i)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Updates every parameter that has a gradient."""
        for (rows, columns), members in self._groups.items():
            active = [i for i in members if self.parameters[i].grad is not None]
            if not active:
                continue
            updates = orthogonalise(torch.stack([self._direction(i).reshape(rows, columns) for i in active]))
            scale = rate * max(1.0, rows / columns) ** 0.5
            for i, update in zip(active, updates, strict=True):
                parameter = self.parameters[i]
                parameter.mul_(1 - rate * self.weight_decay).add_(update.reshape(parameter.shape), alpha=-scale)

    def _direction(self, i: int) -> Tensor:
        """Returns the Nesterov momentum of one parameter."""
        gradient = self.parameters[i].grad
        assert gradient is not None
        self.buffers[i].lerp_(gradient, 1 - self.momentum)
        return gradient.lerp(self.buffers[i], self.momentum)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Approximates the nearest semi-orthogonal matrices (B, R, C) by a quintic Newton-Schulz iteration in bfloat16."""
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for a, b, c in NEWTON_SCHULZ:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    result: Tensor = (x.mT if is_tall else x).float()
    return result


class MovingAverage:
    """Exponential moving average of a model's floating-point state."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.state = {k: v.detach().clone() for k, v in model.state_dict().items() if v.is_floating_point()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards the model. The decay rises from 0.5, to forget the initial weights soon."""
        self.num_updates += 1
        decay = min(self.decay, 1 - 1 / (self.num_updates + 1))
        state = model.state_dict()
        for name, average in self.state.items():
            average.lerp_(state[name].float(), 1 - decay)
