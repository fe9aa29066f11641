"""A tiny Llama and its tokenizers, trained on the corpus."""

import random
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vlmclassifier.benchmarks import PAPER_BENCHMARKS, class_names
from vlmclassifier.mini.corpus import Text
from vlmclassifier.mini.optimisation import Optimisation
from vlmclassifier.mini.recipes import LmRecipe

# The end token must not have id 2: CLIP's text model in transformers then pools at the wrong position.
SPECIAL_TOKENS = ("<pad>", "<unk>", "<s>", "</s>", "<image>")
BPE_VOCABULARY_SIZE = 4096
CLIP_CONTEXT = 32  # tokens
CONTEXT = 4096  # tokens; enough for the class names of every benchmark as candidates
IGNORED = -100  # label of a token that is not predicted
WINDOW_BATCHES = 16  # batches whose rows are sorted by length together


def word_tokenizer(texts: Iterable[str], clip: bool = False) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per word and punctuation mark of `texts`.

    A mark inside a word is part of the word (1.26, 16.4). `clip`: append an end token to every text.
    """
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    marks = pre_tokenizers.Split(Regex(r'(?<!\S)"|"(?=\.)|"(?!\S)|[.,?:](?!\S)'), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([marks, pre_tokenizers.WhitespaceSplit()])
    tokenizer.decoder = decoders.WordPiece(prefix="\u2581", cleanup=True)  # joins words, no space before punctuation
    trainer = trainers.WordLevelTrainer(special_tokens=list(SPECIAL_TOKENS), vocab_size=1_000_000, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return _fast_tokenizer(tokenizer, clip)


def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of 4,096 tokens on the class names of the paper's four benchmarks.

    The names of the embedded data set are not in its training text, so they span several tokens, as names do in real
    models.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_VOCABULARY_SIZE, special_tokens=list(SPECIAL_TOKENS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    names = []
    for benchmark in PAPER_BENCHMARKS.values():
        names += [f" {name}" for name in class_names(benchmark)]
    tokenizer.train_from_iterator(names, trainer)
    return _fast_tokenizer(tokenizer)


def _fast_tokenizer(tokenizer: Tokenizer, clip: bool = False) -> PreTrainedTokenizerFast:
    """Wrap a tokenizer for transformers: with a start token, for CLIP also with an end token."""
    start_and_end = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    template = "<s> $A </s>" if clip else "<s> $A"
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=start_and_end)
    extra = {} if clip else {"extra_special_tokens": {"image_token": "<image>"}}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        padding_side="right" if clip else "left", model_max_length=CLIP_CONTEXT if clip else CONTEXT,
        clean_up_tokenization_spaces=False, **extra,
    )  # fmt: skip


def build_lm(recipe: LmRecipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build an untrained Llama with tied embeddings."""
    config = LlamaConfig(
        hidden_size=recipe.width, intermediate_size=2 * recipe.width, num_hidden_layers=recipe.layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=CONTEXT, vocab_size=len(tokenizer),
        tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def encode(texts: Sequence[Text], tokenizer: PreTrainedTokenizerFast) -> list[tuple[list[int], int]]:
    """Return for each text the token ids of prompt, answer and end token, and the number of prompt tokens.

    Prompt tokens are input only; the model is trained to predict the rest.
    """
    prompts = tokenizer([text.prompt for text in texts])["input_ids"]
    answers = tokenizer([f" {text.answer}" for text in texts], add_special_tokens=False)["input_ids"]
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        rows.append((prompt + answer + [tokenizer.eos_token_id], len(prompt)))
    return rows


def collate(rows: Sequence[tuple[list[int], int]], pad: int) -> tuple[Tensor, Tensor]:
    """Return input_ids and labels of encoded rows, both [rows, tokens], padded on the right with token id `pad`.

    No attention mask is needed: under a causal mask the tokens of a row never attend to the padding behind them.
    """
    length = max(len(ids) for ids, _ in rows)
    input_ids, labels = [], []
    for ids, prompt_length in rows:
        padding = length - len(ids)
        input_ids.append(ids + [pad] * padding)
        labels.append([IGNORED] * prompt_length + ids[prompt_length:] + [IGNORED] * padding)
    return torch.tensor(input_ids), torch.tensor(labels)


def next_token_loss(hidden_states: Tensor, labels: Tensor, lm_head: nn.Linear) -> Tensor:
    """Return the summed cross-entropy of the predicted tokens; the LM head is applied at their positions only.

    `hidden_states`: [rows, tokens, width]; `labels`: [rows, tokens].
    """
    next_labels = labels[:, 1:]
    is_predicted = next_labels != IGNORED
    logits = lm_head(hidden_states[:, :-1][is_predicted])  # [predicted tokens, vocabulary]
    return F.cross_entropy(logits, next_labels[is_predicted], reduction="sum")


def length_batches(lengths: Sequence[int], batch: int, steps: int, seed: int) -> list[list[int]]:
    """Return `steps` batches of row numbers, drawn by `seed`. All rows are used equally often.

    `lengths`: tokens of each row. Each batch has rows of similar length, to save padding.
    """
    rng = random.Random(f"batches:{seed}")
    batches: list[list[int]] = []
    while len(batches) < steps:
        order = list(range(len(lengths)))
        rng.shuffle(order)
        epoch = []
        # Sorting inside windows of a random order saves most of the padding and keeps the batches random.
        for start in range(0, len(order), WINDOW_BATCHES * batch):
            window = sorted(order[start : start + WINDOW_BATCHES * batch], key=lambda row: lengths[row])
            for first in range(0, len(window), batch):
                epoch.append(window[first : first + batch])
        rng.shuffle(epoch)
        batches += epoch
    return batches[:steps]


def train_lm(
    model: LlamaForCausalLM, texts: Sequence[Text], tokenizer: PreTrainedTokenizerFast, recipe: LmRecipe, seed: int
) -> list[float]:
    """Train the language model on the texts and return the loss per predicted token of every step."""
    rows = encode(texts, tokenizer)
    optimisation = Optimisation([model], recipe.muon_lr, recipe.adamw_lr)
    predicted_tokens = [len(ids) - prompt_length for ids, prompt_length in rows]
    batches = length_batches([len(ids) for ids, _ in rows], recipe.batch, recipe.steps, seed)

    def summed_loss(part: Sequence[int]) -> Tensor:
        input_ids, labels = collate([rows[row] for row in part], tokenizer.pad_token_id)
        hidden_states = model.model(input_ids, use_cache=False).last_hidden_state  # [rows, tokens, width]
        return next_token_loss(hidden_states, labels, model.lm_head)

    def step(number: int) -> float:
        return optimisation.backward_batch(summed_loss, batches[number], predicted_tokens)

    return optimisation.run(step, recipe.steps, "language model")
