"""What every miniature shares: sizes, a tokenizer trained on the spot, weights that make the picture matter."""

import math
from collections.abc import Iterable

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

from vlmclassifier.benchmarks import PAPER_BENCHMARKS, class_names
from vlmclassifier.prompts import TEMPLATES, THOUGHT, WORDINGS

IMAGE_SIZE, PATCH, WIDTH, VOCABULARY, QUERIES = 56, 14, 32, 600, 4
SIZE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
VISION = {
    "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": IMAGE_SIZE, "patch_size": PATCH,
}  # fmt: skip
DECODER = {
    "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip


def decoder(model_type: str, tokenizer: PreTrainedTokenizerFast, context: int, **more: object) -> dict:
    """The configuration of a language model of two layers over the tokenizer's vocabulary."""
    return DECODER | {
        "model_type": model_type, "vocab_size": len(tokenizer), "max_position_embeddings": context,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    } | more  # fmt: skip


@torch.no_grad()
def redraw_weights(model: nn.Module, seed: int = 0) -> None:
    """Redraw weights so that the answer depends on the picture: libraries initialise so small that it would not.

    Matrices get std 1/sqrt(fan in), embeddings and query tokens std 1, tied embeddings hidden^-0.5.
    """
    generator = torch.Generator().manual_seed(seed)
    output = model.get_output_embeddings()
    tied = output is not None and output.weight is model.get_input_embeddings().weight
    for name, parameter in sorted(model.named_parameters()):
        if parameter.ndim < 2:
            continue
        embedding = "embed" in name or "query_tokens" in name
        if tied and parameter is output.weight:
            std = parameter.shape[1] ** -0.5
        elif embedding and "patch" not in name:
            std = 1.0
        else:
            std = 1 / math.sqrt(parameter[0].numel())
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def train_tokenizer(
    special: Iterable[str], bos: str | None, eos: str, pad: str, plain: Iterable[str] = (), size: int = VOCABULARY,
    **named: str,
) -> PreTrainedTokenizerFast:  # fmt: skip
    """A byte-level BPE of `size` tokens trained on the class names and prompts, with a begin token in front of a text.

    `special`: tokens in the order of their numbers. `plain`: more tokens, that stay in a decoded answer. `named`: the
    attributes by which a processor finds its tokens (`image_token`).
    """
    texts = [name for benchmark in PAPER_BENCHMARKS.values() for name in class_names(benchmark)]
    texts += [*WORDINGS.values(), *TEMPLATES.values(), THOUGHT]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in plain])
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad, padding_side="left",
        extra_special_tokens=named,
    )  # fmt: skip


def chat_template(before: str, image: str, after: str) -> str:
    """A chat template for one user's message: `image` for the picture, then the question, then `after`."""
    return (
        f"{before}{{% for message in messages %}}{{% for part in message['content'] %}}"
        f"{{% if part['type'] == 'image' %}}{image}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}"
        f"{{% endfor %}}{{% endfor %}}{{% if add_generation_prompt %}}{after}{{% endif %}}"
    )
