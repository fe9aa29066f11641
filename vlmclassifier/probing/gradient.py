"""Probes that are trained by gradient descent: many features, learning rates and seeds in one batched tensor."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmclassifier.probing.data import ProbeData, ProbeResult, Scale
from vlmclassifier.runs.features import Matrix

LEARNING_RATE, BATCH = 1e-3, 512  # of the paper's probe
# Of DINOv2's linear evaluation (Oquab et al., 2023), which trains one head for each and chooses the best.
LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
MOMENTUM = 0.9
PARAMETERS_AT_ONCE = 2**24  # of all probes that are trained together: their gradients and moments take several times it

OnEpoch = Callable[[int], None]


def build_probe(width: int, classes: int, hidden: bool, seed: int) -> nn.Module:
    """The paper's probe: one linear layer, or with `hidden` an MLP with one hidden layer as wide as the features."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if not hidden:
            return nn.Linear(width, classes)
        return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))


class ProbeStack:
    """Probes for several features of one width: of each feature one for every learning rate and seed.

    The probes of a feature read the same batch, so that their weights stand side by side in one matrix product.
    """

    def __init__(
        self, width: int, class_count: int, features: int, rates: Sequence[float], seeds: Sequence[int], hidden: bool,
        device: str,
    ) -> None:  # fmt: skip
        self.shape = (features, len(rates) * len(seeds))
        self.hidden = hidden
        # Of each learning rate: weight [features, in, seeds * out], bias [features, 1, seeds * out], ...
        self.parameters: list[list[Tensor]] = []
        for _ in rates:
            probes = [build_probe(width, class_count, hidden, seed) for seed in seeds]
            layers = [[layer for layer in probe.modules() if isinstance(layer, nn.Linear)] for probe in probes]
            tensors = []
            for parts in zip(*layers, strict=True):
                tensors.append(torch.cat([layer.weight.detach().T for layer in parts], dim=1))
                tensors.append(torch.cat([layer.bias.detach()[None] for layer in parts], dim=1))
            self.parameters.append([
                tensor.to(device).expand(features, *tensor.shape).contiguous().requires_grad_() for tensor in tensors
            ])  # fmt: skip
        self.losses = torch.zeros(self.shape, device=device)  # means over the last epoch

    def logits(self, batch: Tensor) -> Tensor:
        """Logits [features, rows, probes, classes] of a batch [features, rows, width]."""
        weight, bias, *rest = (torch.cat(parts, dim=2) if len(parts) > 1 else parts[0] for parts in
                               zip(*self.parameters, strict=True))  # fmt: skip
        values = torch.baddbmm(bias, batch, weight).unflatten(2, (self.shape[1], -1))  # [features, rows, probes, out]
        if not self.hidden:
            return values
        weight, bias = (tensor.unflatten(2, (self.shape[1], -1)).transpose(1, 2).flatten(0, 1) for tensor in rest)
        inner = values.relu().transpose(1, 2).flatten(0, 1)  # [features * probes, rows, hidden]
        logits = torch.baddbmm(bias, inner, weight)  # [features * probes, rows, classes]
        return logits.unflatten(0, self.shape).transpose(1, 2)

    def loss(self, logits: Tensor, classes: Tensor) -> Tensor:
        """The mean cross-entropy [features, probes] over the rows of a batch."""
        target = classes[None, :, None].expand(logits.shape[:3])  # [features, rows, probes]
        losses = F.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="none")
        return losses.view(target.shape).mean(dim=1)

    @torch.no_grad()
    def predict(self, inputs: "Inputs") -> Tensor:
        """Class indices int32 [features, probes, rows] on the CPU."""
        found = [self.logits(batch).argmax(dim=-1).int().transpose(1, 2).cpu() for batch, _ in inputs.batches()]
        return torch.cat(found, dim=2)


