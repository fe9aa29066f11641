"""A page to try one image: a VLM and CLIP side by side, the ranking of all names, and guidance as a slider.

    pip install --constraint constraints.txt --editable '.[demo]'
    python scripts/demo.py
    python scripts/demo.py --weights outputs/plane_figures/seed-0/checkpoints
    python scripts/demo.py --models llava-1.5-7b qwen3-vl-8b --clips clip-vit-l-336 ViT-B-32/laion2b_s34b_b79k

Drop an image, choose the models, type class names (one a line) or pick a benchmark. Shown are the VLM's free answer,
its ranking of all names and CLIP's, as probabilities over these names; the slider t re-scores the stored
log-probabilities: t * log p(name | image, prompt) + (1 - t) * log p(name | prompt). A model is loaded when it is first
chosen; paths.toml and the hub are where it comes from, as in every script. The page is served on this machine alone.
"""

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlmclassifier import cli
from vlmclassifier.benchmarks import BENCHMARKS, class_names
from vlmclassifier.images import open_image
from vlmclassifier.models import MODELS, checkpoint_folder, find_model
from vlmclassifier.prompts import WORDINGS
from vlmclassifier.records import UserError

if TYPE_CHECKING:
    from numpy import ndarray
    from PIL.Image import Image

SHOWN = 8  # names
OWN_NAMES = "my own names"


@dataclass
class Args:
    models: tuple[str, ...] = ()
    """VLMs to choose from; default: the mini models with --weights, else all registered ones."""
    clips: tuple[str, ...] = ()
    """CLIP models to choose from."""
    weights: Path | None = None
    """Folder of a small study's checkpoints (ROOT/checkpoints): its mini LLaVA and mini CLIP."""
    benchmark: Literal[tuple(BENCHMARKS)] | None = None
    """The class names to begin with; default: PlaneFigures with --weights, else Caltech101."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the models run."""
    port: int = 7860
    """Port of the page."""


@dataclass(frozen=True)
class Answer:
    """What both models say about one image; the slider needs nothing else."""

    names: list[str]
    free: str  # the VLM's answer in words
    log_probs: Any  # float64 [names] log p(name | image, prompt)
    prior: Any  # float64 [names] log p(name | prompt)
    clip_scores: Any  # float64 [names]


class Models:
    """Loads a model at its first use, and keeps the last VLM and the last CLIP."""

    def __init__(self, args: Args) -> None:
        self.args, self.lock = args, threading.Lock()
        self.vlm: tuple[str, Any] = ("", None)
        self.clip: tuple[str, Any] = ("", None)
        self.ranker: tuple[tuple, Any] = ((), None)

    def answer(self, image: "Image", model: str, clip: str, names: Sequence[str], wording: str) -> Answer:
        """Ask both models about an image. Raises UserError."""
        names = list(dict.fromkeys(name.strip() for name in names if name.strip()))
        if len(names) < 2:
            raise UserError("Type at least two different class names, one a line.")
        with self.lock:
            return self._answer(image, model, clip, names, wording)

    def _answer(self, image: "Image", model: str, clip: str, names: list[str], wording: str) -> Answer:
        from vlmclassifier.clip import checkpoint_path, load_clip
        from vlmclassifier.ranking import Ranker
        from vlmclassifier.vlm import load_vlm

        if self.vlm[0] != model:
            folder = checkpoint_folder(find_model(model, "vlm"), self._weights("vlm", model))
            self.vlm, self.ranker = ("", None), ((), None)  # two VLMs may not fit into memory
            self.vlm = (model, load_vlm(model, folder, self.args.device))
        if self.clip[0] != clip:
            path = checkpoint_path(find_model(clip, "clip"), self._weights("clip", clip))
            self.clip = (clip, load_clip(clip, path, self.args.device))
        key = (model, wording, *names)
        if self.ranker[0] != key:
            self.ranker = (key, Ranker(self.vlm[1], names, WORDINGS[wording]))
        ranker, found = self.ranker[1], self.clip[1]
        ranker.select_method(image)
        scores = found.scores(found.encode_images([image]), found.class_features(names))[0]
        return Answer(
            names, self.vlm[1].ask(image, WORDINGS[wording]), ranker.log_probs([image])[0].astype(float),
            ranker.prior().astype(float), scores.cpu().numpy().astype(float),
        )  # fmt: skip

    def _weights(self, stage: str, model: str) -> Path | None:
        return self.args.weights / stage if self.args.weights and model.startswith("mini-") else None


