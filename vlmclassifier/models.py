"""The registry of models (data only), and where a checkpoint comes from: --weights, paths.toml, or the hub."""

import json
import os
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from vlmclassifier.paths import local_path, near_miss
from vlmclassifier.prompts import TEMPLATES
from vlmclassifier.records import UserError

CHECKPOINT_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")  # no pickles and no code
ANSWER_PREFIX = "The photo features a"  # used for LLaVA in the paper; "A" is used for BLIP (paper, section 3.1)
MINIATURE = "vlmclassifier_miniature"  # this key in a checkpoint's config marks random or mini weights
Kind = Literal["vlm", "clip", "api"]


@dataclass(frozen=True)
class ModelSpec:
    """One model. `paper_name` is its name in the model column of `paper.csv`; `kind` decides which script runs it."""

    key: str
    kind: Kind
    # vlm: hub id; clip: open_clip's NAME/TAG, or torchvision/NAME; api: model id; None: trained here
    source: str | None
    paper_name: str | None = None
    architecture: str | None = None  # vlm: the model_type in its config.json; None: any
    template: str | None = None  # vlm: a key of prompts.TEMPLATES; None: the processor's own chat template
    answer_prefix: str = ANSWER_PREFIX  # vlm: the beginning of the answer, before a ranked class name
    provider: str | None = None  # api: a key of api.providers.PROVIDERS
    prices: tuple[float, float] | None = None  # api: US dollars per million input and output tokens; None: unknown
    benchmarks: tuple[str, ...] | None = None  # the only benchmarks that it can classify; None: any
    sizes: tuple[int, int] | None = None  # width and layers of the language model, of CLIP's image encoder
    fingerprints: tuple[str, ...] = ()  # of checkpoints that are known to be this model (runs.provenance.fingerprint)


