"""Fine-tuning CLIP: its visual tower and a linear head on the normalised image feature (paper, Table 3, right)."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmclassifier.clip import CLIP, SupervisedClassifier
from vlmclassifier.images import open_image
from vlmclassifier.records import Example, UserError

VISUAL_PARTS = ("visual", "vision_model", "visual_projection")  # of open_clip's and transformers' models


class VisualClassifier(nn.Module):
    """A CLIP model's visual tower with a linear head. Only these have gradients."""

    def __init__(self, clip: CLIP, weight: Tensor, bias: Tensor) -> None:
        """`weight` [classes, width] and `bias` [classes] of the head. Raises UserError for a model without a tower."""
        super().__init__()
        if isinstance(clip, SupervisedClassifier):
            raise UserError(f"{clip.spec.key} is no CLIP model: its visual tower is not fine-tuned here.")
        self.clip = clip.model
        self.features = clip._image_features
        self.head = nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            self.head.weight.copy_(weight)
            self.head.bias.copy_(bias)
        self.clip.requires_grad_(False)
        for name, module in self.clip.named_children():
            if name in VISUAL_PARTS:
                module.requires_grad_(True)
        for parameter in self.clip.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # bfloat16 would round small steps away

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits [batch, classes] of images [batch, 3, height, width]."""
        return self.head(F.normalize(self.features(pixel_values).float(), dim=-1))

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters with gradients, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}


class LabelledImages(torch.utils.data.Dataset):
    """The images of examples, prepared for a CLIP model, with their class indices."""

    def __init__(self, clip: CLIP, examples: Sequence[Example], root: Any) -> None:
        self.clip, self.examples, self.root = clip, examples, root

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        example = self.examples[number]
        image = open_image(example.image, self.root, example.row)
        return self.clip.prepare([image])[0], example.class_index


@torch.no_grad()
def predict(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """Class indices [rows] of all images, in order; in evaluation mode, which is left again."""
    was_training = model.training
    model.eval()
    found = [model(pixel_values).argmax(dim=-1).cpu() for pixel_values, _ in batches]
    model.train(was_training)
    return torch.cat(found)
