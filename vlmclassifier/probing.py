"""Probes on stored features: the paper's, logistic regression, nearest neighbours and nearest centroid (section 3.2).

Every probe is trained on the features of train rows alone. What is chosen (the epoch, the regularisation, the number of
neighbours) is chosen on a held-out part of the train rows, and the probe is then fitted again on all of them.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEARNING_RATE, BATCH = 1e-3, 512  # of the paper's probe
HELD_OUT = 0.1  # share of every class's train rows
REGULARISATIONS = (0.01, 0.1, 1.0)  # C of the logistic regression
NEIGHBOURS = (1, 5, 10, 20)


@dataclass
class ProbeResult:
    """What a probe says of the test rows."""

    predictions: Tensor  # [test rows] class indices, by the choice on held-out train rows
    choice: str  # what was chosen, in words
    curve: Tensor | None = None  # [epochs, test rows] class indices after every epoch, of the paper's probe


def held_out_rows(ids: Sequence[str], classes: Sequence[int], seed: int) -> Tensor:
    """Which rows are held out: a tenth of every class, at least one where a class has two; by (seed, id) alone.

    Returns bool [rows].
    """
    held_out = torch.zeros(len(ids), dtype=torch.bool)
    for rows in _drawn_by_class(ids, classes, seed):
        count = max(1, round(HELD_OUT * len(rows))) if len(rows) > 1 else 0
        held_out[rows[:count]] = True
    return held_out


def few_shot_rows(ids: Sequence[str], classes: Sequence[int], shots: int, seed: int) -> Tensor:
    """The rows [rows] of a train set with `shots` images of every class, in their order; drawn by (seed, id) alone."""
    return torch.tensor(sorted(row for rows in _drawn_by_class(ids, classes, seed) for row in rows[:shots]))


def _drawn_by_class(ids: Sequence[str], classes: Sequence[int], seed: int) -> list[list[int]]:
    """The rows of each class in a random order that depends on the seed and their ids alone."""
    of_class: dict[int, list[int]] = {}
    for row in range(len(ids)):
        of_class.setdefault(classes[row], []).append(row)
    digest = lambda row: hashlib.sha256(f"{seed}:{ids[row]}".encode()).digest()  # noqa: E731
    return [sorted(rows, key=digest) for rows in of_class.values()]


def build_probe(width: int, classes: int, hidden: bool, seed: int) -> nn.Module:
    """The paper's probe: one linear layer, or with `hidden` an MLP with one hidden layer as wide as the features."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if not hidden:
            return nn.Linear(width, classes)
        return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))


def train_paper_probe(
    features: Tensor, classes: Tensor, test: Tensor, epochs: int, hidden: bool = False, seeds: Sequence[int] = (0,),
    evaluate: Callable[[int], None] | None = None,
) -> Tensor:  # fmt: skip
    """Train one probe per seed together, and return the predictions for the test rows after every epoch.

    The paper's settings: Adam at 1e-3 without weight decay, batches of 512 in the order of the rows, which are never
    shuffled. `features` [rows, width] in any dtype, `classes` [rows], `test` [test rows, width]. Returns class indices
    [epochs, seeds, test rows].
    """
    probes = [build_probe(features.shape[1], int(classes.max()) + 1, hidden, seed) for seed in seeds]
    probes = [probe.to(features.device) for probe in probes]
    parameters, buffers = torch.func.stack_module_state(probes)  # [seeds, ...] each
    skeleton = build_probe(features.shape[1], int(classes.max()) + 1, hidden, 0).to(features.device)
    optimiser = torch.optim.Adam(parameters.values(), lr=LEARNING_RATE)

    def logits_of(rows: Tensor) -> Tensor:
        """Logits [seeds, rows, classes] of all probes."""
        call = lambda weights, state: torch.func.functional_call(skeleton, (weights, state), (rows,))  # noqa: E731
        return torch.vmap(call)(parameters, buffers)

    predictions = []
    for epoch in range(epochs):
        for start in range(0, len(features), BATCH):
            batch = features[start : start + BATCH].float()  # [batch, width]
            logits = logits_of(batch)  # [seeds, batch, classes]
            target = classes[start : start + BATCH].expand(len(seeds), -1)  # [seeds, batch]
            # The sum over the probes: each gets the gradient of its own mean loss.
            loss = F.cross_entropy(logits.transpose(1, 2), target, reduction="none").mean(dim=1).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        with torch.no_grad():
            found = [
                logits_of(test[start : start + BATCH].float()).argmax(dim=-1) for start in range(0, len(test), BATCH)
            ]
        predictions.append(torch.cat(found, dim=1))  # [seeds, test rows]
        if evaluate is not None:
            evaluate(epoch)
    return torch.stack(predictions)


