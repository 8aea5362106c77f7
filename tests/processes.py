"""Other processes for tests, without a start of Python for each: forks of one that has imported all."""

import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

import train as train  # "as": the server then has it
from engine.backbone import import_clip

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.processes"])  # this file, found in the folder where pytest runs
import_clip()  # takes seconds; once for all processes


def start(function: Callable, *arguments, output: Path | str = os.devnull, **variables):
    """Starts a process that calls a function of a test module; what it prints goes to a file.

    It has as many threads as this process, on which sums depend. variables: added to its environment."""
    given = (function, arguments, str(output), variables, torch.get_num_threads())
    process = FORKS.Process(target=_call, args=given)
    process.start()
    return process


def _call(function: Callable, arguments: tuple, output: str, variables: dict, threads: int) -> None:
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(variables)
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    try:
        function(*arguments)
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException as error:  # with its exit code, as of Python's own end
        code = error.code if isinstance(error, SystemExit) else 1
        traceback.print_exc() if not isinstance(error, SystemExit) else print(code, file=sys.stderr)
        os._exit(code if isinstance(code, int) else bool(code))


def ranks(count: int, function: Callable, *arguments, folder: Path) -> list[str]:
    """Calls a function in several processes that torch.distributed joins. Returns what each printed."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common = dict(WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    outputs = [folder / f"rank{rank}.txt" for rank in range(count)]
    own = [dict(common, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(count)]
    started = [start(function, *arguments, output=o, **variables) for o, variables in zip(outputs, own)]
    for process in started:
        process.join(120)
    assert [process.exitcode for process in started] == [0] * count, [path.read_text() for path in outputs]
    return [path.read_text() for path in outputs]
