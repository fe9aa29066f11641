"""One class per official SDK: make a request from an image and a question, and parse the response."""

import base64
from typing import Any
from urllib.parse import parse_qs, urlsplit

from vlmclassifier.api.client import Api, Settings, is_refusal, make_reply, media_type
from vlmclassifier.api.http import bounded_client
from vlmclassifier.models import ModelSpec
from vlmclassifier.records import Reply

LIMIT_NAMES = ("max_tokens", "max_completion_tokens")  # of the token limit, by age


class OpenAI(Api):
    """OpenAI's chat completions, whose format many other servers support."""

    default_url = "https://api.openai.com/v1"
    key_variables = ("OPENAI_API_KEY",)

    def connect(self) -> Any:
        import openai

        # OpenAI's reasoning models require the newer name; other servers may support only the older one.
        self.limit_name = "max_completion_tokens" if self.base_url == self.default_url else "max_tokens"
        settings, address = self.settings, urlsplit(self.base_url)
        options = {
            "api_key": self._key or "none", "base_url": address._replace(query="").geturl(),
            "max_retries": settings.retries, "timeout": settings.timeout,
            "http_client": bounded_client(settings.timeout),
        }  # fmt: skip
        version = parse_qs(address.query).get("api-version")
        if version and not address.path.rstrip("/").endswith("/v1"):  # Azure's older form: .../openai/deployments/MODEL
            return openai.AzureOpenAI(api_version=version[0], **options)
        return openai.OpenAI(default_query={"api-version": version[0]} if version else None, **options)

    def request(self, image: bytes | None, question: str) -> dict[str, Any]:
        content: list[dict[str, Any]] = [{"type": "text", "text": question}]
        if image is not None:
            url = f"data:{media_type(image)};base64,{base64.b64encode(image).decode()}"
            place = 0 if self.settings.image_first else len(content)
            content.insert(place, {"type": "image_url", "image_url": {"url": url}})
        arguments = {"model": self.model, "messages": [{"role": "user", "content": content}]}
        if self.settings.max_new_tokens is not None:
            arguments[self.limit_name] = self.settings.max_new_tokens
        if self.settings.temperature is not None:
            arguments["temperature"] = self.settings.temperature
        if self.settings.json_schema is not None:
            schema = {"name": "answer", "strict": True, "schema": self.settings.json_schema}
            arguments["response_format"] = {"type": "json_schema", "json_schema": schema}
        if self.settings.reasoning_effort is not None:
            arguments["reasoning_effort"] = self.settings.reasoning_effort
        return arguments

    def send(self, image: bytes | None, question: str) -> Any:
        import openai

        limit_name = self.limit_name
        try:
            return self.to_dict(self.client.chat.completions.create(**self.request(image, question)))
        except openai.BadRequestError as error:
            other = next(name for name in LIMIT_NAMES if name != limit_name)
            if self.settings.max_new_tokens is None or limit_name not in str(error) or other not in str(error):
                raise
            self.limit_name = other  # for all later requests
            return self.to_dict(self.client.chat.completions.create(**self.request(image, question)))

    def parse(self, response: dict[str, Any]) -> tuple[str, Reply]:
        """The text and the other values of a response, also of one in the results of a batch."""
        if not response.get("choices"):  # some servers send their errors with the status 200
            if is_refusal(str(response.get("error"))):
                return "", make_reply("", True, False, response.get("model") or self.model, 0, 0)
            raise ValueError(f"the server's error: {response.get('error') or response}")
        choice, usage = response["choices"][0], response.get("usage") or {}
        message, reason = choice["message"], choice.get("finish_reason")
        if reason == "error":
            raise ValueError(f"the server ended the answer with an error: {choice.get('error') or message}")
        is_refused = bool(message.get("refusal")) or reason == "content_filter"
        text = message.get("content") or message.get("refusal") or ""
        if isinstance(text, list):  # parts, among which thoughts may be
            text = "".join(part.get("text") or "" for part in text if part.get("type") == "text")
        model = response.get("model") or self.model
        input_tokens, output_tokens = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
        return text, make_reply(text, is_refused, reason == "length", model, input_tokens, output_tokens)


