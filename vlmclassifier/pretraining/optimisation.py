"""One training loop for all mini models: Muon on matrices, AdamW on the rest, warm-up and linear decay.

A batch is computed in two parts, each by a thread of its own on one core, and their gradients are added in a fixed
order: twice as fast as two cores inside every small operation, and the same weights on any number of cores.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

WARM_UP = 30  # steps
DECAY = 0.7  # share of the steps, at the end
PARTS = 2
MOMENTUM = 0.95

T = TypeVar("T")
U = TypeVar("U")


class Muon(torch.optim.Optimizer):
    """Muon in float32 (Jordan et al., 2024; sizes as AdamW's: Liu et al., 2025), matrices of one shape together.

    torch.optim.Muon orthogonalises in bfloat16, which is 30 times slower on a CPU without instructions for it.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(matrices, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape.setdefault(matrix.shape, []).append(matrix)
            for shape, matrices in by_shape.items():
                gradients = [matrix.grad for matrix in matrices]
                momenta = [self.state[m].setdefault("momentum", torch.zeros_like(m)) for m in matrices]
                torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
                update = orthogonal(torch.stack(gradients).lerp(torch.stack(momenta), MOMENTUM))  # Nesterov's
                torch._foreach_add_(matrices, update.unbind(), alpha=-0.2 * max(shape) ** 0.5 * group["lr"])


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Roughly U V^T of every matrix U S V^T, by Newton-Schulz iteration: singular values of 0.7 to 1.2.

    `matrices`: [count, rows, columns].
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT  # [count, short side, short side]
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x if wide else x.mT


class Optimisation:
    """The trainable parameters of some modules, their optimisers, and gradients computed in parts."""

    def __init__(self, modules: Iterable[nn.Module], matrix_rate: float, other_rate: float) -> None:
        torch.set_num_threads(1)
        self.pool = one_core_threads()
        matrices, others = {}, {}  # a dict keeps each parameter once and in order; modules may share some
        for module in (part for whole in modules for part in whole.modules()):
            kind = matrices if isinstance(module, nn.Linear) else others
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad and parameter not in matrices and parameter not in others:
                    (kind if parameter.ndim == 2 else others)[parameter] = None
        self.parameters = [*matrices, *others]
        halves = [list(matrices)[part::PARTS] for part in range(PARTS)]
        self.optimisers: list[torch.optim.Optimizer] = [Muon(half, matrix_rate) for half in halves if half]
        if others:
            self.optimisers.append(torch.optim.AdamW(others, lr=other_rate, weight_decay=0.0, betas=(0.9, 0.98)))

    def map(self, function: Callable[[T], U], parts: Sequence[T]) -> list[U]:
        """The function of every part, in threads."""
        return list(self.pool.map(function, parts))

    def backward(self, outputs: Sequence[object], gradients: Sequence[object] | None = None) -> None:
        """Add the parts' gradients to the parameters, part by part in order."""
        gradients = gradients or [None] * len(outputs)
        pairs = list(zip(outputs, gradients, strict=True))
        found = self.map(
            lambda pair: torch.autograd.grad(*pair[:1], self.parameters, pair[1], allow_unused=True), pairs
        )
        for part in found:
            for parameter, gradient in zip(self.parameters, part, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def summed_step(
        self, loss_of: Callable[[Sequence[int]], Tensor], batch: Sequence[int], predicted: Sequence[int]
    ) -> float:
        """Gradients of a batch's mean loss per predicted token; returns that loss.

        `loss_of` gives the summed loss of some rows, `predicted` each row's number of predicted tokens.
        """
        tokens = sum(predicted[row] for row in batch)
        parts = [batch[part::PARTS] for part in range(PARTS) if batch[part::PARTS]]
        losses = self.map(lambda part: loss_of(part) / tokens, parts)
        self.backward(losses)
        return sum(loss.item() for loss in losses)

    def step(self, share: float) -> None:
        """One update at `share` of the peak rates; the gradients are cleared."""
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["peak"] = group.get("peak", group["lr"])
                group["lr"] = share * group["peak"]
        self.map(lambda optimiser: optimiser.step(), self.optimisers)
        for parameter in self.parameters:
            parameter.grad = None

    def run(
        self, step: Callable[[int], float], steps: int, title: str, after: Callable[[int], None] | None = None
    ) -> list[float]:
        """Call `step(number)`, which fills the gradients and returns its loss, `steps` times; return the losses."""
        losses = []
        for number in tqdm(range(steps), desc=title, unit="step", mininterval=2.0):
            losses.append(step(number))
            self.step(rate(number, steps))
            if after is not None:
                after(number)
        self.pool.shutdown()
        return losses


def one_core_threads() -> ThreadPoolExecutor:
    """Threads that compute on one core each, so that results do not depend on the number of cores."""
    return ThreadPoolExecutor(PARTS, initializer=torch.set_num_threads, initargs=(1,))  # the setting is per thread


def rate(step: int, steps: int) -> float:
    """The share of the peak learning rate at a step."""
    return min(1.0, (step + 1) / WARM_UP, (steps - step) / (DECAY * steps))
