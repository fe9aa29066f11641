"""A worker with torch, transformers and this package loaded: it forks a process for every script that a test runs,
and for every process that accelerate's launcher starts.

    python tests/warm_server.py SOCKET PID

The forked process is a script's own, with arguments, environment, folder and standard streams of its caller; only the
imports are saved (several seconds each). Ends when the process PID, the test session, is gone.
"""

import array
import contextlib
import gc
import json
import os
import runpy
import signal
import socket
import sys
import threading
from pathlib import Path

CLIENT = str(Path(__file__).resolve().parent / "warm_python")


def preload() -> None:
    """Import what scripts import; nothing is computed, so that no thread exists when the server forks."""
    import accelerate.commands.launch  # noqa: F401
    import datasets  # noqa: F401
    import open_clip  # noqa: F401
    import pandas  # noqa: F401
    import scipy.stats  # noqa: F401
    import tabulate  # noqa: F401
    import transformers.models.auto.modeling_auto  # noqa: F401
    import transformers.models.auto.processing_auto  # noqa: F401
    from transformers import (  # noqa: F401
        AutoModelForImageTextToText,
        AutoProcessor,
        Blip2ForConditionalGeneration,
        Blip2Processor,
        CLIPModel,
        LlamaForCausalLM,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    import vlmclassifier.arguments
    import vlmclassifier.clip
    import vlmclassifier.mini.contrastive
    import vlmclassifier.mini.llava
    import vlmclassifier.ranking.ranker
    import vlmclassifier.scoring.rankings
    import vlmclassifier.tables
    import vlmclassifier.tiny
    import vlmclassifier.vlm.pending  # noqa: F401


def serve(path: str, session: int) -> None:
    """Accept callers until the test session ends; a forked process for each."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}.new")
    listener.listen(16)
    os.rename(f"{path}.new", path)
    listener.settimeout(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    gc.freeze()
    while Path(f"/proc/{session}").exists():
        try:
            caller, _ = listener.accept()
        except TimeoutError:
            continue
        if os.fork() == 0:
            listener.close()
            supervise(caller)
        caller.close()


def supervise(caller: socket.socket) -> None:
    """Run the script in its own process; send the caller its exit code, and kill it when the caller dies."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, ancillary, _, _ = caller.recvmsg(1 << 20, socket.CMSG_LEN(3 * array.array("i").itemsize))
    streams = array.array("i")
    streams.frombytes(ancillary[0][2])
    while not message.endswith(b"\n"):
        message += caller.recv(1 << 20)
    job = json.loads(message)
    child = os.fork()
    if child == 0:
        caller.close()
        run(job, list(streams))

    def watch() -> None:
        if caller.recv(1) == b"":  # the caller was killed
            with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                os.kill(child, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    _, status = os.waitpid(child, 0)
    caller.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def run(job: dict, streams: list[int]) -> None:
    """The script as __main__."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - as long as the process
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    from huggingface_hub import constants  # read from the environment when it was imported

    constants.HF_HUB_OFFLINE = os.environ.get("HF_HUB_OFFLINE", "0") in ("1", "true")
    import vlmclassifier.paths

    if outputs := os.environ.get("VLMCLASSIFIER_OUTPUTS"):
        vlmclassifier.paths.OUTPUTS = Path(outputs)
    if pid_file := os.environ.pop("WARM_PID_FILE", None):
        Path(pid_file).write_text(str(os.getpid()))
    sys.executable = CLIENT  # scripts that start scripts use the server too; multiprocessing keeps the interpreter
    code = 0
    try:
        start(job["arguments"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def start(arguments: list[str]) -> None:
    """What the interpreter does with SCRIPT, -m MODULE or -c TEXT, and the arguments behind."""
    first = arguments[0]
    sys.argv = arguments[1:] if first == "-m" else arguments
    if first == "-c":
        sys.argv = ["-c", *arguments[2:]]
        sys.path[0] = ""
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.path[0] = os.getcwd()
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(first).resolve().parent)
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    preload()
    serve(sys.argv[1], int(sys.argv[2]))
