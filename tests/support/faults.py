"""What the tests break inside the program where nothing from outside could break it.

A fault is code for `Relay(..., fault=...)`, run in the child process after `import alarmrelay`: one
of the constants, or what let() makes of a function. What looks into a Spool of the test's own
process comes last. Names with an underscore in front are used in this file alone.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from harness import wait_until

import alarmrelay
from alarmrelay import Spool

BUG = """
def with_a_bug(body, received_ms, parse=alarmrelay.parse_alarms):
    if b"bug" in body:
        raise KeyError("a bug")
    return parse(body, received_ms)

alarmrelay.parse_alarms = with_a_bug
"""
"""Breaks the reading of an alarm that holds the word "bug", by an error that nobody expects."""

LATE_REFUSAL = """
import time

def refuse(*_):
    time.sleep(0.6)
    raise alarmrelay.Unavailable("the disk")

alarmrelay.Spool.store = refuse
"""
"""Lets the spool refuse each alarm, "the disk", and only after 0.6 seconds."""


def let(fault: Callable[..., None], *arguments: object) -> str:
    """Return the code that calls one of the functions below, with these arguments as text."""
    folder = str(Path(__file__).parent)
    words = ", ".join(repr(str(argument)) for argument in arguments)
    return f"sys.path.append({folder!r})\nimport faults\nfaults.{fault.__name__}({words})"


class Database(sqlite3.Connection):
    """The spool's database; a commit by which something changes is a method of its own."""

    changes = 0

    def execute(self, sql: str, *values: Any) -> Any:
        if sql != "COMMIT" or self.total_changes == self.changes:
            return super().execute(sql, *values)
        self.changes = self.total_changes
        return self.commit_changes()

    def commit_changes(self) -> Any:
        return super().execute("COMMIT")


def put(do: Callable[[], Any], owner: type, name: str, when: str = "before") -> None:
    """Let the program do this before a method of its own, or after it."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def longer(*arguments: Any) -> Any:
        if when == "before":
            do()
        result = method(*arguments)
        if when == "after":
            do()
        return result

    setattr(owner, name, longer)
    sqlite3.connect = functools.partial(sqlite3.connect, factory=Database)


HANGS = {
    "courier": (alarmrelay.Courier, "step"),
    "courier while it sends": (alarmrelay.Client, "ask"),
    "spool": (Database, "commit_changes"),
    "accept loop": (alarmrelay.Server, "service_actions"),
}
"""What the threads do that the watchdog is kept from hearing of."""


def hang(part: str, flag: str) -> None:
    """Let this part hang for good at its next turn once the file is there."""

    def hang_once_told() -> None:
        if os.path.exists(flag):
            threading.Event().wait()

    put(hang_once_told, *HANGS[part])


def slow_disk(seconds: str, flag: str) -> None:
    """Let each fsync take so long while the file is there."""

    def wait_while_told() -> None:
        if os.path.exists(flag):
            threading.Event().wait(float(seconds))

    put(wait_while_told, Database, "commit_changes")


def misread(flag: str) -> None:
    """Let the next look at alarms fail as if the file were damaged, once the flag is there.

    The flag is taken away: the look after that one is well.
    """

    class Misread(sqlite3.Connection):
        def execute(self, sql: str, *values: Any) -> Any:
            if "FROM alarm" in sql and os.path.exists(flag):
                os.unlink(flag)
                raise sqlite3.DatabaseError("database disk image is malformed")
            return super().execute(sql, *values)

    sqlite3.connect = functools.partial(sqlite3.connect, factory=Misread)


KILLS = {
    "taken": (alarmrelay.Spool, "store", "before"),
    "stored": (Database, "commit_changes", "before"),
    "committed": (Database, "commit_changes", "after"),
    "answered": (alarmrelay.Handler, "skip_body", "before"),  # the answer has just left
    "picked": (alarmrelay.Courier, "_deliver_singly", "before"),
    "sent": (alarmrelay.Client, "ask", "after"),
    "recorded": (alarmrelay.Spool, "record", "after"),
}
"""The points of an alarm's way at which a kill could lose or double it, in their order."""


def kill(point: str, flag: str) -> None:
    """Kill the program at this point once the file is there, and take the file away."""

    def die_once_told() -> None:
        if os.path.exists(flag):
            os.unlink(flag)
            os.kill(os.getpid(), signal.SIGKILL)

    put(die_once_told, *KILLS[point])


def ask(spool: Spool, sql: str) -> list[Any]:
    """Return the rows of a statement that the spool's own connection executes."""
    return spool.run_job(lambda: spool._db.execute(sql).fetchall())


def statements(spool: Spool) -> list[str]:
    """Return a list to which every statement is added that is executed from now on."""
    found: list[str] = []
    spool._db.set_trace_callback(found.append)
    return found


@contextlib.contextmanager
def busy(spool: Spool, jobs: int) -> Iterator[None]:
    """Keep the spool's thread busy until so many jobs wait for it."""
    has_begun = threading.Event()
    is_over = threading.Event()

    def work() -> None:
        has_begun.set()
        is_over.wait()

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(spool.run_job, work)
        has_begun.wait()
        try:
            yield
            wait_for_jobs(spool, jobs)
        finally:
            is_over.set()
        done.result()


def wait_for_jobs(spool: Spool, count: int) -> None:
    """Wait until so many jobs wait for the spool's thread, which is kept busy."""
    wait_until(lambda: spool._jobs.qsize() == count)
