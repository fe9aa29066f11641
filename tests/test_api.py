"""Protects: errors of servers, through the real SDKs: what is repeated, what is reported and what is recorded."""

import io
import json
import threading
import time

import pytest
from api_server import KEY, Server
from conftest import noise
from PIL import Image

from vlmclassifier.api import Settings, TransientError, check_base_url, encode_image, load_api
from vlmclassifier.api.batches import custom_id, read_batch, write_batches
from vlmclassifier.api.concurrency import MAX_CONSECUTIVE_FAILURES, FailureTracker, run_in_threads
from vlmclassifier.api.costs import Usage, estimated_usage, image_tokens, recorded_usage
from vlmclassifier.models import find_api
from vlmclassifier.records import Prediction, Reply, UserError, prediction_from_line, to_line

PROVIDERS = ("openai", "anthropic", "google")
JPEG = encode_image(noise((60, 40)), 1000)


@pytest.fixture(params=PROVIDERS)
def provider(request, monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)
    return request.param


def connect(provider: str, server: Server, **settings):
    """An API model behind the test server."""
    url = server.url + ("/v1" if provider == "openai" else "")
    spec = find_api("some-model", base_url=url, provider=provider)
    return load_api(spec, Settings(**{"timeout": 5.0, "retries": 2} | settings), url, "TEST_KEY")


@pytest.mark.parametrize(
    ("scenario", "answer", "finish"),
    [
        ("ok", "a photo of a cat", "stop"),
        ("slow", "a photo of a cat", "stop"),
        ("truncated", "a photo of a cat", "length"),
        ("empty", "", "empty"),
        ("refusal", "I cannot help with that.", "refusal"),
        ("policy", "", "refusal"),
    ],
)
def test_responses_are_parsed(provider, scenario, answer, finish):
    with Server(lambda image, call: scenario) as server:
        text, reply = connect(provider, server).ask(JPEG, "What is it?")
    answer = "" if (provider, scenario) == ("google", "refusal") else answer  # Gemini refuses without a text
    assert (text, reply.finish) == (answer, finish)
    assert (reply.input_tokens, reply.output_tokens) == ((0, 0) if scenario == "policy" else (100, 7))
    assert list(server.questions.values()) == ["What is it?"] and sum(server.calls.values()) == 1
    assert server.keys == {KEY}


@pytest.mark.parametrize(
    "scenario", [(429, 1), 429, "per minute", 500, 503, "reset", "malformed", "unexpected structure"]
)
def test_requests_are_repeated_after_transient_errors(provider, scenario):
    with Server(lambda image, call: scenario if call == 1 else "ok") as server:
        start = time.monotonic()
        text, reply = connect(provider, server).ask(JPEG, "What is it?")
    assert (text, reply.finish) == ("a photo of a cat", "stop") and sum(server.calls.values()) == 2
    # A Retry-After header, or the delay in the body of a Google error.
    has_delay = isinstance(scenario, tuple) or (provider, scenario) == ("google", "per minute")
    assert not has_delay or time.monotonic() - start >= 1.0


@pytest.mark.parametrize("scenario", ["hang", "byte by byte"])
def test_slow_responses_time_out(provider, scenario):
    """Also if every single byte arrives within the timeout."""
    with Server(lambda image, call: scenario if call == 1 else "ok") as server:
        text, _ = connect(provider, server, timeout=0.7).ask(JPEG, "What is it?")
        assert text == "a photo of a cat" and sum(server.calls.values()) == 2
    with Server(lambda image, call: scenario) as server, pytest.raises(TransientError, match="(?i)time"):
        connect(provider, server, timeout=0.3, retries=1).ask(JPEG, "What is it?")
    assert sum(server.calls.values()) == 2


REFUSING = [  # by status and body: what servers send about an image that they do not want to see
    (403, {"code": "The caller does not have permission", "error": "Content violates usage guidelines."}),  # xAI
    (403, {"error": {"code": 403, "message": "Your chosen model requires moderation and your input was flagged",
                     "metadata": {"reasons": ["violence"], "flagged_input": "a"}}}),  # OpenRouter
    (400, {"error": {"code": "data_inspection_failed", "message": "Input data may contain inappropriate content."}}),
    (400, {"error": {"code": "content_filter", "innererror": {"code": "ResponsibleAIPolicyViolation"}}}),  # Azure
    (422, {"error": {"message": "blocked by our safety system"}}),
]  # fmt: skip