def paper_probe(
    features: Tensor, classes: Tensor, held_out: Tensor, test: Tensor, epochs: int, hidden: bool, seed: int,
    evaluate: Callable[[int], None] | None = None,
) -> ProbeResult:  # fmt: skip
    """The paper's probe; the epoch is chosen on held-out train rows, then it is trained on all of them."""
    inner = ~held_out
    curve = train_paper_probe(features[inner], classes[inner], features[held_out], epochs, hidden, [seed], evaluate)
    accuracies = (curve[:, 0] == classes[held_out]).float().mean(dim=1)  # [epochs]
    epoch = int(accuracies.argmax())
    predictions = train_paper_probe(features, classes, test, epochs, hidden, [seed], evaluate)[:, 0]
    return ProbeResult(predictions[epoch], f"epoch {epoch + 1} of {epochs}", predictions)


def logistic_probe(features: Tensor, classes: Tensor, held_out: Tensor, test: Tensor) -> ProbeResult:
    """Logistic regression on standardised features; its C is chosen on held-out train rows."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def fitted(c: float, rows: Tensor) -> object:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000, tol=1e-3))
        return model.fit(features[rows].float().numpy(), classes[rows].numpy())

    return _best_of(REGULARISATIONS, fitted, features, classes, held_out, test, "C = {}")


def neighbour_probe(features: Tensor, classes: Tensor, held_out: Tensor, test: Tensor) -> ProbeResult:
    """k nearest neighbours by cosine; k is chosen on held-out train rows."""
    from sklearn.neighbors import KNeighborsClassifier

    def fitted(k: int, rows: Tensor) -> object:
        model = KNeighborsClassifier(min(k, int(rows.sum())), metric="cosine")
        return model.fit(features[rows].float().numpy(), classes[rows].numpy())

    return _best_of(NEIGHBOURS, fitted, features, classes, held_out, test, "k = {}")


def _best_of(
    values: Sequence[float], fitted: Callable, features: Tensor, classes: Tensor, held_out: Tensor, test: Tensor,
    words: str,
) -> ProbeResult:  # fmt: skip
    """The classifier whose setting is best on the held-out rows, fitted on all rows."""
    inner, outer = features[held_out].float().numpy(), classes[held_out].numpy()
    best = max(values, key=lambda value: (fitted(value, ~held_out).predict(inner) == outer).mean())
    predictions = fitted(best, torch.ones_like(held_out)).predict(test.float().numpy())
    return ProbeResult(torch.as_tensor(predictions), words.format(best))


def centroid_probe(features: Tensor, classes: Tensor, held_out: Tensor, test: Tensor) -> ProbeResult:
    """The nearest class centroid by cosine; nothing is chosen."""
    unit = F.normalize(features.float(), dim=1)  # [rows, width]
    present = classes.unique()
    centroids = torch.stack([unit[classes == index].mean(dim=0) for index in present])  # [classes, width]
    similarity = F.normalize(test.float(), dim=1) @ F.normalize(centroids, dim=1).T  # [test rows, classes]
    return ProbeResult(present[similarity.argmax(dim=1)], "nothing chosen")
