"""Python in processes of their own, at once: forked from one that has imported torchrl, but nothing of ours."""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

INTERPRET = "TRITON_INTERPRET"
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torchrl.collectors", "torchrl.data", "torchrl.envs"])


def start() -> BaseContext:
    """The context of such processes, to begin with the one from which they are forked."""
    # What that imports imports Triton, which reads the variable then.
    before = os.environ.pop(INTERPRET, None)
    try:
        forkserver.ensure_running()
    finally:
        if before is not None:
            os.environ[INTERPRET] = before
    return _CONTEXT


def run(code: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Runs code as ``python -c`` does, without Triton's interpreter unless the environment asks for it.

    Variables that are None are not set.
    """
    variables = {**os.environ, INTERPRET: None, **environment}
    variables = {name: value for name, value in variables.items() if value is not None}
    if variables.get(INTERPRET):
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables)
    with tempfile.TemporaryDirectory() as folder:
        process = start().Process(target=_run, args=(code, variables, folder))
        process.start()
        process.join()
        stdout, stderr = (Path(folder, name).read_text() for name in ("1", "2"))
    return subprocess.CompletedProcess(code, process.exitcode, stdout, stderr)


def found(preamble: str, code: str) -> Any:
    """What code prints last, as JSON, in a process that has run a preamble."""
    done = run(preamble + code)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _run(code: str, variables: dict[str, str], folder: str) -> None:
    for descriptor in (1, 2):
        os.dup2(os.open(f"{folder}/{descriptor}", os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(variables)
    exec(code, {"__name__": "__main__"})
