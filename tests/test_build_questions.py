"""Protects: the construction of questions asks for nothing twice, checks every field, and gives the same bytes."""

import json

import pytest
from api_server import KEY, Server
from conftest import script

from vlmclassifier.questions.building import DraftError, audit, parse_drafts
from vlmclassifier.questions.items import read_questions
from vlmclassifier.records import UserError

MODEL = {"model": "m", "key_variable": "MY_KEY", "concurrency": 1, "rows": None}


def drafts(name, count=5):
    return [{"question": f"How old is this object, number {n}?", "choices": ["one", "two", f"{name}ish", "four"],
             "answer": n % 4, "reference": f"It is {n}."} for n in range(count)]  # fmt: skip


def plan_of(first_reply):
    """A server that writes questions, and answers them rightly with the name, and without it those with an even number.

    `first_reply`: what the first request for the questions of each class gets.
    """

    def reply(handler, body):
        text = body["messages"][0]["content"][0]["text"]
        if "Write five" in text:
            assert body["response_format"]["json_schema"]["schema"]["required"] == ["questions"]
            name = text.split("article about ")[1].split(":")[0]
            return json.dumps({"questions": drafts(name)})
        lines = text.split("\n")
        number = int(lines[0].rpartition("number ")[2].rstrip("?"))
        right = ["one", "two", "ish", "four"][number % 4]
        letter = next(line[0] for line in lines if line[1:2] == "." and line.endswith(right))
        wrong = next(line[0] for line in lines if line[1:2] == "." and not line.endswith(right))
        knows = "guess" not in text or number % 2 == 0
        return letter if knows else wrong

    def plan(image, call):
        def scenario(handler, body):
            text = body["messages"][0]["content"][0]["text"]
            if "Write five" in text and call == 1 and first_reply is not None:
                return first_reply if not isinstance(first_reply, str) else content(body, first_reply)
            return content(body, reply(handler, body))

        return scenario

    return plan


