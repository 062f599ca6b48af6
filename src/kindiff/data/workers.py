"""A function over many tasks in child processes, results in order.

The children are plain `python -c` processes that speak through pipes. They never import the caller's main
module (so a script needs no `if __name__ == "__main__"`, and a notebook works), stand in a process group of
their own (so Ctrl-C reaches the parent alone) and end by themselves when the parent is gone.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import json
import os
import struct
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, BinaryIO

MAX_WORKERS = 32
_LENGTHS = struct.Struct("<?QQ")


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def ordered_map(function: str, tasks: Sequence[Any], *, workers: int = 0) -> Iterator[tuple[Any, bytes]]:
    """`function(task)` for every task, in order, a few ahead of the consumer.

    function is `module:name`; it takes one JSON value and returns (JSON value, bytes). workers 0: one a
    usable core. With one worker or one task it runs in this process. An exception in a child is raised here
    as RuntimeError with the child's traceback.
    """
    workers = min(workers or min(usable_cores(), MAX_WORKERS), len(tasks))
    if workers <= 1:
        call = _resolve(function)
        yield from map(call, tasks)
        return
    children = [_start(function) for _ in range(workers)]
    idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
    for child in children:
        idle.put(child)

    def ask(task: Any) -> tuple[Any, bytes]:
        child = idle.get()
        try:
            return _ask(child, task)
        finally:
            idle.put(child)

    threads = ThreadPoolExecutor(workers)
    pending: collections.deque[Future[tuple[Any, bytes]]] = collections.deque()
    try:
        for task in tasks:
            pending.append(threads.submit(ask, task))
            if len(pending) >= 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for child in children:  # also the way out of an interruption: a thread that waits sees the pipe end
            child.kill()
        threads.shutdown(wait=True, cancel_futures=True)
        for child in children:
            child.wait()
            for pipe in (child.stdin, child.stdout):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()  # type: ignore[union-attr]


def _start(function: str) -> subprocess.Popen[bytes]:
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; from kindiff.data.workers import serve; serve({function!r})"
    )
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    group: dict[str, Any] = {"process_group": 0} if os.name == "posix" else {}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **one_thread}, **group,
    )  # fmt: skip


def _ask(child: subprocess.Popen[bytes], task: Any) -> tuple[Any, bytes]:
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(json.dumps(task).encode() + b"\n")
        child.stdin.flush()
    except BrokenPipeError:
        raise RuntimeError(f"a worker process ended early (exit status {child.wait()}).") from None
    head = child.stdout.read(_LENGTHS.size)
    if len(head) < _LENGTHS.size:
        raise RuntimeError(f"a worker process ended early (exit status {child.wait()}); is memory short?")
    ok, value_bytes, payload_bytes = _LENGTHS.unpack(head)
    value = json.loads(child.stdout.read(value_bytes))
    payload = child.stdout.read(payload_bytes)
    if not ok:
        raise RuntimeError(f"a worker process failed:\n{value}")
    return value, payload


def serve(function: str) -> None:
    """The child's side: tasks from standard input until it ends, results to standard output."""
    tasks, results = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # whatever prints must not fall into the results
    call = _resolve(function)
    for line in tasks:
        try:
            value, payload = call(json.loads(line))
            _answer(results, True, value, payload)
        except BrokenPipeError:
            os._exit(0)
        except Exception:
            _answer(results, False, traceback.format_exc(), b"")


def _answer(results: BinaryIO, ok: bool, value: Any, payload: bytes) -> None:
    encoded = json.dumps(value).encode()
    results.write(_LENGTHS.pack(ok, len(encoded), len(payload)))
    results.write(encoded)
    results.write(payload)
    results.flush()


def _resolve(function: str) -> Any:
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)