@pytest.mark.parametrize(("status", "body"), REFUSING)
def test_a_refused_image_is_recorded_as_refused_whatever_the_status(status, body, monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)
    with Server(lambda image, call: {"status": status, "body": body}) as server:
        text, reply = connect("openai", server).ask(JPEG, "What is it?")
    assert (text, reply.finish) == ("", "refusal")


def test_an_account_that_is_blocked_is_no_refused_image(monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)
    body = {"error": {"message": "Your account was flagged for violations of our usage policy"}}
    with Server(lambda image, call: {"status": 403, "body": body}) as server:
        api = connect("openai", server)
        with pytest.raises(UserError, match="refuses the key"):
            api.ask(JPEG, "What is it?")
        api.has_answered = True  # in a run with recorded answers
        with pytest.raises(TransientError, match="403"):
            api.ask(JPEG, "What is it?")
    refused = {"status": 200, "body": {"error": {"code": 403, "message": "your input was flagged"}}}
    with Server(lambda image, call: refused) as server:
        assert connect("openai", server).ask(JPEG, "What is it?")[1].finish == "refusal"


def test_403_is_about_the_key_only_until_the_first_answer(provider):
    with Server(lambda image, call: 403 if call != 2 else "ok") as server:
        api = connect(provider, server, retries=0)
        with pytest.raises(UserError, match="refuses the key"):
            api.ask(JPEG, "What is it?")
        assert api.ask(JPEG, "What is it?")[0] == "a photo of a cat"
        with pytest.raises(TransientError, match="403"):
            api.ask(JPEG, "What is it?")


def completion(content, reason="stop", **more):
    message = {"role": "assistant", "content": content} | more
    choice = {"index": 0, "finish_reason": reason, "message": message}
    usage = {"prompt_tokens": 100, "completion_tokens": 7}
    return {"status": 200, "body": {"model": "m", "choices": [choice], "usage": usage}}


@pytest.mark.parametrize(
    ("response", "text", "finish"),
    [
        (completion([{"type": "text", "text": "a "}, {"type": "text", "text": "cat"}]), "a cat", "stop"),
        (completion([{"type": "thinking", "thinking": "dog?"}, {"type": "text", "text": "cat"}]), "cat", "stop"),
        (completion(None, "length", reasoning_content="daisy, tulip"), "", "length"),
        (completion(None), "", "empty"),
    ],
)
def test_answers_in_other_forms_are_read(response, text, finish, monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)
    with Server(lambda image, call: response) as server:
        answer, reply = connect("openai", server).ask(JPEG, "What is it?")
    assert (answer, reply.finish) == (text, finish) and sum(server.calls.values()) == 1


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ({"status": 200, "body": {"error": {"message": "provider overloaded", "code": 502}}}, "provider overloaded"),
        ({"status": 200, "body": {"choices": [], "model": "m"}}, "the server's error"),
        (completion("half a", "error"), "ended the answer with an error"),
    ],
)
def test_errors_with_status_200_are_repeated_and_their_message_is_shown(response, message, monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)
    with Server(lambda image, call: response if call == 1 else "ok") as server:
        assert connect("openai", server).ask(JPEG, "What is it?")[0] == "a photo of a cat"
    with Server(lambda image, call: response) as server, pytest.raises(TransientError, match=message):
        connect("openai", server, timeout=0.3).ask(JPEG, "What is it?")


@pytest.mark.parametrize("wanted", ["max_completion_tokens", "max_tokens"])
def test_the_name_of_the_token_limit_is_learnt_from_the_server(wanted, monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)
    received = []

    def plan(handler, body):
        received.append(wanted in body)
        other = {"max_tokens", "max_completion_tokens"} & set(body)
        text = f"Unsupported parameter: '{other}' is not supported with this model. Use '{wanted}' instead."
        return "ok" if wanted in body else {"status": 400, "body": {"error": {"message": text, "code": "unsupported"}}}

    with Server(lambda image, call: plan) as server:
        api = connect("openai", server, max_new_tokens=9)
        api.limit_name = next(name for name in ("max_tokens", "max_completion_tokens") if name != wanted)
        for _ in range(2):
            assert api.ask(JPEG, "What is it?")[0] == "a photo of a cat"
    assert received == [False, True, True]


