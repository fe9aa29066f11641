"""Miniatures of current vision-language models, each with its processor and a chat template in the model's format."""

import transformers

from vlmclassifier.models import ModelSpec
from vlmclassifier.tiny.paper_models import PINPOINTS
from vlmclassifier.tiny.parts import (
    IMAGE_SIZE,
    PATCH,
    SIZE,
    VISION,
    WIDTH,
    chat_template,
    decoder_config,
    train_tokenizer,
)

ModelAndProcessor = tuple[transformers.PreTrainedModel, transformers.ProcessorMixin]
PATCHES = (IMAGE_SIZE // PATCH) ** 2  # per tile
SIGLIP_ENCODER = {"model_type": "siglip_vision_model", "vision_use_head": False, **VISION}
CHATML_ANSWER_START = "<|im_end|>\n<|im_start|>assistant\n"  # ends the question and begins the answer


def _qwen_tokenizer() -> transformers.PreTrainedTokenizerFast:
    named_tokens = {
        "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
    }  # fmt: skip
    special_tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *named_tokens.values()]
    return train_tokenizer(special_tokens, None, "<|im_end|>", "<|endoftext|>", **named_tokens)


def _qwen_token_ids(tokenizer: transformers.PreTrainedTokenizerFast) -> dict[str, int]:
    """The token ids in the configuration of a Qwen-VL model."""
    return {
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    }


def _qwen_chat_template() -> str:
    return chat_template("<|im_start|>user\n", "<|vision_start|><|image_pad|><|vision_end|>", CHATML_ANSWER_START)


def make_qwen2_5_vl(spec: ModelSpec) -> ModelAndProcessor:
    """Qwen2.5-VL: as many tokens as patches, windowed attention in the vision encoder, three-dimensional positions."""
    tokenizer = _qwen_tokenizer()
    text_config = decoder_config("qwen2_5_vl_text", tokenizer, 32768) | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    }
    vision_config = {
        "depth": 2, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_heads": 2, "out_hidden_size": WIDTH,
        "patch_size": PATCH, "window_size": IMAGE_SIZE, "fullatt_block_indexes": [1],
    }  # fmt: skip
    pixel_limits = {"shortest_edge": 28 * 28, "longest_edge": 112 * 112}
    image_processor = transformers.Qwen2VLImageProcessor(size=pixel_limits)
    video_processor = transformers.Qwen2VLVideoProcessor(size=pixel_limits)
    processor = transformers.Qwen2_5_VLProcessor(
        image_processor, tokenizer, video_processor, chat_template=_qwen_chat_template()
    )
    config = transformers.Qwen2_5_VLConfig(
        text_config=text_config, vision_config=vision_config, **_qwen_token_ids(tokenizer)
    )  # fmt: skip
    return transformers.Qwen2_5_VLForConditionalGeneration(config), processor


def make_qwen3_vl(spec: ModelSpec) -> ModelAndProcessor:
    """Qwen3-VL: features of inner layers of the vision encoder are added in the first layers of the language model."""
    tokenizer = _qwen_tokenizer()
    text_config = decoder_config("qwen3_vl_text", tokenizer, 262144) | {
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2]},
    }
    vision_config = {
        "depth": 3, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_heads": 2, "out_hidden_size": WIDTH,
        "patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    pixel_limits = {"shortest_edge": 32 * 32, "longest_edge": 128 * 128}
    image_processor = transformers.Qwen2VLImageProcessor(size=pixel_limits, patch_size=16)
    video_processor = transformers.Qwen3VLVideoProcessor(size=pixel_limits, patch_size=16)
    processor = transformers.Qwen3VLProcessor(
        image_processor, tokenizer, video_processor, chat_template=_qwen_chat_template()
    )
    config = transformers.Qwen3VLConfig(
        text_config=text_config, vision_config=vision_config, **_qwen_token_ids(tokenizer)
    )
    return transformers.Qwen3VLForConditionalGeneration(config), processor


def make_internvl(spec: ModelSpec) -> ModelAndProcessor:
    """InternVL3: tiles and a thumbnail, four patches merged into one token, Qwen2."""
    named_tokens = {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }  # fmt: skip
    special_tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *named_tokens.values()]
    tokenizer = train_tokenizer(special_tokens, None, "<|im_end|>", "<|endoftext|>", **named_tokens)
    vision_config = VISION | {
        "image_size": [IMAGE_SIZE, IMAGE_SIZE], "patch_size": [PATCH, PATCH], "attention_bias": True,
        "use_qk_norm": False,
    }  # fmt: skip
    config = transformers.InternVLConfig(
        vision_config=vision_config, text_config=decoder_config("qwen2", tokenizer, 32768),
        image_seq_length=PATCHES // 4, image_token_id=tokenizer.context_image_token_id, downsample_ratio=0.5,
    )  # fmt: skip
    image_processor = transformers.GotOcr2ImageProcessor(size=SIZE, crop_to_patches=True, min_patches=1, max_patches=4)
    processor = transformers.InternVLProcessor(
        image_processor, tokenizer, transformers.InternVLVideoProcessor(size=SIZE), image_seq_length=PATCHES // 4,
        chat_template=chat_template("<|im_start|>user\n", "<IMG_CONTEXT>\n", CHATML_ANSWER_START),
    )  # fmt: skip
    return transformers.InternVLForConditionalGeneration(config), processor