MODELS = {
    spec.key: spec
    for spec in (
        ModelSpec("llava-1.5-7b", "vlm", "llava-hf/llava-1.5-7b-hf", "LLaVA1.5-7B", "llava", "llava-1.5",
                  sizes=(4096, 32)),
        ModelSpec("llava-1.5-13b", "vlm", "llava-hf/llava-1.5-13b-hf", "LLaVA1.5-13B", "llava", "llava-1.5",
                  sizes=(5120, 40)),
        ModelSpec("llava-next-vicuna-7b", "vlm", "llava-hf/llava-v1.6-vicuna-7b-hf", "LLaVANeXT-V7B", "llava_next",
                  "llava-next-vicuna", sizes=(4096, 32)),
        ModelSpec("llava-next-mistral-7b", "vlm", "llava-hf/llava-v1.6-mistral-7b-hf", "LLaVANeXT-M7B", "llava_next",
                  "llava-next-mistral", sizes=(4096, 32)),
        ModelSpec("blip2-2.7b", "vlm", "Salesforce/blip2-opt-2.7b", "BLIP2-2.7B", "blip-2", "blip", "A",
                  sizes=(2560, 32)),
        ModelSpec("instructblip-7b", "vlm", "Salesforce/instructblip-vicuna-7b", "IBLIP-7B", "instructblip", "blip",
                  "A", sizes=(4096, 32)),
        ModelSpec("instructblip-13b", "vlm", "Salesforce/instructblip-vicuna-13b", "IBLIP-13B", "instructblip", "blip",
                  "A", sizes=(5120, 40)),
        # Newer models: the chat template of the processor formats the prompt. PaliGemma has no chat template, and it
        # answers with the class name alone.
        ModelSpec("qwen2.5-vl-7b", "vlm", "Qwen/Qwen2.5-VL-7B-Instruct", architecture="qwen2_5_vl", sizes=(3584, 28)),
        ModelSpec("qwen3-vl-8b", "vlm", "Qwen/Qwen3-VL-8B-Instruct", architecture="qwen3_vl", sizes=(4096, 36)),
        ModelSpec("internvl3-8b", "vlm", "OpenGVLab/InternVL3-8B-hf", architecture="internvl", sizes=(3584, 28)),
        ModelSpec("llava-onevision-7b", "vlm", "llava-hf/llava-onevision-qwen2-7b-ov-hf",
                  architecture="llava_onevision", sizes=(3584, 28)),
        ModelSpec("smolvlm2-2.2b", "vlm", "HuggingFaceTB/SmolVLM2-2.2B-Instruct", architecture="smolvlm",
                  sizes=(2048, 24)),
        ModelSpec("paligemma2-3b", "vlm", "google/paligemma2-3b-mix-448", None, "paligemma", "paligemma", "",
                  sizes=(2304, 26)),
        ModelSpec("gemma3-4b", "vlm", "google/gemma-3-4b-it", architecture="gemma3", sizes=(2560, 34)),
        ModelSpec("idefics3-8b", "vlm", "HuggingFaceM4/Idefics3-8B-Llama3", architecture="idefics3", sizes=(4096, 32)),
        ModelSpec("pixtral-12b", "vlm", "mistral-community/pixtral-12b", architecture="llava", sizes=(5120, 40)),
        ModelSpec("clip-vit-l-336", "clip", "ViT-L-14-336-quickgelu/openai", "CLIP-L", sizes=(1024, 24)),
        ModelSpec("eva-clip-g", "clip", "EVA01-g-14-plus/merged2b_s11b_b114k", "EVA-G"),
        # The paper's APIs. Their ids are retired (--model-id gives another); the prices date from the paper.
        ModelSpec("gpt-4-turbo", "api", "gpt-4-turbo-2024-04-09", "GPT4", provider="openai", prices=(10.0, 30.0)),
        ModelSpec("gemini-pro-vision", "api", "gemini-1.0-pro-vision-001", "GeminiPro", provider="google",
                  prices=(0.5, 1.5)),
        ModelSpec("claude-3-opus", "api", "claude-3-opus-20240229", "Claude3", provider="anthropic",
                  prices=(15.0, 75.0)),
        # The supervised baseline of the reference code, from a local file of torchvision's weights.
        ModelSpec("vit-b-16", "clip", "torchvision/vit_b_16", benchmarks=("imagenet",)),
        # Trained from scratch by training_analysis/pretrain_mini.py.
        ModelSpec("mini-llava", "vlm", None, None, "llava", "llava-1.5", ""),
        ModelSpec("mini-blip2", "vlm", None, None, "blip-2", "mini-blip", ""),
        ModelSpec("mini-clip", "clip", None),
    )
}  # fmt: skip


def display_name(key: str) -> str:
    """The name in the model column of tables: the paper's name if the model has one, else the key."""
    spec = MODELS.get(key)
    return spec.paper_name if spec and spec.paper_name else key


def find_model(key: str, kind: Kind) -> ModelSpec:
    """The spec of a registered model, or of a folder or hub id that is not registered.

    The hub id of a registered model gives that model. For CLIP models, NAME/TAG is open_clip's, such as
    ViT-B-32/laion2b_s34b_b79k. Raises UserError for an unknown key (the message names the nearest one), and for a model
    of another kind.
    """
    if key in MODELS and MODELS[key].kind == kind:
        return MODELS[key]
    if key in MODELS:
        actual_kind = MODELS[key].kind
        article = "an" if actual_kind == "api" else "a"
        raise UserError(f"{key} is {article} {actual_kind} model: use main_results/classify_{actual_kind}.py.")
    specs_by_source = {spec.source: spec for spec in MODELS.values() if spec.kind == kind and spec.source}
    if key in specs_by_source:
        return specs_by_source[key]
    if Path(key).is_dir():
        name = Path(os.path.abspath(key)).name  # of a link its own
        if name in MODELS and MODELS[name].kind == kind:  # with the registered prompt, as --model NAME --weights DIR
            return replace(MODELS[name], source=key)
        return ModelSpec(f"{name}-folder" if name in MODELS else name, kind, key)
    if key.startswith((".", "/", "~")):
        raise UserError(f"The folder {key} does not exist: fix --model.")
    if key.count("/") == 1 and all(key.split("/")):
        return ModelSpec(key.replace("/", "-"), kind, key)
    names = [name for name, spec in MODELS.items() if spec.kind == kind]
    nearest = get_close_matches(key, names, 1)
    unregistered = "an open_clip NAME/TAG" if kind == "clip" else "a hub id OWNER/NAME"
    hint = f": did you mean {nearest[0]!r}?" if nearest else ":"
    raise UserError(f"Unknown model {key!r}{hint} Choose one of {', '.join(names)}, {unregistered}, or a folder.")


