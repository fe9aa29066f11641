"""Miniatures of today's vision-language models, each with its processor and a chat template in its own manner."""

from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GotOcr2ImageProcessor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipImageProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from vlmclassifier.models import ModelSpec
from vlmclassifier.tiny.papers import PINPOINTS
from vlmclassifier.tiny.parts import (
    IMAGE_SIZE,
    PATCH,
    SIZE,
    VISION,
    WIDTH,
    chat_template,
    decoder,
    train_tokenizer,
)

Made = tuple[PreTrainedModel, ProcessorMixin]
PATCHES = (IMAGE_SIZE // PATCH) ** 2
SIGLIP_TOWER = {"model_type": "siglip_vision_model", "vision_use_head": False, **VISION}
CHATML = ("<|im_start|>", "<|im_end|>\n<|im_start|>assistant\n")


def _qwen_tokenizer() -> PreTrainedTokenizerFast:
    named = {
        "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
    }  # fmt: skip
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *named.values()]
    return train_tokenizer(special, None, "<|im_end|>", "<|endoftext|>", **named)


def _qwen(tokenizer: PreTrainedTokenizerFast) -> tuple[dict, str]:
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in (
        ("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end"),
    )}  # fmt: skip
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    return ids, chat_template("<|im_start|>user\n", picture, CHATML[1])


def make_qwen2_5_vl(spec: ModelSpec) -> Made:
    """Qwen2.5-VL: as many tokens as the picture has patches, windows in the tower, positions in three dimensions."""
    tokenizer = _qwen_tokenizer()
    ids, template = _qwen(tokenizer)
    text = decoder("qwen2_5_vl_text", tokenizer, 32768) | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    }
    vision = {
        "depth": 2, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_heads": 2, "out_hidden_size": WIDTH,
        "patch_size": PATCH, "window_size": IMAGE_SIZE, "fullatt_block_indexes": [1],
    }  # fmt: skip
    pixels = {"shortest_edge": 28 * 28, "longest_edge": 112 * 112}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=pixels), tokenizer, Qwen2VLVideoProcessor(size=pixels), chat_template=template
    )
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    ), processor


def make_qwen3_vl(spec: ModelSpec) -> Made:
    """Qwen3-VL: the tower's middle layers are added to the language model's first ones."""
    tokenizer = _qwen_tokenizer()
    ids, template = _qwen(tokenizer)
    text = decoder("qwen3_vl_text", tokenizer, 262144) | {
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2]},
    }
    vision = {
        "depth": 3, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_heads": 2, "out_hidden_size": WIDTH,
        "patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    pixels = {"shortest_edge": 32 * 32, "longest_edge": 128 * 128}
    images = Qwen2VLImageProcessor(size=pixels, patch_size=16)
    videos = Qwen3VLVideoProcessor(size=pixels, patch_size=16)
    processor = Qwen3VLProcessor(images, tokenizer, videos, chat_template=template)
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **ids)), processor


def make_internvl(spec: ModelSpec) -> Made:
    """InternVL3: tiles and a thumbnail, patches joined four by four, Qwen2."""
    named = {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }  # fmt: skip
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *named.values()]
    tokenizer = train_tokenizer(special, None, "<|im_end|>", "<|endoftext|>", **named)
    size = [IMAGE_SIZE, IMAGE_SIZE]
    vision = VISION | {"image_size": size, "patch_size": [PATCH, PATCH], "attention_bias": True, "use_qk_norm": False}
    config = InternVLConfig(
        vision_config=vision, text_config=decoder("qwen2", tokenizer, 32768), image_seq_length=PATCHES // 4,
        image_token_id=tokenizer.context_image_token_id, downsample_ratio=0.5,
    )  # fmt: skip
    images = GotOcr2ImageProcessor(size=SIZE, crop_to_patches=True, min_patches=1, max_patches=4)
    processor = InternVLProcessor(
        images, tokenizer, InternVLVideoProcessor(size=SIZE), image_seq_length=PATCHES // 4,
        chat_template=chat_template("<|im_start|>user\n", "<IMG_CONTEXT>\n", CHATML[1]),
    )  # fmt: skip
    return InternVLForConditionalGeneration(config), processor


