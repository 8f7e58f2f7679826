"""Measure how fast and how small the relay is, in under three minutes, and print a table.

What is compared is measured in turns in this one run, so that what else the machine does hits both
alike; the table has medians, least and most. The relay, what it is compared with and the stand-in
for Webex are processes of their own; the alarms are posted from here. A missed goal is only marked:
the exit status is 1 if an alarm of the storm is not in the room, or a post is not accepted.
"""

from __future__ import annotations

import contextlib
import http.server
import itertools
import json
import multiprocessing
import os
import re
import select
import socket
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from harness import PAYLOADS, PROGRAM, Relay, get, head
from webex_standin import Fault, WebexStandIn

TURNS = 5  # of each side
TURN_S = 0.8
WEBEX_S = 0.15  # that Webex takes for a message
PACE = 200  # posts a second, for the times of answers
STORM = 10_000  # alarms
STORM_CONNECTIONS = 16
STORM_RATE = 5  # messages a second that Webex takes
STORM_S = 150.0  # at most, until all are in the room
IDLE_S = 5.0  # in which wake-ups are counted
FEW = 1_000  # alarms retained
MANY = 1_000_000
RETAINED_DAYS = 29
WAITING = 100_000  # alarms, as many as the relay keeps
GROWTH_ALARMS = 400  # in each turn
GROWTH_PAGES = 40
MESSAGE_BYTES = 7439

TLOC = json.loads((PAYLOADS / "bfd_tloc_down.json").read_bytes())
PLACE = {"system-ip": "10.20.2.1", "color": "biz-internet", "host-name": "BR%010d"}
ALARM = json.dumps({**TLOC, "uuid": "bench-%010d", "values_short_display": [PLACE]}).encode()
HEAD = head(Content_Length=len(ALARM % (0, 0)))
NUMBERS = itertools.count(1)  # of alarms: none is posted twice
SPAWN = multiprocessing.get_context("spawn")


