"""One class per official SDK: how a picture and a question become a request, and what a response says.

The SDKs retry by themselves and wait as long as a server's Retry-After says. Keys come from the environment and go into
the SDK's client, nowhere else: every message from outside is searched for the key before it is passed on.
"""

import base64
import io
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from PIL import Image

from vlmclassifier.models import ModelSpec
from vlmclassifier.records import Reply, UserError

if TYPE_CHECKING:
    import httpx2

JPEG_QUALITY = 95
LONGEST_WAIT = 120  # seconds of a Retry-After that are waited for, as in the SDKs of OpenAI and Anthropic
READINGS = 3  # a response that is not the promised JSON is asked for again; the SDKs themselves take it for an answer
REFUSALS = (  # in an error 400
    "content_policy", "content_filter", "content management policy", "content filtering policy", "safety system",
    "invalid_prompt", "usage policy",
)  # fmt: skip
USED_UP = ("insufficient_quota", "credit balance is too low")  # no waiting helps; a limit per minute has other words
KEY = re.compile(r"[!-~]+")  # what a header can hold
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class NoAnswer(Exception):
    """One picture got no answer, for a reason that may pass: it is left for the next call of the same command."""


@dataclass(frozen=True)
class Settings:
    """How a server is asked."""

    max_new_tokens: int | None = None  # None: the server's own limit
    temperature: float | None = None  # None: the server's own
    timeout: float = 120.0  # seconds: for the head of a response between two pieces of it, for its body as a whole
    retries: int = 5


class Api:
    """One model behind one server; `ask` may be called from several threads at once."""

    url = ""  # where the provider's own server is
    variables: tuple[str, ...] = ()  # environment variables that may hold its key

    def __init__(
        self, spec: ModelSpec, settings: Settings, base_url: str | None, key_variable: str | None, keyless: bool
    ) -> None:
        self.model, self.settings = str(spec.source), settings
        self.base_url = base_url or self.url
        self.host = urlsplit(self.base_url).netloc.rpartition("@")[2]
        self.variable, self._key = "", ""
        if not keyless:
            self.variable, self._key = find_key(self, base_url, key_variable)
        self.client = self.connect()

    def ask(self, jpeg: bytes, question: str) -> tuple[str, Reply]:
        """The answer to one question about one picture, and what came with it.

        Raises NoAnswer when this picture has to wait for another time, UserError when no picture would do better.
        """
        for attempt in range(1, READINGS + 1):
            try:
                response = self.send(jpeg, question)
            except Exception as error:  # every SDK has its own kinds
                refused = self.explain(error)
                if refused is not None:
                    return "", refused
                unreadable = error
            else:
                try:
                    return self.read(response)
                except Exception as error:  # a server may answer anything, in any shape
                    unreadable = error
            if attempt < READINGS:
                time.sleep(min(1.0, self.settings.timeout))
        page = isinstance(unreadable, json.JSONDecodeError) and unreadable.pos == 0 and unreadable.doc.strip()
        if page and self.base_url != self.url:  # a web page, of a proxy or of another server
            raise UserError(
                f"{self.base_url} answers with something else than JSON ({self.clean(page)}): mend --base-url, "
                "which ends in /v1 at servers that speak OpenAI's language, or --provider; what is recorded stays."
            )
        raise NoAnswer(f"the response cannot be read ({self.clean(unreadable)})")

    def explain(self, error: Exception) -> Reply | None:
        """What an SDK's error means: a refusal of this picture is a reply, an unreadable response is None.

        Raises NoAnswer or UserError for all others.
        """
        codes = (getattr(error, "status_code", None), getattr(error, "code", None))
        status = next((code for code in codes if isinstance(code, int)), None)
        text = self.clean(error)
        words = f"{error} {codes[1]}"  # of OpenAI's the code says more than the message
        if isinstance(error, ValueError) and status is None:
            return None
        refused = status in (401, 403) or "API_KEY_INVALID" in words or "API key not valid" in words
        if refused and not self.variable:
            raise UserError(
                f"{self.host} wants a key ({status}: {text}): put it into an environment variable and name that with "
                "--key-variable; what is recorded stays."
            ) from None
        if refused:
            raise UserError(
                f"{self.host} refuses the key ({status}: {text}): set the environment variable {self.variable} to a "
                "valid one and run the same command again; what is recorded stays."
            ) from None
        if status == 404:
            remedy = "the paper's models are retired" if self.base_url == self.url else (
                "or mend --base-url, which ends in /v1 at servers that speak OpenAI's language")  # fmt: skip
            raise UserError(
                f"{self.host} does not know the model {self.model} (404: {text}): name one that it serves with "
                f"--model-id; {remedy}."
            ) from None
        if any(word in words for word in USED_UP):
            raise UserError(
                f"The account at {self.host} is used up ({status}: {text}): fill it and run the same command again; "
                "what is recorded stays."
            ) from None
        if status == 400 and is_refusal(words):
            return Reply("refusal", self.model, 0, 0)
        kind = type(error).__name__
        reached = f"no connection to {self.host}: " if kind in ("APIConnectionError", "ConnectError") else ""
        raise NoAnswer(f"{reached}{status or kind}: {text}") from None

    def dump(self, response: Any) -> dict[str, Any]:
        """The SDK's response as plain values. Raises JSONDecodeError where it is the text of something else."""
        if isinstance(response, str):
            raise json.JSONDecodeError("no JSON", response, 0)
        return response.model_dump(mode="json")

    def clean(self, error: object) -> str:
        """The first words of a message from outside, without the key."""
        text = str(error).replace(self._key, "[key]") if self._key else str(error)
        return " ".join(text.split())[:200]

    def connect(self) -> Any:
        """The SDK's client."""
        raise NotImplementedError

    def request(self, jpeg: bytes, question: str) -> dict[str, Any]:
        """What the SDK's call is given."""
        raise NotImplementedError

    def send(self, jpeg: bytes, question: str) -> Any:
        """Call the server."""
        raise NotImplementedError

    def read(self, response: Any) -> tuple[str, Reply]:
        """The text of a response, and what came with it."""
        raise NotImplementedError