@dataclass(frozen=True)
class Inputs:
    """The same rows of several features of one width, read in batches."""

    features: Sequence[Matrix]  # each [rows, width]
    device: str
    scales: Sequence[Scale] = ()  # that standardise each feature

    def batches(self, order: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches [features, BATCH, width] in float32 with their rows [BATCH]; in order, or in a given one."""
        rows = torch.arange(len(self.features[0])) if order is None else order
        for part in rows.split(BATCH):
            values = [matrix[part].to(self.device).float() for matrix in self.features]
            if self.scales:
                values = [scale(value) for scale, value in zip(self.scales, values, strict=True)]
            yield values[0][None] if len(values) == 1 else torch.stack(values), part


def train_probes(
    inputs: Inputs, classes: Tensor, class_count: int, epochs: int, rates: Sequence[float] = (LEARNING_RATE,),
    seeds: Sequence[int] = (0,), hidden: bool = False, shuffle_seed: int | None = None,
) -> Iterator[ProbeStack]:  # fmt: skip
    """Train a probe for every feature, learning rate and seed together, and yield them after each epoch.

    `seeds`: of the weights. The paper's settings: Adam without weight decay, batches of 512 in the
    order of the rows, which are never shuffled. With `shuffle_seed` DINOv2's: SGD with momentum, a cosine schedule, and
    new batches in every epoch. Each probe gets the gradient of its own mean loss, so that its trajectory is that of a
    probe alone.
    """
    width, device = inputs.features[0].width, inputs.device
    stack = ProbeStack(width, class_count, len(inputs.features), rates, seeds, hidden, device)
    groups = [{"params": tensors, "lr": rate} for rate, tensors in zip(rates, stack.parameters, strict=True)]
    schedule = None
    if shuffle_seed is None:
        optimiser: torch.optim.Optimizer = torch.optim.Adam(groups, fused=True)
    else:
        optimiser = torch.optim.SGD(groups, momentum=MOMENTUM)
        steps = epochs * -(-len(classes) // BATCH)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        generator = torch.Generator().manual_seed(shuffle_seed)
    targets = classes.to(device)
    for _ in range(epochs):
        order = None if shuffle_seed is None else torch.randperm(len(classes), generator=generator)
        losses = torch.zeros_like(stack.losses)
        for batch, rows in inputs.batches(order):
            loss = stack.loss(stack.logits(batch), targets[rows.to(device)])  # [features, probes]
            optimiser.zero_grad()
            loss.sum().backward()
            optimiser.step()
            losses += loss.detach() * len(rows)
            if schedule is not None:
                schedule.step()
        stack.losses = losses / len(classes)
        yield stack


def groups_of(widths: Sequence[int], class_count: int, runs: int, hidden: bool) -> list[list[int]]:
    """Which features are trained together: neighbours of one width, with at most PARAMETERS_AT_ONCE parameters."""
    groups: list[list[int]] = []
    for number, width in enumerate(widths):
        size = runs * width * (width + class_count if hidden else class_count)
        is_full = not groups or widths[groups[-1][0]] != width or (len(groups[-1]) + 1) * size > PARAMETERS_AT_ONCE
        if is_full:
            groups.append([])
        groups[-1].append(number)
    return groups


@dataclass(frozen=True)
class PaperResult:
    """The three readings of the paper's probe: its choice on held-out train rows, its last epoch, the paper's rule."""

    held_out: ProbeResult | None  # None where nothing is held out
    last: ProbeResult
    papers: ProbeResult  # the epoch that is best on the test rows


def paper_probes(
    features: Sequence[ProbeData], truth: Tensor, epochs: int, hidden: bool = False, seeds: Sequence[int] = (0,),
    on_epoch: OnEpoch = lambda epoch: None,
) -> list[list[PaperResult]]:  # fmt: skip
    """The paper's probe for features of one width and several seeds together (paper, section 3.2): [features][seeds].

    The epoch is chosen on held-out train rows, then the probes are trained on all of them. `truth` [test rows]: the
    classes of the test rows, for the paper's rule. `on_epoch` is called after every epoch, at most 2 x `epochs` times.
    """
    first, rates = features[0], (LEARNING_RATE,)
    device, count = first.device, first.class_count
    chosen = None
    if first.held_out.any():
        parts, outer = [data.inner for data in features], Inputs([data.outer[0] for data in features], device)
        inner, classes = Inputs([part.on_device(device) for part, _ in parts], device), parts[0][1]
        accuracies = []
        for epoch, stack in enumerate(train_probes(inner, classes, count, epochs, rates, seeds, hidden)):
            accuracies.append((stack.predict(outer) == first.outer[1]).float().mean(dim=2))
            on_epoch(epoch)
        chosen = torch.stack(accuracies).argmax(dim=0)  # [features, seeds] the first of the best epochs
    train = Inputs([data.train.on_device(device) for data in features], device)
    test = Inputs([data.test.on_device(device) for data in features], device)
    best = torch.full((len(features), len(seeds)), -1.0)  # accuracy on the test rows
    kept: dict[str, Tensor] = {}  # each [features, seeds, test rows]
    best_epoch = torch.zeros(best.shape, dtype=torch.long)
    for epoch, stack in enumerate(train_probes(train, first.classes, count, epochs, rates, seeds, hidden)):
        predictions = stack.predict(test)  # [features, seeds, test rows]
        accuracy = (predictions == truth).float().mean(dim=2)  # [features, seeds]
        is_best = accuracy > best
        best, best_epoch = torch.maximum(best, accuracy), torch.where(is_best, epoch, best_epoch)
        kept["papers"] = torch.where(is_best[..., None], predictions, kept.get("papers", predictions))
        if chosen is not None:
            kept["held_out"] = torch.where((chosen == epoch)[..., None], predictions, kept.get("held_out", predictions))
        on_epoch(epoch)
    of = lambda number, epoch: f"epoch {int(epoch) + 1} of {number}"  # noqa: E731
    return [[
        PaperResult(
            None if chosen is None else ProbeResult(kept["held_out"][f, s], of(epochs, chosen[f, s])),
            ProbeResult(predictions[f, s], of(epochs, epochs - 1)),
            ProbeResult(kept["papers"][f, s], "the paper's rule: " + of(epochs, best_epoch[f, s])
                        + ", the best on these very rows"),
        ) for s in range(len(seeds))
    ] for f in range(len(features))]  # fmt: skip


@dataclass(frozen=True)
class GridResult:
    """The best head of one feature by the held-out train rows, fitted again on all train rows."""

    result: ProbeResult
    accuracy: float  # on the held-out rows


def grid_probes(
    features: Sequence[ProbeData], epochs: int, seed: int = 0, on_epoch: OnEpoch = lambda epoch: None
) -> list[GridResult]:
    """Heads of 13 learning rates on standardised features of one width together, as in DINOv2's linear evaluation.

    The learning rate is chosen on held-out train rows. `on_epoch` is called 2 x `epochs` times.
    """
    first = features[0]
    device, count = first.device, first.class_count
    parts = [data.inner for data in features]
    scales = [Scale.of(part, device) for part, _ in parts]
    inner = Inputs([part.on_device(device) for part, _ in parts], device, scales)
    settings = {"seeds": [seed], "shuffle_seed": seed}
    heads = _trained(train_probes(inner, parts[0][1], count, epochs, LEARNING_RATES, **settings), on_epoch)
    outer = Inputs([data.outer[0] for data in features], device, scales)
    accuracies = (heads.predict(outer) == first.outer[1]).float().mean(dim=2)  # [features, learning rates]
    chosen = accuracies.argmax(dim=1).tolist()  # [features]
    scales = [Scale.of(data.train, device) for data in features]
    train = Inputs([data.train.on_device(device) for data in features], device, scales)
    places = sorted(set(chosen))
    rates = [LEARNING_RATES[place] for place in places]
    heads = _trained(train_probes(train, first.classes, count, epochs, rates, **settings), on_epoch)
    predictions = heads.predict(Inputs([data.test for data in features], device, scales))
    return [
        GridResult(
            ProbeResult(predictions[f, places.index(place)], f"learning rate {LEARNING_RATES[place]:g}"),
            float(accuracies[f, place]),
        )
        for f, place in enumerate(chosen)
    ]


def _trained(epochs: Iterator[ProbeStack], on_epoch: OnEpoch) -> ProbeStack:
    """The probes after their last epoch."""
    for epoch, stack in enumerate(epochs):  # noqa: B007 - the last one is returned
        on_epoch(epoch)
    return stack
