"""Benchmark the ranking of 1,000 names in one pass against the reference's method and one forward pass per name.

    python scripts/bench/bench_ranking.py
    python scripts/bench/bench_ranking.py --vlm outputs/bpe/vlm --data-root outputs/plane_figures/seed-0/images
    python scripts/bench/bench_ranking.py --size 7b --device cuda

The model is a LLaVA with random weights: 8 layers of width 512, 32,000 tokens, 576 image tokens and a prompt. The
methods are measured in turn in one process, in CPU time (on a GPU in wall-clock time, where each call ends with numbers
on the CPU); medians are printed. The baselines run a sample of the names, and their time is scaled by the number of
tokens of all names:
(A) the reference's method, corrected: the prompt is cached, and every name is run token by token;
(R) one full forward pass per name, as in the likelihood tasks of evaluation harnesses.
The last line is one JSON object. fraction_of_gemm_bound: the time of the necessary multiplications (the prompt through
the decoder, each inner node through decoder and output embeddings) at the rate of matrix products measured in the same
turns, over the measured time. peak_memory_ratio_10x_classes: the growth of the memory of the process while 10 times as
many names are ranked, over the growth with the names alone. topk_*: the search for the best 5 names with a trained mini
model (--vlm; by default with the random model). --size 7b builds the real architecture of LLaVA-1.5-7B in bfloat16 and
prints images per second, MFU and peak memory.
"""

import ctypes
import gc
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlmclassifier import cli
from vlmclassifier.generated_images import generated_image
from vlmclassifier.records import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlmclassifier.ranking import Ranker
    from vlmclassifier.vlm import VLM

QUESTION = "What type of object is in this photo?"
VOCABULARY = 32_000
TOKENIZER_SIZE = 2_000  # of the trained tokenizer: gives about as many nodes as LLaMA's tokenizer for ImageNet's names
PEAK_FLOPS = 989e12  # dense bfloat16 operations per second of an H100, for MFU


@dataclass
class Args:
    size: Literal["bench", "7b", "tiny"] = "bench"
    """bench: 8 layers of width 512; 7b: the architecture of LLaVA-1.5-7B; tiny: a quick test."""
    tokenizer: Path | None = None
    """Folder of a real tokenizer (LLaMA's); default: a byte-level tokenizer trained on the class names."""
    vlm: Path | None = None
    """Folder of a trained mini VLM with subword tokens, for the top-k search (pretrain_mini.py --tokenizer bpe)."""
    data_root: Path | None = None
    """With --vlm: folder of the PlaneFigures images for the top-k search."""
    repeats: int = 5
    """Turns; the medians are printed."""
    sample: int = 12
    """Names per turn for the baselines."""
    images: int = 32
    """Images for the top-k search."""
    device: str = "cpu"
    """cpu or cuda."""
    seed: int = 0
    """Seed of weights, images and samples."""