def content(body, text):
    message = {"role": "assistant", "content": text}
    return {"status": 200, "body": {"id": "c", "object": "chat.completion", "created": 0, "model": body["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}}}  # fmt: skip


@pytest.fixture
def built(own, tmp_path, monkeypatch):
    """A function that builds questions about two classes, from articles in a folder."""
    monkeypatch.setenv("MY_KEY", KEY)
    (tmp_path / "articles").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "articles" / f"{name}.txt").write_text(f"The {name} is old.")
    module = script("imagewikiqa/build_questions.py")

    def build(out, server, **options):
        module.main(module.Args(articles=str(tmp_path / "articles"), out=tmp_path / out,
                                base_url=f"{server.url}/v1", **own.args | MODEL | options))  # fmt: skip
        return {file.name: file.read_bytes() for file in sorted((tmp_path / out).iterdir())}

    return build


@pytest.mark.parametrize(
    "first_reply",
    ["", "no JSON", '{"questions": [', json.dumps({"questions": drafts("x") + [{"question": "this object?"}]}),
     json.dumps({"questions": [drafts("x")[0] | {"choices": ["a", "b", "c"]}]}), 503],
)  # fmt: skip
def test_a_malformed_reply_is_asked_for_again(first_reply, built, tmp_path, capsys):
    with Server(plan_of(first_reply)) as server:
        files = built("out", server)
        rows = [json.loads(line) for line in files["drafts.jsonl"].decode().splitlines()]
        assert [row["tries"] for row in rows] == ([1, 1] if first_reply == 503 else [2, 2])
        questions = read_questions(tmp_path / "out" / "mine_wikiqa.jsonl")
        # Of five questions per class the two with odd numbers need the name; three images, of which two are cats'.
        assert len(questions) == 2 * 2 + 2 * 1 and all("number 1" in q.question or "number 3" in q.question
                                                       for q in questions)  # fmt: skip
        assert audit(questions)["same option twice"] == 0
        printed = capsys.readouterr().out
        assert "| drafts | 10 |" in printed and "| kept: wrong without it | 4 |" in printed
        calls = sum(server.calls.values())
        assert built("out", server) == files and sum(server.calls.values()) == calls


@pytest.mark.parametrize("stage", ["articles", "questions", "with_name", "without_name"])
def test_an_interrupted_construction_continues(stage, built, tmp_path, monkeypatch):
    from vlmclassifier.questions.stages import Stage

    original = Stage.run

    def stop(self, results, title):
        def some(keys):
            for number, pair in enumerate(results(keys)):
                if title == stage and number == 1:
                    raise KeyboardInterrupt
                yield pair

        return original(self, some, title)

    with Server(plan_of(None)) as server:
        whole = built("whole", server)
        asked = sum(server.calls.values())
        with monkeypatch.context() as patch:
            patch.setattr(Stage, "run", stop)
            with pytest.raises(KeyboardInterrupt):
                built("stopped", server)
        assert built("stopped", server) == whole
        assert sum(server.calls.values()) <= 2 * asked + 2  # requests that were being made are made again


def test_mistakes_are_told(built, own, tmp_path, monkeypatch, capsys):
    module = script("imagewikiqa/build_questions.py")
    with Server(plan_of(None)) as server:
        with pytest.raises(UserError, match="Give either --articles"):
            module.main(module.Args(**own.args))
        (tmp_path / "articles" / "dog.txt").unlink()
        built("part", server)
        assert "1 of 2 classes have no article and get no questions: dog" in capsys.readouterr().out
        (tmp_path / "articles" / "dog.txt").write_text("The dog is old.")
        assert "number 1" in built("part", server)["mine_wikiqa.jsonl"].decode()
        assert "2 classes with articles, 1 without questions" in capsys.readouterr().out
        built("part", server)
        assert "0 without questions. Estimate, m: 0 calls" in capsys.readouterr().out
        (tmp_path / "articles" / "dog.txt").write_text("The dog is young.")
        with pytest.raises(UserError, match="the article of dog has changed since its questions were written"):
            built("part", server)
        (tmp_path / "articles" / "dog.txt").write_text("The dog is old.")
        assert {q.class_name for q in read_questions(tmp_path / "part" / "mine_wikiqa.jsonl")} == {"cat", "dog"}
        with pytest.raises(UserError, match="part holds another construction .characters"):
            built("part", server, characters=5)
        calls = sum(server.calls.values())
        built("dry", server, dry_run=True)
        assert "Estimate, m: " in capsys.readouterr().out and sum(server.calls.values()) == calls
        built("dry", server, model="another")  # nothing was decided by the dry run
        (tmp_path / "articles" / "latin.txt").write_bytes("é".encode("latin-1"))
        with pytest.raises(UserError, match="cannot be read as articles"):
            built("latin", server)
        (tmp_path / "articles" / "latin.txt").unlink()
        with pytest.raises(UserError, match="is the name of a stage's file"):
            built("drafts", server, name="drafts")
        for name in ("cat", "dog"):
            (tmp_path / "articles" / f"{name}.txt").unlink()
        with pytest.raises(UserError, match="has no article of any class"):
            built("none", server)
    assert KEY not in "".join(file.read_text() for file in tmp_path.glob("*/*.json*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 4}, "no index of a choice"), ({"answer": True}, "no index of a choice"),
        ({"choices": ["a", "a", "b", "c"]}, "the same choice twice"), ({"reference": ""}, "no reference"),
        ({"question": "How old is a newt?"}, "contains the class name"),
        ({"choices": ["a", "the newt", "b", "c"]}, "a choice contains the class name"),
        ({"question": "How old is it?"}, "does not say"),
        ({"choices": "abcd"}, "does not have 4 choices"), ({"question": "a\nb"}, "no text of one line"),
    ],
)  # fmt: skip
def test_every_field_is_checked(change, message):
    rows = [drafts("newt")[0] | change]
    with pytest.raises(DraftError, match=message):
        parse_drafts(json.dumps({"questions": rows}), "newt")
    assert parse_drafts(f"Here: ```json\n{json.dumps({'questions': drafts('newt')})}\n```", "newt")[1].answer == 1


def test_articles_come_from_a_wiki(own, tmp_path, monkeypatch):
    """Over HTTP, with a contact in every request; a page that is missing, and a server that is busy once."""
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    from urllib.parse import parse_qs, urlsplit

    from vlmclassifier.questions.wikipedia import download_articles

    seen = []

    class Wiki(BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            """Log nothing."""

        def do_GET(self):
            title = parse_qs(urlsplit(self.path).query)["titles"][0]
            seen.append((title, self.headers["User-Agent"]))
            if len(seen) == 1:
                self.send_response(429)
                self.send_header("Retry-After", "0")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            page = {"title": title, "missing": True}
            if title == "cat":
                page = {"title": "Cat", "extract": "About cat."}
            body = json.dumps({"query": {"pages": [page]}}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Wiki)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}/w/api.php"
        found = dict(download_articles(["cat", "dog"], "me@example.org", url, pause=0.0))
        assert found == {"cat": {"title": "Cat", "text": "About cat."}, "dog": {"title": "dog", "text": None}}
        assert [title for title, _ in seen] == ["cat", "cat", "dog"] and all("me@example.org" in a for _, a in seen)
        with pytest.raises(UserError, match="asks for a contact"):
            next(download_articles(["cat"], "", url))
    finally:
        server.shutdown()
        server.server_close()


def test_facts_become_questions(trained, figures_root, tmp_path, capsys):
    """The embedded data set's, filtered by its language model, which a few steps of training taught nothing."""
    module = script("imagewikiqa/build_questions.py")
    common = {"benchmark": "plane_figures", "data_root": figures_root, "facts": "plane_figures", "rows": 50}
    module.main(module.Args(out=tmp_path / "all", **common))
    questions = read_questions(tmp_path / "all" / "plane_figures_wikiqa.jsonl")
    assert len(questions) == 50 and not any(question.class_name in question.text for question in questions)
    with pytest.raises(UserError, match="No question is left"):
        module.main(module.Args(out=tmp_path / "filtered", language_model=trained / "lm", **common))


def test_rows_of_other_keys_are_kept(tmp_path):
    from vlmclassifier.questions.stages import Stage

    Stage(tmp_path / "s.jsonl", ["a", "b"]).run(lambda keys: ((key, {"n": 1}) for key in keys), "first")
    stage = Stage(tmp_path / "s.jsonl", ["c", "a"])
    stage.run(lambda keys: ((key, {"n": 2}) for key in keys), "second")
    rows = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert rows == [{"key": "c", "n": 2}, {"key": "a", "n": 1}, {"key": "b", "n": 1}]
