"""Protects: answers through a real server, `transformers serve`, equal those of the same weights loaded here."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import noise, run_script

from vlmclassifier.questions.items import make_question
from vlmclassifier.runs import read_run

KEY = "qwen3-vl-8b"


@pytest.fixture(scope="module")
def server(tiny):
    """The address of a server of a miniature in float32."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    program = Path(sys.executable).with_name("transformers")
    words = [
        program,
        "serve",
        tiny / KEY,
        "--host",
        "127.0.0.1",
        "--port",
        port,
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([str(word) for word in words], env=environment, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        for _ in range(240):
            assert process.poll() is None, "transformers serve ended"
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_served_model_answers_as_here(server, tiny, own, tmp_path):
    """PNG, the image before the question, greedy decoding: classification and questions."""
    for number in range(3):
        noise((64, 48), number).save(own.folder / f"{number}.png")
    served = ["--model", tiny / KEY, "--base-url", server, "--image-format", "png", "--image-first", "--temperature", 0,
              "--concurrency", 1]  # fmt: skip
    data = ["--benchmark", own.manifest, "--classes", own.classes, "--max-new-tokens", 8]
    local = ["--model", KEY, "--weights", tiny / KEY, "--dtype", "float32", "--batch-size", 1]
    run_script("main_results/classify_api.py", *served, *data, "--out", tmp_path / "api")
    run_script("main_results/classify_vlm.py", *local, *data, "--out", tmp_path / "vlm")
    questions = [make_question(f"{n}.png", "How old is this object?", ("one", "two"), n % 2, "newt") for n in range(3)]
    (tmp_path / "q.jsonl").write_text("".join(question.to_line() for question in questions))
    data = [
        "--questions",
        tmp_path / "q.jsonl",
        "--max-new-tokens",
        8,
        "--no-chain-of-thought",
        "--given",
        "image",
        "text",
    ]
    run_script("imagewikiqa/answer.py", *served, *data, "--out", tmp_path / "q-api")
    run_script("imagewikiqa/answer.py", *local, *data, "--out", tmp_path / "q-vlm")
    pairs = [("api", "vlm")] + [(f"q-api-multiple_choice-direct{end}", f"q-vlm-multiple_choice-direct{end}")
                                for end in ("", "-text_only")]  # fmt: skip
    for one, other in pairs:
        ours, theirs = ([row.output.strip() for row in read_run(tmp_path / name)[1]] for name in (one, other))
        assert ours == theirs and len(ours) == 3 and any(ours), one