def kind_of(key: str) -> Kind:
    """The kind of any model that a script takes, registered or not, without a download; a hub id is a VLM's."""
    if key in MODELS:
        return MODELS[key].kind
    folder = Path(key)
    if folder.is_dir():
        if (folder / "open_clip_config.json").is_file():
            return "clip"
        try:
            model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        except (OSError, ValueError, AttributeError):
            model_type = None
        return "clip" if model_type in ("clip", "siglip", "siglip2") else "vlm"
    owner, _, name = key.partition("/")
    if owner in ("openai", "anthropic") or name.startswith("gemini"):
        return "api"
    spec = find_spec("open_clip")
    configs = Path(str(spec.origin)).parent / "model_configs" if spec else Path()
    return "clip" if name and (configs / f"{owner}.json").is_file() else "vlm"


def find_api(
    key: str, model_id: str | None = None, base_url: str | None = None, provider: str | None = None
) -> ModelSpec:  # fmt: skip
    """The spec of a model behind an API: a registered key, PROVIDER/ID, or any model id of the server at `base_url`.

    `model_id` replaces the registered id. `provider`: the API format of the server at `base_url`; OpenAI's by default.
    With `base_url`, an id such as google/gemma-3-4b-it is sent unchanged. Raises UserError for an unknown key, and for
    a provider that contradicts the key.
    """
    providers = sorted({str(spec.provider) for spec in MODELS.values() if spec.kind == "api"})
    if key in MODELS:
        spec = find_model(key, "api")
    elif base_url is not None:
        spec = ModelSpec(key.replace("/", "-"), "api", key, provider=provider or "openai")
    elif key.split("/")[0] in providers and key.split("/", 1)[-1]:
        key_provider, _, name = key.partition("/")
        spec = ModelSpec(key.replace("/", "-"), "api", name, provider=key_provider)
    else:
        names = [name for name, spec in MODELS.items() if spec.kind == "api"]
        raise UserError(
            f"Unknown model {key!r}: choose one of {', '.join(names)}, PROVIDER/ID with one of {', '.join(providers)}, "
            "or add the --base-url of a server with an OpenAI-compatible API."
        )
    if provider and provider != spec.provider:
        raise UserError(f"{key} uses the API format of {spec.provider}: use --provider only with --base-url.")
    if model_id:  # the registered prices belong to the registered id
        spec = replace(spec, source=model_id, prices=spec.prices if model_id == spec.source else None)
    return spec


def template_of(spec: ModelSpec) -> str | None:
    """The text of a model's prompt template; None where the chat template of the checkpoint's processor is used.

    Raises UserError for a registry entry whose template does not exist.
    """
    if spec.template is not None and spec.template not in TEMPLATES:
        raise UserError(
            f"The entry {spec.key} of vlmclassifier/models.py has the unknown template {spec.template!r}: choose one "
            f"of {', '.join(TEMPLATES)}, add it to vlmclassifier/prompts.py, or remove it from the entry."
        )
    return TEMPLATES[spec.template] if spec.template else None


