"""The HTTP client of the SDKs: a time limit for a whole response, no redirects, Retry-After."""

import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx2

MAX_RETRY_AFTER = 120  # seconds; a longer Retry-After is ignored, as by the SDKs of OpenAI and Anthropic


def bounded_client(timeout: float, wait_for_retry_after: bool = False) -> "httpx2.Client":
    """An HTTP client with a time limit for the whole body of a response, in seconds.

    Without it, a server that sends byte by byte would block a request forever. The client follows no redirects, because
    they would send the key to another host. `wait_for_retry_after`: wait as long as a Retry-After says before the SDK
    receives the response.
    """
    import httpx2

    class BoundedClient(httpx2.Client):
        def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
            deadline = time.monotonic() + timeout
            try:
                response = super().send(request, stream=True, **(options | {"follow_redirects": False}))
                try:
                    body = read_until(deadline, response, request)
                finally:
                    response.close()
            except (httpx2.NetworkError, httpx2.RemoteProtocolError) as error:
                # Google's SDK repeats requests after a failed connection, but not after a lost one.
                raise httpx2.ConnectError(str(error), request=request) from error
            if wait_for_retry_after and response.status_code in (429, 503):
                wait_for_retry(response.headers.get("retry-after") or retry_delay(body))
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

    return BoundedClient(timeout=timeout)


def retry_delay(body: bytes) -> str | None:
    """The seconds in the body of a Google error, which has {"retryDelay": "34s"} among its details; None: no delay."""
    try:
        for detail in json.loads(body)["error"]["details"]:
            if "retryDelay" in detail:
                return str(detail["retryDelay"]).removesuffix("s")
    except (ValueError, LookupError, TypeError):
        pass
    return None


def wait_for_retry(seconds: str | None, sleep: Callable[[float], None] = time.sleep) -> None:
    """Wait for a Retry-After in seconds. For a Retry-After with a date, the SDK waits for its own delay instead."""
    try:
        delay = float(seconds or 0)
    except ValueError:
        return
    if 0 < delay <= MAX_RETRY_AFTER:
        sleep(delay)
