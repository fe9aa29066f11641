"""Protects: every trouble a server can make, through the real SDKs: what is retried, what is said, what is recorded."""

import io
import json
import threading
import time

import pytest
from api_server import KEY, Server
from conftest import noise
from PIL import Image

from vlmclassifier.api import NoAnswer, encode_picture, load_api
from vlmclassifier.api.asking import PATIENCE, Patience, in_threads
from vlmclassifier.api.batches import custom_id, read_batch, write_batches
from vlmclassifier.api.costs import Usage, expected, picture_tokens, used
from vlmclassifier.api.servers import Settings
from vlmclassifier.models import find_api
from vlmclassifier.records import Prediction, Reply, UserError, prediction_from_line, to_line

PROVIDERS = ("openai", "anthropic", "google")
JPEG = encode_picture(noise((60, 40)), 1000)


@pytest.fixture(params=PROVIDERS)
def provider(request, monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)
    return request.param


def behind(provider: str, server: Server, **settings):
    url = server.url + ("/v1" if provider == "openai" else "")
    spec = find_api("some-model", base_url=url, provider=provider)
    return load_api(spec, Settings(**{"timeout": 5.0, "retries": 2} | settings), url, "TEST_KEY")


@pytest.mark.parametrize(
    ("deed", "said", "finish"),
    [
        ("ok", "a photo of a cat", "stop"),
        ("slow", "a photo of a cat", "stop"),
        ("cut", "a photo of a cat", "length"),
        ("empty", "", "empty"),
        ("refusal", "I cannot help with that.", "refusal"),
        ("policy", "", "refusal"),
    ],
)
def test_answers_are_told_apart(provider, deed, said, finish):
    with Server(lambda picture, call: deed) as server:
        text, reply = behind(provider, server).ask(JPEG, "What is it?")
    said = "" if (provider, deed) == ("google", "refusal") else said  # Gemini gives no words then
    assert (text, reply.finish) == (said, finish)
    assert (reply.input_tokens, reply.output_tokens) == ((0, 0) if deed == "policy" else (100, 7))
    assert list(server.questions.values()) == ["What is it?"] and sum(server.calls.values()) == 1
    assert server.keys == {KEY}


@pytest.mark.parametrize("deed", [(429, 1), 429, "per minute", 500, 503, "reset", "malformed", "nonsense"])
def test_trouble_that_passes_is_asked_again(provider, deed):
    with Server(lambda picture, call: deed if call == 1 else "ok") as server:
        start = time.monotonic()
        text, reply = behind(provider, server).ask(JPEG, "What is it?")
    assert (text, reply.finish) == ("a photo of a cat", "stop") and sum(server.calls.values()) == 2
    told = isinstance(deed, tuple) or (provider, deed) == ("google", "per minute")  # Retry-After, or in the body
    assert not told or time.monotonic() - start >= 1.0


@pytest.mark.parametrize("deed", ["hang", "drip"])
def test_an_attempt_that_takes_too_long_is_given_up(provider, deed):
    """Also where every byte of it comes in time."""
    with Server(lambda picture, call: deed if call == 1 else "ok") as server:
        text, _ = behind(provider, server, timeout=0.7).ask(JPEG, "What is it?")
        assert text == "a photo of a cat" and sum(server.calls.values()) == 2
    with Server(lambda picture, call: deed) as server, pytest.raises(NoAnswer, match="(?i)time"):
        behind(provider, server, timeout=0.3, retries=1).ask(JPEG, "What is it?")
    assert sum(server.calls.values()) == 2


def test_a_web_page_in_place_of_an_answer_is_told_apart(provider):
    """Repeating would not help: it is another server's address, as where /v1 is missing."""
    with Server(lambda picture, call: "web page") as server, pytest.raises(UserError, match="else than JSON") as error:
        behind(provider, server).ask(JPEG, "What is it?")
    assert "mend --base-url, which ends in /v1" in str(error.value) and server.url in str(error.value)


def test_a_server_that_wants_a_key_or_is_not_there_is_named(provider):
    with Server(lambda picture, call: 401) as server:
        spec = find_api("x", base_url=server.url, provider=provider)
        with pytest.raises(UserError, match="127.0.0.1:.* wants a key .*name that with --key-variable"):
            load_api(spec, Settings(retries=0), server.url).ask(JPEG, "What is it?")
    with pytest.raises(NoAnswer, match="no connection to 127.0.0.1:9: "):
        load_api(spec, Settings(retries=0), "http://127.0.0.1:9").ask(JPEG, "What is it?")


@pytest.mark.parametrize("deed", [400, 500, "reset", "malformed"])
def test_trouble_that_stays_costs_this_picture_only(provider, deed):
    with Server(lambda picture, call: deed) as server, pytest.raises(NoAnswer) as error:
        behind(provider, server, retries=1).ask(JPEG, "What is it?")
    assert KEY not in str(error.value)
    assert sum(server.calls.values()) == {400: 1, 500: 2, "reset": 2, "malformed": 3}[deed]


