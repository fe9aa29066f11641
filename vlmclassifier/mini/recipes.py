"""Hyperparameters of the mini models. Each checkpoint's training.json records those of its stage.

The field names are part of the recorded configuration: renaming one makes existing checkpoints unusable.
"""

from dataclasses import dataclass, field

TRAINING_VERSION = 1  # increase it when a change of the training code changes the weights of a seed


@dataclass(frozen=True)
class ClipRecipe:
    """The mini CLIP. Learning rates are peak values: 30 steps of warm-up, linear decay over the last 70% of steps."""

    steps: int = 560
    batch: int = 128
    width: int = 128
    layers: int = 4
    patch: int = 12
    text_width: int = 64
    projection: int = 128
    muon_lr: float = 1e-2
    adamw_lr: float = 2e-3
    text_to_image: float = 0.3  # share of the text-to-image loss; the rest is image to text
    patch_loss: float = 0.5  # weight of classification from the patch features that LLaVA uses
    balanced: bool = False  # sample images with weight (class size)^-1/2; else every image once per epoch
    structured_start: bool = True  # wave-like initial patch filters and positions: half the steps suffice
    augment: bool = False  # crop, flip, rotation, colour, erasing, mixing; generated images need none
    label_smoothing: float = 0.0
    ema: float | None = None  # decay of the moving average of the weights
    validation: float = 0.0  # share of the train split held out to choose the best step


@dataclass(frozen=True)
class LmRecipe:
    """The language model and the number of its training texts."""

    steps: int = 220
    batch: int = 64
    texts: int = 14_000
    width: int = 128
    layers: int = 4
    muon_lr: float = 4e-3
    adamw_lr: float = 4e-3


@dataclass(frozen=True)
class VlmRecipe:
    """The two training stages of the mini LLaVA, on cached patch features."""

    images: int = 150  # per class, the first in the manifest
    views: int = 1  # of each image: the image itself and augmented ones
    batch: int = 64
    pretrain_steps: int = 60
    pretrain_lr: float = 2e-3
    steps: int = 350
    muon_lr: float = 2e-3
    adamw_lr: float = 1e-3
    replay: float = 0.2  # share of texts without images in stage 2


@dataclass(frozen=True)
class BlipRecipe:
    """What the mini BLIP-2 has beyond the mini LLaVA's recipe, whose texts, steps and rates it shares."""

    vision_steps: int = 160
    vision_batch: int = 128
    vision_lr: float = 1e-3
    layers: int = 2  # of the Q-Former
    queries: int = 8


@dataclass(frozen=True)
class NamingRecipe:
    """How often texts name a class of frequency rank r = 0, 1, ...

    The share of its images that are named is min(1, (head x classes / (r + 1))^exponent).
    """

    head: float = 12 / 96  # share of the classes that are always named
    exponent: float = 1.2
    never: float = 15 / 96  # share of the classes that are never named
    keep_generic: float = 0.15  # share of the unnamed images that get a text with a generic word; the others have none


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of all stages."""

    size: int = 48  # side of an image in pixels
    clip: ClipRecipe = field(default_factory=ClipRecipe)
    lm: LmRecipe = field(default_factory=LmRecipe)
    vlm: VlmRecipe = field(default_factory=VlmRecipe)
    naming: NamingRecipe = field(default_factory=NamingRecipe)


RECIPES = {
    "figures": Recipe(),
    "photos": Recipe(
        clip=ClipRecipe(
            steps=1800, balanced=True, augment=True, label_smoothing=0.1, ema=0.995,
            validation=0.1,
        ),
        lm=LmRecipe(texts=8_000, steps=250),
        vlm=VlmRecipe(images=1_000_000, views=6),
        naming=NamingRecipe(head=0.2, exponent=1.0, never=0.0, keep_generic=0.3),
    ),
    "smoke": Recipe(
        clip=ClipRecipe(steps=20, batch=64), lm=LmRecipe(texts=1_000, steps=20),
        vlm=VlmRecipe(images=20, pretrain_steps=5, steps=20),
    ),
}  # fmt: skip
BLIP_RECIPES = {preset: BlipRecipe() for preset in RECIPES} | {"smoke": BlipRecipe(vision_steps=5)}