def make_llava_onevision(spec: ModelSpec) -> ModelAndProcessor:
    """LLaVA-OneVision: any-resolution tiles, SigLIP, Qwen2."""
    named_tokens = {"image_token": "<image>", "video_token": "<video>"}
    special_tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *named_tokens.values()]
    tokenizer = train_tokenizer(special_tokens, None, "<|im_end|>", "<|endoftext|>", **named_tokens)
    config = transformers.LlavaOnevisionConfig(
        vision_config=SIGLIP_ENCODER, text_config=decoder_config("qwen2", tokenizer, 32768),
        image_grid_pinpoints=PINPOINTS, image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id, vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    image_processor = transformers.LlavaOnevisionImageProcessor(size=SIZE, image_grid_pinpoints=PINPOINTS)
    processor = transformers.LlavaOnevisionProcessor(
        image_processor, tokenizer, transformers.LlavaOnevisionVideoProcessor(size=SIZE), num_image_tokens=PATCHES,
        vision_feature_select_strategy="full",
        chat_template=chat_template("<|im_start|>user ", "<image>\n", CHATML_ANSWER_START),
    )  # fmt: skip
    return transformers.LlavaOnevisionForConditionalGeneration(config), processor


def _tile_tokens(size: int = 4) -> list[str]:
    """The tokens before the tiles of a grid of size x size, as Idefics3 and SmolVLM name them."""
    tokens = []
    for row in range(1, size + 1):
        for column in range(1, size + 1):
            tokens.append(f"<row_{row}_col_{column}>")
    return tokens


def make_smolvlm(spec: ModelSpec) -> ModelAndProcessor:
    """SmolVLM2: tiles of equal size, each with a token for its row and column, and the whole image; Llama."""
    named_tokens = {
        "image_token": "<image>", "fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>", "video_token": "<video>",
    }  # fmt: skip
    special_tokens = ["<|endoftext|>", "<|im_start|>", *named_tokens.values(), *_tile_tokens()]
    tokenizer = train_tokenizer(special_tokens, "<|im_start|>", "<end_of_utterance>", "<|endoftext|>", **named_tokens)
    config = transformers.SmolVLMConfig(
        vision_config=VISION, text_config=decoder_config("llama", tokenizer, 8192), scale_factor=2,
        image_token_id=tokenizer.image_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    pixel_limits = {"size": {"longest_edge": 2 * IMAGE_SIZE}, "max_image_size": {"longest_edge": IMAGE_SIZE}}
    image_processor = transformers.SmolVLMImageProcessor(**pixel_limits)
    video_processor = transformers.SmolVLMVideoProcessor(**pixel_limits)
    template = chat_template("<|im_start|>User:", "<image>", "<end_of_utterance>\nAssistant:")
    processor = transformers.SmolVLMProcessor(
        image_processor, tokenizer, video_processor, image_seq_len=PATCHES // 4, chat_template=template
    )
    return transformers.SmolVLMForConditionalGeneration(config), processor


def make_idefics3(spec: ModelSpec) -> ModelAndProcessor:
    """Idefics3: the same tiles as SmolVLM; Llama 3."""
    special_tokens = ["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<fake_token_around_image>",
               "<image>", "<end_of_utterance>", "<global-img>", *_tile_tokens(6)]  # fmt: skip
    tokenizer = train_tokenizer(special_tokens, "<|begin_of_text|>", "<end_of_utterance>", "<|finetune_right_pad_id|>")
    config = transformers.Idefics3Config(
        vision_config=VISION, text_config=decoder_config("llama", tokenizer, 10240), scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    image_processor = transformers.Idefics3ImageProcessor(
        size={"longest_edge": 2 * IMAGE_SIZE}, max_image_size={"longest_edge": IMAGE_SIZE}
    )
    template = chat_template("<|begin_of_text|>User:", "<image>", "<end_of_utterance>\nAssistant:")
    processor = transformers.Idefics3Processor(
        image_processor, tokenizer, image_seq_len=PATCHES // 4, chat_template=template
    )
    return transformers.Idefics3ForConditionalGeneration(config), processor


def make_paligemma(spec: ModelSpec) -> ModelAndProcessor:
    """PaliGemma 2: SigLIP, and Gemma 2 with bidirectional attention over image and question; no chat template."""
    tokenizer = train_tokenizer(["<pad>", "<eos>", "<bos>", "<unk>", "<image>"], "<bos>", "<eos>", "<pad>",
                                image_token="<image>")  # fmt: skip
    image_processor = transformers.SiglipImageProcessor(size=SIZE)
    image_processor.image_seq_length = PATCHES
    processor = transformers.PaliGemmaProcessor(
        image_processor, tokenizer
    )  # adds its <loc> and <seg> tokens to the tokenizer
    text_config = decoder_config("gemma2", tokenizer, 8192) | {
        "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4096,
    }  # fmt: skip
    config = transformers.PaliGemmaConfig(
        vision_config=SIGLIP_ENCODER | {"projection_dim": WIDTH}, text_config=text_config, projection_dim=WIDTH,
        image_token_index=tokenizer.image_token_id,
    )  # fmt: skip
    return transformers.PaliGemmaForConditionalGeneration(config), processor


def make_gemma3(spec: ModelSpec) -> ModelAndProcessor:
    """Gemma 3: four pooled image tokens with bidirectional attention, alternating sliding and full attention."""
    named_tokens = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    special_tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", *named_tokens.values()]
    tokenizer = train_tokenizer(special_tokens, "<bos>", "<eos>", "<pad>", **named_tokens)
    text_config = decoder_config("gemma3_text", tokenizer, 131072) | {
        "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64, "sliding_window_pattern": 2,
        "eos_token_id": [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")],
    }  # fmt: skip
    config = transformers.Gemma3Config(
        vision_config=SIGLIP_ENCODER, text_config=text_config, mm_tokens_per_image=4,
        eos_token_id=text_config["eos_token_id"], boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id, image_token_index=tokenizer.image_token_id,
    )  # fmt: skip
    template = chat_template("<bos><start_of_turn>user\n", "<start_of_image>", "<end_of_turn>\n<start_of_turn>model\n")
    image_processor = transformers.Gemma3ImageProcessor(size=SIZE)
    processor = transformers.Gemma3Processor(image_processor, tokenizer, template, image_seq_length=4)
    return transformers.Gemma3ForConditionalGeneration(config), processor


def make_pixtral(spec: ModelSpec) -> ModelAndProcessor:
    """Pixtral: as many tokens as patches, with a break token after each row of patches, Mistral."""
    special_tokens = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<pad>", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    tokenizer = train_tokenizer(special_tokens, "<s>", "</s>", "<pad>", image_token="[IMG]")
    vision_config = VISION | {"model_type": "pixtral", "image_size": 2 * IMAGE_SIZE, "head_dim": WIDTH // 2}
    config = transformers.LlavaConfig(
        vision_config=vision_config, text_config=decoder_config("mistral", tokenizer, 1024000, head_dim=WIDTH // 2),
        image_token_index=tokenizer.image_token_id, vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    image_processor = transformers.PixtralImageProcessor(size={"longest_edge": 2 * IMAGE_SIZE}, patch_size=PATCH)
    processor = transformers.PixtralProcessor(
        image_processor, tokenizer, patch_size=PATCH, chat_template=chat_template("<s>[INST]", "[IMG]", "[/INST]")
    )
    return transformers.LlavaForConditionalGeneration(config), processor
