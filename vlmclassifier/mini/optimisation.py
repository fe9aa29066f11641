"""One training loop for all mini models: Muon on matrices, AdamW on the rest, warm-up and linear decay.

A batch is computed in two parts, each in a thread that uses one core, and the gradients of the parts are added in a
fixed order. This is twice as fast as two cores inside every small operation, and it gives the same weights on any
number of cores.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vlmclassifier.records import UserError

WARM_UP = 30  # steps
DECAY = 0.7  # the last share of the steps, in which the rates fall to zero
PARTS = 2
MOMENTUM = 0.95

T = TypeVar("T")
U = TypeVar("U")


class Muon(torch.optim.Optimizer):
    """Muon in float32 (Jordan et al., 2024); update sizes match AdamW's (Liu et al., 2025).

    torch.optim.Muon orthogonalises in bfloat16, which is 30 times slower on a CPU without instructions for it. Matrices
    of the same shape are updated together.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(matrices, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape.setdefault(matrix.shape, []).append(matrix)
            for shape, matrices in by_shape.items():
                gradients, momenta = [], []
                for matrix in matrices:
                    gradients.append(matrix.grad)
                    momenta.append(self.state[matrix].setdefault("momentum", torch.zeros_like(matrix)))
                torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
                nesterov = torch.stack(gradients).lerp(torch.stack(momenta), MOMENTUM)  # [count, rows, columns]
                update = orthogonalise(nesterov)
                torch._foreach_add_(matrices, update.unbind(), alpha=-0.2 * max(shape) ** 0.5 * group["lr"])


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Return roughly U V^T of every matrix U S V^T by Newton-Schulz iteration.

    The singular values of the result are between 0.7 and 1.2. `matrices`: [count, rows, columns].
    """
    is_wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if is_wide else matrices.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT  # [count, short side, short side]
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x if is_wide else x.mT


class Optimisation:
    """The trainable parameters of some modules, their optimisers, and gradients that are computed in parts."""

    def __init__(self, modules: Iterable[nn.Module], muon_lr: float, adamw_lr: float) -> None:
        torch.set_num_threads(1)
        self.pool = one_core_threads()
        # Weights of linear layers go to Muon, all others to AdamW. Modules may share parameters: a dict keeps each
        # parameter once and in order.
        matrices: dict[nn.Parameter, None] = {}
        others: dict[nn.Parameter, None] = {}
        for root_module in modules:
            for module in root_module.modules():
                for parameter in module.parameters(recurse=False):
                    if not parameter.requires_grad or parameter in matrices or parameter in others:
                        continue
                    if isinstance(module, nn.Linear) and parameter.ndim == 2:
                        matrices[parameter] = None
                    else:
                        others[parameter] = None
        self.parameters = [*matrices, *others]
        self.optimisers: list[torch.optim.Optimizer] = []
        for part in range(PARTS):  # the matrices are updated in threads, too
            part_matrices = list(matrices)[part::PARTS]
            if part_matrices:
                self.optimisers.append(Muon(part_matrices, muon_lr))
        if others:
            self.optimisers.append(torch.optim.AdamW(list(others), lr=adamw_lr, weight_decay=0.0, betas=(0.9, 0.98)))

    def map_parts(self, function: Callable[[T], U], parts: Sequence[T]) -> list[U]:
        """Call the function on every part, in threads, and return the results in order."""
        return list(self.pool.map(function, parts))

    def backward(self, outputs: Sequence[object], gradients: Sequence[object] | None = None) -> None:
        """Add the gradients of each part's output to the parameters, part by part in order.

        `gradients`: the gradients of the loss for each output; None where the outputs are losses themselves.
        """
        if gradients is None:
            gradients = [None] * len(outputs)

        def parameter_gradients(part: tuple[object, object]) -> tuple[Tensor | None, ...]:
            output, gradient = part
            return torch.autograd.grad(output, self.parameters, gradient, allow_unused=True)

        parts = list(zip(outputs, gradients, strict=True))
        for part_gradients in self.map_parts(parameter_gradients, parts):
            for parameter, gradient in zip(self.parameters, part_gradients, strict=True):
                if gradient is None:
                    continue
                if parameter.grad is None:
                    parameter.grad = gradient
                else:
                    parameter.grad.add_(gradient)

    def backward_batch(
        self, summed_loss: Callable[[Sequence[int]], Tensor], batch: Sequence[int], predicted_tokens: Sequence[int]
    ) -> float:
        """Compute the gradients of a batch's mean loss per predicted token and return that loss.

        `summed_loss`: returns the summed loss of some rows. `batch`: row numbers. `predicted_tokens`: the number of
        predicted tokens of every row.
        """
        tokens = sum(predicted_tokens[row] for row in batch)
        parts = []
        for part in range(PARTS):
            rows = batch[part::PARTS]
            if rows:
                parts.append(rows)
        losses = self.map_parts(lambda rows: summed_loss(rows) / tokens, parts)
        self.backward(losses)
        return sum(loss.item() for loss in losses)

    def step(self, rate_factor: float) -> None:
        """Update the parameters once at `rate_factor` times the peak learning rates and clear the gradients."""
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["peak"] = group.get("peak", group["lr"])
                group["lr"] = rate_factor * group["peak"]
        self.map_parts(lambda optimiser: optimiser.step(), self.optimisers)
        for parameter in self.parameters:
            parameter.grad = None

    def run(
        self, step: Callable[[int], float], steps: int, title: str, after_step: Callable[[int], None] | None = None
    ) -> list[float]:
        """Train for `steps` steps and return the loss of each.

        `step(number)` computes the gradients and returns the loss; `after_step(number)` follows each update.
        """
        losses = []
        for number in tqdm(range(steps), desc=title, unit="step", mininterval=2.0):
            losses.append(step(number))
            if not math.isfinite(losses[-1]):
                raise UserError(
                    f"{title}: the loss of step {number} is not a finite number, so the weights are useless and are "
                    "not saved: try another --seed, and fewer steps or images of another kind if it stays so."
                )
            self.step(learning_rate_factor(number, steps))
            if after_step is not None:
                after_step(number)
        self.pool.shutdown()
        return losses


def one_core_threads() -> ThreadPoolExecutor:
    """Return a pool of threads that compute on one core each: results do not depend on the number of cores."""
    return ThreadPoolExecutor(PARTS, initializer=torch.set_num_threads, initargs=(1,))  # the setting is per thread


def learning_rate_factor(step: int, steps: int) -> float:
    """Return the learning rate at a step as a share of its peak: linear warm-up, constant, linear decay."""
    return min(1.0, (step + 1) / WARM_UP, (steps - step) / (DECAY * steps))