class OpenAI(Api):
    """OpenAI's chat completions, which many other servers speak."""

    url = "https://api.openai.com/v1"
    variables = ("OPENAI_API_KEY",)

    def connect(self) -> Any:
        import openai

        s = self.settings
        return openai.OpenAI(api_key=self._key or "none", base_url=self.base_url, max_retries=s.retries,
                             timeout=s.timeout, http_client=patient_client(s.timeout))  # fmt: skip

    def request(self, jpeg: bytes, question: str) -> dict[str, Any]:
        data = base64.b64encode(jpeg).decode()
        picture = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}
        content = [{"type": "text", "text": question}, picture]
        # Reasoning models want the newer word, other servers may know only the older one.
        limit = "max_completion_tokens" if self.base_url == self.url else "max_tokens"
        more = {limit: self.settings.max_new_tokens, "temperature": self.settings.temperature}
        more = {name: value for name, value in more.items() if value is not None}
        return {"model": self.model, "messages": [{"role": "user", "content": content}]} | more

    def send(self, jpeg: bytes, question: str) -> Any:
        return self.dump(self.client.chat.completions.create(**self.request(jpeg, question)))

    def read(self, response: dict[str, Any]) -> tuple[str, Reply]:
        """Also of a line in the results of a batch."""
        choice, usage = response["choices"][0], response.get("usage") or {}
        message, reason = choice["message"], choice.get("finish_reason")
        refused = bool(message.get("refusal")) or reason == "content_filter"
        text = message.get("content") or message.get("refusal") or ""
        tokens = (usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0)
        return text, reply(text, refused, reason == "length", response.get("model") or self.model, *tokens)


