"""Classifiers of stored features that need no schedule: logistic regression, neighbours, centroids, caches, heads."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmclassifier.probing.data import ROWS, ProbeData, ProbeResult, Scale
from vlmclassifier.runs.features import Matrix

REGULARISATIONS = (1e-4, 1e-3, 0.01, 0.1, 1.0)  # C of the logistic regression
ITERATIONS, TOLERANCE = 200, 3e-4  # of L-BFGS; the largest entry of the gradient of the mean loss
NEIGHBOURS = (1, 5, 10, 20)
SHARPNESS, RESIDUAL = (1.0, 3.0, 5.5, 8.0), (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)  # beta and alpha of Tip-Adapter
CLIP_SCALE = 100.0  # of CLIP's logits
HEADS_ROWS = 32  # rows at a time where every attention head has a similarity to every class
HEAD_COUNTS = (1, 4, 20)  # how many of the best heads vote


def fit_logistic(
    train: Matrix, classes: Tensor, class_count: int, c: float, scale: Scale, device: str = "cpu",
    initial: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Multinomial logistic regression on standardised features by L-BFGS over all rows: weight, bias.

    Minimises the mean cross-entropy + |weight|^2 / (2 C rows), as scikit-learn's does, which needs all rows in memory;
    here they are read in batches, on the device. `initial`: parameters to start from. Returns [width, classes] and
    [classes].
    """
    weight, bias = initial or (torch.zeros(train.width, class_count), torch.zeros(class_count))
    parameters = [tensor.detach().clone().to(device).requires_grad_() for tensor in (weight, bias)]
    optimiser = torch.optim.LBFGS(
        parameters, max_iter=ITERATIONS, tolerance_grad=TOLERANCE, tolerance_change=1e-9, history_size=10,
        line_search_fn="strong_wolfe",
    )  # fmt: skip
    train, targets = train.on_device(device), classes.to(device)

    def closure() -> Tensor:
        optimiser.zero_grad()
        total = parameters[0].square().sum() / (2 * c * len(train))
        total.backward()
        total = total.detach()
        for start in range(0, len(train), ROWS):
            batch = scale(train[start : start + ROWS].to(device).float())  # [rows, width]
            logits = torch.addmm(parameters[1], batch, parameters[0])  # [rows, classes]
            loss = F.cross_entropy(logits, targets[start : start + ROWS], reduction="sum") / len(train)
            loss.backward()
            total = total + loss.detach()
        return total

    optimiser.step(closure)
    return parameters[0].detach(), parameters[1].detach()


def logistic_probe(data: ProbeData) -> ProbeResult:
    """Logistic regression on standardised features; its C is chosen on held-out train rows."""
    device = data.device
    (inner, classes), (outer, truth) = data.inner, data.outer
    scale, parameters, best = Scale.of(inner, device), None, (-1.0, 0.0)
    for c in REGULARISATIONS:
        parameters = fit_logistic(inner, classes, data.class_count, c, scale, device, parameters)
        accuracy = float((_logistic_predictions(outer, scale, parameters, device) == truth).float().mean())
        if accuracy > best[0]:
            best, initial = (accuracy, c), parameters
    scale = Scale.of(data.train, device)
    parameters = fit_logistic(data.train, data.classes, data.class_count, best[1], scale, device, initial)
    return ProbeResult(_logistic_predictions(data.test, scale, parameters, device), f"C = {best[1]:g}")


def _logistic_predictions(rows: Matrix, scale: Scale, parameters: tuple[Tensor, Tensor], device: str) -> Tensor:
    weight, bias = parameters
    found = [torch.addmm(bias, scale(batch.to(device)), weight).argmax(dim=1).cpu() for batch in rows.batches(ROWS)]
    return torch.cat(found)


def neighbour_probe(data: ProbeData) -> ProbeResult:
    """k nearest neighbours by cosine, each with one vote; k is chosen on held-out train rows."""
    (inner, classes), (outer, truth) = data.inner, data.outer
    counts = [k for k in NEIGHBOURS if k <= len(inner)] or [len(inner)]
    nearest = _nearest_classes(inner, classes, outer, max(counts), data.device)
    best = max(counts, key=lambda k: (_majority(nearest[:, :k], data.class_count) == truth).float().mean())
    nearest = _nearest_classes(data.train, data.classes, data.test, best, data.device)
    return ProbeResult(_majority(nearest, data.class_count), f"k = {best}")


def _nearest_classes(train: Matrix, classes: Tensor, rows: Matrix, k: int, device: str) -> Tensor:
    """The classes [rows, k] of the k nearest train rows of each row, the nearest first."""
    found = []
    for batch in rows.batches(ROWS):
        queries = F.normalize(batch.to(device), dim=1)  # [rows, width]
        values, indices = queries.new_zeros((len(queries), 0)), torch.zeros((len(queries), 0), dtype=torch.long)
        indices = indices.to(device)
        for start, part in enumerate(train.batches(ROWS)):
            similarity = queries @ F.normalize(part.to(device), dim=1).T  # [rows, train rows of the part]
            places = torch.arange(len(part), device=device).expand_as(similarity) + start * ROWS
            values, indices = torch.cat([values, similarity], dim=1), torch.cat([indices, places], dim=1)
            values, kept = values.topk(min(k, values.shape[1]), dim=1)
            indices = indices.gather(1, kept)
        found.append(classes[indices.cpu()])
    return torch.cat(found)


def _majority(votes: Tensor, class_count: int) -> Tensor:
    """The class [rows] with the most of the votes [rows, votes]; the smallest of several."""
    counts = torch.zeros((len(votes), class_count)).scatter_add_(1, votes, torch.ones(votes.shape))
    return counts.argmax(dim=1)


