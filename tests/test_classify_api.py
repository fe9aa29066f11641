"""Protects: classify_api.py with a failing server: no answer is lost, and no recorded answer is requested again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from api_server import KEY, Server
from conftest import ROOT, run_script, script
from PIL import Image

from vlmclassifier.records import UserError
from vlmclassifier.runs import read_run

SCRIPT = "main_results/classify_api.py"
COUNT = 30


@pytest.fixture
def benchmark(tmp_path):
    """The folder of a benchmark with thirty different images and three classes."""
    rows = []
    for number in range(COUNT):
        Image.new("RGB", (40, 30), (8 * number, 250 - 8 * number, 90)).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "label": ["cat", "dog", "horse"][number % 3], "split": "test"})
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "classes.json").write_text('["cat", "dog", "horse"]')
    return tmp_path


def command(benchmark, server, out, *options):
    return [SCRIPT, "--model", "some-model", "--base-url", f"{server.url}/v1", "--key-variable", "TEST_KEY",
            "--benchmark", benchmark / "my.jsonl", "--classes", benchmark / "classes.json", "--out", out,
            "--retries", "1", "--timeout", "5", "--concurrency", "8", *options]  # fmt: skip


def classify(benchmark, server, out, *options, check=True, key=KEY):
    """Run the script in its own process. The key must appear neither in its output nor in the files of the run."""
    done = run_script(*command(benchmark, server, out, *options), env={"TEST_KEY": key}, check=check)
    assert not KEY or (KEY not in done.stdout and KEY not in done.stderr)
    for file in out.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file
    return done


SCENARIOS = [429, 500, "reset", "malformed", (429, 1), "persistent", "empty", "refusal", "slow", "ok"]


def failing_server() -> Server:
    """Each new image gets the next scenario, in its first request; "persistent": more failures than retries."""
    image_number: dict[str, int] = {}

    def plan(image: str, call: int):
        scenario = SCENARIOS[image_number.setdefault(image, len(image_number)) % len(SCENARIOS)]
        if scenario == "persistent":
            return 500 if call <= 3 else "ok"
        return scenario if call == 1 or scenario in ("empty", "refusal") else "ok"

    return Server(plan)


def test_no_answer_is_lost_and_no_recorded_answer_is_requested_again(benchmark, tmp_path):
    out = tmp_path / "run"
    with failing_server() as server:
        first = classify(benchmark, server, out, check=False)
        persistent = COUNT // len(SCENARIOS)
        assert len(server.calls) == COUNT
        assert first.returncode == 1 and f"{persistent} images got no answer, most often: 500" in first.stderr
        assert "Traceback" not in first.stderr and "Estimate, some-model: 30 calls" in first.stdout
        assert f"Used: {COUNT - persistent} calls, " in first.stdout  # the received answers are paid for
        assert len(json.loads((out / "unanswered.json").read_text())) == persistent
        record, rows = read_run(out)
        assert len(rows) == COUNT - persistent and record["finished"] is None
        second = classify(benchmark, server, out)
        # The estimate uses the mean of the recorded answers.
        assert f"Estimate, some-model: {persistent} calls, {100 * persistent} tokens in" in second.stdout
        record, rows = read_run(out)
        assert len(rows) == COUNT and record["finished"]
        assert max(server.answered.values()) == 1 and sum(server.answered.values()) == COUNT
        calls = dict(server.calls)
        third = classify(benchmark, server, out)
        assert dict(server.calls) == calls and "Estimate" not in third.stdout
    finishes = [row.reply.finish for row in rows]
    assert {"stop", "empty", "refusal"} <= set(finishes) and {row.output for row in rows} >= {"", "a photo of a cat"}
    assert record["config"]["model_id"] == "some-model" and "openai" in record["sessions"][0]["versions"]
    assert not (out / "unanswered.json").exists()
    usage = json.loads((out / "usage.json").read_text())
    assert usage == {"calls": COUNT, "input_tokens": 3000, "output_tokens": 210, "prices": None, "dollars": None}
    scores = (out / "scores.csv").read_text()
    assert f",{COUNT},at 127.0.0.1" in scores


def test_the_rows_do_not_depend_on_interruption_or_concurrency(benchmark, tmp_path):
    """SIGKILL, Ctrl-C and one request at a time: the same bytes, and no recorded answer is requested again."""
    options = ["--candidates", "2", "--chain-of-thought"]
    with Server() as server:
        classify(benchmark, server, tmp_path / "whole", "--concurrency", "1", *options)
        expected_bytes = (tmp_path / "whole" / "predictions.jsonl").read_bytes()
        assert server.max_concurrent == 1
        for text in server.questions.values():
            assert text.startswith('What type of object is in this photo? Choose one from "')
            assert text.endswith("step by step.")
    for number, name in ((signal.SIGKILL, "killed"), (signal.SIGINT, "interrupted")):
        out = tmp_path / name
        with Server(lambda image, call: time.sleep(0.15) or "ok") as server:
            arguments = command(benchmark, server, out, "--concurrency", "3", *options)
            process = subprocess.Popen(
                [sys.executable, *map(str, arguments)], cwd=ROOT, env={**os.environ, "TEST_KEY": KEY}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
            while sum(server.answered.values()) < 9:
                time.sleep(0.02)
            process.send_signal(number)
            stdout, stderr = process.communicate(timeout=60)
            assert process.returncode == (130 if number == signal.SIGINT else -9)
            time.sleep(0.5)  # until the server has ended the requests in progress
            rows = sum(part.read_bytes().count(b"\n") for part in [*out.glob("part-*"), *out.glob("predictions*")])
            answered = sum(server.answered.values())
            if number == signal.SIGINT:  # answers in progress are recorded, because they are paid for
                assert rows == answered < COUNT and "waiting for the requests in progress" in stderr
                assert f"Used: {rows} calls, " in stdout
            assert rows >= answered - 3
            classify(benchmark, server, out, *options)
            repeated = sum(server.answered.values()) - COUNT
            assert repeated == answered - rows
        assert (out / "predictions.jsonl").read_bytes() == expected_bytes


def test_a_server_that_is_down_ends_the_run_early(benchmark, tmp_path):
    with Server(lambda image, call: 500) as server:
        done = classify(benchmark, server, tmp_path / "run", "--retries", "0", "--concurrency", "2", check=False)
        assert done.returncode == 1 and "in a row failed, so no more requests were sent" in done.stderr
        assert 20 <= sum(server.calls.values()) < COUNT


def test_images_that_always_fail_do_not_block_others(benchmark, tmp_path):
    """Twenty of thirty images always get an error: the others are sent first the next time, in every setting."""
    images: list[str] = []  # in the order of the first request

    def plan(image: str, call: int):
        if image not in images:
            images.append(image)
        return 400 if images.index(image) < failing else "ok"

    failing = 20

    with Server(plan) as server:
        both = ["--candidates", "none", "2", "--concurrency", "1", "--retries", "0"]
        first = classify(benchmark, server, tmp_path / "run", *both, check=False)
        assert first.returncode == 1 and "20 images in a row failed" in first.stderr
        second = classify(benchmark, server, tmp_path / "run", *both, check=False)
        assert second.returncode == 1 and "open_world: 10 of 30 images have an answer" in second.stdout
        failing = 1
        last = classify(benchmark, server, tmp_path / "run", *both, check=False)
        assert last.returncode == 1 and "1 images got no answer, most often: 400" in last.stderr
    for setting in ("open_world", "2_classes"):
        assert len(read_run(tmp_path / f"run-{setting}")[1]) == COUNT - 1
        assert len(json.loads((tmp_path / f"run-{setting}" / "unanswered.json").read_text())) == 1


def test_a_paid_run_ends_without_the_images_that_never_get_an_answer(benchmark, tmp_path):
    """One image fails for ever; without the option the run stays open, with it the table says what is missing."""
    out = tmp_path / "runs" / "run"
    with Server(lambda image, call: 400 if list(server.calls).index(image) == 3 else "ok") as server:
        first = classify(benchmark, server, out, "--concurrency", "1", check=False)
        assert first.returncode == 1 and "--accept-unanswered ends the run without them" in first.stdout
        done = classify(benchmark, server, out, "--accept-unanswered")
        assert f"n={COUNT - 1}" in done.stdout and f"1 of {COUNT} images unanswered" in done.stdout
        record, rows = read_run(out)
        assert record["finished"] and record["target"] == len(rows) == COUNT - 1
        assert max(server.answered.values()) == 1
        server.plan = lambda image, call: "ok"
        classify(benchmark, server, out)  # without the option the same command sends the last one
    record, rows = read_run(out)
    assert len(rows) == COUNT and not any("unanswered" in tag for tag in record["config"]["tags"])


def test_a_server_that_is_down_does_not_end_a_run_as_accepted(benchmark, tmp_path):
    with Server(lambda image, call: "ok" if sum(server.calls.values()) <= 5 else 500) as server:
        done = classify(benchmark, server, tmp_path / "run", "--accept-unanswered", "--retries", "0", check=False)
    assert done.returncode == 1 and "in a row failed" in done.stderr
    assert read_run(tmp_path / "run")[0]["finished"] is None


@pytest.mark.parametrize("scenario", ["wrong key", "used up"])
def test_a_refused_key_ends_the_run_and_recorded_answers_are_kept(benchmark, tmp_path, scenario):
    with Server(lambda image, call: "ok" if sum(server.calls.values()) <= 10 else scenario) as server:
        done = classify(benchmark, server, tmp_path / "run", "--concurrency", "2", "--retries", "0", check=False)
        assert done.returncode == 1 and done.stderr.count("error:") == 1 and "Traceback" not in done.stderr
        assert len(read_run(tmp_path / "run")[1]) == sum(server.answered.values()) >= 9
        server.plan = lambda image, call: "ok"
        classify(benchmark, server, tmp_path / "run")
    assert max(server.answered.values()) == 1 and len(read_run(tmp_path / "run")[1]) == COUNT


def test_batch_files_instead_of_requests(benchmark, tmp_path):
    data_options = ["--benchmark", benchmark / "my.jsonl", "--classes", benchmark / "classes.json",
                    "--out", tmp_path / "run"]  # fmt: skip
    batch = [SCRIPT, "--model", "openai/some-model", *data_options, "--prices", "2", "8"]
    done = run_script(*batch, "--estimate-only")
    assert "30 calls" in done.stdout and "US dollars at 2 and 8" in done.stdout
    assert not (tmp_path / "run").exists()  # an estimate creates no files
    run_script(*batch, "--write-batch", tmp_path / "batches")
    (file,) = (tmp_path / "batches").glob("*.jsonl")
    requests = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(requests) == COUNT
    body = {"model": "some-model-2", "usage": {"prompt_tokens": 5, "completion_tokens": 1},
            "choices": [{"finish_reason": "stop", "message": {"content": "a cat"}}]}  # fmt: skip
    lines = [
        {"custom_id": request["custom_id"], "response": {"status_code": 200, "body": body}} for request in requests
    ]
    lines[3] = {"custom_id": requests[3]["custom_id"], "response": None, "error": {"code": "batch_expired"}}
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(line) + "\n" for line in reversed(lines)))
    done = run_script(*batch, "--read-batch", results)
    assert "1 requests of the batch failed" in done.stdout and "29 of 30 images have an answer" in done.stdout
    before = {file: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    assert "some-model: 1 calls, 5 tokens in, 1 tokens out" in run_script(*batch, "--estimate-only").stdout
    assert before == {file: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    results.write_text(
        "".join(json.dumps(line | {"response": lines[0]["response"], "error": None}) + "\n" for line in lines)
    )
    done = run_script(*batch, "--read-batch", results)
    assert "accuracy 33.3%" in done.stdout and "Used: 30 calls, 150 tokens in, 30 tokens out: 0.00" in done.stdout
    record, rows = read_run(tmp_path / "run")
    assert record["finished"] and {row.reply.model for row in rows} == {"some-model-2"}
    assert "there is nothing to write" in run_script(*batch, "--write-batch", tmp_path / "batches").stdout
    data_options[-1] = tmp_path / "other"
    for change in (["--model", "openai/other-model"], ["--model", "openai/some-model", "--candidates", "2"]):
        wrong = run_script(SCRIPT, *data_options, *change, "--read-batch", results, check=False)
        assert wrong.returncode == 1 and "answers none of these questions" in wrong.stderr
        assert not read_run(tmp_path / "other")[1]
        shutil.rmtree(tmp_path / "other")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "gpt-5"}, "Unknown model 'gpt-5': choose one of gpt-4-turbo"),
        ({"model": "llava-1.5-7b"}, "llava-1.5-7b is a vlm model: use main_results/classify_vlm.py"),
        ({"base_url": "localhost:8000"}, "is no address: write it as http"),
        ({"base_url": "http://me:secret@host/v1"}, "put the key into an environment variable"),
        ({"model": "google/x", "write_batch": "batches"}, "Batch files are OpenAI's"),
        ({"model": "openai/x"}, "The environment variable OPENAI_API_KEY is not set"),
        ({"concurrency": 0}, "--concurrency 0 is below 1"),
        ({"concurrency": 100_000}, "give at most 256"),
        ({"timeout": float("nan")}, "--timeout must be above 0"),
        ({"temperature": float("nan")}, "must be numbers from 0 on"),
        ({"prices": (-1.0, 2.0)}, "must be numbers from 0 on"),
        ({"base_url": "http://[bad/v1"}, "is no address"),
        ({"base_url": "http://host:port/v1"}, "is no address"),
        ({"candidates": ("9",)}, "--candidates 9 is outside 2 to 3"),
    ],
)
def test_user_errors_are_reported_before_anything_is_written(benchmark, tmp_path, monkeypatch, changed, message):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    module = script(SCRIPT)
    options = {"model": "x", "base_url": None if "model" in changed else "http://127.0.0.1:9/v1",
               "benchmark": str(benchmark / "my.jsonl"), "classes": benchmark / "classes.json",
               "out": tmp_path / "run"}  # fmt: skip
    with pytest.raises(UserError, match=message):
        module.main(module.Args(**options | changed))
    assert not (tmp_path / "run").exists()


def test_another_model_in_the_same_folder_is_refused(benchmark, tmp_path):
    with Server() as server:
        classify(benchmark, server, tmp_path / "run", "--limit", "4")
        done = classify(benchmark, server, tmp_path / "run", "--limit", "4", "--model-id", "other", check=False)
    assert done.returncode == 1 and 'model_id: "some-model" there, "other" now' in done.stderr