def make_llava_onevision(spec: ModelSpec) -> Made:
    """LLaVA-OneVision: any-resolution tiles through SigLIP, Qwen2."""
    named = {"image_token": "<image>", "video_token": "<video>"}
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *named.values()]
    tokenizer = train_tokenizer(special, None, "<|im_end|>", "<|endoftext|>", **named)
    config = LlavaOnevisionConfig(
        vision_config=SIGLIP_TOWER, text_config=decoder("qwen2", tokenizer, 32768), image_grid_pinpoints=PINPOINTS,
        image_token_index=tokenizer.image_token_id, video_token_index=tokenizer.video_token_id,
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    images = LlavaOnevisionImageProcessor(size=SIZE, image_grid_pinpoints=PINPOINTS)
    processor = LlavaOnevisionProcessor(
        images, tokenizer, LlavaOnevisionVideoProcessor(size=SIZE), num_image_tokens=PATCHES,
        vision_feature_select_strategy="full",
        chat_template=chat_template("<|im_start|>user ", "<image>\n", CHATML[1]),
    )  # fmt: skip
    return LlavaOnevisionForConditionalGeneration(config), processor


def _idefics_tokens(tokens: int = 4) -> list[str]:
    return [f"<row_{row}_col_{column}>" for row in range(1, tokens + 1) for column in range(1, tokens + 1)]


def make_smolvlm(spec: ModelSpec) -> Made:
    """SmolVLM2: tiles of equal size, named by row and column, and the whole picture; Llama."""
    named = {
        "image_token": "<image>", "fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>", "video_token": "<video>",
    }  # fmt: skip
    special = ["<|endoftext|>", "<|im_start|>", *named.values(), *_idefics_tokens()]
    tokenizer = train_tokenizer(special, "<|im_start|>", "<end_of_utterance>", "<|endoftext|>", **named)
    config = SmolVLMConfig(
        vision_config=VISION, text_config=decoder("llama", tokenizer, 8192), scale_factor=2,
        image_token_id=tokenizer.image_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    pixels = {"size": {"longest_edge": 2 * IMAGE_SIZE}, "max_image_size": {"longest_edge": IMAGE_SIZE}}
    images = SmolVLMImageProcessor(**pixels)
    videos = SmolVLMVideoProcessor(**pixels)
    template = chat_template("<|im_start|>User:", "<image>", "<end_of_utterance>\nAssistant:")
    processor = SmolVLMProcessor(images, tokenizer, videos, image_seq_len=PATCHES // 4, chat_template=template)
    return SmolVLMForConditionalGeneration(config), processor


def make_idefics3(spec: ModelSpec) -> Made:
    """Idefics3: as SmolVLM; Llama 3."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<fake_token_around_image>",
               "<image>", "<end_of_utterance>", "<global-img>", *_idefics_tokens(6)]  # fmt: skip
    tokenizer = train_tokenizer(special, "<|begin_of_text|>", "<end_of_utterance>", "<|finetune_right_pad_id|>")
    config = Idefics3Config(
        vision_config=VISION, text_config=decoder("llama", tokenizer, 10240), scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    images = Idefics3ImageProcessor(size={"longest_edge": 2 * IMAGE_SIZE}, max_image_size={"longest_edge": IMAGE_SIZE})
    template = chat_template("<|begin_of_text|>User:", "<image>", "<end_of_utterance>\nAssistant:")
    processor = Idefics3Processor(images, tokenizer, image_seq_len=PATCHES // 4, chat_template=template)
    return Idefics3ForConditionalGeneration(config), processor


def make_paligemma(spec: ModelSpec) -> Made:
    """PaliGemma 2: SigLIP, Gemma 2 that sees picture and question in both directions; no chat template."""
    tokenizer = train_tokenizer(["<pad>", "<eos>", "<bos>", "<unk>", "<image>"], "<bos>", "<eos>", "<pad>",
                                image_token="<image>")  # fmt: skip
    images = SiglipImageProcessor(size=SIZE)
    images.image_seq_length = PATCHES
    processor = PaliGemmaProcessor(images, tokenizer)  # adds its <loc> and <seg> tokens to the tokenizer
    text = decoder("gemma2", tokenizer, 8192) | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4096}
    config = PaliGemmaConfig(
        vision_config=SIGLIP_TOWER | {"projection_dim": WIDTH}, text_config=text, projection_dim=WIDTH,
        image_token_index=tokenizer.image_token_id,
    )  # fmt: skip
    return PaliGemmaForConditionalGeneration(config), processor


def make_gemma3(spec: ModelSpec) -> Made:
    """Gemma 3: four pooled image tokens, sliding and full attention in turn, image tokens see one another."""
    named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", *named.values()]
    tokenizer = train_tokenizer(special, "<bos>", "<eos>", "<pad>", **named)
    text = decoder("gemma3_text", tokenizer, 131072) | {
        "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64, "sliding_window_pattern": 2,
        "eos_token_id": [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")],
    }  # fmt: skip
    config = Gemma3Config(
        vision_config=SIGLIP_TOWER, text_config=text, mm_tokens_per_image=4, eos_token_id=text["eos_token_id"],
        boi_token_index=tokenizer.boi_token_id, eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )  # fmt: skip
    template = chat_template("<bos><start_of_turn>user\n", "<start_of_image>", "<end_of_turn>\n<start_of_turn>model\n")
    images = Gemma3ImageProcessor(size=SIZE)
    return Gemma3ForConditionalGeneration(config), Gemma3Processor(images, tokenizer, template, image_seq_length=4)


def make_pixtral(spec: ModelSpec) -> Made:
    """Pixtral: rows of patches with break tokens between them, Mistral."""
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<pad>", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    tokenizer = train_tokenizer(special, "<s>", "</s>", "<pad>", image_token="[IMG]")
    vision = VISION | {"model_type": "pixtral", "image_size": 2 * IMAGE_SIZE, "head_dim": WIDTH // 2}
    config = LlavaConfig(
        vision_config=vision, text_config=decoder("mistral", tokenizer, 1024000, head_dim=WIDTH // 2),
        image_token_index=tokenizer.image_token_id, vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    images = PixtralImageProcessor(size={"longest_edge": 2 * IMAGE_SIZE}, patch_size=PATCH)
    processor = PixtralProcessor(
        images, tokenizer, patch_size=PATCH, chat_template=chat_template("<s>[INST]", "[IMG]", "[/INST]")
    )
    return LlavaForConditionalGeneration(config), processor
