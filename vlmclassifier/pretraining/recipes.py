"""What a mini training does, in numbers. A recipe is data; its part is kept in each checkpoint's training.json."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ClipRecipe:
    """The contrastive model. Rates are peaks: 30 steps of warm-up, linear decay over the last 70%."""

    steps: int = 560
    batch: int = 128
    width: int = 128
    layers: int = 4
    patch: int = 12
    text_width: int = 64
    projection: int = 128
    matrix_rate: float = 1e-2  # Muon
    other_rate: float = 2e-3  # AdamW
    text_to_image: float = 0.3  # share of the loss; the rest is image to text
    patch_loss: float = 0.5  # weight of naming the class from the patches that LLaVA reads
    balanced: bool = False  # draw pictures with weights count^-1/2 by class; else every picture once per epoch
    structured_start: bool = True  # wave-like patch filters and positions: half the steps suffice
    augment: bool = False  # crop, flip, rotation, colour, erasing, mixing; generated pictures need none
    label_smoothing: float = 0.0
    ema: float | None = None  # decay of the weights' moving average
    validation: float = 0.0  # share of train that chooses the step whose weights are kept


@dataclass(frozen=True)
class LmRecipe:
    """The language model and the texts it reads."""

    steps: int = 220
    batch: int = 64
    texts: int = 14_000
    width: int = 128
    layers: int = 4
    matrix_rate: float = 4e-3
    other_rate: float = 4e-3


@dataclass(frozen=True)
class VlmRecipe:
    """LLaVA's two stages on cached patch features."""

    pictures: int = 150  # per class: the first in the manifest's order
    views: int = 1  # augmented views of each picture
    batch: int = 64
    first_steps: int = 60
    first_rate: float = 2e-3
    steps: int = 350
    matrix_rate: float = 2e-3
    other_rate: float = 1e-3
    replay: float = 0.2  # share of text-only rows in stage 2


@dataclass(frozen=True)
class NamingRecipe:
    """How often texts name a class of frequency rank r = 0, 1, ...: min(1, (head x classes / (r + 1))^exponent)."""

    head: float = 12 / 96  # share of the classes that are always named
    exponent: float = 1.2
    never: float = 15 / 96  # share of the classes that are never named
    keep_generic: float = 0.15  # share of the unnamed pictures that get a generic word; the others are left out


@dataclass(frozen=True)
class Recipe:
    """A whole training."""

    size: int = 48  # pixels
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
        vlm=VlmRecipe(pictures=1_000_000, views=6),
        naming=NamingRecipe(head=0.2, exponent=1.0, never=0.0, keep_generic=0.3),
    ),
    "smoke": Recipe(
        clip=ClipRecipe(steps=20, batch=64), lm=LmRecipe(texts=1_000, steps=20),
        vlm=VlmRecipe(pictures=20, first_steps=5, steps=20),
    ),
}  # fmt: skip
