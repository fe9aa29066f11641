"""One model behind one server: requests, responses, and the meaning of errors.

The SDKs repeat failed requests themselves, and wait as long as the server's Retry-After header says. Keys are read from
environment variables and are passed only to the SDK's client: the key is removed from every message of an SDK or a
server before it is shown.
"""

import io
import json
import os
import re
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

from PIL import Image

from vlmclassifier.models import ModelSpec
from vlmclassifier.records import Reply, UserError

JPEG_QUALITY = 95
READ_ATTEMPTS = 3  # requests until a response can be parsed: the SDKs do not repeat a request with an invalid response
REFUSALS = (  # in the body of an error 4xx, in lower case: the server refuses this image, others may be answered
    "content_policy", "content_filter", "content management policy", "content filtering policy", "safety system",
    "invalid_prompt", "usage policy", "usage guidelines", "responsibleaipolicy", "data_inspection_failed",
    "datainspectionfailed", "inappropriate content", "was flagged", "flagged_input", "moderation",
)  # fmt: skip
NO_REFUSAL = (401, 404, 408, 429)  # what these mean is not about the image
# Errors that do not pass with time, unlike a rate limit.
QUOTA_EXHAUSTED = ("insufficient_quota", "credit balance is too low")
KEY = re.compile(r"[!-~]+")  # the characters that an HTTP header can contain
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class TransientError(Exception):
    """A request failed for a reason that may pass: the next call of the same command sends the image again."""


@dataclass(frozen=True)
class Settings:
    """Options of the requests."""

    max_new_tokens: int | None = None  # None: the server's default
    temperature: float | None = None  # None: the server's default
    timeout: float = 120.0  # seconds: for the headers of a response, between two pieces of it, and for its whole body
    retries: int = 5
    reasoning_effort: str | None = None  # None: the server's default
    image_first: bool = False  # before the question, as local models are asked; of OpenAI's interface
    json_schema: dict[str, Any] | None = None  # the form of the answer; Anthropic's interface is not told it


class Api:
    """One model behind one server. `ask` may be called from several threads at once."""

    default_url = ""  # of the provider's own server
    key_variables: tuple[str, ...] = ()  # environment variables that may contain the provider's key

    def __init__(
        self, spec: ModelSpec, settings: Settings, base_url: str | None, key_variable: str | None, keyless: bool
    ) -> None:
        self.model, self.settings = str(spec.source), settings
        self.base_url = base_url or self.default_url
        self.host = urlsplit(self.base_url).netloc.rpartition("@")[2]
        self.key_variable, self._key = "", ""
        self.has_answered = False  # whether the server has accepted the key for some image
        if not keyless:
            self.key_variable, self._key = find_key(self, base_url, key_variable)
        self.client = self.connect()

    def ask(self, image: bytes | None, question: str) -> tuple[str, Reply]:
        """The answer to one question about one image (JPEG or PNG), or about none, with the response's other values.

        Raises TransientError when this image has to be sent again later, and UserError when every image would fail.
        """
        for attempt in range(1, READ_ATTEMPTS + 1):
            try:
                response = self.send(image, question)
            except Exception as error:  # every SDK has its own exception types
                refusal = self.interpret_error(error)
                if refusal is not None:
                    return "", refusal
                parsing_error = error
            else:
                self.has_answered = True
                try:
                    return self.parse(response)
                except Exception as error:  # a server may send JSON of any structure
                    parsing_error = error
            if attempt < READ_ATTEMPTS:
                time.sleep(min(1.0, self.settings.timeout))
        is_not_json = isinstance(parsing_error, json.JSONDecodeError) and parsing_error.pos == 0
        text = parsing_error.doc.strip() if is_not_json else ""
        if text and self.base_url != self.default_url:  # a web page, of a proxy or of another kind of server
            raise UserError(
                f"{self.base_url} returns something other than JSON ({self.redact(text)}): fix --base-url, which ends "
                "in /v1 for OpenAI-compatible servers, or --provider; recorded answers are kept."
            )
        raise TransientError(f"the response cannot be read ({self.redact(parsing_error)})")

    def interpret_error(self, error: Exception) -> Reply | None:
        """The meaning of an SDK's exception: a reply if the server refuses this image, None for an invalid response.

        Raises TransientError or UserError for all other exceptions.
        """
        codes = (getattr(error, "status_code", None), getattr(error, "code", None))
        status = next((code for code in codes if isinstance(code, int)), None)
        message = self.redact(error)
        # The code of OpenAI's errors is more specific than the message; other servers have details in the body only.
        full_text = f"{error} {codes[1]} {getattr(error, 'body', '')}"
        if isinstance(error, ValueError) and status is None:
            return None
        is_about_the_account = status == 403 and "account" in full_text.lower()
        is_about_the_image = status is not None and 400 <= status < 500 and status not in NO_REFUSAL
        if is_about_the_image and not is_about_the_account and is_refusal(full_text):
            return Reply("refusal", self.model, 0, 0)
        is_key_refused = status == 401 or "API_KEY_INVALID" in full_text or "API key not valid" in full_text
        is_key_refused |= status == 403 and not self.has_answered  # later, it is about this image
        if is_key_refused and not self.key_variable:
            raise UserError(
                f"{self.host} requires a key ({status}: {message}): set an environment variable to the key and pass "
                "the name of the variable with --key-variable; recorded answers are kept."
            ) from None
        if is_key_refused:
            raise UserError(
                f"{self.host} refuses the key ({status}: {message}): set the environment variable {self.key_variable} "
                "to a valid key and run the same command again; recorded answers are kept."
            ) from None
        if status == 404:
            if self.base_url == self.default_url:
                hint = "the paper's models are retired"
            else:
                hint = "or fix --base-url, which ends in /v1 for OpenAI-compatible servers"
            raise UserError(
                f"{self.host} has no model {self.model} (404: {message}): choose a model of the server with "
                f"--model-id; {hint}."
            ) from None
        if any(phrase in full_text for phrase in QUOTA_EXHAUSTED):
            raise UserError(
                f"The credit of the account at {self.host} is used up ({status}: {message}): add credit and run the "
                "same command again; recorded answers are kept."
            ) from None
        error_type = type(error).__name__
        prefix = f"no connection to {self.host}: " if error_type in ("APIConnectionError", "ConnectError") else ""
        raise TransientError(f"{prefix}{status or error_type}: {message}") from None

    def to_dict(self, response: Any) -> dict[str, Any]:
        """The SDK's response as plain values. Raises JSONDecodeError for a text that is not JSON."""
        if isinstance(response, str):
            raise json.JSONDecodeError("no JSON", response, 0)
        return response.model_dump(mode="json", warnings=False)

    def redact(self, message: object) -> str:
        """The first 200 characters of a message of an SDK or a server, without the key."""
        text = str(message).replace(self._key, "[key]") if self._key else str(message)
        return " ".join(text.split())[:200]

    def connect(self) -> Any:
        """Create the SDK's client."""
        raise NotImplementedError

    def request(self, image: bytes | None, question: str) -> dict[str, Any]:
        """The arguments of the SDK's call for one question about one image."""
        raise NotImplementedError

    def send(self, image: bytes | None, question: str) -> Any:
        """Send a request to the server and return the response."""
        raise NotImplementedError

    def parse(self, response: Any) -> tuple[str, Reply]:
        """The text and the other values of a response. Raises any exception for an unexpected structure."""
        raise NotImplementedError