@pytest.mark.parametrize("path", ["/openai/v1", "/openai/deployments/some-model"])
def test_azures_address_keeps_its_version(path, monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)
    paths, efforts = [], []

    def plan(handler, body):
        paths.append(handler.path)
        efforts.append(body.get("reasoning_effort"))
        return "ok"

    with Server(lambda image, call: plan) as server:
        url = f"{server.url}{path}?api-version=2024-10-21"
        check_base_url(url)
        spec = find_api("some-model", base_url=url)
        settings = Settings(timeout=5.0, reasoning_effort="low")
        assert load_api(spec, settings, url, "TEST_KEY").ask(JPEG, "What is it?")[0] == "a photo of a cat"
    assert paths == [f"{path}/chat/completions?api-version=2024-10-21"] and efforts == ["low"]


def test_a_web_page_instead_of_a_response_ends_the_run(provider):
    """The address is wrong, for example without /v1, so repeating the request would not help."""
    message = "something other than JSON"
    with Server(lambda image, call: "web page") as server, pytest.raises(UserError, match=message) as error:
        connect(provider, server).ask(JPEG, "What is it?")
    assert "fix --base-url, which ends in /v1" in str(error.value) and server.url in str(error.value)


def test_a_missing_key_and_an_unreachable_server_are_reported(provider):
    with Server(lambda image, call: 401) as server:
        spec = find_api("x", base_url=server.url, provider=provider)
        message = "127.0.0.1:.* requires a key .*pass the name of the variable with --key-variable"
        with pytest.raises(UserError, match=message):
            load_api(spec, Settings(retries=0), server.url).ask(JPEG, "What is it?")
    with pytest.raises(TransientError, match="no connection to 127.0.0.1:9: "):
        load_api(spec, Settings(retries=0), "http://127.0.0.1:9").ask(JPEG, "What is it?")


@pytest.mark.parametrize("scenario", [400, 500, "reset", "malformed"])
def test_lasting_errors_fail_only_this_image(provider, scenario):
    with Server(lambda image, call: scenario) as server, pytest.raises(TransientError) as error:
        connect(provider, server, retries=1).ask(JPEG, "What is it?")
    assert KEY not in str(error.value)
    assert sum(server.calls.values()) == {400: 1, 500: 2, "reset": 2, "malformed": 3}[scenario]


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        ("wrong key", "refuses the key .*the environment variable TEST_KEY"),
        (403, "refuses the key"),
        ("unknown model", "has no model some-model .*--model-id; or fix --base-url, which ends in /v1"),
        ("used up", "is used up"),
    ],
)
def test_errors_of_every_image_end_the_run(provider, scenario, message):
    if (provider, scenario) == ("google", "used up"):
        pytest.skip("Gemini sends the same message for a rate limit, so the request is repeated")
    with Server(lambda image, call: scenario) as server, pytest.raises(UserError, match=message) as error:
        connect(provider, server, retries=0).ask(JPEG, "What is it?")
    assert KEY not in str(error.value)


def test_redirects_are_not_followed_with_the_key(provider):
    with Server() as other_host, Server(lambda image, call: 307) as server:
        server.redirect = other_host.url
        with pytest.raises(TransientError):
            connect(provider, server, retries=0).ask(JPEG, "What is it?")
        assert not other_host.calls and sum(server.calls.values()) >= 1


