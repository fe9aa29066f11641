"""Protects: captions contain the class name, are asked for again, and are never asked for twice."""

import json

import pytest
from api_server import KEY, Server
from conftest import script

from vlmclassifier.records import UserError


def make(own, out, **options):
    module = script("training_analysis/make_captions.py")
    module.main(module.Args(out=out, split="test", **own.args | options))
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_an_api_is_asked_until_the_name_is_there(own, tmp_path, monkeypatch, capsys):
    """Over HTTP with OpenAI's SDK; the answer always names the cat, so dogs get none after three tries."""
    monkeypatch.setenv("MY_KEY", KEY)
    out = tmp_path / "captions.jsonl"
    fails = lambda image, call: 400 if call == 1 else "ok"  # noqa: E731
    with Server(lambda image, call: "ok") as server:
        options = {"model": "m", "base_url": f"{server.url}/v1", "key_variable": "MY_KEY", "concurrency": 2}
        rows = make(own, out, **options)
        assert len(rows) == 3 and sorted(row["tries"] for row in rows) == [1, 1, 3]
        assert {row["caption"] for row in rows} == {"a photo of a cat", None}
        assert sum(server.calls.values()) == 5
        assert "2 of 3 images have a caption with their class name, 1 got none in 3 tries" in capsys.readouterr().out
        before = out.read_bytes()
        make(own, out, **options)
        assert sum(server.calls.values()) == 5 and out.read_bytes() == before
        assert any("word for word" in question for question in server.questions.values())
        out.write_bytes(before[:-20])  # a line that was cut off
        assert make(own, out, **options) and out.read_bytes() == before
        with pytest.raises(UserError, match="holds other captions .model"):
            make(own, out, **options | {"model": "another"})
        other = tmp_path / "notes.json"
        other.write_text('{"id": "x", "caption": "someone else\'s", "tries": 0, "more": 1}\n')
        with pytest.raises(UserError, match="notes.json exists without notes.json.json: choose another --out"):
            make(own, other, **options)
        assert "more" in other.read_text()  # read and written again only where it is ours
        assert json.loads((tmp_path / "captions.jsonl.json").read_text())["manifest"]
    with Server(fails) as server:
        options["base_url"] = f"{server.url}/v1"
        with pytest.raises(UserError):
            make(own, tmp_path / "b.jsonl", **options)
        assert len(make(own, tmp_path / "b.jsonl", **options)) == 3
    assert KEY not in "".join(file.read_text() for file in tmp_path.glob("*.json*"))


def test_a_local_model_is_asked_in_batches(tiny, own, tmp_path, monkeypatch):
    from vlmclassifier.vlm import VLM

    asked = []

    def generate(self, batch, new_tokens, features=None):
        asked.append(len(batch))
        return ["a dog" if "exact words" in prompt else "a Cat on a mat" for prompt in batch.prompts]

    monkeypatch.setattr(VLM, "generate", generate)
    rows = make(
        own, tmp_path / "c.jsonl", local=True, model="llava-1.5-7b", weights=tiny / "llava-1.5-7b", batch_size=2
    )
    assert {(row["caption"], row["tries"]) for row in rows} == {("a Cat on a mat", 1), ("a dog", 2)}
    assert sum(asked) == 4
    with pytest.raises(UserError, match="--tries 4 is more than the 3 requests"):
        make(own, tmp_path / "d.jsonl", local=True, tries=4)
