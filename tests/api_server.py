"""A local HTTP server with the formats of the three APIs, which can simulate errors; for the tests of APIs."""

import hashlib
import json
import socket
import struct
import threading
import time
from base64 import b64decode
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-test-3f9a1c77d2e84b60"  # the key that the tests send


class Server:
    """Counts the requests. `plan(image, request number of this image)` returns a scenario: "ok", 429, "reset", ..."""

    def __init__(self, plan=lambda image, call: "ok", text="a photo of a cat") -> None:
        self.plan, self.text, self.redirect = plan, text, ""
        self.calls, self.answered = Counter(), Counter()  # by image: a hash of its bytes
        self.questions, self.keys = {}, set()
        self.concurrent, self.max_concurrent = 0, 0
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

    def log_message(self, *arguments) -> None:
        """Log nothing."""

    def do_POST(self) -> None:
        state = self.server_state
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = (self.headers.get("x-goog-api-key") or self.headers.get("x-api-key")
               or self.headers.get("Authorization", "").removeprefix("Bearer "))  # fmt: skip
        question, jpeg = parts_of(body)
        image = hashlib.sha256(jpeg or question.encode()).hexdigest()[:12]  # of a question without image: its text
        with state.lock:
            state.keys.add(key)
            state.questions[image] = question
            state.calls[image] += 1
            number = state.calls[image]
            state.concurrent += 1
            state.max_concurrent = max(state.max_concurrent, state.concurrent)
        try:
            self.respond(state.plan(image, number), body, key, image)
        except (BrokenPipeError, ConnectionResetError):  # the client has closed the connection
            self.close_connection = True
        finally:
            with state.lock:
                state.concurrent -= 1

    def respond(self, scenario, body: dict, key: str, image: str) -> None:
        state = self.server_state
        is_anthropic = self.path.startswith("/v1/messages")
        if scenario == "wrong key":
            self.send(401, error_body(self.path, 401, f"Incorrect API key provided: {key}"))
        elif scenario == "unknown model":
            self.send(404, error_body(self.path, 404, "no such model"))
        elif scenario == "used up" and is_anthropic:
            text = "Your credit balance is too low to access the Anthropic API."
            self.send(400, error_body(self.path, 400, text, code=""))
        elif scenario == "used up":
            text = "You exceeded your current quota, please check your plan and billing details."
            self.send(429, error_body(self.path, 429, text, code="insufficient_quota"))
        elif scenario == "per minute":  # a rate limit, whose message mentions the billing details too
            text = "You exceeded your current quota, please check your plan and billing details."
            error = json.loads(error_body(self.path, 429, text, code="rate_limit_exceeded"))
            if "generateContent" in self.path:
                details = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "1s"}
                error["error"]["details"] = [details]
            self.send(429, json.dumps(error).encode())
        elif scenario == "policy":
            text = "Output blocked by content filtering policy" if is_anthropic else "rejected by the safety system"
            self.send(400, error_body(self.path, 400, text, code="content_policy_violation"))
        elif scenario == "half a character":
            self.send(200, json.dumps(answer_body(self.path, body, "ok", "a cat \ud83d")).encode())
        elif isinstance(scenario, dict):  # a response as it is: its status and its body
            self.send(scenario["status"], json.dumps(scenario["body"]).encode())
        elif callable(scenario):  # decides by the request
            self.respond(scenario(self, body), body, key, image)
        elif isinstance(scenario, tuple):  # an error status with a Retry-After
            status, delay = scenario
            self.send(status, error_body(self.path, status, "slow down"), {"Retry-After": str(delay)})
        elif isinstance(scenario, int):
            headers = {"Location": f"{state.redirect}{self.path}"} if state.redirect else {}
            self.send(scenario, error_body(self.path, scenario, f"trouble with {key}"), headers)
        elif scenario == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        elif scenario == "hang":
            time.sleep(3)
            self.close_connection = True
        elif scenario == "malformed":
            self.send(200, b'{"choices": [{"mess')
        elif scenario == "web page":
            self.send(200, b"<html><title>Log in</title></html>", {"Content-Type": "text/html"})
        elif scenario == "unexpected structure":
            self.send(200, b'{"hello": "world"}')
        elif scenario == "byte by byte":  # endless, although every byte arrives within the timeout
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
            answer = json.dumps(answer_body(self.path, body, scenario, state.text)).encode()
            self.send(200, answer, slowly=scenario == "slow")
            with state.lock:
                state.answered[image] += 1

    def send(self, status: int, body: bytes, headers: dict | None = None, slowly: bool = False) -> None:
        self.send_response(status)
        all_headers = {"Content-Type": "application/json", "Content-Length": len(body)} | (headers or {})
        for name, value in all_headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        step = max(1, len(body) // 10) if slowly else len(body)
        for start in range(0, len(body), step):
            self.wfile.write(body[start : start + step])
            self.wfile.flush()
            if slowly:
                time.sleep(0.03)


def parts_of(body: dict) -> tuple[str, bytes]:
    """The question and the image of a request in any of the three formats."""
    if "contents" in body:
        parts = body["contents"][0]["parts"]
        data = next((part["inlineData"]["data"] for part in parts if "inlineData" in part), "")
        data += "=" * (-len(data) % 4)
        return parts[0]["text"], b64decode(data.replace("-", "+").replace("_", "/"))
    content = body["messages"][0]["content"]
    text = next(part["text"] for part in content if part["type"] == "text")
    image = next((part for part in content if part["type"] != "text"), None)
    if image is None:
        return text, b""
    data = image["source"]["data"] if "source" in image else image["image_url"]["url"].split(",", 1)[1]
    return text, b64decode(data)


def answer_body(path: str, body: dict, scenario: str, text: str) -> dict:
    """A response in the format of the path; `scenario`: "ok", "slow", "empty", "refusal" or "truncated"."""
    answer = {"empty": "", "refusal": "I cannot help with that."}.get(scenario, text)
    if path.startswith("/v1/messages"):
        reason = {"refusal": "refusal", "truncated": "max_tokens"}.get(scenario, "end_turn")
        return {"id": "m", "type": "message", "role": "assistant", "model": body["model"], "stop_reason": reason,
                "content": [{"type": "text", "text": answer}], "stop_sequence": None,
                "usage": {"input_tokens": 100, "output_tokens": 7}}  # fmt: skip
    if "generateContent" in path:
        usage = {"promptTokenCount": 100, "candidatesTokenCount": 5, "thoughtsTokenCount": 2, "totalTokenCount": 107}
        if scenario == "refusal":
            return {
                "promptFeedback": {"blockReason": "PROHIBITED_CONTENT"},
                "usageMetadata": usage,
                "modelVersion": "g",
            }
        reason = "MAX_TOKENS" if scenario == "truncated" else "STOP"
        candidate = {"content": {"role": "model", "parts": [{"text": answer}]}, "finishReason": reason}
        return {"candidates": [candidate], "usageMetadata": usage, "modelVersion": "g"}
    if scenario == "refusal":
        message = {"role": "assistant", "content": None, "refusal": answer}
    else:
        message = {"role": "assistant", "content": answer}
    reason = "length" if scenario == "truncated" else "stop"
    return {"id": "c", "object": "chat.completion", "created": 0, "model": body["model"],
            "choices": [{"index": 0, "finish_reason": reason, "message": message}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}}  # fmt: skip


def error_body(path: str, status: int, message: str, code: str | None = None) -> bytes:
    """An error in the format of the path."""
    if "generateContent" in path:
        values = {"error": {"code": status, "message": f"{message} {code or ''}", "status": "FAILED"}}
    elif path.startswith("/v1/messages"):
        values = {"type": "error", "error": {"type": "some_error", "message": f"{message} {code or ''}"}}
    else:
        values = {"error": {"message": message, "type": "some_error", "code": code}}
    return json.dumps(values).encode()