# === The table ====================================================================================
class Table:
    """Figures of the relay, of what it is compared with, their ratio and its goal."""

    def __init__(self) -> None:
        self.rows = [("", "relay", "compared with", "ratio", "goal", "")]

    def add(
        self,
        what: str,
        ours: Sequence[float],
        theirs: Sequence[float] = (),
        form: str = "{:,.0f}",
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> None:
        """Add a row; the goal is for the ratio's median, or the relay's if it stands alone."""
        ratios = [our / their for our, their in zip(ours, theirs)]
        judged = statistics.median(ratios or ours)
        goal = ""
        verdict = ""
        if at_least is not None:
            goal = f"≥ {at_least:g}"
            verdict = "" if judged >= at_least else "MISSED"
        if at_most is not None:
            goal = f"≤ {at_most:g}"
            verdict = "" if judged <= at_most else "MISSED"
        figures = (spread(ours, form), spread(theirs, form), spread(ratios, "{:.2f}"))
        self.rows.append((what, *figures, goal, verdict))

    def print(self) -> None:
        """Print it in columns."""
        widths = [max(map(len, column)) for column in zip(*self.rows)]
        for row in self.rows:
            print("  ".join(map(str.ljust, row, widths)).rstrip())


def spread(values: Sequence[float], form: str) -> str:
    """Return the median, and with several values the least and the most."""
    if not values:
        return ""
    median = form.format(statistics.median(values))
    if len(values) == 1:
        return median
    return f"{median} ({form.format(min(values))}…{form.format(max(values))})"


# === Processes: Webex, the empty handler ==========================================================
class Webex:
    """The stand-in, and when it had read each message."""

    def __init__(self) -> None:
        self._standin = WebexStandIn()
        self._standin.fault_for = self._fault
        self._standin.__enter__()
        self._state = "at once"
        self._released = threading.Event()  # set when the state ends
        self._times_s: list[float] = []
        self._second = 0  # of the clock, for the rate
        self._taken = 0  # messages in this second

    def url(self) -> str:
        return self._standin.url

    def be(self, state: str) -> None:
        """From now on answer `at once`, `slow`, `hanging`, `limited` or at the storm's `rate`."""
        self._state = state
        self._times_s.clear()
        self._released.set()
        self._released = threading.Event()

    def times_s(self) -> list[float]:
        """Return the moments, by CLOCK_MONOTONIC, when it had a message, in this state."""
        return self._times_s

    def texts(self) -> list[str]:
        """Return what stands in the room."""
        return self._standin.texts()

    def _fault(self, _: dict[str, Any]) -> Fault | None:
        now_s = time.monotonic()
        self._times_s.append(now_s)
        if self._state == "slow":
            time.sleep(WEBEX_S)
        if self._state == "hanging":
            self._released.wait()
            return None
        if self._state == "limited" or (self._state == "rate" and self._is_too_many(now_s)):
            return Fault(status=429, headers={"Retry-After": "1"})
        return None

    def _is_too_many(self, now_s: float) -> bool:
        if int(now_s) != self._second:
            self._second = int(now_s)
            self._taken = 0
        self._taken += 1
        return self._taken > STORM_RATE


class EmptyHandler(http.server.BaseHTTPRequestHandler):
    """Reads an alarm and answers as the relay does, without a look at it."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps({"status": "accepted"}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Empty(http.server.ThreadingHTTPServer):
    """A server that does nothing with what it reads."""

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), EmptyHandler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def port(self) -> int:
        return int(self.server_address[1])

    def pid(self) -> int:
        return os.getpid()


class Process(BaseManager):
    """Holds one of these in a process of its own; its methods are called from here."""


Process.register("Webex", Webex, exposed=["url", "be", "times_s", "texts"])
Process.register("Empty", Empty, exposed=["port", "pid"])


# === Posts ========================================================================================
def alarm_request() -> bytes:
    """Return the bytes of a post of an alarm that is like no other."""
    number = next(NUMBERS)
    return HEAD + ALARM % (number, number)


def read_answer(client: socket.socket) -> None:
    """Read an answer, which comes at once as it is small; raise unless it accepts the alarm."""
    answer = client.recv(4096)
    if not (answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b'"accepted"}')):
        raise AssertionError(f"a post was answered with {answer!r}")


def flood(
    port: int, connections: int, is_kept: bool, seconds: float, most: int = sys.maxsize
) -> tuple[int, float]:
    """Post without a pause over connections, kept or each for one alarm.

    Return how many alarms were accepted, and in how many seconds.
    """
    poll = select.epoll()
    clients: dict[int, socket.socket] = {}

    def connect() -> socket.socket:
        client = socket.create_connection(("127.0.0.1", port))
        poll.register(client, select.EPOLLIN)
        clients[client.fileno()] = client
        return client

    answers = 0
    began_s = time.monotonic()
    for _ in range(connections):
        connect().sendall(alarm_request())
    while clients:
        ready = poll.poll(30)
        if not ready:
            raise AssertionError(f"{len(clients)} posts are unanswered")
        for descriptor, _ in ready:
            client = clients[descriptor]
            read_answer(client)
            answers += 1
            is_enough = answers + len(clients) > most  # with those on their way
            is_over = is_enough or time.monotonic() - began_s > seconds
            if is_over or not is_kept:
                del clients[descriptor]
                client.close()
            if not is_over:
                next_client = client if is_kept else connect()
                next_client.sendall(alarm_request())
    return answers, time.monotonic() - began_s


def post_ms(client: socket.socket) -> float:
    """Post one alarm over a connection, and return how long its answer took."""
    request = alarm_request()
    began_s = time.monotonic()
    client.sendall(request)
    read_answer(client)
    return (time.monotonic() - began_s) * 1000


def answers_ms(port: int) -> list[float]:
    """Post at an even pace over a connection, and return how long each answer took."""
    found = []
    began_s = time.monotonic()
    with socket.create_connection(("127.0.0.1", port)) as client:
        for number in range(int(PACE * TURN_S)):
            time.sleep(max(0.0, began_s + number / PACE - time.monotonic()))
            found.append(post_ms(client))
    return found


# === The relay ====================================================================================
def relay_in(folder: Path, webex: Any) -> Relay:
    """Return the relay as a service runs it: the file as it is, without the tests' limits."""
    folder.mkdir(exist_ok=True)
    relay = Relay(folder, webex.url(), {})
    relay.command = [sys.executable, str(PROGRAM)]
    return relay


@contextlib.contextmanager
def running(folder: Path, state: str) -> Iterator[tuple[Relay, Any]]:
    """Run a relay on a folder and a stand-in in this state; stop both."""
    with Process(ctx=SPAWN) as holder:
        webex = holder.Webex()
        webex.be(state)
        with relay_in(folder, webex) as relay:
            yield relay, webex
            webex.be("at once")  # a message that hangs would delay the stop


def memory_mib(relay: Relay) -> float:
    """Return what it has in memory."""
    status = Path(f"/proc/{relay.process.pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) / 1024


def processor_s(pid: int) -> float:
    """Return the processor time that a process has used, of user and system (proc(5), stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wakeups(relay: Relay) -> int:
    """Return how often its threads have waited for something, ever."""
    count = 0
    for path in Path(f"/proc/{relay.process.pid}/task").glob("*/status"):
        count += int(re.findall(r"\nvoluntary_ctxt_switches:\s+(\d+)", path.read_text())[0])
    return count


def fill(folder: Path, state: str, count: int) -> None:
    """Put alarms into a spool: one that the relay took while Webex was in this state, and copies.

    Each copy has its own number, ids, hash and time, evenly over the last days.
    """
    number = f"{next(NUMBERS):010d}"
    alarm = {key: TLOC[key] for key in ("rule_name_display", "message", "severity", "active")}
    alarm["uuid"] = f"bench-{number}"
    alarm["values"] = [{"host-name": f"BR{number}"}]
    with running(folder, state) as (relay, _):
        relay.post(alarm)
        relay.told("0 waiting, 1 delivered" if state == "at once" else "1 waiting, ")
        relay.kill()  # before the pause is over and Webex takes it
    db = sqlite3.connect(folder / "state/alarmrelay.db", isolation_level=None)
    db.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF")
    db.execute("PRAGMA cache_size = -1000000")  # KiB: indexes grow at any place
    db.execute(
        "WITH RECURSIVE copy(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM copy LIMIT :count - 1)"
        " INSERT INTO alarm SELECT NULL, room, received_ms - (:count - i) * :step_ms,"
        " randomblob(16), replace(body, :number, printf('9%09d', i)),"
        " delivered_ms - (:count - i) * :step_ms, iif(message_id IS NULL, NULL, 'copy-' || i),"
        " replace(uuid, :number, printf('9%09d', i)), replace(down, :number, printf('9%09d', i))"
        " FROM copy, (SELECT * FROM alarm ORDER BY id DESC LIMIT 1)",
        {"count": count, "step_ms": RETAINED_DAYS * 86_400_000 // count, "number": number},
    )
    db.close()
    os.sync()  # lest what is measured next waits for it


# === What is measured =============================================================================
def measure_accepting(folder: Path, table: Table) -> None:
    """Compare alarms a second, while Webex takes its time, with those of an empty handler."""
    ways = (
        ("1 connection", 1, True, None),
        ("8 connections", 8, True, None),
        ("32 connections", 32, True, 0.5),
        ("new connections", 8, False, 0.8),
    )
    with running(folder, "slow") as (relay, _), Process(ctx=SPAWN) as holder:
        empty = holder.Empty()
        sides = ((relay.port, relay.process.pid), (empty.port(), empty.pid()))
        for name, connections, is_kept, goal in ways:
            rates: tuple[list[float], list[float]] = ([], [])
            costs_us: tuple[list[float], list[float]] = ([], [])
            for _ in range(TURNS):
                for side, (port, pid) in enumerate(sides):
                    before_s = processor_s(pid)
                    answers, seconds = flood(port, connections, is_kept, TURN_S)
                    rates[side].append(answers / seconds)
                    costs_us[side].append((processor_s(pid) - before_s) / answers * 1e6)
            table.add(f"accepted a second, {name}; an empty handler", *rates, at_least=goal)
            table.add("processor time for one, µs", *costs_us)


def measure_answering(folder: Path, table: Table) -> None:
    """Compare the times of answers while Webex hangs with those while it is well."""
    medians: dict[str, list[float]] = {"slow": [], "hanging": []}
    worst: dict[str, list[float]] = {"slow": [], "hanging": []}
    with running(folder, "slow") as (relay, webex):
        for state in list(medians) * TURNS:
            webex.be(state)
            time.sleep(0.3)
            cuts = statistics.quantiles(answers_ms(relay.port), n=100)
            medians[state].append(cuts[49])
            worst[state].append(cuts[98])
    what = "answer, ms, Webex hangs; Webex is well"
    table.add(f"{what}, p50", medians["hanging"], medians["slow"], "{:.2f}", at_most=1.2)
    table.add(f"{what}, p99", worst["hanging"], worst["slow"], "{:.2f}")


def measure_storm(folder: Path, table: Table) -> int:
    """Measure the relay at rest, then a storm with a Webex that limits the bot.

    Return how many alarms are missing.
    """
    with running(folder, "rate") as (relay, webex):
        time.sleep(1)
        rest_mib = memory_mib(relay)
        before = wakeups(relay)
        time.sleep(IDLE_S)
        rate = (wakeups(relay) - before) / IDLE_S
        began_s = time.monotonic()
        answers, answered_s = flood(relay.port, STORM_CONNECTIONS, True, STORM_S, STORM)
        relay.told(f"0 waiting, {answers} delivered", STORM_S)
        requests_s = webex.times_s()
        texts = webex.texts()
        more_mib = memory_mib(relay) - rest_mib
    missing = STORM - len(set(re.findall(r"\bBR\d{10}\b", "\n".join(texts))))
    least = sum(len(text.encode()) for text in texts) / MESSAGE_BYTES
    table.add(f"storm of {STORM:,}, s until answered", [answered_s], form="{:.1f}")
    table.add("storm, s until in the room", [requests_s[-1] - began_s], form="{:.1f}")
    table.add("storm, messages; that would just hold them", [len(texts)], [least])
    table.add("storm, alarms missing", [missing], at_most=0)
    table.add("memory at rest, MiB", [rest_mib], form="{:.1f}", at_most=36)
    table.add("wake-ups a second at rest", [rate], form="{:.1f}", at_most=2)
    table.add("memory after the storm, MiB more", [more_mib], form="{:.1f}", at_most=10)
    return missing


def costs_ms(relay: Relay, webex: Any) -> Iterator[tuple[str, float]]:
    """Yield what an alarm, a message and a page cost in this relay."""
    webex.be("hanging")
    with socket.create_connection(("127.0.0.1", relay.port)) as client:
        accept_ms = [post_ms(client) for _ in range(GROWTH_ALARMS)]
    relay.told(f" {GROWTH_ALARMS} waiting, ")
    yield "accept an alarm, ms", statistics.median(accept_ms)
    webex.be("at once")
    relay.told(" 0 waiting, ")
    times_s = webex.times_s()
    between_s = [after_s - before_s for before_s, after_s in zip(times_s, times_s[1:])]
    yield "deliver a message, ms", statistics.median(between_s) * 1000
    pages_ms = []
    for _ in range(GROWTH_PAGES):
        began_s = time.monotonic()
        assert get(relay, "/")[0] == 200
        pages_ms.append((time.monotonic() - began_s) * 1000)
    yield "show the page, ms", statistics.median(pages_ms)


def measure_growth(few: Path, many: Path, table: Table) -> None:
    """Compare what alarms cost with few and many retained, in relays that run side by side."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    with running(many, "at once") as many_relay, running(few, "at once") as few_relay:
        for _ in range(TURNS):
            for side, (relay, webex) in enumerate((many_relay, few_relay)):
                for what, cost_ms in costs_ms(relay, webex):
                    found.setdefault(what, ([], []))[side].append(cost_ms)
    for what, sides in found.items():
        name = f"{what}, {MANY:,} retained; {FEW:,}"
        table.add(name, *sides, form="{:.2f}", at_most=1.2)


def measure_starts(full: Path, empty: Path, table: Table) -> None:
    """Compare starts with a full spool, Webex paused, with those with an empty one."""
    took_s: dict[Path, list[float]] = {full: [], empty: []}
    rest_mib: dict[Path, float] = {}
    with Process(ctx=SPAWN) as holder:
        webex = holder.Webex()
        webex.be("limited")
        for folder in list(took_s) * TURNS:
            relay = relay_in(folder, webex)
            began_s = time.monotonic()
            relay.start()
            took_s[folder].append(time.monotonic() - began_s)
            if len(took_s[folder]) == TURNS:
                time.sleep(1)
                rest_mib[folder] = memory_mib(relay)
            relay.stop()
    what = f"start, {WAITING:,} waiting, {MANY:,} retained, s; none"
    table.add(what, took_s[full], took_s[empty], "{:.2f}", at_most=2)
    more_mib = rest_mib[full] - rest_mib[empty]
    table.add(f"memory, {WAITING:,} waiting, MiB more", [more_mib], form="{:.1f}", at_most=10)


def syncs_a_second(folder: Path) -> float:
    """Return how often the disk syncs a file that grows."""
    with (folder / "syncs").open("wb") as file:
        began_s = time.monotonic()
        for _ in range(200):
            file.write(b"-" * 4096)
            file.flush()
            os.fsync(file.fileno())
        return 200 / (time.monotonic() - began_s)


def main() -> int:
    """Measure everything, print the table, and return 1 if an alarm is missing."""
    began_s = time.monotonic()
    table = Table()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        version = ".".join(map(str, sys.version_info[:3]))
        print(f"Python {version}, SQLite {sqlite3.sqlite_version}, {os.cpu_count()} cores,")
        print(f"a disk that syncs {syncs_a_second(folder):,.0f} times a second\n", flush=True)
        measure_accepting(folder / "accepting", table)
        measure_answering(folder / "answering", table)
        missing = measure_storm(folder / "storm", table)
        fill(folder / "few", "at once", FEW)
        fill(folder / "many", "at once", MANY)
        measure_growth(folder / "few", folder / "many", table)
        fill(folder / "many", "limited", WAITING)
        measure_starts(folder / "many", folder / "empty", table)
        table.print()
    print(f"\nmedian (least…most); measured in {time.monotonic() - began_s:.0f} s")
    return int(missing > 0)


if __name__ == "__main__":
    sys.exit(main())
