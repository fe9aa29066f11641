"""Convert fine-tuned weights: merge them into a whole checkpoint, take projectors from LLaVA's original code and back.

    python training_analysis/merge.py adapter --model llava-1.5-7b --adapter RUN/best --out DIR
    python training_analysis/merge.py from-original --model llava-1.5-7b --projector mm_projector.bin --out DIR
    python training_analysis/merge.py to-original --model llava-1.5-7b --adapter RUN/best --projector mm_projector.bin

adapter writes a checkpoint that --weights takes; PEFT adds LoRA to the matrices, and the logits before and after are
compared on a test prompt. from-original writes fine-tuned weights that --adapter takes, with the prompt template and
the padded images that LLaVA's own code trains with (--template, --no-pad-square for other code). to-original writes the
projector of a model or of fine-tuned weights for that code. A .bin file is read without running code.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vlmclassifier import cli
from vlmclassifier.arguments import AdapterArgs, ModelArgs
from vlmclassifier.identity import Adapter, read_adapter
from vlmclassifier.models import ModelSpec, checkpoint_folder, find_model
from vlmclassifier.prompts import TEMPLATES
from vlmclassifier.records import UserError
from vlmclassifier.runs.provenance import fingerprint, versions


@dataclass
class Args(AdapterArgs, ModelArgs):
    """Arguments."""

    what: Annotated[Literal["adapter", "from-original", "to-original"], tyro.conf.Positional] = "adapter"
    """adapter, from-original or to-original."""
    projector: Path | None = None
    """Projector of LLaVA's original code: mm_projector.bin, or .safetensors."""
    template: Literal[tuple(TEMPLATES)] = "llava-v1"
    """from-original: prompt template that the projector was trained with."""
    pad_square: bool = True
    """from-original: whether images were padded to squares."""
    out: Path | None = None
    """Folder to write."""


def main(args: Args) -> None:
    """Check, convert, say how the result is used."""
    needed = {"adapter": ("adapter", "out"), "from-original": ("projector", "out"), "to-original": ("projector",)}
    for name in needed[args.what]:
        if getattr(args, name) is None:
            raise UserError(f"merge.py {args.what} needs --{name}.")
    for file in (args.out, args.projector if args.what == "to-original" else None):
        if file is not None and file.exists():
            raise UserError(f"{file} exists: choose another name or remove it.")
    spec = find_model(args.model, "vlm")
    checkpoint = checkpoint_folder(spec, args.weights)
    adapter = read_adapter(args.adapter, spec, checkpoint)
    {"adapter": merge, "from-original": from_original, "to-original": to_original}[args.what](
        args, spec, checkpoint, adapter
    )  # fmt: skip


def merge(args: Args, spec: ModelSpec, checkpoint: Path, adapter: Adapter) -> None:
    """Write a whole checkpoint with the fine-tuned weights in it."""
    from PIL import Image

    from vlmclassifier.checkpoints import merge_adapter, save_checkpoint
    from vlmclassifier.vlm import load_vlm

    vlm = load_vlm(args.model, checkpoint, args.device, args.dtype)
    vlm.spec = adapter.spec(spec)
    image = Image.radial_gradient("L").convert("RGB")
    batch = vlm.prepare([image], [vlm.prompt("What type of object is in this photo?")])
    difference = merge_adapter(vlm, adapter, batch)
    record = adapter.record | {"merged": {"adapter": fingerprint(adapter.folder), "into": fingerprint(checkpoint)}}
    save_checkpoint(vlm, args.out, checkpoint, record)
    print(f"Merged; the logits differ by {difference:.2g} of the largest. Next: python main_results/classify_vlm.py "
          f"--model {args.model} --weights {args.out}")  # fmt: skip


def from_original(args: Args, spec: ModelSpec, checkpoint: Path, adapter: Adapter | None) -> None:
    """Write a projector of LLaVA's original code as fine-tuned weights."""
    from vlmclassifier.checkpoints import put_projector, read_original_projector
    from vlmclassifier.finetuning.parts import Lora, select_trained
    from vlmclassifier.finetuning.weights import save_trained
    from vlmclassifier.vlm import load_vlm

    weights = read_original_projector(args.projector)
    vlm = load_vlm(args.model, checkpoint, args.device, args.dtype)
    select_trained(vlm.model, "projector", Lora())
    put_projector(vlm.model, weights, str(args.projector))
    config = {"train": "projector", "model": spec.key, "checkpoint": fingerprint(checkpoint), "captions": None,
              "benchmark": "another code", "mix": [], "template": args.template,
              "pad_square": args.pad_square}  # fmt: skip
    save_trained(vlm.model, args.out, {"config": config, "versions": versions(), "lora": None})
    print(f"Written: {args.out}. Next: python main_results/classify_vlm.py --model {args.model} --adapter {args.out}")


def to_original(args: Args, spec: ModelSpec, checkpoint: Path, adapter: Adapter | None) -> None:
    """Write the projector for LLaVA's original code."""
    import torch

    from vlmclassifier.checkpoints import original_projector
    from vlmclassifier.finetuning.weights import load_adapter
    from vlmclassifier.vlm import load_vlm

    vlm = load_vlm(args.model, checkpoint, args.device, args.dtype)
    load_adapter(vlm, adapter)
    weights = original_projector(vlm.model)
    if args.projector.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(weights, args.projector)
    else:
        torch.save(weights, args.projector)
    print(f"Written: {args.projector}, for --pretrain_mm_mlp_adapter of LLaVA's code")


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
