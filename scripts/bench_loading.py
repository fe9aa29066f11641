"""Measure the host memory that loading a large checkpoint takes beyond its own size: 2 GiB are allowed.

    python scripts/bench_loading.py
    python scripts/bench_loading.py --layers 8 --dtype float32

Writes a sharded LLaVA-1.5-7B (true widths, bfloat16, meaningless weights, one shard in memory at a time) with as many
layers as fit into this machine, loads it in a process of its own by `load_vlm`, reads every weight once, and watches
that process. In bfloat16 the weights may stay mapped files, so every resident page counts; in another dtype the files
are only read, and their pages, which the system takes back at any time, are left out. The last line is one JSON object:
size_gib (in the chosen dtype), peak_gib, over_gib.
"""

import json
import multiprocessing
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlmclassifier import cli
from vlmclassifier.records import UserError

ALLOWED = 2.0  # GiB
SHARD = 2 * 2**30  # bytes
GIB = 2**30


@dataclass
class Args:
    layers: int | None = None
    """Layers of the language model; without it the true 32, or as many as the free memory and disk allow."""
    folder: Path | None = None
    """Where the checkpoint is written; without it the system's folder for temporary files. It is removed again."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Number format that it is loaded in; the checkpoint is bfloat16."""


def main(args: Args) -> None:
    """Write, load, compare."""
    cli.check_positive(layers=args.layers)
    if args.folder is not None and not args.folder.is_dir():
        raise UserError(f"--folder {args.folder} is no folder: make it first.")
    work = Path(tempfile.mkdtemp(prefix="bench-loading-", dir=args.folder))
    wider = 2 if args.dtype == "float32" else 1
    try:
        layers = args.layers or fitting_layers(work, wider)
        size = wider * write_checkpoint(work / "model", layers)
        print(f"Written: {len(list((work / 'model').glob('*.safetensors')))} shards, {layers} layers", flush=True)
        peak = watch(work / "model", args.dtype)
    finally:
        shutil.rmtree(work)
    numbers = {"size_gib": size / GIB, "peak_gib": peak / GIB, "over_gib": (peak - size) / GIB}
    rounded = {name: round(value, 2) for name, value in numbers.items()}
    print(json.dumps({"layers": layers, "dtype": args.dtype} | rounded))
    if numbers["over_gib"] > ALLOWED:
        raise UserError(f"Loading needs {numbers['over_gib']:.2f} GiB beyond the size, more than {ALLOWED:.0f}.")


def fitting_layers(work: Path, wider: int) -> int:
    """As many of the 32 layers (0.4 GiB each) as leave room for the rest (1.2 GiB of tower and embeddings)."""
    free = min(available_memory(), shutil.disk_usage(work).free) / GIB
    layers = min(32, int(((free - ALLOWED - 1) / wider - 1.2) / 0.4))
    if layers < 1:
        raise UserError(f"Only {free:.1f} GiB are free: too few even for one layer.")
    return layers


def available_memory() -> int:
    """Bytes that new processes can have."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    raise UserError("This machine does not say how much memory is available (/proc/meminfo): pass --layers.")


def write_checkpoint(folder: Path, layers: int) -> int:
    """A LLaVA-1.5-7B of some layers: true shapes, one shard in memory at a time. Returns the bytes of its tensors."""
    import torch
    from safetensors.torch import save_file
    from tqdm import tqdm
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from vlmclassifier.models import MODELS
    from vlmclassifier.tiny import make_tiny

    make_tiny(MODELS["llava-1.5-7b"], folder)  # its processor; the weights and the config are replaced
    (folder / "model.safetensors").unlink()
    vision = CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                              image_size=336, patch_size=14, projection_dim=768)  # fmt: skip
    text = LlamaConfig(vocab_size=32064, num_hidden_layers=layers)
    config = LlavaConfig(vision_config=vision, text_config=text, dtype="bfloat16")
    config.architectures = ["LlavaForConditionalGeneration"]
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in LlavaForConditionalGeneration(config).state_dict().items()}
    config.save_pretrained(folder)
    shards: list[dict[str, torch.Size]] = [{}]
    for name, shape in shapes.items():
        if sum(2 * other.numel() for other in shards[-1].values()) + 2 * shape.numel() > SHARD and shards[-1]:
            shards.append({})
        shards[-1][name] = shape
    index = {}
    for number, shard in enumerate(tqdm(shards, desc="writing", unit="shard")):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in shard.items()}
        save_file(tensors, folder / file, {"format": "pt"})
        index |= dict.fromkeys(shard, file)
    total = sum(2 * shape.numel() for shape in shapes.values())
    listed = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(listed, encoding="utf-8")
    return total


def watch(folder: Path, dtype: str) -> int:
    """Largest memory of a process that loads the checkpoint, in bytes."""
    process = multiprocessing.get_context("spawn").Process(target=load, args=(folder, dtype))
    process.start()
    kinds = ("RssAnon", "RssShmem") if dtype != "bfloat16" else ("RssAnon", "RssShmem", "RssFile")
    peak = 0
    while process.is_alive():
        status = dict(line.split(":", 1) for line in read(f"/proc/{process.pid}/status").splitlines() if ":" in line)
        peak = max(peak, sum(1024 * int(status[kind].split()[0]) for kind in kinds if kind in status))
        time.sleep(0.01)
    if process.exitcode:
        raise UserError(f"the loading process ended with code {process.exitcode}: the memory did not suffice?")
    return peak


def read(file: str) -> str:
    try:
        return Path(file).read_text()
    except OSError:  # the process has just ended
        return ""


def load(folder: Path, dtype: str) -> None:
    """In a process of its own: the user's path, then every weight is read, so that none is left on the disk."""
    from vlmclassifier.vlm import load_vlm

    vlm = load_vlm("llava-1.5-7b", folder, "cpu", dtype)
    parameters = list(vlm.model.parameters())
    mean = sum(p.detach().sum().item() for p in parameters) / sum(p.numel() for p in parameters)
    print(f"loaded {sum(p.numel() for p in parameters):,} parameters, their mean is {mean:.4f}", flush=True)


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
