"""Runs `python -m lorajax.train` again and again without its start-up: each run is a fork of a warm process.

Reads lines `[log, argument, ...]` (JSON) from standard input; answers each with the child's process id, and
with its exit status, negative for a signal, once it has ended. Before the first run nothing but modules is
loaded and there is one thread only, so a fork is as good as a new process.

Usage: python train_server.py MODEL_FOLDER
"""

from __future__ import annotations

import gc
import json
import os
import sys

import lorajax.training.fit  # noqa: F401
from lorajax.command import run_command
from lorajax.data import load_tokenizer
from lorajax.train import main


def train(log: str, arguments: list[str]) -> int:
    """In the child: the command, with its output in a file."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv[1:] = arguments
    return run_command(main)


def serve() -> None:
    load_tokenizer(sys.argv[1])  # transformers imports most of itself here
    if os.path.isdir("/proc/self/task"):
        assert len(os.listdir("/proc/self/task")) == 1, "a fork needs a process of one thread"
    gc.freeze()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            log, *arguments = json.loads(line)
            status = train(log, arguments)
            sys.stdout.flush()
            os._exit(status)  # taking down all that was imported takes longer than many a run here
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
