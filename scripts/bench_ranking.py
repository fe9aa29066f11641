"""Measure the ranking of 1,000 names in one pass against the reference's way and against one forward pass per name.

    python scripts/bench_ranking.py
    python scripts/bench_ranking.py --vlm outputs/bpe/vlm --data-root outputs/plane_figures/seed-0/pictures
    python scripts/bench_ranking.py --size 7b --device cuda

The model is a LLaVA with random weights: 8 layers of width 512, 32,000 tokens, 576 image tokens and a prompt. Measured
in one process, in turns, in CPU time (on a GPU in wall time, each call ending on the host); medians. The baselines run
a sample of names, and their time is scaled by the number of tokens that all names have:
(A) the reference's method made correct: prompt cached, every name token by token;
(R) one whole forward pass per name, as likelihood tasks of evaluation harnesses do.
The last line is one JSON object. fraction_of_gemm_bound: the multiplications that cannot be avoided (prompt through the
body, each inner node through body and head), at the rate of matrix products measured in the same turns, over the time
taken. peak_memory_ratio_10x_classes: growth of the process's memory while 10 times as many names are ranked, over that
of the names alone. topk_*: the search for the best 5 on a trained mini model (--vlm; without it on the random one).
--size 7b builds LLaVA-1.5-7B's true architecture in bfloat16 and prints pictures per second, MFU and peak memory.
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
from vlmclassifier.records import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlmclassifier.ranking import Ranker
    from vlmclassifier.vlm import VLM

VOCABULARY = 32_000
PIECES = 2_000  # learnt on the spot: about as many nodes as LLaMA's tokenizer makes of ImageNet's names
PEAK = 989e12  # bfloat16 operations per second of an H100, dense: what MFU is a share of


@dataclass
class Args:
    size: Literal["bench", "7b", "tiny"] = "bench"
    """bench: 8 layers of width 512; 7b: LLaVA-1.5-7B's architecture; tiny: to see that it runs."""
    tokenizer: Path | None = None
    """Folder of a real tokenizer (LLaMA's); without it a byte-level one learnt on the spot from 1,000 names."""
    vlm: Path | None = None
    """Folder of a trained mini VLM with subword tokens, for the top-k search (pretrain_mini.py --tokenizer bpe)."""
    data_root: Path | None = None
    """With --vlm: folder of the PlaneFigures pictures that it is searched on."""
    repeats: int = 5
    """Turns; the medians are printed."""
    sample: int = 12
    """Names that the baselines run in each turn."""
    pictures: int = 32
    """Pictures of the top-k search."""
    device: str = "cpu"
    """cpu or cuda."""
    seed: int = 0
    """Seed of weights, pictures and samples."""


def main(args: Args) -> None:
    """Build, check, measure in turns, print."""
    cli.check_positive(repeats=args.repeats, sample=args.sample, pictures=args.pictures)
    import torch

    from vlmclassifier.benchmarks import BENCHMARKS, class_names
    from vlmclassifier.devices import resolve_device
    from vlmclassifier.ranking import Ranker

    resolve_device(args.device)
    torch.manual_seed(args.seed)
    names = list(dict.fromkeys(class_names(BENCHMARKS["imagenet"])))[: 100 if args.size == "tiny" else None]
    if not 4 <= args.sample <= len(names):
        raise UserError(f"--sample {args.sample} is outside 4 to {len(names)}: give another number.")
    vlm = build(args)
    ranker = Ranker(vlm, names, "What type of object is in this photo?")
    image = picture(random.Random(args.seed))
    trie = ranker.trie
    print(f"{len(names)} names, {trie.lengths.sum()} tokens: {trie.size} nodes, {len(trie.inner)} to run; prompt of "
          f"{ranker.prepare([image])['input_ids'].shape[1]} tokens; {torch.get_num_threads()} threads")  # fmt: skip
    results = {"size": args.size, "device": device_name(args.device)} | compare(args, ranker, image)
    if args.device == "cpu":
        results["peak_memory_ratio_10x_classes"] = memory_ratio(vlm, names, image)
    else:
        results["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    results |= search_against_full(args, ranker)
    print(json.dumps(results))


def build(args: Args) -> "VLM":
    """A LLaVA with random weights, redrawn so that the picture matters; the tower is small but for 7b."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    from vlmclassifier.models import MODELS
    from vlmclassifier.tiny.parts import redraw_weights
    from vlmclassifier.vlm import VLM

    width, layers, heads, inner, side = {"bench": (512, 8, 8, 1376, 336), "7b": (4096, 32, 32, 11008, 336),
                                         "tiny": (64, 2, 2, 128, 56)}[args.size]  # fmt: skip
    tokenizer = load_tokenizer(args.tokenizer)
    text = {"model_type": "llama", "vocab_size": max(VOCABULARY, len(tokenizer)) + 64, "hidden_size": width,
            "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": heads, "max_position_embeddings": 4096}  # fmt: skip
    tower = {"model_type": "clip_vision_model", "hidden_size": 1024 if args.size == "7b" else 64, "patch_size": 14,
             "image_size": side, "num_hidden_layers": 24 if args.size == "7b" else 2, "projection_dim": 64,
             "num_attention_heads": 16 if args.size == "7b" else 2,
             "intermediate_size": 4096 if args.size == "7b" else 128}  # fmt: skip
    config = LlavaConfig(vision_config=tower, text_config=text, image_token_index=tokenizer.image_token_id,
                         vision_feature_layer=-2, vision_feature_select_strategy="default")  # fmt: skip
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    torch.set_default_dtype(dtype)
    with torch.device(args.device):
        model = LlavaForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    if args.device == "cpu":
        redraw_weights(model, args.seed)
    return VLM(model, processor(tokenizer, side), MODELS["llava-1.5-7b"])


def load_tokenizer(folder: Path | None) -> Any:
    """A tokenizer with an image token: a real one, or one whose pieces give the names about three tokens each."""
    from transformers import AutoTokenizer

    from vlmclassifier.tiny.parts import train_tokenizer

    if folder is None:
        special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
        return train_tokenizer(special, "<s>", "</s>", "<pad>", size=PIECES, image_token="<image>")
    if not folder.is_dir():
        raise UserError(f"The tokenizer's folder {folder} does not exist: mend --tokenizer.")
    tokenizer = AutoTokenizer.from_pretrained(folder, extra_special_tokens={"image_token": "<image>"})
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def processor(tokenizer: Any, side: int) -> Any:
    """LLaVA-1.5's processor for square pictures of this many pixels a side."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    images = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return LlavaProcessor(images, tokenizer, patch_size=14, vision_feature_select_strategy="default",
                          num_additional_image_tokens=1)  # fmt: skip


