"""Muon (https://kellerjordan.github.io/posts/muon): momentum whose matrices are made orthogonal; Adam for what is no matrix.

torch.optim.Muon takes two-dimensional parameters only; here a convolution is the matrix of its flattened kernels.
"""

import torch
from torch import Tensor

# The quintic iteration's coefficients, from the source above.
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """The nearest matrix with singular values about 1 (0.7 to 1.2), by Newton-Schulz in bf16. matrix: [rows, columns] fp32."""
    x = (matrix / (matrix.norm() + 1e-7)).to(torch.bfloat16)
    transposed = x.shape[0] > x.shape[1]
    x = x.T if transposed else x
    for _ in range(steps):
        square = x @ x.T
        x = _A * x + (_B * square + _C * square @ square) @ x
    return (x.T if transposed else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Args: params: of two or more dimensions. lr: relative size of a step; each changes a matrix by about lr per singular value."""

    def __init__(self, params, lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                average = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                ahead = parameter.grad.lerp(average, group["momentum"]).flatten(1)  # Nesterov
                scale = max(1.0, ahead.shape[0] / ahead.shape[1]) ** 0.5
                parameter.add_(orthogonalise(ahead).view_as(parameter), alpha=-group["lr"] * scale)