class Anthropic(Api):
    """Anthropic's messages."""

    url = "https://api.anthropic.com"
    variables = ("ANTHROPIC_API_KEY",)
    max_new_tokens = 1024  # the server wants a limit: the paper's

    def connect(self) -> Any:
        import anthropic

        s = self.settings
        return anthropic.Anthropic(api_key=self._key or "none", base_url=self.base_url, max_retries=s.retries,
                                   timeout=s.timeout, http_client=patient_client(s.timeout))  # fmt: skip

    def request(self, jpeg: bytes, question: str) -> dict[str, Any]:
        source = {"type": "base64", "media_type": "image/jpeg", "data": base64.b64encode(jpeg).decode()}
        content = [{"type": "image", "source": source}, {"type": "text", "text": question}]
        more = {} if self.settings.temperature is None else {"temperature": self.settings.temperature}
        limit = self.settings.max_new_tokens or self.max_new_tokens
        return {"model": self.model, "max_tokens": limit, "messages": [{"role": "user", "content": content}]} | more

    def send(self, jpeg: bytes, question: str) -> Any:
        return self.dump(self.client.messages.create(**self.request(jpeg, question)))

    def read(self, response: dict[str, Any]) -> tuple[str, Reply]:
        text = "".join(block["text"] for block in response["content"] if block["type"] == "text")
        reason, usage = response["stop_reason"], response["usage"]
        tokens = (usage["input_tokens"], usage["output_tokens"])
        return text, reply(text, reason == "refusal", reason == "max_tokens", response["model"], *tokens)


class Google(Api):
    """Google's Gemini."""

    url = "https://generativelanguage.googleapis.com"
    variables = ("GOOGLE_API_KEY", "GEMINI_API_KEY")

    def connect(self) -> Any:
        from google import genai

        s = self.settings
        # This SDK retries, but does not read Retry-After: the client waits for it.
        options = genai.types.HttpOptions(
            base_url=self.base_url, timeout=int(1000 * s.timeout), httpx_client=patient_client(s.timeout, waits=True),
            retry_options=genai.types.HttpRetryOptions(attempts=s.retries + 1, initial_delay=0.5, max_delay=8.0),
        )  # fmt: skip
        return genai.Client(api_key=self._key or "none", vertexai=False, http_options=options)

    def request(self, jpeg: bytes, question: str) -> dict[str, Any]:
        from google.genai import types

        s = self.settings
        config = types.GenerateContentConfig(max_output_tokens=s.max_new_tokens, temperature=s.temperature)
        contents = [question, types.Part.from_bytes(data=jpeg, mime_type="image/jpeg")]
        return {"model": self.model, "contents": contents, "config": config}

    def send(self, jpeg: bytes, question: str) -> Any:
        return self.dump(self.client.models.generate_content(**self.request(jpeg, question)))

    def read(self, response: dict[str, Any]) -> tuple[str, Reply]:
        usage, model = response.get("usage_metadata") or {}, response.get("model_version") or self.model
        thinking = usage.get("thoughts_token_count") or 0  # they are paid for as answers are
        tokens = (usage.get("prompt_token_count") or 0, (usage.get("candidates_token_count") or 0) + thinking)
        if not response.get("candidates"):
            if not (response.get("prompt_feedback") or {}).get("block_reason"):
                raise ValueError("neither an answer nor a reason why there is none")
            return "", reply("", True, False, model, *tokens)
        candidate = response["candidates"][0]
        parts = (candidate.get("content") or {}).get("parts") or []
        text = "".join(part.get("text") or "" for part in parts if not part.get("thought"))
        reason = candidate.get("finish_reason")
        refused = reason not in ("STOP", "MAX_TOKENS", None)
        return text, reply(text, refused, reason == "MAX_TOKENS", model, *tokens)


PROVIDERS: dict[str, type[Api]] = {"openai": OpenAI, "anthropic": Anthropic, "google": Google}


def load_api(
    spec: ModelSpec,
    settings: Settings | None = None,
    base_url: str | None = None,
    key_variable: str | None = None,
    keyless: bool = False,
) -> Api:
    """The model of a spec (`models.find_api`) behind its provider's server, or behind the one at `base_url`.

    `keyless`: only requests are written and responses read. Raises UserError where the key is missing.
    """
    return PROVIDERS[str(spec.provider)](spec, settings or Settings(), base_url, key_variable, keyless)