def picture(rng: random.Random) -> "Image":
    """A generated picture."""
    from make_pictures import draw

    return draw(rng)


def device_name(device: str) -> str:
    """What the numbers were measured on."""
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def taken(device: str, work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, and what it returned: CPU time of the process, on a GPU wall time."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    result = work()  # ends in numbers on the host
    return clock() - start, result


def compare(args: Args, ranker: "Ranker", image: "Image") -> dict[str, float]:
    """The ranking and both baselines in turns, with the rate of matrix products beside them."""
    import numpy as np

    from vlmclassifier.ranking.one_by_one import behind_the_cache, whole_passes

    inputs = ranker.prepare([image])
    row, lengths = ranker._on_device(inputs), ranker.trie.lengths
    rng, device = random.Random(args.seed), args.device
    prefill = row["input_ids"].shape[1]
    times: dict[str, list[float]] = {"full": [], "A": [], "R": [], "bound": []}
    off = []
    for turn in range(args.repeats + 1):  # the first warms up
        full, sums = taken(device, lambda: ranker.log_probs([image], inputs)[0])
        some = rng.sample(range(len(lengths)), args.sample)
        tokens = ranker._tokens(some)
        a, cached = taken(device, lambda tokens=tokens: behind_the_cache(ranker.vlm, row, tokens, token_by_token=True))
        start, _ = taken(device, lambda: behind_the_cache(ranker.vlm, row, []))  # the prompt alone, once per picture
        few = some[: args.sample // 4]
        r, whole = taken(device, lambda tokens=tokens, few=few: whole_passes(ranker.vlm, row, tokens[: len(few)]))
        rate = gemm_rate(ranker.vlm, device)
        off += [*np.abs(cached - sums[some]), *np.abs(whole - sums[few])]
        if turn:
            steps = (lengths - 1).sum() / max(1, (lengths[some] - 1).sum())  # forward passes behind the prompt
            times["A"].append(start + (a - start) * steps)
            times["R"].append(r * (prefill + lengths - 1).sum() / (prefill + lengths[few] - 1).sum())
            times["full"].append(full)
            times["bound"].append(operations(ranker, prefill) / rate)
        print(f"turn {turn}: full {full:.2f} s, A {a:.2f} s for {len(some)} names, R {r:.2f} s for {len(few)}, "
              f"{rate / 1e9:.0f} GFLOP/s", flush=True)  # fmt: skip
    medians = {key: statistics.median(values) for key, values in times.items()}
    ratio = {key: statistics.median(b / f for b, f in zip(times[key], times["full"], strict=True)) for key in times}
    results = {
        "speedup_vs_per_token_loop": round(ratio["A"], 1), "speedup_vs_full_forward": round(ratio["R"], 1),
        "fraction_of_gemm_bound": round(ratio["bound"], 3), "max_abs_diff": float(max(off)),
        "seconds_full": round(medians["full"], 3), "seconds_per_token_loop": round(medians["A"], 1),
        "seconds_full_forward": round(medians["R"], 1), "names_per_turn_of_A": args.sample,
        "names_per_turn_of_R": args.sample // 4,
        "baselines": "scaled by token count",
    }  # fmt: skip
    if device != "cpu":
        results["mfu"] = round(operations(ranker, prefill) / medians["full"] / PEAK, 3)
        results["pictures_per_second"] = round(1 / medians["full"], 2)
    return results


def operations(ranker: "Ranker", prefill: int) -> float:
    """Operations that cannot be avoided: 2 per weight and token; the head only at the prompt's end and inner nodes."""
    decoder, head = ranker.decoder.decoder, ranker.decoder.head
    body = sum(p.numel() for name, p in decoder.named_parameters() if p.ndim == 2 and "embed" not in name)
    nodes = len(ranker.trie.inner) - 1
    return 2.0 * ((prefill + nodes) * body + (nodes + 1) * head.weight.numel())


def gemm_rate(vlm: "VLM", device: str) -> float:
    """Operations per second of the products that the model is made of: 256 tokens through its matrices."""
    import torch

    layer = vlm.model.get_decoder().layers[0].mlp
    x = torch.randn(256, layer.up_proj.in_features, dtype=vlm.model.dtype, device=device)
    y = torch.randn(256, layer.down_proj.in_features, dtype=vlm.model.dtype, device=device)
    repeats = 10

    def work() -> float:
        with torch.inference_mode():
            for _ in range(repeats):
                layer.up_proj(x), layer.gate_proj(x), layer.down_proj(y)
                last = vlm.model.get_output_embeddings()(x)
            return last[0, 0].item()

    weights = sum(p.numel() for p in layer.parameters()) + vlm.model.get_output_embeddings().weight.numel()
    seconds, _ = taken(device, work)
    return 2.0 * 256 * weights * repeats / seconds


def memory_ratio(vlm: "VLM", names: Sequence[str], image: "Image") -> float:
    """Growth of the process's memory while 10 times the names are ranked, over that with the names alone."""
    from vlmclassifier.ranking import Ranker

    many = [f"{name} {word}".strip() for word in ("", *names[:9]) for name in names]
    rankers = [Ranker(vlm, some, "What type of object is in this photo?") for some in (names, many)]
    rankers[0].log_probs([image])  # warms up
    grown: dict[int, list[int]] = {}
    for ranker in rankers * 2:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is freed goes back to the system
        Path("/proc/self/clear_refs").write_text("5")  # and the peak begins anew
        before = memory("VmRSS")
        ranker.log_probs([image])
        grown.setdefault(len(ranker.names), []).append(memory("VmHWM") - before)
    few, all_of_them = (statistics.mean(grown[len(ranker.names)]) for ranker in rankers)
    print(f"{len(names)} names: {few / 2**20:.0f} MiB above the model; {len(many)}: {all_of_them / 2**20:.0f} MiB")
    return round(all_of_them / few, 3)


def memory(key: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def search_against_full(args: Args, ranker: "Ranker") -> dict[str, float]:
    """The best 5 by search against the full ranking: share of nodes run, time, and whether the names are the same."""
    from vlmclassifier.ranking import Scoring, best

    images = [picture(random.Random(f"{args.seed}:{i}")) for i in range(args.pictures if args.device == "cpu" else 8)]
    batch = 1
    if args.vlm is not None:
        ranker, images, batch = trained(args), figures(args), 16
    elif args.device == "cpu":
        images = images[:2]  # the random model spreads its probability: a search on it only shows that it runs
    full, found, times = [], [], {"full": [], "search": []}
    for start in range(0, len(images), batch):
        some = images[start : start + batch]
        inputs = ranker.prepare(some)
        for _ in range(3 if args.vlm else 1):
            seconds, sums = taken(args.device, lambda some=some, inputs=inputs: ranker.log_probs(some, inputs))
            times["full"].append(seconds)
            seconds, hits = taken(
                args.device, lambda some=some, inputs=inputs: ranker.top_k(some, 5, Scoring(), inputs)
            )
            times["search"].append(seconds)
        full += [best(row, 5).tolist() for row in Scoring()(sums, ranker.trie.lengths)]
        found += hits
    nodes = statistics.mean(one.nodes for one in found) / (len(ranker.trie.inner) - 1)
    return {
        "topk_model": str(args.vlm.name if args.vlm else "random weights"), "topk_pictures": len(images),
        "topk_same": full == [one.names.tolist() for one in found], "topk_nodes_fraction": round(nodes, 3),
        "topk_rounds": round(statistics.mean(one.rounds for one in found), 2),
        "topk_speedup_vs_full": round(sum(times["full"]) / sum(times["search"]), 2),
        "topk_pictures_per_second": round(batch * len(times["search"]) / sum(times["search"]), 2),
    }  # fmt: skip


def trained(args: Args) -> "Ranker":
    """The trained mini model of --vlm, over the names of PlaneFigures."""
    from vlmclassifier.plane_figures import FIGURES
    from vlmclassifier.ranking import Ranker
    from vlmclassifier.vlm import load_vlm

    return Ranker(load_vlm("mini-llava", args.vlm, args.device), list(FIGURES), "What type of object is in this photo?")


def figures(args: Args) -> "list[Image]":
    """The first test pictures of PlaneFigures in the evaluation order."""
    from vlmclassifier.benchmarks import load_evaluation
    from vlmclassifier.images import open_image

    task = load_evaluation("plane_figures", root=args.data_root, limit=args.pictures)
    return [open_image(example.image, task.root, example.row) for example in task.examples]


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
