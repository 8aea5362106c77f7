"""Runs a benchmark case in its own process, to measure its memory and to outlive it if it is killed."""

import multiprocessing
import time
from collections.abc import Callable


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
