"""A model that answers questions, on this machine or behind an API, and the arguments that choose it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol
from urllib.parse import urlsplit

from vlmclassifier import cli
from vlmclassifier.arguments import AdapterArgs, ModelArgs, run_config, run_name
from vlmclassifier.benchmarks import Evaluation
from vlmclassifier.identity import read_adapter
from vlmclassifier.images import open_image
from vlmclassifier.models import MODELS, checkpoint_folder, find_api, find_model, template_of
from vlmclassifier.prompts import THOUGHT
from vlmclassifier.questions.items import ChoiceQuestion, image_file
from vlmclassifier.questions.settings import QuestionSetting
from vlmclassifier.records import Prediction, UserError
from vlmclassifier.runs import Run, read_rows

if TYPE_CHECKING:
    from vlmclassifier.api import Api
    from vlmclassifier.vlm import VLM

PROVIDERS = ("openai/", "anthropic/", "google/")


@dataclass
class AnswerArgs(AdapterArgs, ModelArgs):
    """The model, local or behind an API, and how long its answers may be."""

    chain_of_thought: bool = True
    """Ask for a chain of thought before the letter, as the paper does."""
    max_new_tokens: int | None = None
    """Longest answer in tokens; default: 1,024 with chain of thought, else 64."""
    base_url: str | None = None
    """A server with OpenAI's interface, such as vLLM or transformers serve: http://HOST:PORT/v1."""
    model_id: str | None = None
    """The id to request in place of the API model's own."""
    key_variable: str | None = None
    """Environment variable with the key; default: the provider's own, and none for another server."""
    concurrency: int = 16
    """Calls at a time."""
    image_format: Literal["jpeg", "png"] = "jpeg"
    """Of images that are sent; png: without loss."""
    image_first: bool = False
    """Send the image before the question, as local models are asked: for servers of open models."""
    max_side: int = 1024
    """Images are sent with the longer side at most this many pixels."""
    temperature: float | None = None
    """Sampling temperature of an API; default: the server's own."""
    timeout: float = 120.0
    """Seconds after which a request is given up and repeated."""

    def new_tokens(self, setting: QuestionSetting) -> int:
        """The longest answer in tokens."""
        if setting.form == "naming":
            return setting.new_tokens
        return self.max_new_tokens or setting.new_tokens


class Asking(NamedTuple):
    """Questions in one setting. `groups`: id -> group; `own_name`: the model's own name of a question's image."""

    setting: QuestionSetting
    questions: Sequence[ChoiceQuestion]
    groups: Mapping[str, int]
    root: Path
    own_name: Callable[[ChoiceQuestion], str] | None = None


def kind_of(setting: QuestionSetting) -> str:
    """The kind of run: multiple-choice questions, or those of a general benchmark."""
    return "vqa" if setting.form == "vqa" else "questions"


class QuestionModel(Protocol):
    """What LocalModel and ApiModel have in common."""

    def name(self, task: Evaluation) -> str:
        """The default name of a run."""

    def config(self, task: Evaluation, setting: QuestionSetting, **more: Any) -> dict[str, Any]:
        """The configuration of the run of a setting."""

    def answer(self, run: Run, asking: Asking, batch_size: int) -> None:
        """Answer what a run has no row for."""


def load_model(args: AnswerArgs) -> QuestionModel:
    """The model of the arguments. Raises UserError for an unknown one, and for a missing key."""
    is_registered = args.model in MODELS and MODELS[args.model].kind == "api"
    is_local = args.weights is not None or args.model in {one.source for one in MODELS.values() if one.kind == "vlm"}
    is_api = bool(args.base_url) or is_registered or (args.model.startswith(PROVIDERS) and not is_local)
    return ApiModel(args) if is_api else LocalModel(args)


class LocalModel:
    """A vision-language model on this machine, which is loaded when there is something to answer."""

    def __init__(self, args: AnswerArgs) -> None:
        from vlmclassifier.devices import resolve_device, resolve_dtype

        self.args, spec = args, find_model(args.model, "vlm")
        self.checkpoint = checkpoint_folder(spec, args.weights)
        self.adapter = read_adapter(args.adapter, spec, self.checkpoint)
        self.spec = self.adapter.spec(spec) if self.adapter else spec
        device = resolve_device(args.device)
        self.dtype, self.default_dtype = resolve_dtype(args.dtype, device), resolve_dtype("auto", device)
        self.vlm: VLM | None = None

    def name(self, task: Evaluation) -> str:
        """The default name of a run."""
        return run_name(self.spec, task, self.checkpoint, self.adapter)

    def config(self, task: Evaluation, setting: QuestionSetting, **more: Any) -> dict[str, Any]:
        """The configuration of the run of a setting."""
        length = self.args.new_tokens(setting)
        is_default = length == replace(self.args, max_new_tokens=None).new_tokens(setting)
        tags = [] if is_default or setting.is_ranked else [f"{length} tokens"]
        return run_config(
            "answer", kind_of(setting), self.spec, task, checkpoint=self.checkpoint, adapter=self.adapter,
            template=template_of(self.spec), default_dtype=self.default_dtype, dtype=self.dtype, max_new_tokens=length,
            tags=tags, **more,
        ) | setting.config  # fmt: skip

    def answer(self, run: Run, asking: Asking, batch_size: int) -> None:
        """Answer what a run has no row for."""
        from vlmclassifier.answering import Answerer
        from vlmclassifier.finetuning.weights import load_adapter
        from vlmclassifier.vlm import load_vlm

        if self.vlm is None:
            self.vlm = load_vlm(self.args.model, self.checkpoint, self.args.device, self.args.dtype)
            load_adapter(self.vlm, self.adapter)
        answerer = Answerer(
            self.vlm, asking.setting, asking.root, asking.groups, self.args.new_tokens(asking.setting), asking.own_name
        )
        answerer.check_context(asking.questions)
        with cli.progress([run], f"{self.spec.key}, {asking.setting.name}") as update:
            for _ in answerer.answer_pending(run, asking.questions, batch_size):
                update()