def probabilities(names: Sequence[str], scores: "ndarray") -> dict[str, float]:
    """Name -> probability, by the softmax of scores over the names."""
    from scipy.special import softmax

    return dict(zip(names, softmax(scores).tolist(), strict=True))


def guided(answer: Answer | None, t: float) -> dict[str, float]:
    """The VLM's probabilities at t of the guidance, from what is stored."""
    from vlmclassifier.scoring.guidance import Scoring

    if answer is None:
        return {}
    constant = Scoring(t=t, prior=answer.prior).constant(len(answer.names))
    return probabilities(answer.names, t * answer.log_probs + constant)


def build(args: Args) -> Any:
    """The page, not yet served."""
    import gradio

    models = Models(args)
    vlms, clips = choices(args)
    first = args.benchmark or ("plane_figures" if args.weights else "caltech")

    def names_of(benchmark: str) -> Any:
        return "" if benchmark == OWN_NAMES else "\n".join(class_names(BENCHMARKS[benchmark]))

    def ask(image: Any, model: str, clip: str, names: str, wording: str, t: float) -> tuple:
        if image is None:
            raise gradio.Error("Drop an image first.")
        try:
            answer = models.answer(open_image(image), model, clip, names.splitlines(), wording)
        except UserError as error:
            raise gradio.Error(str(error)) from None
        of_clip = probabilities(answer.names, answer.clip_scores)
        best = max(of_clip, key=of_clip.__getitem__)
        return answer, answer.free or "(empty)", best, guided(answer, t), of_clip

    with gradio.Blocks(title="VLM Classifier", analytics_enabled=False) as page:
        gradio.Markdown("# A vision-language model and CLIP on one image")
        stored = gradio.State(None)
        with gradio.Row():
            with gradio.Column():
                image = gradio.Image(type="filepath", label="Image", elem_id="image", height=280)
                model = gradio.Dropdown(vlms, value=vlms[0], label="Vision-language model")
                clip = gradio.Dropdown(clips, value=clips[0], label="CLIP")
                wording = gradio.Dropdown(list(WORDINGS), value="base", label="Wording of the question")
                benchmark = gradio.Dropdown([OWN_NAMES, *BENCHMARKS], value=first, label="Class names of")
                names = gradio.Textbox(names_of(first), lines=6, max_lines=12, label="Class names, one a line",
                                       elem_id="names")  # fmt: skip
                button = gradio.Button("Classify", variant="primary", elem_id="classify")
            with gradio.Column():
                free = gradio.Textbox(label="The VLM's free answer", elem_id="free", interactive=False)
                best = gradio.Textbox(label="CLIP's answer", elem_id="clip", interactive=False)
                t = gradio.Slider(0, 8, value=1, step=0.25, label="t of the guidance (1: none)", elem_id="t")
                ranked = gradio.Label(label="The VLM's ranking of all names", num_top_classes=SHOWN, elem_id="ranking")
                similar = gradio.Label(label="CLIP's ranking", num_top_classes=SHOWN, elem_id="similarity")
                gradio.Markdown("Probabilities are over the names that were given, and not calibrated.")
        benchmark.change(names_of, benchmark, names)
        button.click(ask, [image, model, clip, names, wording, t], [stored, free, best, ranked, similar])
        t.change(guided, [stored, t], ranked)
    return page


def choices(args: Args) -> tuple[list[str], list[str]]:
    """The VLMs and CLIPs to choose from."""
    mini = (["mini-llava"], ["mini-clip"]) if args.weights else ([], [])
    registered = [[key for key, spec in MODELS.items() if spec.kind == kind and not key.startswith("mini-")]
                  for kind in ("vlm", "clip")]  # fmt: skip
    vlms, clips = (list(given) or own or known
                   for given, own, known in zip((args.models, args.clips), mini, registered, strict=True))  # fmt: skip
    for kind, keys in (("vlm", vlms), ("clip", clips)):
        for key in keys:
            find_model(key, kind)
    return vlms, clips


def main(args: Args) -> None:
    """Build the page and serve it until Ctrl-C."""
    try:
        import gradio  # noqa: F401 - an optional extra
    except ImportError:
        command = "pip install --constraint constraints.txt --editable '.[demo]'"
        raise UserError(f"gradio is not installed: {command}.") from None
    if args.weights and not (args.weights / "vlm").is_dir():
        raise UserError(f"{args.weights} has no folder vlm: give ROOT/checkpoints of a small study.")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        build(args).launch(server_name="127.0.0.1", server_port=args.port, quiet=False)
    except OSError as error:
        if "empty port" not in str(error):
            raise
        raise UserError(f"Port {args.port} is in use, perhaps by another demo: give another --port.") from None


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
