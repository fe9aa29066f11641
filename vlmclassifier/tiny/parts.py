"""Shared parts of all miniatures: sizes, a tokenizer trained on the class names, weights that depend on the image."""

import math
from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

from vlmclassifier.benchmarks import PAPER_BENCHMARKS, class_names
from vlmclassifier.prompts import TEMPLATES, THOUGHT, WORDINGS

IMAGE_SIZE = 56  # pixels
PATCH = 14  # pixels
WIDTH = 32  # of the hidden states
VOCABULARY = 600  # tokens
QUERIES = 4  # query tokens of the Q-Former
SIZE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
VISION = {
    "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": IMAGE_SIZE, "patch_size": PATCH,
}  # fmt: skip
DECODER = {
    "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip


def decoder_config(model_type: str, tokenizer: PreTrainedTokenizerFast, context: int, **options: object) -> dict:
    """The configuration of a two-layer language model with the tokenizer's vocabulary and `context` positions."""
    return DECODER | {
        "model_type": model_type, "vocab_size": len(tokenizer), "max_position_embeddings": context,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    } | options  # fmt: skip


@torch.no_grad()
def redraw_weights(model: nn.Module, seed: int = 0) -> None:
    """Draw the weights again, so that the answer depends on the image: default initialisations are too small for that.

    The standard deviation is 1 / sqrt(fan-in) for matrices, 1 for embeddings and query tokens, and 1 / sqrt(width) for
    tied embeddings.
    """
    generator = torch.Generator().manual_seed(seed)
    output_embeddings = model.get_output_embeddings()
    is_tied = output_embeddings is not None and output_embeddings.weight is model.get_input_embeddings().weight
    for name, parameter in sorted(model.named_parameters()):
        if parameter.ndim < 2:
            continue
        is_embedding = "embed" in name or "query_tokens" in name
        if is_tied and parameter is output_embeddings.weight:
            std = parameter.shape[1] ** -0.5
        elif is_embedding and "patch" not in name:
            std = 1.0
        else:
            std = 1 / math.sqrt(parameter[0].numel())
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


# Whose texts the tokenizers are trained on: another template must not change every miniature.
TOKENIZER_TEMPLATES = ("llava-1.5", "llava-next-vicuna", "llava-next-mistral", "blip", "paligemma")


def train_tokenizer(
    special_tokens: Iterable[str], bos: str | None, eos: str, pad: str, size: int = VOCABULARY, **named_tokens: str
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `size` tokens, trained on the class names and prompts.

    It adds the begin token `bos` in front of a text, if there is one. `special_tokens`: in the order of their ids.
    `named_tokens`: the attributes by which a processor finds its tokens, such as `image_token`.
    """
    texts = [name for benchmark in PAPER_BENCHMARKS.values() for name in class_names(benchmark)]
    texts += [*WORDINGS.values(), *(TEMPLATES[name] for name in TOKENIZER_TEMPLATES), THOUGHT]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special_tokens), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad, padding_side="left",
        extra_special_tokens=named_tokens,
    )  # fmt: skip


def chat_template(before: str, image: str, after: str) -> str:
    """A chat template for one message of the user: `before`, then `image` and the question, then `after`."""
    return (
        f"{before}{{% for message in messages %}}{{% for part in message['content'] %}}"
        f"{{% if part['type'] == 'image' %}}{image}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}"
        f"{{% endfor %}}{{% endfor %}}{{% if add_generation_prompt %}}{after}{{% endif %}}"
    )