def test_keys_come_from_the_environment_and_other_servers_need_key_variable(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("TEST_KEY", raising=False)
    with Server() as server:
        load_api(find_api("openai/x"), Settings(), f"{server.url}/v1").ask(JPEG, "?")
    assert server.keys == {"none"}
    with pytest.raises(UserError, match="given with --key-variable is not set"):
        load_api(find_api("openai/x"), Settings(), "http://127.0.0.1:9/v1", "TEST_KEY")
    with pytest.raises(UserError, match="must be the name of an environment variable") as error:
        load_api(find_api("openai/x"), Settings(), "http://127.0.0.1:9/v1", KEY)
    assert KEY not in str(error.value)
    for malformed_key in (f"{KEY}\n{KEY}", f"{KEY} and more", f"{KEY}…"):
        monkeypatch.setenv("OPENAI_API_KEY", malformed_key)
        with pytest.raises(UserError, match="OPENAI_API_KEY contains white space or other characters") as error:
            load_api(find_api("openai/x"))
        assert KEY not in str(error.value)
    for variable in ("GOOGLE_API_KEY", "GEMINI_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(UserError, match="GOOGLE_API_KEY or GEMINI_API_KEY is not set"):
        load_api(find_api("gemini-pro-vision"))


def test_a_model_id_of_another_server_is_sent_unchanged():
    spec = find_api("google/gemma-3-4b-it", base_url="http://host/v1")
    assert (spec.provider, spec.source, spec.key) == ("openai", "google/gemma-3-4b-it", "google-gemma-3-4b-it")
    assert find_api("google/gemini-x").provider == "google" and find_api("google/gemini-x").source == "gemini-x"
    assert find_api("claude-3-opus", base_url="http://host").provider == "anthropic"  # the paper's own
    assert find_api("x", base_url="http://host", provider="anthropic").provider == "anthropic"
    with pytest.raises(UserError, match="use --provider only with --base-url"):
        find_api("openai/x", provider="google")


def test_half_a_surrogate_pair_is_recorded(provider):
    """JSON can contain it, UTF-8 cannot."""
    with Server(lambda image, call: "half a character") as server:
        text, reply = connect(provider, server).ask(JPEG, "What is it?")
    line = to_line(Prediction("a.jpg", "cat", 0, "Q", None, text, None, reply))
    assert prediction_from_line(line).output == "a cat ?" and line.encode()


@pytest.mark.parametrize(("size", "sent_size"), [((900, 600), (300, 200)), ((30, 20), (30, 20))])
def test_images_are_shrunk_to_the_limit_and_never_enlarged(size, sent_size):
    jpeg = encode_image(Image.new("RGB", size), 300)
    assert Image.open(io.BytesIO(jpeg)).size == sent_size


def test_threads_take_an_item_when_they_are_free_and_complete_it_after_a_stop():
    stop, taken, release = threading.Event(), [], threading.Event()

    def items():
        for number in range(100):
            taken.append(number)
            yield number

    def work(number: int) -> int:
        release.wait(5)
        if number == 1:
            raise TransientError("one")
        return 10 * number

    results = run_in_threads(items(), work, 4, stop)
    threading.Timer(0.2, lambda: (stop.set(), release.set())).start()
    done = dict(results)
    assert taken == [0, 1, 2, 3] and {done[0], done[2], done[3]} == {0, 20, 30} and isinstance(done[1], TransientError)

    def failing_items():
        yield 1
        raise OSError("the disk")

    with pytest.raises(OSError, match="the disk"):
        list(run_in_threads(failing_items(), lambda number: number, 2, threading.Event()))


def test_consecutive_failures_end_the_run_and_the_most_frequent_reason_is_reported():
    stop = threading.Event()
    tracker = FailureTracker(stop)
    for number in range(MAX_CONSECUTIVE_FAILURES - 1):
        tracker.add_failure(TransientError(f"{500 + number // 12}: trouble"))
    tracker.add_success()
    tracker.add_failure(TransientError("500: trouble"))
    assert not stop.is_set()
    message = f"{MAX_CONSECUTIVE_FAILURES} images got no answer, most often: 500: trouble. All received answers"
    with pytest.raises(UserError, match=message):
        tracker.check()
    for _ in range(MAX_CONSECUTIVE_FAILURES):
        tracker.add_failure(TransientError("down"))
    assert stop.is_set()
    tracker.add_success()  # of a request that was in progress
    message = f"{MAX_CONSECUTIVE_FAILURES + 1} images in a row failed, so no more requests were sent"
    with pytest.raises(UserError, match=message):
        tracker.check()
    tracker.add_failure(UserError("the key"))
    with pytest.raises(UserError, match="the key"):
        tracker.check()


def test_costs():
    assert Usage(2, 1_000_000, 500_000).cost((10, 30)) == 25.0
    assert "25.00 US dollars" in Usage(2, 1_000_000, 500_000).sentence((10, 30))
    assert "cost unknown" in Usage(1, 1, 1).sentence(None)
    # The examples in the documentation of the providers.
    assert image_tokens("openai", 1024, 1024, 4000) == 765 and image_tokens("openai", 2048, 4096, 2048) == 1105
    assert image_tokens("anthropic", 1092, 1092, 4000) == 1590
    assert image_tokens("google", 384, 384, 4000) == 258 and image_tokens("google", 960, 540, 4000) == 516
    assert image_tokens("openai", 4000, 2000, 512) == 255  # the size after shrinking counts
    estimate = estimated_usage("anthropic", ["x" * 40] * 10, [(750, 100), (750, 300)], 4000, Usage(0, 0, 0))
    assert estimate == Usage(10, 10 * 10 + 10 * 200, 640)
    assert estimated_usage("anthropic", ["?"] * 10, [], 4000, Usage(4, 400, 8)) == Usage(10, 1000, 20)


def test_rows_are_recorded_with_and_without_a_reply():
    row = Prediction("a.jpg", "cat", 0, "?", None, "a cat", None, Reply("stop", "m", 100, 7))
    assert prediction_from_line(to_line(row)) == row and recorded_usage([row, row]) == Usage(2, 200, 14)
    without_reply = Prediction("a.jpg", "cat", 0, "?", ("cat", "dog"), "a cat", None)
    assert "reply" not in to_line(without_reply) and prediction_from_line(to_line(without_reply)) == without_reply
    incomplete = json.loads(to_line(row)) | {"reply": {"finish": "stop"}}
    with pytest.raises(ValueError, match="not a reply"):
        prediction_from_line(json.dumps(incomplete))


def test_batch_files_are_written_completely_and_results_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("vlmclassifier.api.batches.MAX_LINES", 2)
    api = load_api(find_api("openai/some-model"), Settings(max_new_tokens=9, temperature=0.0), keyless=True)
    requests = [(custom_id("open_world", f"{number}.jpg"), JPEG, f"question {number}") for number in range(5)]
    files = write_batches(api, iter(requests), tmp_path / "batches", "run-batch")
    assert [file.name for file in files] == ["run-batch-1.jsonl", "run-batch-2.jsonl", "run-batch-3.jsonl"]
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert [line["custom_id"] for line in lines] == [request_id for request_id, _, _ in requests]
    assert len({line["custom_id"] for line in lines}) == 5 and max(len(line["custom_id"]) for line in lines) <= 64
    body = lines[3]["body"]
    assert (lines[3]["method"], lines[3]["url"], body["model"]) == ("POST", "/v1/chat/completions", "some-model")
    assert body["max_completion_tokens"] == 9 and body["temperature"] == 0.0
    assert body["messages"][0]["content"][0]["text"] == "question 3"
    for name in ("run-batch", "run[1]"):  # the brackets are not a glob pattern
        write_batches(api, iter(requests), tmp_path / "other", name)
        with pytest.raises(UserError, match="exists already"):
            write_batches(api, iter(requests), tmp_path / "other", name)

    def failing_requests():
        yield requests[0]
        raise UserError("a broken image")

    with pytest.raises(UserError, match="a broken image"):
        write_batches(api, failing_requests(), tmp_path / "batches", "other")
    assert not list((tmp_path / "batches").glob("other*.jsonl"))
    answer = {"choices": [{"finish_reason": "stop", "message": {"content": "a cat"}}],
              "model": "m", "usage": {"prompt_tokens": 3, "completion_tokens": 2}}  # fmt: skip
    results = tmp_path / "results.jsonl"
    rows = [{"id": "1", "custom_id": "a", "response": {"status_code": 200, "body": answer}, "error": None},
            {"id": "2", "custom_id": "b", "response": {"status_code": 400, "body": {"error": "bad"}}, "error": None},
            {"id": "3", "custom_id": "c", "response": None, "error": {"code": "batch_expired"}},
            {"id": "4", "custom_id": "d", "error": None, "response": {
                "status_code": 400, "body": {"error": {"code": "content_policy_violation"}}}}]  # fmt: skip
    rows[0]["response"]["body"]["choices"][0]["message"]["content"] = "a\u2028cat"  # not the end of a line
    results.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    entries = list(read_batch(api, results))
    assert entries[0] == ("a", "a\u2028cat", Reply("stop", "m", 3, 2))
    refusal = Reply("refusal", "some-model", 0, 0)
    assert [(request_id, reply) for request_id, _, reply in entries[1:]] == [("b", None), ("c", None), ("d", refusal)]
    assert "batch_expired" in entries[2][1]
    results.write_text(json.dumps(rows[0]) + '\n{"custom_id": "b"}\n')
    with pytest.raises(UserError, match="results.jsonl row 2 is not a line of a batch's results"):
        list(read_batch(api, results))