class Anthropic(Api):
    """Anthropic's messages."""

    default_url = "https://api.anthropic.com"
    key_variables = ("ANTHROPIC_API_KEY",)
    max_new_tokens = 1024  # the server requires a limit; this is the paper's

    def connect(self) -> Any:
        import anthropic

        settings = self.settings
        return anthropic.Anthropic(
            api_key=self._key or "none", base_url=self.base_url, max_retries=settings.retries,
            timeout=settings.timeout, http_client=bounded_client(settings.timeout),
        )  # fmt: skip

    def request(self, image: bytes | None, question: str) -> dict[str, Any]:
        content: list[dict[str, Any]] = [{"type": "text", "text": question}]
        if image is not None:
            data = base64.b64encode(image).decode()
            content.insert(0, {"type": "image", "source": {"type": "base64", "media_type": media_type(image),
                                                           "data": data}})  # fmt: skip
        limit = self.settings.max_new_tokens or self.max_new_tokens
        arguments = {
            "model": self.model, "max_tokens": limit, "messages": [{"role": "user", "content": content}],
        }  # fmt: skip
        if self.settings.temperature is not None:
            arguments["temperature"] = self.settings.temperature
        return arguments

    def send(self, image: bytes | None, question: str) -> Any:
        return self.to_dict(self.client.messages.create(**self.request(image, question)))

    def parse(self, response: dict[str, Any]) -> tuple[str, Reply]:
        text = "".join(block["text"] for block in response["content"] if block["type"] == "text")
        reason, usage = response["stop_reason"], response["usage"]
        return text, make_reply(
            text, reason == "refusal", reason == "max_tokens", response["model"], usage["input_tokens"],
            usage["output_tokens"],
        )  # fmt: skip


class Google(Api):
    """Google's Gemini."""

    default_url = "https://generativelanguage.googleapis.com"
    key_variables = ("GOOGLE_API_KEY", "GEMINI_API_KEY")

    def connect(self) -> Any:
        from google import genai

        settings = self.settings
        retry_options = genai.types.HttpRetryOptions(attempts=settings.retries + 1, initial_delay=0.5, max_delay=8.0)
        # This SDK repeats failed requests, but ignores Retry-After, so the HTTP client waits for it.
        options = genai.types.HttpOptions(
            base_url=self.base_url, timeout=int(1000 * settings.timeout), retry_options=retry_options,
            httpx_client=bounded_client(settings.timeout, wait_for_retry_after=True),
        )  # fmt: skip
        return genai.Client(api_key=self._key or "none", vertexai=False, http_options=options)

    def request(self, image: bytes | None, question: str) -> dict[str, Any]:
        from google.genai import types

        form = {}
        if self.settings.json_schema is not None:
            form = {"response_mime_type": "application/json", "response_json_schema": self.settings.json_schema}
        config = types.GenerateContentConfig(
            max_output_tokens=self.settings.max_new_tokens, temperature=self.settings.temperature, **form
        )
        contents = [question]
        if image is not None:
            contents.append(types.Part.from_bytes(data=image, mime_type=media_type(image)))
        return {"model": self.model, "contents": contents, "config": config}

    def send(self, image: bytes | None, question: str) -> Any:
        return self.to_dict(self.client.models.generate_content(**self.request(image, question)))

    def parse(self, response: dict[str, Any]) -> tuple[str, Reply]:
        usage, model = response.get("usage_metadata") or {}, response.get("model_version") or self.model
        input_tokens = usage.get("prompt_token_count") or 0
        output_tokens = usage.get("candidates_token_count") or 0
        output_tokens += usage.get("thoughts_token_count") or 0  # these have the same price
        if not response.get("candidates"):
            if not (response.get("prompt_feedback") or {}).get("block_reason"):
                raise ValueError("the response has neither an answer nor a block reason")
            return "", make_reply("", True, False, model, input_tokens, output_tokens)
        candidate = response["candidates"][0]
        parts = (candidate.get("content") or {}).get("parts") or []
        text = "".join(part.get("text") or "" for part in parts if not part.get("thought"))
        reason = candidate.get("finish_reason")
        is_refused = reason not in ("STOP", "MAX_TOKENS", None)
        return text, make_reply(text, is_refused, reason == "MAX_TOKENS", model, input_tokens, output_tokens)


PROVIDERS: dict[str, type[Api]] = {"openai": OpenAI, "anthropic": Anthropic, "google": Google}


def load_api(
    spec: ModelSpec,
    settings: Settings | None = None,
    base_url: str | None = None,
    key_variable: str | None = None,
    keyless: bool = False,
) -> Api:
    """The model of a spec of `models.find_api`, behind its provider's server or the server at `base_url`.

    `key_variable`: the environment variable with the key. `keyless`: no key is read, because nothing will be sent.
    Raises UserError when the key is missing or malformed.
    """
    return PROVIDERS[str(spec.provider)](spec, settings or Settings(), base_url, key_variable, keyless)
