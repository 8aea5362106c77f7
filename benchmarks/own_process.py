"""Runs a benchmark case in its own process, to measure its memory and to outlive it if it is killed."""

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path


def in_own_process(function: Callable, *arguments) -> tuple[object, int | None]:
    """Calls a module-level function in a new process. Returns its result (None if it failed), exit code."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_send, args=(queue, function, arguments))
    process.start()
    while process.is_alive() and queue.empty():
        time.sleep(0.05)
    answer = queue.get(timeout=5) if not queue.empty() or process.exitcode == 0 else None
    process.join()
    return answer, process.exitcode


def _send(queue: multiprocessing.Queue, function: Callable, arguments: tuple) -> None:
    queue.put(function(*arguments))


def rows_of(function: Callable, *arguments, limit: float, log: Path) -> tuple[list, str]:
    """Runs a module-level generator function in a new process, for at most `limit` seconds.

    Returns the rows that it yielded, and why it failed in one line ("": it did not). The rows before a
    failure are kept. What the process prints goes to the log. It is ended with all processes it started."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_send_rows, args=(send, log, function, arguments))
    process.start()
    send.close()  # so that the end of the process ends the reading
    rows, failure, end = [], None, time.monotonic() + limit
    try:
        while failure is None and receive.poll(max(0.0, end - time.monotonic())):
            kind, content = receive.recv()
            if kind == "row":
                rows.append(content)
            else:
                failure = content
                process.join(10)  # it closes its files
        if failure is None:
            failure = f"stopped after {limit:.0f} s"
    except EOFError:  # such as a process that was killed
        process.join(2)
        failure = f"the process ended with exit code {process.exitcode}"
    finally:
        _end(process)
    return rows, failure


def _send_rows(send, log: Path, function: Callable, arguments: tuple) -> None:
    """The new process: in a group of its own, with its output in the log."""
    os.setpgid(0, 0)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for output in (1, 2):
        os.dup2(file, output)
    try:
        for row in function(*arguments):
            send.send(("row", row))
    except Exception as error:
        send.send(("end", first_line(error)))
        raise  # the traceback goes to the log
    send.send(("end", ""))


def _end(process: multiprocessing.Process) -> None:
    """Ends a process and those of its group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):  # its group is gone, or not there yet
            os.killpg(process.pid, number)
        process.join(2)
    process.kill()


def first_line(error: BaseException) -> str:
    """Returns the kind of an error and the first line of its message, at most 200 characters."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]
