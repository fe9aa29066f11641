"""Miniatures of the paper's vision-language models."""

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
    CLIPImageProcessor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vlmclassifier.models import ModelSpec
from vlmclassifier.tiny.parts import IMAGE_SIZE, PATCH, QUERIES, SIZE, VISION, WIDTH, decoder, train_tokenizer

CLIP_TOWER = {"model_type": "clip_vision_model", "projection_dim": WIDTH, **VISION}
PINPOINTS = [[IMAGE_SIZE, 2 * IMAGE_SIZE], [2 * IMAGE_SIZE, IMAGE_SIZE], [2 * IMAGE_SIZE, 2 * IMAGE_SIZE]]
QFORMER_LIMIT = 512  # positions for the question, as in the released models


def _llama_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    return train_tokenizer(special, "<s>", "</s>", "<pad>", image_token="<image>")


def make_llava(spec: ModelSpec) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """LLaVA-1.5: a CLIP tower's second-to-last layer, a two-layer projector, Llama."""
    tokenizer = _llama_tokenizer()
    config = LlavaConfig(
        vision_config=CLIP_TOWER, text_config=decoder("llama", tokenizer, 4096),
        image_token_index=tokenizer.image_token_id, image_seq_length=(IMAGE_SIZE // PATCH) ** 2,
        vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    images = CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=SIZE)
    processor = LlavaProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return LlavaForConditionalGeneration(config), processor


def make_llava_next(spec: ModelSpec) -> tuple[LlavaNextForConditionalGeneration, LlavaNextProcessor]:
    """LLaVA-NeXT: the picture in tiles whose number follows its shape; Vicuna (Llama) or Mistral."""
    tokenizer = _llama_tokenizer()
    mistral = spec.template == "llava-next-mistral"
    text = decoder("mistral", tokenizer, 32768) if mistral else decoder("llama", tokenizer, 4096)
    config = LlavaNextConfig(
        vision_config=CLIP_TOWER, text_config=text, image_token_index=tokenizer.image_token_id,
        image_grid_pinpoints=PINPOINTS, image_seq_length=(IMAGE_SIZE // PATCH) ** 2,
        vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    images = LlavaNextImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=SIZE, image_grid_pinpoints=PINPOINTS)
    processor = LlavaNextProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return LlavaNextForConditionalGeneration(config), processor


def _qformer(vocabulary: int) -> dict:
    return {
        "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
        "encoder_hidden_size": WIDTH, "vocab_size": vocabulary, "max_position_embeddings": QFORMER_LIMIT,
    }  # fmt: skip


def make_blip2(spec: ModelSpec) -> tuple[Blip2ForConditionalGeneration, Blip2Processor]:
    """BLIP-2: query tokens through a Q-Former, OPT."""
    # OPT's begin and end token are one. "<image>" stays an unnamed special token, as in the released processor.
    tokenizer = train_tokenizer(["<s>", "<pad>", "</s>", "<unk>", "<image>"], "</s>", "</s>", "<pad>")
    text = decoder("opt", tokenizer, 2048) | {"word_embed_proj_dim": WIDTH, "ffn_dim": 2 * WIDTH}
    config = Blip2Config(
        vision_config=VISION, qformer_config=_qformer(len(tokenizer)), text_config=text, num_query_tokens=QUERIES,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    processor = Blip2Processor(BlipImageProcessor(size=SIZE), tokenizer, num_query_tokens=QUERIES)
    return Blip2ForConditionalGeneration(config), processor


def make_instructblip(spec: ModelSpec) -> tuple[InstructBlipForConditionalGeneration, InstructBlipProcessor]:
    """InstructBLIP: the Q-Former reads the question too, with a tokenizer of its own; Vicuna."""
    tokenizer = train_tokenizer(["<unk>", "<s>", "</s>", "<pad>", "<image>"], "<s>", "</s>", "<pad>")
    reader = _wordpiece_tokenizer()
    config = InstructBlipConfig(
        vision_config=VISION, qformer_config=_qformer(len(reader)), text_config=decoder("llama", tokenizer, 2048),
        num_query_tokens=QUERIES, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    processor = InstructBlipProcessor(BlipImageProcessor(size=SIZE), tokenizer, reader, num_query_tokens=QUERIES)
    return InstructBlipForConditionalGeneration(config), processor


def _wordpiece_tokenizer() -> PreTrainedTokenizerFast:
    """BERT's kind: lower case, letter by letter here, [CLS] and [SEP] around a text."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,:?!'\"()-/&"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = Tokenizer(models.WordPiece({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        padding_side="right",
    )  # fmt: skip
