"""A local HTTP server that speaks the three APIs' languages and misbehaves as it is told; for the tests of APIs."""

import hashlib
import json
import socket
import struct
import threading
import time
from base64 import b64decode
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-test-3f9a1c77d2e84b60"  # the only key that it takes


class Server:
    """`plan(number of the call for this picture)` says what happens: "ok", 429, 500, "reset", ...; counts the calls."""

    def __init__(self, plan=lambda picture, call: "ok", text="a photo of a cat") -> None:
        self.plan, self.text, self.redirect = plan, text, ""
        self.calls, self.answered = Counter(), Counter()  # by picture: a hash of its bytes
        self.questions, self.keys, self.at_once, self.most = {}, set(), 0, 0
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"server_state": self}))
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error) -> None:
        self.http.shutdown()
        self.http.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: Server

    def log_message(self, *words) -> None:
        """Quiet."""

    def do_POST(self) -> None:
        state = self.server_state
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = (self.headers.get("x-goog-api-key") or self.headers.get("x-api-key")
               or self.headers.get("Authorization", "").removeprefix("Bearer "))  # fmt: skip
        question, jpeg = parts_of(body)
        picture = hashlib.sha256(jpeg).hexdigest()[:12]
        with state.lock:
            state.keys.add(key)
            state.questions[picture] = question
            state.calls[picture] += 1
            number = state.calls[picture]
            state.at_once += 1
            state.most = max(state.most, state.at_once)
        try:
            self.act(state.plan(picture, number), body, key, picture)
        except (BrokenPipeError, ConnectionResetError):  # a client that has given up
            self.close_connection = True
        finally:
            with state.lock:
                state.at_once -= 1

    def act(self, deed, body: dict, key: str, picture: str) -> None:
        state = self.server_state
        if deed == "wrong key":
            self.send(401, error_of(self.path, 401, f"Incorrect API key provided: {key}"))
        elif deed == "unknown model":
            self.send(404, error_of(self.path, 404, "no such model"))
        elif deed == "used up":  # each in its own words
            words = {
                "openai": (
                    429,
                    "You exceeded your current quota, please check your plan and billing details.",
                    "insufficient_quota",
                ),
                "anthropic": (400, "Your credit balance is too low to access the Anthropic API.", ""),
            }
            status, text, code = words["anthropic" if self.path.startswith("/v1/messages") else "openai"]
            self.send(status, error_of(self.path, status, text, code=code))
        elif deed == "per minute":  # a limit that passes speaks of the bill too
            text = "You exceeded your current quota, please check your plan and billing details."
            body = json.loads(error_of(self.path, 429, text, code="rate_limit_exceeded"))
            if "generateContent" in self.path:
                info = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "1s"}
                body["error"]["details"] = [info]
            self.send(429, json.dumps(body).encode())
        elif deed == "policy":
            words = (
                "Output blocked by content filtering policy"
                if self.path.startswith("/v1/messages")
                else ("rejected by the safety system")
            )
            self.send(400, error_of(self.path, 400, words, code="content_policy_violation"))
        elif deed == "half a character":
            self.send(200, json.dumps(answer_of(self.path, body, "ok", "a cat \ud83d")).encode())
        elif isinstance(deed, tuple):  # 429 with a Retry-After
            self.send(deed[0], error_of(self.path, deed[0], "slow down"), {"Retry-After": str(deed[1])})
        elif isinstance(deed, int):
            more = {"Location": f"{state.redirect}{self.path}"} if state.redirect else {}
            self.send(deed, error_of(self.path, deed, f"trouble with {key}"), more)
        elif deed == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        elif deed == "hang":
            time.sleep(3)
            self.close_connection = True
        elif deed == "malformed":
            self.send(200, b'{"choices": [{"mess')
        elif deed == "web page":
            self.send(200, b"<html><title>Log in</title></html>", {"Content-Type": "text/html"})
        elif deed == "nonsense":
            self.send(200, b'{"hello": "world"}')
        elif deed == "drip":  # a byte at a time, for ever: every single one comes in time
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", "100000")
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.05)
            self.close_connection = True
        else:
            answer = json.dumps(answer_of(self.path, body, deed, state.text)).encode()
            self.send(200, answer, slowly=deed == "slow")
            with state.lock:
                state.answered[picture] += 1

    def send(self, status: int, body: bytes, more: dict | None = None, slowly: bool = False) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": len(body)} | (more or {})).items():
            self.send_header(name, str(value))
        self.end_headers()
        step = max(1, len(body) // 10) if slowly else len(body)
        for start in range(0, len(body), step):
            self.wfile.write(body[start : start + step])
            self.wfile.flush()
            if slowly:
                time.sleep(0.03)


def parts_of(body: dict) -> tuple[str, bytes]:
    """The question and the picture of a request in any of the three languages."""
    if "contents" in body:
        parts = body["contents"][0]["parts"]
        data = next(part["inlineData"]["data"] for part in parts if "inlineData" in part)
        data += "=" * (-len(data) % 4)
        return parts[0]["text"], b64decode(data.replace("-", "+").replace("_", "/"))
    content = body["messages"][0]["content"]
    text = next(part["text"] for part in content if part["type"] == "text")
    picture = next(part for part in content if part["type"] != "text")
    data = picture["source"]["data"] if "source" in picture else picture["image_url"]["url"].split(",", 1)[1]
    return text, b64decode(data)


def answer_of(path: str, body: dict, deed: str, text: str) -> dict:
    """A response in the language of the path: "ok", "empty", "refusal" or "cut"."""
    said = {"empty": "", "refusal": "I cannot help with that."}.get(deed, text)
    if path.startswith("/v1/messages"):
        reason = {"refusal": "refusal", "cut": "max_tokens"}.get(deed, "end_turn")
        return {"id": "m", "type": "message", "role": "assistant", "model": body["model"], "stop_reason": reason,
                "content": [{"type": "text", "text": said}], "stop_sequence": None,
                "usage": {"input_tokens": 100, "output_tokens": 7}}  # fmt: skip
    if "generateContent" in path:
        usage = {"promptTokenCount": 100, "candidatesTokenCount": 5, "thoughtsTokenCount": 2, "totalTokenCount": 107}
        if deed == "refusal":
            return {
                "promptFeedback": {"blockReason": "PROHIBITED_CONTENT"},
                "usageMetadata": usage,
                "modelVersion": "g",
            }
        reason = "MAX_TOKENS" if deed == "cut" else "STOP"
        candidate = {"content": {"role": "model", "parts": [{"text": said}]}, "finishReason": reason}
        return {"candidates": [candidate], "usageMetadata": usage, "modelVersion": "g"}
    message = {"role": "assistant", "content": None if deed == "refusal" else said}
    message |= {"refusal": said} if deed == "refusal" else {}
    reason = "length" if deed == "cut" else "stop"
    return {"id": "c", "object": "chat.completion", "created": 0, "model": body["model"],
            "choices": [{"index": 0, "finish_reason": reason, "message": message}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}}  # fmt: skip


def error_of(path: str, status: int, message: str, code: str | None = None) -> bytes:
    """An error in the language of the path."""
    if "generateContent" in path:
        values = {"error": {"code": status, "message": f"{message} {code or ''}", "status": "FAILED"}}
    elif path.startswith("/v1/messages"):
        values = {"type": "error", "error": {"type": "some_error", "message": f"{message} {code or ''}"}}
    else:
        values = {"error": {"message": message, "type": "some_error", "code": code}}
    return json.dumps(values).encode()