def local_checkpoint(spec: ModelSpec, weights: Path | None = None) -> Path | None:
    """The local checkpoint of a model, or None if it has to come from the hub.

    A folder must contain safetensors. Raises UserError for a missing path, for a folder without a config or weights,
    for one with an adapter, and for one whose only weights are pickles, which can run code when they are opened.
    """
    is_folder = spec.source is not None and Path(spec.source).is_dir()
    named = is_folder and spec != MODELS.get(spec.key)  # --model FOLDER, which wins over paths.toml
    path = weights or (Path(str(spec.source)) if named else local_path("models", spec.key))
    if path is None and is_folder:
        path = Path(str(spec.source))
    if path is None:
        return None
    if not path.exists():
        training_hint = "" if spec.source else ", or run scripts/quickstart.sh, which trains it"
        raise UserError(
            f"The checkpoint {path} of {spec.key} does not exist: fix --weights or paths.toml{training_hint}."
        )
    if path.is_file():
        if spec.kind == "clip":
            return path
        raise UserError(f"{path} is a file: set --weights of {spec.key} to the folder that contains config.json.")
    refuse_adapter(path)
    configs = ("config.json",) if spec.kind == "vlm" else ("open_clip_config.json", "config.json")
    if not any((path / config).is_file() for config in configs):
        raise UserError(
            f"The checkpoint folder {path} has no {' or '.join(configs)}: set --weights to the folder that contains it."
        )
    if not any(path.glob("*.safetensors")):
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
        if pickles:
            raise UserError(
                f"The checkpoint folder {path} has only a pickle ({pickles[0]}), which can run code when opened: "
                "convert it to safetensors (load it once in an environment where that is safe, then save_pretrained)."
            )
        raise UserError(f"The checkpoint folder {path} has no *.safetensors weights: download or save them again.")
    return path


def refuse_adapter(folder: Path) -> None:
    """Raise UserError for a checkpoint folder with an adapter, which nothing here applies to the model."""
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"The checkpoint folder {folder} holds an adapter, which would be ignored: merge it into its model "
            "(peft: PeftModel.from_pretrained(model, FOLDER).merge_and_unload().save_pretrained(NEW)), copy the "
            "processor's files there too, and give that folder."
        )


def checkpoint_folder(spec: ModelSpec, weights: Path | None = None) -> Path:
    """The local folder of a vision-language model's checkpoint, downloaded from the hub if no local one is given.

    Raises UserError when the hub cannot be reached, and in the cases of `local_checkpoint`.
    """
    folder = local_checkpoint(spec, weights)
    if folder is not None:
        return folder
    check_source(spec)
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(spec.source, allow_patterns=list(CHECKPOINT_FILES)))
    except Exception as error:  # many exception types: no network, no such repository, gated access, offline mode
        raise hub_error(spec, error) from error
    refuse_adapter(folder)
    return folder


def check_source(spec: ModelSpec) -> None:
    """Raise UserError for a model that cannot be downloaded because it is trained locally."""
    if spec.source is None:
        raise UserError(
            f"{spec.key} is trained, not downloaded: run scripts/quickstart.sh or training_analysis/pretrain_mini.py, "
            "then pass its folder with --weights or add it to [models] in paths.toml."
        )


def hub_error(spec: ModelSpec, error: Exception) -> UserError:
    """The error for a model that could not be fetched from the hub."""
    names = {one.__name__ for one in type(error).__mro__} | {one.__name__ for one in type(error.__cause__).__mro__}
    why = type(error).__name__
    if "GatedRepoError" in names:
        why = "it is gated: accept its licence on the hub and run hf auth login"
    elif os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        cache = os.environ.get("HF_HOME", "~/.cache/huggingface")
        why = f"HF_HUB_OFFLINE is set, and it is not in the cache {cache} (HF_HOME)"
    return UserError(
        f"{spec.key} could not be fetched from the hub ({spec.source}: {why}): pass a local copy "
        f"with --weights or add it to [models] in paths.toml.{near_miss('models', spec.key, MODELS)}"
    )


def is_miniature(checkpoint: Path) -> bool:
    """Whether the config of a checkpoint marks it as a miniature (random or mini weights).

    Raises UserError for a config that is not a JSON object.
    """
    for name in ("config.json", "open_clip_config.json"):
        file = checkpoint / name
        if file.is_file():
            try:
                return bool(json.loads(file.read_text(encoding="utf-8")).get(MINIATURE))
            except (ValueError, AttributeError) as error:
                raise UserError(f"{file} is not a JSON object ({error}): save or download it again.") from None
    return False