def centroid_probe(data: ProbeData) -> ProbeResult:
    """The nearest class centroid by cosine; nothing is chosen."""
    centroids = _centroids(data.train, data.classes, data.class_count, 1, data.device)  # [1, classes, width]
    found = [_similarities(batch.to(data.device), centroids)[:, 0].argmax(dim=1).cpu() for batch in
             data.test.batches(ROWS)]  # fmt: skip
    return ProbeResult(torch.cat(found), "nothing chosen")


def _centroids(rows: Matrix, classes: Tensor, class_count: int, heads: int, device: str) -> Tensor:
    """The mean direction of each class in each head: unit vectors [heads, classes, width of a head].

    A class without rows has a centroid of zeros.
    """
    sums = torch.zeros(class_count, heads, rows.width // heads, device=device)
    step = ROWS if heads == 1 else HEADS_ROWS
    for start, batch in zip(range(0, len(rows), step), rows.batches(step), strict=True):
        unit = F.normalize(batch.to(device).unflatten(1, (heads, -1)), dim=2)  # [rows, heads, width of a head]
        sums.index_add_(0, classes[start : start + step].to(device), unit)
    return F.normalize(sums, dim=2).transpose(0, 1)


def _similarities(batch: Tensor, centroids: Tensor) -> Tensor:
    """Cosines [rows, heads, classes] of rows [rows, width] with centroids; -2 for a class without rows."""
    unit = F.normalize(batch.unflatten(1, (len(centroids), -1)), dim=2)  # [rows, heads, width of a head]
    cosines = torch.einsum("rhw,hcw->rhc", unit, centroids)
    return cosines.masked_fill((centroids == 0).all(dim=2), -2.0)


def head_probe(data: ProbeData, heads: int) -> dict[str, ProbeResult]:
    """Attention heads as few-shot classifiers: the best 1, 4, 20 and all heads vote (Mitra et al., 2024).

    The features are the activations of all heads, [rows, heads * width of a head]. Each head names the class of the
    nearest centroid by cosine; heads are ordered by their accuracy on held-out train rows, with centroids of the other
    train rows; then the centroids are those of all train rows. Equal votes are decided by the summed cosines.
    """
    (inner, classes), (outer, truth) = data.inner, data.outer
    centroids = _centroids(inner, classes, data.class_count, heads, data.device)
    right = torch.zeros(heads)
    for start, batch in zip(range(0, len(outer), HEADS_ROWS), outer.batches(HEADS_ROWS), strict=True):
        named = _similarities(batch.to(data.device), centroids).argmax(dim=2).cpu()  # [rows, heads]
        right += (named == truth[start : start + HEADS_ROWS, None]).sum(dim=0)
    order = right.argsort(descending=True, stable=True)  # [heads] the best first
    centroids = _centroids(data.train, data.classes, data.class_count, heads, data.device)
    counts = [*(count for count in HEAD_COUNTS if count < heads), heads]
    found: dict[int, list[Tensor]] = {count: [] for count in counts}
    for batch in data.test.batches(HEADS_ROWS):
        similarities = _similarities(batch.to(data.device), centroids).cpu()[:, order]  # [rows, heads, classes]
        for count in counts:
            best = similarities[:, :count]
            votes = F.one_hot(best.argmax(dim=2), data.class_count).sum(dim=1)  # [rows, classes]
            found[count].append((votes + best.sum(dim=1) / (4 * count)).argmax(dim=1))  # the cosines break ties alone
    words = f"heads {', '.join(str(int(head)) for head in order[:4])}, ... by held-out train rows"
    names = {count: "all" if count == heads else str(count) for count in counts}
    return {names[count]: ProbeResult(torch.cat(parts), words) for count, parts in found.items()}


def tip_adapter(data: ProbeData, class_features: Tensor) -> ProbeResult:
    """CLIP with the train images as a cache, without training (Tip-Adapter, Zhang et al., 2022).

    The logits are 100 x the cosine with the class features [classes, width] plus alpha x the sum over the train images
    of a class of exp(-beta (1 - cosine)); alpha and beta are chosen on held-out train rows.
    """
    inner, classes = data.inner
    outer, truth = data.outer
    best, choice = -1.0, (SHARPNESS[0], RESIDUAL[0])
    for beta in SHARPNESS:
        zero_shot, cache = _cache_logits(inner, classes, outer, class_features, beta, data.device)
        for alpha in RESIDUAL:
            accuracy = float(((zero_shot + alpha * cache).argmax(dim=1) == truth).float().mean())
            if accuracy > best:
                best, choice = accuracy, (beta, alpha)
    beta, alpha = choice
    zero_shot, cache = _cache_logits(data.train, data.classes, data.test, class_features, beta, data.device)
    return ProbeResult((zero_shot + alpha * cache).argmax(dim=1), f"alpha = {alpha:g}, beta = {beta:g}")


def _cache_logits(
    train: Matrix, classes: Tensor, rows: Matrix, class_features: Tensor, beta: float, device: str
) -> tuple[Tensor, Tensor]:
    """Zero-shot logits and cache sums, both [rows, classes] on the CPU."""
    text = class_features.float().to(device)
    zero_shot, cache = [], []
    for batch in rows.batches(ROWS):
        queries = F.normalize(batch.to(device), dim=1)  # [rows, width]
        sums = torch.zeros(len(queries), len(text), device=device)
        for start, part in enumerate(train.batches(ROWS)):
            affinity = (beta * (queries @ F.normalize(part.to(device), dim=1).T - 1)).exp()  # [rows, train rows]
            sums.index_add_(1, classes[start * ROWS : (start + 1) * ROWS].to(device), affinity)
        zero_shot.append(CLIP_SCALE * (queries @ text.T))
        cache.append(sums)
    return torch.cat(zero_shot).cpu(), torch.cat(cache).cpu()