class ApiModel:
    """A model behind an API."""

    def __init__(self, args: AnswerArgs) -> None:
        from vlmclassifier.api import check_base_url

        if args.adapter:
            raise UserError("--adapter is for local models: serve a merged checkpoint (merge.py) instead.")
        if args.base_url:
            check_base_url(args.base_url)
        self.args, self.spec = args, find_api(args.model, args.model_id, args.base_url)
        self.apis: dict[int, Api] = {}
        self._api(args.max_new_tokens or 1)  # a missing key is reported before anything is written

    def _api(self, length: int) -> "Api":
        """The client with a token limit."""
        from vlmclassifier.api import Settings, load_api

        settings = Settings(
            length, self.args.temperature, self.args.timeout, image_first=self.args.image_first
        )  # fmt: skip
        if length not in self.apis:
            self.apis[length] = load_api(self.spec, settings, self.args.base_url, self.args.key_variable)
        return self.apis[length]

    def name(self, task: Evaluation) -> str:
        """The default name of a run."""
        return run_name(self.spec, task)

    def config(self, task: Evaluation, setting: QuestionSetting, **more: Any) -> dict[str, Any]:
        """The configuration of the run of a setting. Raises UserError for one that needs log-probabilities."""
        if setting.is_ranked:
            raise UserError("APIs give no log-probabilities of whole texts: leave out --form rank_...")
        registered = MODELS.get(self.spec.key)
        tags = [str(self.spec.source)] if registered and self.spec.source != registered.source else []
        tags += [f"at {urlsplit(self.args.base_url).netloc}"] if self.args.base_url else []
        return run_config(
            "answer", kind_of(setting), self.spec, task, provider=self.spec.provider, model_id=self.spec.source,
            base_url=self.args.base_url, temperature=self.args.temperature, tags=tags, max_side=self.args.max_side,
            image_format=self.args.image_format, image_first=self.args.image_first,
            max_new_tokens=self.args.new_tokens(setting), **more,
        ) | setting.config  # fmt: skip

    def answer(self, run: Run, asking: Asking, batch_size: int) -> None:
        """Send what a run has no row for, after an estimate of its cost."""
        from vlmclassifier.api import encode_image
        from vlmclassifier.api.costs import ANSWER_TOKENS, THOUGHT_TOKENS, estimated_usage, recorded_usage
        from vlmclassifier.api.setting_run import SAMPLE_SIZE, send_pending
        from vlmclassifier.images import image_sizes

        setting, of_id = asking.setting, {question.id: question for question in asking.questions}
        pending = [question for question in asking.questions if question.id not in run.done]
        sizes = []
        if setting.has_image:
            sizes = image_sizes([str(image_file(asking.root, question)) for question in pending[:SAMPLE_SIZE]])
        prompts = [self._prompt(asking, question) for question in pending]
        tokens = THOUGHT_TOKENS if setting.has_thought else ANSWER_TOKENS
        usage = estimated_usage(
            str(self.spec.provider), prompts, sizes, self.args.max_side, recorded_usage(read_rows(run.folder)), tokens
        )
        print(f"Estimate, {self.spec.source}: {usage.sentence(self.spec.prices)}", flush=True)
        api = self._api(self.args.new_tokens(setting))

        def answer(question_id: str) -> Prediction:
            question, image = of_id[question_id], None
            if setting.has_image:
                opened = open_image(image_file(asking.root, question), asking.root, question.row)
                image = encode_image(opened, self.args.max_side, self.args.image_format)
            prompt = self._prompt(asking, question)
            text, reply = api.ask(image, prompt)
            return replace(setting.row(question, asking.groups[question.id], prompt, text), reply=reply)

        title = f"{self.spec.key}, {setting.name}"
        send_pending(run, api, answer, self.args.concurrency, title).check()

    def _prompt(self, asking: Asking, question: ChoiceQuestion) -> str:
        text = asking.setting.shown(question, asking.own_name)
        return text + (THOUGHT if asking.setting.has_thought else "")