def find_key(api: Api, base_url: str | None, variable: str | None) -> tuple[str, str]:
    """The name and value of the environment variable with the key; at another server none is sent unless named.

    Raises UserError where it is not set.
    """
    if variable and not VARIABLE.fullmatch(variable):  # the key itself, perhaps: it is not repeated
        raise UserError("--key-variable wants the name of an environment variable, such as MY_KEY, not a key.")
    names = (variable,) if variable else () if base_url else api.variables
    for name in names:
        if value := os.environ.get(name, "").strip():
            if not KEY.fullmatch(value):
                raise UserError(
                    f"The environment variable {name} holds white space or other characters that no key has: put the "
                    "key alone there."
                )
            return name, value
    if variable:
        raise UserError("The environment variable that --key-variable names is not set: put the key there.")
    if names:
        raise UserError(
            f"The environment variable {' or '.join(names)} is not set: put the key for {api.host} there (it is never "
            "read from a file or an argument)."
        )
    return "", ""


def is_refusal(words: str) -> bool:
    """Whether an error 400 means that the server will not answer about this picture."""
    return any(word in words for word in REFUSALS)


def reply(text: str, refused: bool, cut: bool, model: str, input_tokens: int, output_tokens: int) -> Reply:
    """What came with an answer, in one form for all servers."""
    finish = "refusal" if refused else "empty" if not text.strip() else "length" if cut else "stop"
    return Reply(finish, model, input_tokens, output_tokens)


def encode_picture(image: Image.Image, max_side: int) -> bytes:
    """An upright RGB picture as JPEG, its longer side at most `max_side` pixels."""
    image = image.copy()
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)  # never enlarges
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=JPEG_QUALITY)
    return stream.getvalue()


def patient_client(timeout: float, waits: bool = False) -> "httpx2.Client":
    """An HTTP client with a limit for a body as a whole: a server that sends byte by byte would hold it for ever.

    It follows no redirect, which would carry the key to another host. `waits`: wait for a Retry-After before the SDK
    sees the response.
    """
    import httpx2

    class Patient(httpx2.Client):
        def send(self, request: Any, *, stream: bool = False, **more: Any) -> Any:
            deadline = time.monotonic() + timeout
            try:
                response = super().send(request, stream=True, **(more | {"follow_redirects": False}))
                try:
                    body = read_until(deadline, response, request)
                finally:
                    response.close()
            except (httpx2.NetworkError, httpx2.RemoteProtocolError) as error:
                # Google's SDK repeats what could not be connected, but not what was cut off.
                raise httpx2.ConnectError(str(error), request=request) from error
            if waits and response.status_code in (429, 503):
                wait_as_told(response.headers.get("retry-after") or delay_in(body))
            headers = [(name, value) for name, value in response.headers.multi_items()
                       if name.lower() not in ("content-encoding", "content-length", "transfer-encoding")]  # fmt: skip
            return httpx2.Response(response.status_code, headers=headers, content=body, request=request)

    def read_until(deadline: float, response: Any, request: Any) -> bytes:
        body = bytearray()
        for chunk in response.iter_bytes():
            body += chunk
            if time.monotonic() > deadline:
                raise httpx2.ReadTimeout(f"the response took longer than {timeout:g} s", request=request)
        return bytes(body)

    return Patient(timeout=timeout)


def delay_in(body: bytes) -> str | None:
    """The seconds that Google's errors name in their body: {"retryDelay": "34s"} among the details."""
    try:
        details = json.loads(body)["error"]["details"]
        return next(str(detail["retryDelay"]).removesuffix("s") for detail in details if "retryDelay" in detail)
    except (ValueError, LookupError, TypeError, StopIteration):
        return None


def wait_as_told(seconds: str | None, sleep: Callable[[float], None] = time.sleep) -> None:
    """Wait for a Retry-After in seconds; its other form, a date, is left to the SDK's own delay."""
    try:
        delay = float(seconds or 0)
    except ValueError:
        return
    if 0 < delay <= LONGEST_WAIT:
        sleep(delay)