def main(args: Args) -> None:
    """Build the model, compare the methods, print the results."""
    cli.check_positive(repeats=args.repeats, sample=args.sample, images=args.images)
    import torch

    from vlmclassifier.benchmarks import BENCHMARKS, class_names
    from vlmclassifier.devices import resolve_device
    from vlmclassifier.ranking import Ranker

    resolve_device(args.device)
    torch.manual_seed(args.seed)
    names = list(dict.fromkeys(class_names(BENCHMARKS["imagenet"])))[: 100 if args.size == "tiny" else None]
    if not 4 <= args.sample <= len(names):
        raise UserError(f"--sample {args.sample} is outside 4 to {len(names)}: give a number in this range.")
    vlm = build_vlm(args)
    ranker = Ranker(vlm, names, QUESTION)
    image = generated_image(random.Random(args.seed))
    trie = ranker.trie
    prompt_tokens = ranker.prepare([image]).inputs["input_ids"].shape[1]
    print(f"{len(names)} names, {trie.lengths.sum()} tokens: {trie.size} nodes, {len(trie.inner)} to run; prompt of "
          f"{prompt_tokens} tokens; {torch.get_num_threads()} threads")  # fmt: skip
    results = {"size": args.size, "device": device_name(args.device)} | compare_methods(args, ranker, image)
    if args.device == "cpu":
        results["peak_memory_ratio_10x_classes"] = memory_ratio(vlm, names, image)
    else:
        results["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    results |= compare_search(args, ranker)
    print(json.dumps(results))


def build_vlm(args: Args) -> "VLM":
    """A LLaVA with random weights, drawn so that the answer depends on the image.

    The vision encoder is small, except for 7b.
    """
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    from vlmclassifier.models import MODELS
    from vlmclassifier.tiny.parts import redraw_weights
    from vlmclassifier.vlm import VLM

    is_7b = args.size == "7b"
    width, layers, heads, mlp_width, side = {
        "bench": (512, 8, 8, 1376, 336), "7b": (4096, 32, 32, 11008, 336), "tiny": (64, 2, 2, 128, 56),
    }[args.size]  # fmt: skip
    tokenizer = load_tokenizer(args.tokenizer)
    text_config = {
        "model_type": "llama", "vocab_size": max(VOCABULARY, len(tokenizer)) + 64, "hidden_size": width,
        "intermediate_size": mlp_width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": heads, "max_position_embeddings": 4096,
    }  # fmt: skip
    vision_config = {
        "model_type": "clip_vision_model", "hidden_size": 1024 if is_7b else 64, "patch_size": 14, "image_size": side,
        "num_hidden_layers": 24 if is_7b else 2, "projection_dim": 64, "num_attention_heads": 16 if is_7b else 2,
        "intermediate_size": 4096 if is_7b else 128,
    }  # fmt: skip
    config = LlavaConfig(
        vision_config=vision_config, text_config=text_config, image_token_index=tokenizer.image_token_id,
        vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    torch.set_default_dtype(torch.float32 if args.device == "cpu" else torch.bfloat16)
    with torch.device(args.device):
        model = LlavaForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    if args.device == "cpu":
        redraw_weights(model, args.seed)
    return VLM(model, make_processor(tokenizer, side), MODELS["llava-1.5-7b"])


def load_tokenizer(folder: Path | None) -> Any:
    """A tokenizer with an image token: a real one, or a trained one with about three tokens per name."""
    from transformers import AutoTokenizer

    from vlmclassifier.tiny.parts import train_tokenizer

    if folder is None:
        special_tokens = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
        return train_tokenizer(special_tokens, "<s>", "</s>", "<pad>", size=TOKENIZER_SIZE, image_token="<image>")
    if not folder.is_dir():
        raise UserError(f"The tokenizer folder {folder} does not exist: fix --tokenizer.")
    tokenizer = AutoTokenizer.from_pretrained(folder, extra_special_tokens={"image_token": "<image>"})
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def make_processor(tokenizer: Any, side: int) -> Any:
    """LLaVA-1.5's processor for square images of `side` x `side` pixels."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    image_processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return LlavaProcessor(image_processor, tokenizer, patch_size=14, vision_feature_select_strategy="default",
                          num_additional_image_tokens=1)  # fmt: skip


def device_name(device: str) -> str:
    """The name of the GPU, or "cpu"."""
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def measure(device: str, function: Callable[[], Any]) -> tuple[float, Any]:
    """The time of a call in seconds, and its result: CPU time of the process, with a GPU wall-clock time.

    The function must return numbers on the CPU, so that work on a GPU is included.
    """
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    result = function()
    return clock() - start, result


def compare_methods(args: Args, ranker: "Ranker", image: "Image") -> dict[str, float]:
    """Measure the ranking, both baselines and the rate of matrix products in turn, and compare the log_probs."""
    import numpy as np

    from vlmclassifier.ranking.one_by_one import cached_prompt_log_probs, full_forward_log_probs

    vlm, lengths, device = ranker.vlm, ranker.trie.lengths, args.device
    batch = ranker.prepare([image])
    row = vlm.to_device(batch.inputs)
    rng = random.Random(args.seed)
    prompt_length = row["input_ids"].shape[1]
    times: dict[str, list[float]] = {"full": [], "A": [], "R": [], "bound": []}
    differences = []
    for turn in range(args.repeats + 1):  # the first turn is a warm-up
        full_seconds, log_probs = measure(device, lambda: ranker.log_probs(batch)[0])
        names_a = rng.sample(range(len(lengths)), args.sample)
        names_r = names_a[: args.sample // 4]
        pairs_a, pairs_r = ranker.name_pairs(names_a), ranker.name_pairs(names_r)
        a_seconds, a_log_probs = measure(
            device, lambda pairs=pairs_a: cached_prompt_log_probs(vlm, row, pairs, token_by_token=True)
        )
        prompt_seconds, _ = measure(device, lambda: cached_prompt_log_probs(vlm, row, []))  # the prompt alone
        r_seconds, r_log_probs = measure(device, lambda pairs=pairs_r: full_forward_log_probs(vlm, row, pairs))
        rate = gemm_rate(vlm, device)
        differences += [*np.abs(a_log_probs - log_probs[names_a]), *np.abs(r_log_probs - log_probs[names_r])]
        if turn > 0:
            # A needs one forward pass per token but the last, R processes prompt and name again for each name.
            a_scale = (lengths - 1).sum() / max(1, (lengths[names_a] - 1).sum())
            times["A"].append(prompt_seconds + (a_seconds - prompt_seconds) * a_scale)
            r_tokens = (prompt_length + lengths - 1).sum()
            times["R"].append(r_seconds * r_tokens / (prompt_length + lengths[names_r] - 1).sum())
            times["full"].append(full_seconds)
            times["bound"].append(necessary_operations(ranker, prompt_length) / rate)
        print(f"turn {turn}: full {full_seconds:.2f} s, A {a_seconds:.2f} s for {len(names_a)} names, R "
              f"{r_seconds:.2f} s for {len(names_r)}, {rate / 1e9:.0f} GFLOP/s", flush=True)  # fmt: skip
    medians, ratios = {}, {}
    for key, values in times.items():
        medians[key] = statistics.median(values)
        ratios[key] = statistics.median(value / full for value, full in zip(values, times["full"], strict=True))
    results = {
        "speedup_vs_per_token_loop": round(ratios["A"], 1), "speedup_vs_full_forward": round(ratios["R"], 1),
        "fraction_of_gemm_bound": round(ratios["bound"], 3), "max_abs_diff": float(max(differences)),
        "seconds_full": round(medians["full"], 3), "seconds_per_token_loop": round(medians["A"], 1),
        "seconds_full_forward": round(medians["R"], 1), "names_per_turn_of_A": args.sample,
        "names_per_turn_of_R": args.sample // 4,
        "baselines": "scaled by token count",
    }  # fmt: skip
    if device != "cpu":
        results["mfu"] = round(necessary_operations(ranker, prompt_length) / medians["full"] / PEAK_FLOPS, 3)
        results["images_per_second"] = round(1 / medians["full"], 2)
    return results


def necessary_operations(ranker: "Ranker", prompt_length: int) -> float:
    """The number of necessary operations: 2 per weight and token.

    The output embeddings are only needed at the last token of the prompt and at the inner nodes.
    """
    decoder, head = ranker.decoder.decoder, ranker.decoder.head
    decoder_weights = 0
    for name, parameter in decoder.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:
            decoder_weights += parameter.numel()
    nodes = len(ranker.trie.inner) - 1
    return 2.0 * ((prompt_length + nodes) * decoder_weights + (nodes + 1) * head.weight.numel())


def gemm_rate(vlm: "VLM", device: str) -> float:
    """Operations per second of matrix products as in the model: 256 tokens through its matrices."""
    import torch

    mlp, head = vlm.model.get_decoder().layers[0].mlp, vlm.model.get_output_embeddings()
    x = torch.randn(256, mlp.up_proj.in_features, dtype=vlm.model.dtype, device=device)  # [tokens, width]
    y = torch.randn(256, mlp.down_proj.in_features, dtype=vlm.model.dtype, device=device)  # [tokens, mlp width]
    repeats = 10

    def multiply() -> float:
        with torch.inference_mode():
            for _ in range(repeats):
                mlp.up_proj(x)
                mlp.gate_proj(x)
                mlp.down_proj(y)
                logits = head(x)
            return logits[0, 0].item()

    weights = sum(parameter.numel() for parameter in mlp.parameters()) + head.weight.numel()
    seconds, _ = measure(device, multiply)
    return 2.0 * 256 * weights * repeats / seconds


def memory_ratio(vlm: "VLM", names: Sequence[str], image: "Image") -> float:
    """The growth of the memory of the process while 10 times as many names are ranked, over that with the names."""
    from vlmclassifier.ranking import Ranker

    many_names = []
    for suffix in ("", *names[:9]):
        for name in names:
            many_names.append(f"{name} {suffix}".strip())
    ranker, large_ranker = Ranker(vlm, names, QUESTION), Ranker(vlm, many_names, QUESTION)
    ranker.log_probs([image])  # warm-up
    growth, large_growth = [], []
    for _ in range(2):
        growth.append(memory_growth(ranker, image))
        large_growth.append(memory_growth(large_ranker, image))
    mean, large_mean = statistics.mean(growth), statistics.mean(large_growth)
    print(
        f"{len(names)} names: {mean / 2**20:.0f} MiB in addition to the model; {len(many_names)} names: "
        f"{large_mean / 2**20:.0f} MiB"
    )
    return round(large_mean / mean, 3)


def memory_growth(ranker: "Ranker", image: "Image") -> int:
    """The growth of the memory of this process in bytes while one image is ranked."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # returns freed memory to the system
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = process_memory("VmRSS")
    ranker.log_probs([image])
    return process_memory("VmHWM") - before


def process_memory(key: str) -> int:
    """The memory of this process in bytes: "VmRSS" is the current value, "VmHWM" the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def compare_search(args: Args, ranker: "Ranker") -> dict[str, float]:
    """Compare the search for the best 5 names with the full ranking: share of nodes, time, equality of the names."""
    from vlmclassifier.scoring.guidance import Scoring, best

    if args.vlm is not None:
        ranker, images, batch_size = trained_ranker(args), plane_figures_images(args), 16
    else:
        # The probabilities of the random model are spread over all names, so on a CPU two images are enough.
        count = min(2, args.images) if args.device == "cpu" else 8
        images = [generated_image(random.Random(f"{args.seed}:{number}")) for number in range(count)]
        batch_size = 1
    expected, results = [], []
    full_seconds, search_seconds = [], []
    for start in range(0, len(images), batch_size):
        batch = ranker.prepare(images[start : start + batch_size])
        for _ in range(3 if args.vlm else 1):
            seconds, log_probs = measure(args.device, lambda batch=batch: ranker.log_probs(batch))
            full_seconds.append(seconds)
            seconds, batch_results = measure(args.device, lambda batch=batch: ranker.top_k(batch, 5, Scoring()))
            search_seconds.append(seconds)
        expected += [best(row, 5).tolist() for row in Scoring()(log_probs, ranker.trie.lengths)]
        results += batch_results
    nodes_fraction = statistics.mean(result.nodes for result in results) / (len(ranker.trie.inner) - 1)
    return {
        "topk_model": str(args.vlm.name if args.vlm else "random weights"), "topk_images": len(images),
        "topk_same": expected == [result.names.tolist() for result in results],
        "topk_nodes_fraction": round(nodes_fraction, 3),
        "topk_rounds": round(statistics.mean(result.rounds for result in results), 2),
        "topk_speedup_vs_full": round(sum(full_seconds) / sum(search_seconds), 2),
        "topk_images_per_second": round(batch_size * len(search_seconds) / sum(search_seconds), 2),
    }  # fmt: skip


def trained_ranker(args: Args) -> "Ranker":
    """A ranker of the names of PlaneFigures with the trained mini model of --vlm."""
    from vlmclassifier.plane_figures import FIGURES
    from vlmclassifier.ranking import Ranker
    from vlmclassifier.vlm import load_vlm

    return Ranker(load_vlm("mini-llava", args.vlm, args.device), list(FIGURES), QUESTION)


def plane_figures_images(args: Args) -> "list[Image]":
    """The first test images of PlaneFigures in the evaluation order."""
    from vlmclassifier.benchmarks import load_evaluation
    from vlmclassifier.images import open_image

    task = load_evaluation("plane_figures", root=args.data_root, limit=args.images)
    return [open_image(example.image, task.root, example.row) for example in task.examples]


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
