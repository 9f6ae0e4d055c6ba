"""The optimizer of the vision recipe: Muon for matrices inside layers, AdamW for everything else.

`torch.optim.Muon` orthogonalises one matrix after another in bfloat16, which a CPU without bfloat16 arithmetic emulates
at some twenty times the cost; here all matrices of one shape go through it together, in float32.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import nn

# Keller Jordan's coefficients (https://kellerjordan.github.io/posts/muon/): singular values end up near one, not at it.
QUINTIC = (3.4445, -4.7750, 2.0315)
ROUNDS = 5
FINAL_RATE = 0.02


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Bring the singular values of every matrix of a stack (count, rows, columns) near one."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    a, b, c = QUINTIC
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum (Nesterov) with orthogonalised updates, scaled to the size that AdamW's would have."""

    def __init__(self, matrices: Sequence[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        shapes: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for matrix in matrices:
            shapes[matrix.shape].append(matrix)
        groups = [{"params": group} for group in shapes.values()]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every matrix; all of them must have a gradient."""
        for group in self.param_groups:
            matrices = group["params"]
            gradient = torch.stack([matrix.grad for matrix in matrices])
            state = self.state[matrices[0]]
            average = state.setdefault("average", torch.zeros_like(gradient))
            average.lerp_(gradient, 1 - group["momentum"])
            update = orthogonalise(gradient.lerp(average, group["momentum"]))
            rate = group["lr"] * 0.2 * math.sqrt(max(matrices[0].shape))
            for matrix, change in zip(matrices, update, strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"]).sub_(change, alpha=rate)


class Optimizer:
    """Muon for the linear layers of `body` and AdamW for its other parameters and `heads`, on one schedule.

    Muon sees the first shapes after about half as many images as AdamW alone, which is most of this recipe's cost.
    """

    def __init__(self, body: Sequence[nn.Module], rate: float, steps: int, heads: Sequence[nn.Module] = ()) -> None:
        layers = [layer for part in body for layer in part.modules() if isinstance(layer, nn.Linear)]
        matrices = [layer.weight for layer in layers]
        known = {id(weight) for weight in matrices}
        self._parameters = [weight for part in (*body, *heads) for weight in part.parameters()]
        others = [weight for weight in self._parameters if id(weight) not in known]
        self._optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=rate, momentum=0.95, weight_decay=0.02),
            torch.optim.AdamW(others, lr=rate / 2, betas=(0.9, 0.98), weight_decay=0.02, foreach=True),
        ]
        warmup = max(1, min(100, steps // 10))

        def scale(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            progress = (step - warmup) / max(1, steps - warmup)
            return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * progress))

        self._schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, scale) for optimizer in self._optimizers]

    def step(self, loss: torch.Tensor) -> None:
        """Follow the gradient of `loss` by one step."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        for stage in (*self._optimizers, *self._schedules):
            stage.step()
