"""A case of a benchmark in a process of its own: its memory is its own, and where it is killed the other cases go on."""

import multiprocessing
import time
from collections.abc import Callable


def in_own_process(function: Callable, *arguments) -> tuple[object, int | None]:
    """(what the function returns, exit code of the process); (None, exit code) where it failed. The function is one of a module's own, by name."""
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
