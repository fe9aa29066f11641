"""A tiny Llama and its tokenizer, trained on texts of the world."""

import random
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vlmclassifier.benchmarks import PAPER_BENCHMARKS, class_names
from vlmclassifier.plane_figures.texts import Text
from vlmclassifier.pretraining.optimisation import Optimisation
from vlmclassifier.pretraining.recipes import LmRecipe

SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<image>")  # CLIP's text model pools wrongly at an end token of id 2
PIECES = 4096
CLIP_CONTEXT = 32
CONTEXT = 4096  # long enough for the names of every benchmark as candidates
IGNORED = -100  # label of a token that is given, not predicted


def word_tokenizer(texts: Iterable[str], clip: bool = False) -> PreTrainedTokenizerFast:
    """One token per word and punctuation mark of `texts`; for CLIP with an end token behind every text.

    A mark inside a word belongs to it (1.26, 16.4).
    """
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    marks = pre_tokenizers.Split(Regex(r'(?<!\S)"|"(?=\.)|"(?!\S)|[.,?:](?!\S)'), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([marks, pre_tokenizers.WhitespaceSplit()])
    tokenizer.decoder = decoders.WordPiece(prefix="\u2581", cleanup=True)  # joins words, no space before punctuation
    trainer = trainers.WordLevelTrainer(special_tokens=list(SPECIAL), vocab_size=1_000_000, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return _wrapped(tokenizer, clip)


def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 4,096 pieces learnt from the names of the paper's four benchmarks.

    It has not seen the names of the embedded world, so these span several tokens, as names do in real models.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    names = (f" {name}" for benchmark in PAPER_BENCHMARKS.values() for name in class_names(benchmark))
    tokenizer.train_from_iterator(names, trainer)
    return _wrapped(tokenizer)


def _wrapped(tokenizer: Tokenizer, clip: bool = False) -> PreTrainedTokenizerFast:
    ends = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    form = "<s> $A </s>" if clip else "<s> $A"
    tokenizer.post_processor = processors.TemplateProcessing(single=form, special_tokens=ends)
    named = {} if clip else {"extra_special_tokens": {"image_token": "<image>"}}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        padding_side="right" if clip else "left", model_max_length=CLIP_CONTEXT if clip else CONTEXT,
        clean_up_tokenization_spaces=False, **named,
    )  # fmt: skip


def build_lm(recipe: LmRecipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama with tied embeddings."""
    config = LlamaConfig(
        hidden_size=recipe.width, intermediate_size=2 * recipe.width, num_hidden_layers=recipe.layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=CONTEXT, vocab_size=len(tokenizer),
        tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def encode(texts: Sequence[Text], tokenizer: PreTrainedTokenizerFast) -> list[tuple[list[int], int]]:
    """Token ids of prompt, answer and end token, and how many of them are the prompt's: those are not predicted."""
    prompts = tokenizer([text.prompt for text in texts])["input_ids"]
    answers = tokenizer([f" {text.answer}" for text in texts], add_special_tokens=False)["input_ids"]
    return [
        (prompt + answer + [tokenizer.eos_token_id], len(prompt))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def collate(rows: Sequence[tuple[list[int], int]], pad: int) -> tuple[Tensor, Tensor]:
    """Padded on the right: input_ids and labels, [rows, tokens]. What is behind a row's end is never attended to."""
    length = max(len(ids) for ids, _ in rows)
    input_ids = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in rows])
    labels = torch.tensor([[IGNORED] * given + ids[given:] + [IGNORED] * (length - len(ids)) for ids, given in rows])
    return input_ids, labels


def next_token_loss(hidden_states: Tensor, labels: Tensor, head: nn.Linear) -> Tensor:
    """Sum of the cross-entropy of the predicted tokens; the head is applied to these positions only.

    `hidden_states`: [rows, tokens, width]; `labels`: [rows, tokens].
    """
    following = labels[:, 1:]
    wanted = following != IGNORED
    return F.cross_entropy(head(hidden_states[:, :-1][wanted]), following[wanted], reduction="sum")


def batches(lengths: Sequence[int], batch: int, steps: int, seed: int) -> list[list[int]]:
    """`steps` batches of row numbers, each of rows of similar length, drawn by `seed`; rows repeat evenly."""
    rng, out = random.Random(f"batches:{seed}"), []
    while len(out) < steps:
        order = list(range(len(lengths)))
        rng.shuffle(order)
        chunks = []
        for start in range(0, len(order), 16 * batch):  # sorted within a stretch: little padding, still random
            stretch = sorted(order[start : start + 16 * batch], key=lambda row: lengths[row])
            chunks += [stretch[first : first + batch] for first in range(0, len(stretch), batch)]
        rng.shuffle(chunks)
        out += chunks
    return out[:steps]


def train_lm(
    model: LlamaForCausalLM, texts: Sequence[Text], tokenizer: PreTrainedTokenizerFast, recipe: LmRecipe, seed: int
) -> list[float]:
    """Train on the texts; returns the loss per predicted token of every step."""
    rows = encode(texts, tokenizer)
    optimisation = Optimisation([model], recipe.matrix_rate, recipe.other_rate)
    predicted = [len(ids) - given for ids, given in rows]
    order = batches([len(ids) for ids, _ in rows], recipe.batch, recipe.steps, seed)

    def loss_of(part: Sequence[int]) -> Tensor:
        input_ids, labels = collate([rows[row] for row in part], tokenizer.pad_token_id)
        hidden_states = model.model(input_ids, use_cache=False).last_hidden_state  # [rows, tokens, width]
        return next_token_loss(hidden_states, labels, model.lm_head)

    def step(number: int) -> float:
        return optimisation.summed_step(loss_of, order[number], predicted)

    return optimisation.run(step, recipe.steps, "language model")
