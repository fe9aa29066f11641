"""A mini CLIP: transformers' `CLIPModel`, trained from scratch on labelled pictures."""

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from vlmclassifier.pretraining.language import CLIP_CONTEXT
from vlmclassifier.pretraining.optimisation import PARTS, Optimisation
from vlmclassifier.pretraining.pictures import Pictures, augment, keyed_generator, mix
from vlmclassifier.pretraining.recipes import ClipRecipe
from vlmclassifier.prompts import CAPTION

VALIDATE_EVERY = 50  # steps


def build_clip(recipe: ClipRecipe, size: int, tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """An untrained CLIP of the recipe's widths; token embeddings start with std 1."""
    shape = {"hidden_act": "gelu", "num_attention_heads": 4}
    vision = shape | {
        "hidden_size": recipe.width, "intermediate_size": 2 * recipe.width, "num_hidden_layers": recipe.layers,
        "image_size": size, "patch_size": recipe.patch,
    }  # fmt: skip
    text = shape | {
        "hidden_size": recipe.text_width, "intermediate_size": 4 * recipe.text_width, "num_hidden_layers": 1,
        "max_position_embeddings": CLIP_CONTEXT, "vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=recipe.projection))
    nn.init.normal_(model.text_model.embeddings.token_embedding.weight)
    if recipe.structured_start:
        _start_structured(model)
    return model


@torch.no_grad()
def _start_structured(model: CLIPModel) -> None:
    """Patch filters start as cosine waves, the fine ones amplified, positions as sines: for few pictures."""
    embeddings = model.vision_model.embeddings
    width, _, side, _ = embeddings.patch_embedding.weight.shape
    place = (torch.arange(side) + 0.5) / side
    pairs = sorted(((i, j) for i in range(side) for j in range(side)), key=lambda pair: (sum(pair), pair))
    for number in range(width):
        (i, j), colour = pairs[number // 3], number % 3
        wave = torch.outer(torch.cos(math.pi * i * place), torch.cos(math.pi * j * place))
        tint = torch.tensor([(1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (-0.5, 1.0, -0.5)][colour])
        filters = tint[:, None, None] * wave * (1 + i + j) ** 0.5  # natural pictures have little fine contrast
        embeddings.patch_embedding.weight[number] = filters / (3 * side)
    grid = math.isqrt(embeddings.num_patches)
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    waves = torch.exp(torch.linspace(0, -math.log(grid), width // 4)) * math.pi / 2
    angles = torch.stack([rows.ravel(), columns.ravel()], 1)[..., None] * waves  # [patches, 2, width / 4]
    positions = torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1)
    embeddings.position_embedding.weight[1:] = 0.3 * positions


def contrastive_loss(similarity: Tensor, targets: Tensor, text_to_image: float, smoothing: float = 0.0) -> Tensor:
    """Image-to-text cross-entropy and text-to-image cross-entropy over all pictures of the class.

    `similarity`: scaled logits [pictures, classes of the batch]; `targets`: [pictures, classes], rows sum to 1.
    """
    to_text = F.cross_entropy(similarity, targets, label_smoothing=smoothing)
    positive = targets.T / targets.sum(0)[:, None]  # [classes, pictures]
    to_image = -(F.log_softmax(similarity.T, dim=1) * positive).sum(1)
    return (1 - text_to_image) * to_text + text_to_image * to_image.mean()


class ClipTraining:
    """One training of one model: what a step does, and how it is judged on held-out pictures of train."""

    def __init__(
        self, model: CLIPModel, tokenizer: PreTrainedTokenizerFast, pictures: Pictures, names: Sequence[str],
        recipe: ClipRecipe, seed: int,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.pictures = model, tokenizer, pictures
        self.recipe, self.seed = recipe, seed
        self.captions = tokenizer([CAPTION.format(name) for name in names], padding=True, return_tensors="pt")
        self.head = nn.Linear(recipe.width, len(names))  # the auxiliary classifier; thrown away
        self.tower = nn.ModuleList([model.vision_model, model.visual_projection])
        self.optimisation = Optimisation([model, self.head], recipe.matrix_rate, recipe.other_rate)
        self.train_rows, self.held_out = pictures.split(recipe.validation, seed)
        self.order = pictures.order(self.train_rows, recipe.steps * recipe.batch, recipe.balanced, seed)
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema)) if recipe.ema else None
        self.validation: list[tuple[int, float]] = []  # step, macro accuracy
        self.best: dict[str, Tensor] = {}

    def see(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Image features [pictures, projection] and mean patches of the second-to-last layer [pictures, width].

        `pictures`: pixel_values [pictures, 3, size, size] or row numbers [pictures].
        """
        pixel_values = pictures if pictures.is_floating_point() else self.pictures.values(pictures)
        out = self.model.vision_model(pixel_values, output_hidden_states=True)
        return self.model.visual_projection(out.pooler_output), out.hidden_states[-2][:, 1:].mean(dim=1)

    def text_features(self, model: CLIPModel, classes: Tensor) -> Tensor:
        """Unit-length features of the classes' captions: [classes, projection]."""
        inputs = {key: value[classes] for key, value in self.captions.items()}
        return F.normalize(model.text_projection(model.text_model(**inputs).pooler_output), dim=-1)

    def step(self, number: int) -> float:
        """Fill the gradients of one batch; returns its loss."""
        rows = self.order[number * self.recipe.batch : (number + 1) * self.recipe.batch]
        parts = rows.chunk(PARTS)
        targets = F.one_hot(self.pictures.labels[rows], len(self.head.weight)).float()  # [batch, classes]
        if self.recipe.augment:
            generator = keyed_generator(f"augment:{self.seed}:{number}")
            pixel_values, targets = mix(augment(self.pictures.values(rows), generator), targets, generator)
            parts = pixel_values.chunk(PARTS)
        seen = self.optimisation.map(self.see, parts)
        leaves = [tuple(tensor.detach().requires_grad_() for tensor in part) for part in seen]
        image_features, patches = (torch.cat(tensors) for tensors in zip(*leaves, strict=True))
        present = targets.sum(0).nonzero()[:, 0]
        similarity = F.normalize(image_features, dim=-1) @ self.text_features(self.model, present).T
        logits = self.model.logit_scale.exp() * similarity
        loss = contrastive_loss(logits, targets[:, present], self.recipe.text_to_image, self.recipe.label_smoothing)
        named = F.cross_entropy(self.head(patches), targets, label_smoothing=self.recipe.label_smoothing)
        loss = loss + self.recipe.patch_loss * named
        loss.backward()
        self.optimisation.backward(seen, [tuple(leaf.grad for leaf in part) for part in leaves])
        return loss.item()

    def after(self, number: int) -> None:
        """Move the average; judge it on the held-out pictures now and then and keep the best."""
        if self.average is not None:
            self.average.update_parameters(self.model)
        last = number + 1 == self.recipe.steps
        if len(self.held_out) and ((number + 1) % VALIDATE_EVERY == 0 or last):
            model = self.average.module if self.average is not None else self.model
            accuracy = self.macro_accuracy(model, self.held_out)
            if not self.validation or accuracy > max(value for _, value in self.validation):
                self.best = copy.deepcopy(model.state_dict())
            self.validation.append((number + 1, accuracy))

    @torch.inference_mode()
    def macro_accuracy(self, model: CLIPModel, rows: Tensor) -> float:
        """Mean over the classes of the zero-shot accuracy on some pictures."""
        model.eval()
        classes = self.text_features(model, torch.arange(len(self.head.weight)))
        features = [
            model.visual_projection(model.vision_model(self.pictures.values(part)).pooler_output)
            for part in rows.split(256)
        ]
        right = (torch.cat(features) @ classes.T).argmax(1) == self.pictures.labels[rows]
        labels = self.pictures.labels[rows]
        model.train()
        return torch.stack([right[labels == label].float().mean() for label in labels.unique()]).mean().item()

    def run(self) -> list[float]:
        """Train; leave the last weights in the model, or the best where pictures are held out. Returns the losses."""
        self.model.train()
        losses = self.optimisation.run(self.step, self.recipe.steps, "CLIP", self.after)
        if self.best:
            self.model.load_state_dict(self.best)
        elif self.average is not None:
            self.model.load_state_dict(self.average.module.state_dict())
        self.model.eval()
        return losses
