"""A mini CLIP: transformers' `CLIPModel`, trained from scratch on labelled images."""

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from vlmclassifier.mini.language import CLIP_CONTEXT
from vlmclassifier.mini.optimisation import PARTS, Optimisation
from vlmclassifier.mini.recipes import ClipRecipe
from vlmclassifier.mini.training_images import TrainingImages, augment, keyed_generator, mix
from vlmclassifier.prompts import CAPTION

VALIDATE_EVERY = 50  # steps
VALIDATION_BATCH = 256  # images


def build_clip(recipe: ClipRecipe, size: int, tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """Build an untrained CLIP with the recipe's widths for images of `size` x `size` pixels.

    The token embeddings are drawn with a standard deviation of 1.
    """
    shared = {"hidden_act": "gelu", "num_attention_heads": 4}
    vision = shared | {
        "hidden_size": recipe.width, "intermediate_size": 2 * recipe.width, "num_hidden_layers": recipe.layers,
        "image_size": size, "patch_size": recipe.patch,
    }  # fmt: skip
    text = shared | {
        "hidden_size": recipe.text_width, "intermediate_size": 4 * recipe.text_width, "num_hidden_layers": 1,
        "max_position_embeddings": CLIP_CONTEXT, "vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=recipe.projection))
    nn.init.normal_(model.text_model.embeddings.token_embedding.weight)
    if recipe.structured_start:
        _initialise_structured(model)
    return model


@torch.no_grad()
def _initialise_structured(model: CLIPModel) -> None:
    """Initialise patch filters with cosine waves and position embeddings with sine waves.

    Filters of high spatial frequency are amplified. A model that starts like this needs fewer images and steps.
    """
    embeddings = model.vision_model.embeddings
    width, _, side, _ = embeddings.patch_embedding.weight.shape
    pixel = (torch.arange(side) + 0.5) / side
    frequencies = [(i, j) for i in range(side) for j in range(side)]
    frequencies.sort(key=lambda pair: (sum(pair), pair))
    colours = [(1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (-0.5, 1.0, -0.5)]
    for number in range(width):
        i, j = frequencies[number // 3]
        wave = torch.outer(torch.cos(math.pi * i * pixel), torch.cos(math.pi * j * pixel))
        colour = torch.tensor(colours[number % 3])
        filters = colour[:, None, None] * wave * (1 + i + j) ** 0.5  # natural images have little fine contrast
        embeddings.patch_embedding.weight[number] = filters / (3 * side)
    grid = math.isqrt(embeddings.num_patches)
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    waves = torch.exp(torch.linspace(0, -math.log(grid), width // 4)) * math.pi / 2
    angles = torch.stack([rows.ravel(), columns.ravel()], 1)[..., None] * waves  # [patches, 2, width / 4]
    positions = torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1)
    embeddings.position_embedding.weight[1:] = 0.3 * positions


def contrastive_loss(similarity: Tensor, targets: Tensor, text_to_image: float, smoothing: float = 0.0) -> Tensor:
    """Return the weighted sum of image-to-text and text-to-image cross-entropy.

    Text to image, the target of a class is spread evenly over all images of the class. `similarity`: scaled logits
    [images, classes of the batch]. `targets`: [images, classes of the batch], rows sum to 1. `text_to_image`: the
    weight of the second term; the first has the rest.
    """
    image_to_text_loss = F.cross_entropy(similarity, targets, label_smoothing=smoothing)
    image_targets = targets.T / targets.sum(0)[:, None]  # [classes, images]
    text_to_image_loss = -(F.log_softmax(similarity.T, dim=1) * image_targets).sum(1)  # [classes]
    return (1 - text_to_image) * image_to_text_loss + text_to_image * text_to_image_loss.mean()


class ClipTraining:
    """One training of one CLIP: its steps, and its validation on held-out images of the train split."""

    def __init__(
        self, model: CLIPModel, tokenizer: PreTrainedTokenizerFast, images: TrainingImages, names: Sequence[str],
        recipe: ClipRecipe, seed: int,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.images = model, tokenizer, images
        self.recipe, self.seed = recipe, seed
        self.captions = tokenizer([CAPTION.format(name) for name in names], padding=True, return_tensors="pt")
        self.classifier = nn.Linear(recipe.width, len(names))  # for the auxiliary loss only; never saved
        self.optimisation = Optimisation([model, self.classifier], recipe.muon_lr, recipe.adamw_lr)
        self.train_rows, self.held_out_rows = images.split(recipe.validation, seed)
        self.order = images.training_order(self.train_rows, recipe.steps * recipe.batch, recipe.balanced, seed)
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema)) if recipe.ema else None
        self.validation: list[tuple[int, float]] = []  # step, macro accuracy
        self.best_weights: dict[str, Tensor] = {}

    def image_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return image features [images, projection] and mean patches of the second-to-last layer [images, width].

        `images`: pixel_values [images, 3, size, size] or row numbers [images].
        """
        pixel_values = images if images.is_floating_point() else self.images.pixel_values(images)
        out = self.model.vision_model(pixel_values, output_hidden_states=True)
        return self.model.visual_projection(out.pooler_output), out.hidden_states[-2][:, 1:].mean(dim=1)

    def text_features(self, model: CLIPModel, classes: Tensor) -> Tensor:
        """Return unit-length features of the captions of some classes: [classes, projection]."""
        inputs = {key: value[classes] for key, value in self.captions.items()}
        return F.normalize(model.text_projection(model.text_model(**inputs).pooler_output), dim=-1)

    def step(self, number: int) -> float:
        """Compute the gradients of batch `number` and return its loss."""
        rows = self.order[number * self.recipe.batch : (number + 1) * self.recipe.batch]
        parts = rows.chunk(PARTS)
        targets = F.one_hot(self.images.labels[rows], len(self.classifier.weight)).float()  # [batch, classes]
        if self.recipe.augment:
            generator = keyed_generator(f"augment:{self.seed}:{number}")
            pixel_values, targets = mix(augment(self.images.pixel_values(rows), generator), targets, generator)
            parts = pixel_values.chunk(PARTS)
        encoded = self.optimisation.map_parts(self.image_features, parts)
        # The loss needs the whole batch: its gradients stop at these copies and go on in parts below.
        leaves = []
        for part_features, part_patches in encoded:
            leaves.append((part_features.detach().requires_grad_(), part_patches.detach().requires_grad_()))
        image_features = torch.cat([part_features for part_features, _ in leaves])
        patches = torch.cat([part_patches for _, part_patches in leaves])
        present = targets.sum(0).nonzero()[:, 0]
        similarity = F.normalize(image_features, dim=-1) @ self.text_features(self.model, present).T
        logits = self.model.logit_scale.exp() * similarity
        smoothing = self.recipe.label_smoothing
        loss = contrastive_loss(logits, targets[:, present], self.recipe.text_to_image, smoothing)
        patch_loss = F.cross_entropy(self.classifier(patches), targets, label_smoothing=smoothing)
        loss = loss + self.recipe.patch_loss * patch_loss
        loss.backward()
        gradients = [(part_features.grad, part_patches.grad) for part_features, part_patches in leaves]
        self.optimisation.backward(encoded, gradients)
        return loss.item()

    def after_step(self, number: int) -> None:
        """Update the average; every VALIDATE_EVERY steps evaluate it on the held-out images and keep the best."""
        if self.average is not None:
            self.average.update_parameters(self.model)
        is_last = number + 1 == self.recipe.steps
        if len(self.held_out_rows) and ((number + 1) % VALIDATE_EVERY == 0 or is_last):
            model = self.average.module if self.average is not None else self.model
            accuracy = self.macro_accuracy(model, self.held_out_rows)
            if not self.validation or accuracy > max(value for _, value in self.validation):
                self.best_weights = copy.deepcopy(model.state_dict())
            self.validation.append((number + 1, accuracy))

    @torch.inference_mode()
    def macro_accuracy(self, model: CLIPModel, rows: Tensor) -> float:
        """Return the mean over the classes of the zero-shot accuracy (0 to 1) on the images of some rows."""
        model.eval()
        class_features = self.text_features(model, torch.arange(len(self.classifier.weight)))
        features = []
        for part in rows.split(VALIDATION_BATCH):
            features.append(model.visual_projection(model.vision_model(self.images.pixel_values(part)).pooler_output))
        labels = self.images.labels[rows]
        correct = (torch.cat(features) @ class_features.T).argmax(1) == labels
        model.train()
        return torch.stack([correct[labels == label].float().mean() for label in labels.unique()]).mean().item()

    def run(self) -> list[float]:
        """Train and return the loss of every step.

        The model is left with the last weights, or with the best ones where images are held out.
        """
        self.model.train()
        losses = self.optimisation.run(self.step, self.recipe.steps, "CLIP", self.after_step)
        if self.best_weights:
            self.model.load_state_dict(self.best_weights)
        elif self.average is not None:
            self.model.load_state_dict(self.average.module.state_dict())
        self.model.eval()
        return losses