@pytest.mark.parametrize(
    ("deed", "sentence"),
    [
        ("wrong key", "refuses the key .*the environment variable TEST_KEY"),
        (403, "refuses the key"),
        ("unknown model", "does not know the model some-model .*--model-id; or mend --base-url, which ends in /v1"),
        ("used up", "is used up"),
    ],
)
def test_what_no_picture_would_survive_ends_the_run(provider, deed, sentence):
    if (provider, deed) == ("google", "used up"):
        pytest.skip("Gemini's words are those of a limit per minute: it is asked again")
    with Server(lambda picture, call: deed) as server, pytest.raises(UserError, match=sentence) as error:
        behind(provider, server, retries=0).ask(JPEG, "What is it?")
    assert KEY not in str(error.value)


def test_no_redirect_takes_the_key_to_another_host(provider):
    with Server() as other, Server(lambda picture, call: 307) as server:
        server.redirect = other.url
        with pytest.raises(NoAnswer):
            behind(provider, server, retries=0).ask(JPEG, "What is it?")
        assert not other.calls and sum(server.calls.values()) >= 1


def test_a_key_comes_from_the_environment_and_to_another_server_only_by_name(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("TEST_KEY", raising=False)
    with Server() as server:
        load_api(find_api("openai/x"), Settings(), f"{server.url}/v1").ask(JPEG, "?")
    assert server.keys == {"none"}
    with pytest.raises(UserError, match="that --key-variable names is not set"):
        load_api(find_api("openai/x"), Settings(), "http://127.0.0.1:9/v1", "TEST_KEY")
    with pytest.raises(UserError, match="wants the name of an environment variable") as error:
        load_api(find_api("openai/x"), Settings(), "http://127.0.0.1:9/v1", KEY)
    assert KEY not in str(error.value)
    for spoilt in (f"{KEY}\n{KEY}", f"{KEY} and more", f"{KEY}…"):
        monkeypatch.setenv("OPENAI_API_KEY", spoilt)
        with pytest.raises(UserError, match="OPENAI_API_KEY holds white space or other characters") as error:
            load_api(find_api("openai/x"))
        assert KEY not in str(error.value)
    for variable in ("GOOGLE_API_KEY", "GEMINI_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(UserError, match="GOOGLE_API_KEY or GEMINI_API_KEY is not set"):
        load_api(find_api("gemini-pro-vision"))


def test_an_id_at_another_server_is_passed_on_whole():
    spec = find_api("google/gemma-3-4b-it", base_url="http://host/v1")
    assert (spec.provider, spec.source, spec.key) == ("openai", "google/gemma-3-4b-it", "google-gemma-3-4b-it")
    assert find_api("google/gemini-x").provider == "google" and find_api("google/gemini-x").source == "gemini-x"
    assert find_api("claude-3-opus", base_url="http://host").provider == "anthropic"  # the paper's own
    assert find_api("x", base_url="http://host", provider="anthropic").provider == "anthropic"
    with pytest.raises(UserError, match="--provider goes with --base-url"):
        find_api("openai/x", provider="google")


def test_half_a_character_is_no_traceback(provider):
    """JSON can hold it, UTF-8 cannot."""
    with Server(lambda picture, call: "half a character") as server:
        text, reply = behind(provider, server).ask(JPEG, "What is it?")
    line = to_line(Prediction("a.jpg", "cat", 0, "Q", None, text, None, None, reply))
    assert prediction_from_line(line).output == "a cat ?" and line.encode()


def test_pictures_are_shrunk_to_the_limit_and_never_enlarged():

    sizes = [
        Image.open(io.BytesIO(encode_picture(Image.new("RGB", size), 300))).size for size in ((900, 600), (30, 20))
    ]
    assert sizes == [(300, 200), (30, 20)]


def test_threads_take_an_item_when_they_are_free_and_finish_what_they_hold():
    stop, taken, release = threading.Event(), [], threading.Event()

    def items():
        for number in range(100):
            taken.append(number)
            yield number

    def work(number: int) -> int:
        release.wait(5)
        if number == 1:
            raise NoAnswer("one")
        return 10 * number

    results = in_threads(items(), work, 4, stop)
    threading.Timer(0.2, lambda: (stop.set(), release.set())).start()
    done = dict(results)
    assert taken == [0, 1, 2, 3] and {done[0], done[2], done[3]} == {0, 20, 30} and isinstance(done[1], NoAnswer)

    def broken():
        yield 1
        raise OSError("the disk")

    with pytest.raises(OSError, match="the disk"):
        list(in_threads(broken(), lambda number: number, 2, threading.Event()))


def test_patience_ends_with_the_server_and_names_the_usual_reason():
    stop = threading.Event()
    patience = Patience(stop)
    for number in range(PATIENCE - 1):
        patience.failed(NoAnswer(f"{500 + number // 12}: trouble"))
    patience.answered()
    patience.failed(NoAnswer("500: trouble"))
    assert not stop.is_set()
    with pytest.raises(UserError, match=f"{PATIENCE} pictures got no answer, most often: 500: trouble. The answers"):
        patience.check()
    for _ in range(PATIENCE):
        patience.failed(NoAnswer("down"))
    assert stop.is_set()
    patience.answered()  # one that was under way
    with pytest.raises(UserError, match=f"{PATIENCE + 1} in a row failed, so no more were asked"):
        patience.check()
    patience.failed(UserError("the key"))
    with pytest.raises(UserError, match="the key"):
        patience.check()


def test_costs():
    assert Usage(2, 1_000_000, 500_000).cost((10, 30)) == 25.0
    assert "25.00 US dollars" in Usage(2, 1_000_000, 500_000).sentence((10, 30))
    assert "cost unknown" in Usage(1, 1, 1).sentence(None)
    # The examples that the providers' pages give.
    assert picture_tokens("openai", 1024, 1024, 4000) == 765 and picture_tokens("openai", 2048, 4096, 2048) == 1105
    assert picture_tokens("anthropic", 1092, 1092, 4000) == 1590
    assert picture_tokens("google", 384, 384, 4000) == 258 and picture_tokens("google", 960, 540, 4000) == 516
    assert picture_tokens("openai", 4000, 2000, 512) == 255  # what is sent counts
    guess = expected("anthropic", ["x" * 40] * 10, [(750, 100), (750, 300)], 4000, Usage(0, 0, 0))
    assert guess == Usage(10, 10 * 10 + 10 * 200, 640)
    assert expected("anthropic", ["?"] * 10, [], 4000, Usage(4, 400, 8)) == Usage(10, 1000, 20)


def test_a_reply_is_kept_in_the_row_and_rows_without_one_are_as_before():
    row = Prediction("a.jpg", "cat", 0, "?", None, "a cat", None, None, Reply("stop", "m", 100, 7))
    assert prediction_from_line(to_line(row)) == row and used([row, row]) == Usage(2, 200, 14)
    plain = Prediction("a.jpg", "cat", 0, "?", ("cat", "dog"), "a cat", None, None)
    assert "reply" not in to_line(plain) and prediction_from_line(to_line(plain)) == plain
    broken = json.loads(to_line(row)) | {"reply": {"finish": "stop"}}
    with pytest.raises(ValueError, match="not a reply"):
        prediction_from_line(json.dumps(broken))


def test_batches_are_written_whole_and_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr("vlmclassifier.api.batches.MOST_LINES", 2)
    api = load_api(find_api("openai/some-model"), Settings(max_new_tokens=9, temperature=0.0), keyless=True)
    asked = [(custom_id("open_world", f"{number}.jpg"), JPEG, f"question {number}") for number in range(5)]
    files = write_batches(api, iter(asked), tmp_path / "batches", "run-batch")
    assert [file.name for file in files] == ["run-batch-1.jsonl", "run-batch-2.jsonl", "run-batch-3.jsonl"]
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert [line["custom_id"] for line in lines] == [identity for identity, _, _ in asked]
    assert len({line["custom_id"] for line in lines}) == 5 and max(len(line["custom_id"]) for line in lines) <= 64
    body = lines[3]["body"]
    assert (lines[3]["method"], lines[3]["url"], body["model"]) == ("POST", "/v1/chat/completions", "some-model")
    assert body["max_completion_tokens"] == 9 and body["temperature"] == 0.0
    assert body["messages"][0]["content"][0]["text"] == "question 3"
    for name in ("run-batch", "run[1]"):  # no pattern
        write_batches(api, iter(asked), tmp_path / "other", name)
        with pytest.raises(UserError, match="exists already"):
            write_batches(api, iter(asked), tmp_path / "other", name)

    def dies():
        yield asked[0]
        raise UserError("a broken picture")

    with pytest.raises(UserError, match="a broken picture"):
        write_batches(api, dies(), tmp_path / "batches", "other")
    assert not list((tmp_path / "batches").glob("other*.jsonl"))
    answer = {"choices": [{"finish_reason": "stop", "message": {"content": "a cat"}}],
              "model": "m", "usage": {"prompt_tokens": 3, "completion_tokens": 2}}  # fmt: skip
    results = tmp_path / "results.jsonl"
    rows = [{"id": "1", "custom_id": "a", "response": {"status_code": 200, "body": answer}, "error": None},
            {"id": "2", "custom_id": "b", "response": {"status_code": 400, "body": {"error": "bad"}}, "error": None},
            {"id": "3", "custom_id": "c", "response": None, "error": {"code": "batch_expired"}},
            {"id": "4", "custom_id": "d", "error": None, "response": {
                "status_code": 400, "body": {"error": {"code": "content_policy_violation"}}}}]  # fmt: skip
    rows[0]["response"]["body"]["choices"][0]["message"]["content"] = "a\u2028cat"  # no line ends there
    results.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    read = list(read_batch(api, results))
    assert read[0] == ("a", "a\u2028cat", Reply("stop", "m", 3, 2))
    refusal = Reply("refusal", "some-model", 0, 0)
    assert [(identity, reply) for identity, _, reply in read[1:]] == [("b", None), ("c", None), ("d", refusal)]
    assert "batch_expired" in read[2][1]
    results.write_text(json.dumps(rows[0]) + '\n{"custom_id": "b"}\n')
    with pytest.raises(UserError, match="results.jsonl row 2 is not a line of a batch's results"):
        list(read_batch(api, results))