def check_base_url(url: str) -> None:
    """Raise UserError for an invalid address of a server, and for one that holds something secret."""
    try:
        address = urlsplit(url)
        address.port  # noqa: B018 - raises for an invalid one
    except ValueError as error:
        raise UserError(f"--base-url {url} is no address ({error}): write it as http://HOST:PORT/v1.") from None
    if address.scheme not in ("http", "https") or not address.netloc:
        raise UserError(f"--base-url {url} is no address: write it as http://HOST:PORT/v1.")
    if "@" in address.netloc or set(parse_qs(address.query)) - {"api-version"}:
        raise UserError(
            "--base-url holds a name, a key or a query, which would be written down: put the key into an environment "
            "variable and name that with --key-variable."
        )


def find_key(api: Api, base_url: str | None, key_variable: str | None) -> tuple[str, str]:
    """The name and the value of the environment variable with the key; both empty if no key is sent.

    A server other than the provider's gets a key only if `key_variable` is given. Raises UserError when the variable is
    not set, or when its value or `key_variable` is malformed.
    """
    if key_variable and not VARIABLE.fullmatch(key_variable):  # it may be the key itself, so it is not shown
        raise UserError("--key-variable must be the name of an environment variable, such as MY_KEY, not the key.")
    names = () if base_url else api.key_variables
    if key_variable:
        names = (key_variable,)
    for name in names:
        value = os.environ.get(name, "").strip()
        if not value:
            continue
        if not KEY.fullmatch(value):
            raise UserError(
                f"The environment variable {name} contains white space or other characters that no key has: set it to "
                "the key alone."
            )
        return name, value
    if key_variable:
        raise UserError("The environment variable given with --key-variable is not set: set it to the key.")
    if names:
        raise UserError(
            f"The environment variable {' or '.join(names)} is not set: set it to the key for {api.host} (keys are "
            "never read from a file or an argument)."
        )
    return "", ""


def is_refusal(message: str) -> bool:
    """Whether the body of an error means that the server refuses to answer about this image."""
    return any(phrase in message.lower() for phrase in REFUSALS)


def make_reply(
    text: str, is_refused: bool, is_truncated: bool, model: str, input_tokens: int, output_tokens: int
) -> Reply:
    """The values of a response other than its text, in the same form for all servers."""
    if is_refused:
        finish = "refusal"
    elif is_truncated:  # also without a text: a reasoning model has spent all tokens on its thought
        finish = "length"
    else:
        finish = "stop" if text.strip() else "empty"
    return Reply(finish, model, input_tokens, output_tokens)


def encode_image(image: Image.Image, max_side: int, image_format: str = "jpeg") -> bytes:
    """An upright RGB image as JPEG, or as PNG without loss, whose longer side has at most `max_side` pixels."""
    image = image.copy()
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)  # never enlarges
    stream = io.BytesIO()
    if image_format == "png":
        image.save(stream, "PNG")
    else:
        image.save(stream, "JPEG", quality=JPEG_QUALITY)
    return stream.getvalue()


def media_type(image: bytes) -> str:
    """The media type of an encoded image."""
    return "image/png" if image.startswith(b"\x89PNG") else "image/jpeg"
