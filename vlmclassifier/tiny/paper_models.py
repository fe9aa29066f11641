"""Miniatures of the paper's vision-language models."""

import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from vlmclassifier.models import ModelSpec
from vlmclassifier.tiny.parts import IMAGE_SIZE, PATCH, QUERIES, SIZE, VISION, WIDTH, decoder_config, train_tokenizer

CLIP_ENCODER = {"model_type": "clip_vision_model", "projection_dim": WIDTH, **VISION}
PINPOINTS = [[IMAGE_SIZE, 2 * IMAGE_SIZE], [2 * IMAGE_SIZE, IMAGE_SIZE], [2 * IMAGE_SIZE, 2 * IMAGE_SIZE]]
QFORMER_POSITIONS = 512  # positions for the question, as in the released models


def _llama_tokenizer() -> transformers.PreTrainedTokenizerFast:
    special_tokens = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    return train_tokenizer(special_tokens, "<s>", "</s>", "<pad>", image_token="<image>")


def make_llava(spec: ModelSpec) -> tuple[transformers.PreTrainedModel, transformers.ProcessorMixin]:
    """LLaVA-1.5: the second-to-last layer of a CLIP vision encoder, a two-layer projector, Llama."""
    tokenizer = _llama_tokenizer()
    config = transformers.LlavaConfig(
        vision_config=CLIP_ENCODER, text_config=decoder_config("llama", tokenizer, 4096),
        image_token_index=tokenizer.image_token_id, image_seq_length=(IMAGE_SIZE // PATCH) ** 2,
        vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    image_processor = transformers.CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=SIZE)
    processor = transformers.LlavaProcessor(
        image_processor, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config), processor


def make_llava_next(
    spec: ModelSpec,
) -> tuple[transformers.PreTrainedModel, transformers.ProcessorMixin]:
    """LLaVA-NeXT: tiles, whose number depends on the shape of the image; Vicuna (Llama) or Mistral."""
    tokenizer = _llama_tokenizer()
    if spec.template == "llava-next-mistral":
        text_config = decoder_config("mistral", tokenizer, 32768)
    else:
        text_config = decoder_config("llama", tokenizer, 4096)
    config = transformers.LlavaNextConfig(
        vision_config=CLIP_ENCODER, text_config=text_config, image_token_index=tokenizer.image_token_id,
        image_grid_pinpoints=PINPOINTS, image_seq_length=(IMAGE_SIZE // PATCH) ** 2,
        vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    image_processor = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=SIZE, image_grid_pinpoints=PINPOINTS
    )
    processor = transformers.LlavaNextProcessor(
        image_processor, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
    return transformers.LlavaNextForConditionalGeneration(config), processor


def _qformer_config(vocabulary_size: int) -> dict:
    return {
        "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
        "encoder_hidden_size": WIDTH, "vocab_size": vocabulary_size, "max_position_embeddings": QFORMER_POSITIONS,
    }  # fmt: skip


def make_blip2(spec: ModelSpec) -> tuple[transformers.PreTrainedModel, transformers.ProcessorMixin]:
    """BLIP-2: query tokens and a Q-Former as the projector, OPT."""
    # OPT uses one token as begin and end token. "<image>" is a special token without a name, as in the released
    # processor.
    tokenizer = train_tokenizer(["<s>", "<pad>", "</s>", "<unk>", "<image>"], "</s>", "</s>", "<pad>")
    text_config = decoder_config("opt", tokenizer, 2048) | {"word_embed_proj_dim": WIDTH, "ffn_dim": 2 * WIDTH}
    config = transformers.Blip2Config(
        vision_config=VISION, qformer_config=_qformer_config(len(tokenizer)), text_config=text_config,
        num_query_tokens=QUERIES, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    processor = transformers.Blip2Processor(
        transformers.BlipImageProcessor(size=SIZE), tokenizer, num_query_tokens=QUERIES
    )
    return transformers.Blip2ForConditionalGeneration(config), processor


def make_instructblip(
    spec: ModelSpec,
) -> tuple[transformers.PreTrainedModel, transformers.ProcessorMixin]:
    """InstructBLIP: the Q-Former also reads the question, with its own tokenizer; Vicuna."""
    tokenizer = train_tokenizer(["<unk>", "<s>", "</s>", "<pad>", "<image>"], "<s>", "</s>", "<pad>")
    qformer_tokenizer = _wordpiece_tokenizer()
    config = transformers.InstructBlipConfig(
        vision_config=VISION, qformer_config=_qformer_config(len(qformer_tokenizer)),
        text_config=decoder_config("llama", tokenizer, 2048), num_query_tokens=QUERIES,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    processor = transformers.InstructBlipProcessor(
        transformers.BlipImageProcessor(size=SIZE), tokenizer, qformer_tokenizer, num_query_tokens=QUERIES
    )
    return transformers.InstructBlipForConditionalGeneration(config), processor


def _wordpiece_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A WordPiece tokenizer as of BERT: lower case, [CLS] and [SEP] around a text, and here one token per character."""
    characters = "abcdefghijklmnopqrstuvwxyz0123456789.,:?!'\"()-/&"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"] + list(characters) + [f"##{character}" for character in characters]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        padding_side="right",
    )  # fmt: skip
