"""Benchmark the CPU memory that loading a large checkpoint needs in addition to its size; the limit is 2 GiB.

    python scripts/bench/bench_loading.py
    python scripts/bench/bench_loading.py --layers 8 --dtype float32

Writes a sharded LLaVA-1.5-7B checkpoint (real widths, bfloat16, constant weights, one shard in memory at a time) with
as many layers as fit into this machine. Loads it with `load_vlm` in a separate process, reads every weight once, and
measures the memory of that process. In bfloat16 the weights may stay memory-mapped files, so all resident pages count.
In another dtype the files are only read, and their pages are not counted, because the system can free them at any time.
The last line is one JSON object: size_gib (in the chosen dtype), peak_gib, over_gib.
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

ALLOWED_GIB = 2.0
SHARD_BYTES = 2 * 2**30
GIB = 2**30  # bytes


@dataclass
class Args:
    layers: int | None = None
    """Layers of the language model; default: 32 as in the real model, or fewer if memory or disk space is short."""
    folder: Path | None = None
    """Folder in which the checkpoint is written and removed again; default: the system's temporary folder."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """dtype of the loaded model; the checkpoint is bfloat16."""


def main(args: Args) -> None:
    """Write the checkpoint, load it, compare the memory with the limit."""
    cli.check_positive(layers=args.layers)
    if args.folder is not None and not args.folder.is_dir():
        raise UserError(f"--folder {args.folder} is not a folder: create it first.")
    temporary_folder = Path(tempfile.mkdtemp(prefix="bench-loading-", dir=args.folder))
    checkpoint = temporary_folder / "model"
    growth = 2 if args.dtype == "float32" else 1  # of the size in memory over the size on disk
    try:
        layers = args.layers or fitting_layers(temporary_folder, growth)
        size = growth * write_checkpoint(checkpoint, layers)
        print(f"Written: {len(list(checkpoint.glob('*.safetensors')))} shards, {layers} layers", flush=True)
        peak = peak_loading_memory(checkpoint, args.dtype)
    finally:
        shutil.rmtree(temporary_folder)
    numbers = {"size_gib": size / GIB, "peak_gib": peak / GIB, "over_gib": (peak - size) / GIB}
    rounded = {name: round(value, 2) for name, value in numbers.items()}
    print(json.dumps({"layers": layers, "dtype": args.dtype} | rounded))
    if numbers["over_gib"] > ALLOWED_GIB:
        raise UserError(
            f"Loading needs {numbers['over_gib']:.2f} GiB in addition to the size, more than {ALLOWED_GIB:.0f} GiB."
        )


def fitting_layers(folder: Path, growth: int) -> int:
    """The number of layers (0.4 GiB each, at most 32) that fit with the vision encoder and embeddings (1.2 GiB)."""
    free = min(available_memory(), shutil.disk_usage(folder).free) / GIB
    layers = min(32, int(((free - ALLOWED_GIB - 1) / growth - 1.2) / 0.4))
    if layers < 1:
        raise UserError(
            f"Only {free:.1f} GiB of memory or disk space are free, not enough for one layer: free some, or set "
            "--folder to another disk."
        )
    return layers


def available_memory() -> int:
    """The memory in bytes that is available to new processes."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    raise UserError("/proc/meminfo does not contain the available memory of this machine: pass --layers.")


def write_checkpoint(folder: Path, layers: int) -> int:
    """Write a LLaVA-1.5-7B checkpoint with this number of layers and otherwise real shapes, shard by shard.

    Returns the size of its tensors in bytes.
    """
    import torch
    from safetensors.torch import save_file
    from tqdm import tqdm
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from vlmclassifier.models import MODELS
    from vlmclassifier.tiny import make_tiny

    make_tiny(MODELS["llava-1.5-7b"], folder)  # only its processor is used: weights and config are replaced
    (folder / "model.safetensors").unlink()
    vision_config = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14, projection_dim=768,
    )  # fmt: skip
    text_config = LlamaConfig(vocab_size=32064, num_hidden_layers=layers)
    config = LlavaConfig(vision_config=vision_config, text_config=text_config, dtype="bfloat16")
    config.architectures = ["LlavaForConditionalGeneration"]
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlavaForConditionalGeneration(config).state_dict().items()}
    config.save_pretrained(folder)
    shards: list[dict[str, torch.Size]] = [{}]
    shard_bytes = total_bytes = 0
    for name, shape in shapes.items():
        tensor_bytes = 2 * shape.numel()
        if shards[-1] and shard_bytes + tensor_bytes > SHARD_BYTES:
            shards.append({})
            shard_bytes = 0
        shards[-1][name] = shape
        shard_bytes += tensor_bytes
        total_bytes += tensor_bytes
    weight_map = {}
    for number, shard in enumerate(tqdm(shards, desc="writing", unit="shard")):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in shard.items()}
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    return total_bytes


def peak_loading_memory(checkpoint: Path, dtype: str) -> int:
    """The peak memory in bytes of a separate process that loads the checkpoint."""
    process = multiprocessing.get_context("spawn").Process(target=load, args=(checkpoint, dtype))
    process.start()
    keys = ("RssAnon", "RssShmem") if dtype != "bfloat16" else ("RssAnon", "RssShmem", "RssFile")
    peak = 0
    while process.is_alive():
        peak = max(peak, resident_memory(process.pid, keys))
        time.sleep(0.01)
    if process.exitcode:
        raise UserError(
            f"The loading process ended with exit code {process.exitcode}, probably because the memory was not enough: "
            "pass a smaller --layers."
        )
    return peak


def resident_memory(pid: int, keys: tuple[str, ...]) -> int:
    """The sum in bytes of these entries of /proc/PID/status; 0 if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    total = 0
    for line in lines:
        key, _, value = line.partition(":")
        if key in keys:
            total += 1024 * int(value.split()[0])  # the unit of these entries is kB
    return total


def load(checkpoint: Path, dtype: str) -> None:
    """Load the checkpoint like a user, and read every weight, so that all of them are in memory."""
    from vlmclassifier.vlm import load_vlm

    vlm = load_vlm("llava-1.5-7b", checkpoint, "cpu", dtype)
    parameters = list(vlm.model.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    mean = sum(parameter.detach().sum().item() for parameter in parameters) / count
    print(f"loaded {count:,} parameters, their mean is {mean:.4f}", flush=True)


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
