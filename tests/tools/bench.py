"""Measure how fast and how small the relay is, in under three minutes; print a table and a profile.

What is compared is measured in turns in this one run, so that what else the machine does hits both
alike; the table has medians, least and most. The relay, what it is compared with, the stand-in for
Webex and what posts the alarms are processes of their own. A missed goal is only marked: the exit
status is 1 if a post is not answered with 200, or an alarm of the storm is not in the room.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import http.server
import io
import itertools
import json
import logging
import multiprocessing
import os
import re
import select
import signal
import socket
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from harness import PAYLOADS, PROGRAM, Relay, basic, environment, head
from webex_standin import ROOM, TOKEN, Fault, WebexStandIn

ROUNDS, ROUND_S = 5, 0.8  # turns of each side, and how long one lasts
WEBEX_S = 0.15  # that Webex takes for a message
PACE, PACE_CONNECTIONS = 200, 4  # posts a second for the answer times
RESTS = {0.02: 30, 0.2: 6}  # s before each message from post to room; messages in a turn
STORM, STORM_CONNECTIONS, STORM_RATE = 10_000, 16, 5  # alarms; messages a second that Webex takes
SIZES, WAITING, STARTS = (1_000, 100_000, 1_000_000), 100_000, 5
GROWTH_ALARMS, GROWTH_PAGES = 400, 40  # in each turn
IDLE_S, RETAINED_DAYS, OLD, ROOMS = 10.0, 29, 20_000, 20

SPAWN = multiprocessing.get_context("spawn")
BLOCKS = itertools.count(1)  # of alarm numbers: no alarm is posted twice
TLOC = json.loads((PAYLOADS / "bfd_tloc_down.json").read_bytes())
PLACE = {"system-ip": "10.20.2.1", "color": "biz-internet", "host-name": "BR%010d"}
ALARM = json.dumps({**TLOC, "uuid": "bench-%010d", "values_short_display": [PLACE]}).encode()
REQUEST = head(Content_Length=len(ALARM % (0, 0))).replace(b"%", b"%%") + ALARM
SMALL = {key: TLOC[key] for key in ("rule_name_display", "message", "severity", "active", "values")}
SMALL = json.dumps({**SMALL, "uuid": "%", "receive_time": TLOC["receive_time"]})  # in a full spool


# === The table ====================================================================================
rows: list[tuple[str, ...]] = [("", "relay", "compared with", "ratio", "goal", "")]


def spread(values: Sequence[float], form: str) -> str:
    """Return the median, and with several values the least and the most."""
    if len(values) < 2:
        return "".join(form.format(value) for value in values)
    texts = (form.format(value) for value in (statistics.median(values), min(values), max(values)))
    return "{} ({}…{})".format(*texts)


def row(
    what: str,
    ours: Sequence[float],
    theirs: Sequence[float] = (),
    goal: str = "",
    form: str = "{:,.0f}",
) -> None:
    """Note figures of the relay, of what it is compared with in turns, and the ratio's goal."""
    ratios = [our / their for our, their in zip(ours, theirs)]
    judged, (sign, _, bound) = statistics.median(ratios or ours), goal.partition(" ")
    if sign == "noise":
        is_met = min(ours) <= max(theirs)
    else:
        is_met = not goal or (judged >= float(bound) if sign == "≥" else judged <= float(bound))
    shown = spread(ours, form), spread(theirs, form), spread(ratios, "{:.2f}")
    rows.append((what, *shown, goal, "" if is_met else "MISSED"))


def print_table() -> None:
    widths = [max(map(len, column)) for column in zip(*rows)]
    for what, *figures in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(figures, widths[1:])]
        print("  ".join([f"{what:{widths[0]}}", *cells]).rstrip())


# === Processes: Webex, the empty handler, the load ================================================
class Webex:
    """The stand-in, and when it had read each message; in a process of its own."""

    def __init__(self) -> None:
        self._standin = WebexStandIn().__enter__()
        self._standin.fault_for = self._fault
        self._state, self._held, self._times_s = "at once", threading.Event(), list[float]()
        self._second = self._taken = 0

    def url(self) -> str:
        return self._standin.url

    def be(self, state: str) -> None:
        """From now on answer `at once`, `slow`, `hanging`, `limited` or at the storm's `rate`."""
        self._state, held, self._held = state, self._held, threading.Event()
        held.set()  # what hung until now
        self._times_s.clear()

    def times_s(self) -> list[float]:
        """Return the moments, by CLOCK_MONOTONIC, when it had a message, in this state."""
        return self._times_s

    def messages(self) -> list[dict[str, Any]]:
        return self._standin.messages

    def _fault(self, _: dict[str, Any]) -> Fault | None:
        self._times_s.append(time.monotonic())
        second, before, self._second = int(time.monotonic()), self._second, int(time.monotonic())
        self._taken = self._taken + 1 if second == before else 1
        if self._state == "limited" or (self._state == "rate" and self._taken > STORM_RATE):
            return Fault(status=429, headers={"Retry-After": "1"})
        if self._state == "hanging":
            return Fault(take=True, status=200, hold=self._held)
        return Fault(take=True, status=200, hold=Delay()) if self._state == "slow" else None


class Delay(threading.Event):
    def wait(self, timeout: float | None = None) -> bool:
        time.sleep(WEBEX_S)
        return True


class EmptyHandler(http.server.BaseHTTPRequestHandler):
    protocol_version, wbufsize = "HTTP/1.1", -1

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
    """A server in the relay's process model that does nothing with what it reads."""

    daemon_threads, request_queue_size = True, 1024

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), EmptyHandler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def port(self) -> int:
        return int(self.server_address[1])


class Process(BaseManager):
    """Holds one of these in a process of its own; its methods are called from here."""


Process.register("Webex", Webex, exposed=["url", "be", "times_s", "messages"])
Process.register("Empty", Empty, exposed=["port"])


def answer_of(client: socket.socket) -> None:
    """Read an answer, which comes at once as it is small; raise unless it accepts the alarm."""
    answer = client.recv(4096)
    if not (answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b'"accepted"}')):
        raise AssertionError(f"a post was answered with {answer!r}")


def saturate(
    port: int, first: int, connections: int, is_kept: bool, seconds: float, most: int = sys.maxsize
) -> float:
    """Post from so many connections, kept or each for one alarm; return the answers a second."""
    numbers, poll, clients = itertools.count(first), select.epoll(), dict[int, socket.socket]()

    def post(client: socket.socket | None = None) -> None:
        if not client:
            client = socket.create_connection(("127.0.0.1", port))
            poll.register(client, select.EPOLLIN)
            clients[client.fileno()] = client
        client.sendall(REQUEST % ((number := next(numbers)), number))

    began_s, answers = time.monotonic(), 0
    for _ in range(connections):
        post()
    while clients:
        if not (ready := poll.poll(30)):
            raise AssertionError(f"{len(clients)} posts are unanswered")
        for descriptor, _ in ready:
            answer_of(client := clients[descriptor])
            answers += 1
            is_over = time.monotonic() - began_s > seconds or answers + len(clients) > most
            if is_over or not is_kept:
                del clients[descriptor]
                client.close()
            if not is_over:
                post(client if is_kept else None)
    return answers / (time.monotonic() - began_s)


def post_ms(client: socket.socket, number: int) -> float:
    """Post one alarm over a connection, and return how long its answer took."""
    began_s = time.monotonic()
    client.sendall(REQUEST % (number, number))
    answer_of(client)
    return (time.monotonic() - began_s) * 1000


def answers_ms(port: int, first: int, seconds: float) -> list[float]:
    """Post at an even pace over some connections, and return how long each answer took."""
    began_s, count = time.monotonic(), int(PACE * seconds / PACE_CONNECTIONS)

    def post(place: int) -> list[float]:
        found = []
        with socket.create_connection(("127.0.0.1", port)) as client:
            for number in range(place, count * PACE_CONNECTIONS, PACE_CONNECTIONS):
                time.sleep(max(0.0, began_s + number / PACE - time.monotonic()))
                found.append(post_ms(client, first + number))
        return found

    with concurrent.futures.ThreadPoolExecutor(PACE_CONNECTIONS) as threads:
        return [*itertools.chain(*threads.map(post, range(PACE_CONNECTIONS)))]


class Load(concurrent.futures.ProcessPoolExecutor):
    """Posts from processes of its own."""

    def __init__(self) -> None:
        super().__init__(2, SPAWN)
        for _ in (1, 2):
            self.submit(time.sleep, 0.5)  # both start

    def start(self, work: Any, port: int, *arguments: Any) -> concurrent.futures.Future[Any]:
        return self.submit(work, port, next(BLOCKS) * 10**6, *arguments)


# === The relay ====================================================================================
def relay_in(folder: Path, webex: Any, **rooms: str) -> Relay:
    """Return the relay as a service runs it, the file as it is, not as the tests do."""
    folder.mkdir(exist_ok=True)
    relay = Relay(folder, webex.url(), {}, **rooms)
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
    status = Path(f"/proc/{relay.process.pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) / 1024


def wakeups(relay: Relay) -> int:
    """Return how often its threads have waited for something, ever."""
    statuses = Path(f"/proc/{relay.process.pid}/task").glob("*/status")
    counts = (re.findall(r"\nvoluntary_ctxt_switches:\s+(\d+)", s.read_text()) for s in statuses)
    return sum(int(count) for (count,) in counts)


def get(relay: Relay, path: str) -> tuple[int, str]:
    with contextlib.closing(relay.connect()) as client:
        client.request("GET", path, headers={"Authorization": basic()})
        answer = client.getresponse()
        return answer.status, answer.read().decode()


def fill(folder: Path, retained: int, waiting: int = 0, days: int = RETAINED_DAYS) -> None:
    """Put alarms into a spool: delivered, evenly over the last days, and waiting ones."""
    import alarmrelay

    (folder / "state").mkdir(parents=True, exist_ok=True)
    db = alarmrelay.Spool(folder / "state")._db
    db.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; BEGIN")
    indexes = db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'index'").fetchall()
    for name, _ in indexes if retained else ():  # made at the end they take half the time
        db.execute(f"DROP INDEX {name}")
    span_ms = days * 86_400_000
    count = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT ?1)"
    delivered = "?2 + i * ?3, 'message-' || i, 'full-' || i, iif(i % 10, NULL, 'down-' || i)"
    for number, rest in ((retained, delivered), (waiting, "NULL, NULL, NULL, NULL")):
        db.execute(
            "INSERT INTO alarm (room, request, received_ms, body, delivered_ms, message_id, uuid,"
            f" down) {count} SELECT '/', randomblob(16), ?2 + i * ?3, replace(?4, '%', i), {rest}"
            " FROM n",
            (number, time.time_ns() // 10**6 - span_ms, span_ms // max(number, 1), SMALL),
        )
    for _, sql in indexes if retained else ():
        db.execute(sql)
    db.execute("COMMIT")
    db.close()
    os.sync()  # lest what is measured next waits for it


# === What is measured =============================================================================
def measure_accepting(folder: Path, load: Load) -> None:
    """Compare alarms a second, while Webex takes its time, with those of an empty handler."""
    ways = [("1 connection", 1, True), ("8 connections", 8, True), ("32 connections", 32, True)]
    ways.append(("new connections", 8, False))
    goals = {"32 connections": "≥ 0.5", "new connections": "≥ 0.8"}
    with running(folder, "slow") as (relay, _), Process(ctx=SPAWN) as holder:
        port = holder.Empty().port()
        for name, *way in ways:
            ours, empty = list[float](), list[float]()
            for _ in range(ROUNDS):
                ours.append(load.start(saturate, relay.port, *way, ROUND_S).result())
                empty.append(load.start(saturate, port, *way, ROUND_S).result())
            row(f"accepted a second, {name}; an empty handler", ours, empty, goals.get(name, ""))
        twice = list[float]()
        for _ in range(2):
            halves = [load.start(saturate, port, 16, True, ROUND_S) for _ in (1, 2)]
            twice.append(sum(half.result() for half in halves))
            empty.append(load.start(saturate, port, 32, True, ROUND_S).result())
        row("(the empty handler alone, posts from 2 processes; from 1)", twice, empty[-2:])


def measure_answering(folder: Path, load: Load) -> None:
    """Compare the times of answers while Webex hangs, or limits the bot, with those else."""
    found = {state: list[list[float]]() for state in ("slow", "hanging", "limited")}
    with running(folder, "slow") as (relay, webex):
        for state in [*found] * ROUNDS:
            webex.be(state)
            time.sleep(1.3 if state == "slow" else 0.1)  # after "limited" the room pauses for 1 s
            times_ms = load.start(answers_ms, relay.port, ROUND_S).result()
            found[state].append(statistics.quantiles(times_ms, n=100))
    for state, name in (("hanging", "hangs"), ("limited", "limits")):
        for percent in (50, 99):
            ours, healthy = ([cuts[percent - 1] for cuts in found[s]] for s in (state, "slow"))
            what = f"answer p{percent}, ms, Webex {name}; Webex is well"
            row(what, ours, healthy, "noise", "{:.2f}")


def measure_retention(folder: Path, load: Load) -> None:
    """Compare the times of answers while old alarms are deleted with those when there are none."""
    fill(folder / "old", OLD, days=60)  # half of them are to be deleted
    found = {"old": list[list[float]](), "none": list[list[float]]()}
    with contextlib.ExitStack() as stack:
        relays = {name: stack.enter_context(running(folder / name, "at once"))[0] for name in found}
        for name in [*found] * ROUNDS:
            times_ms = load.start(answers_ms, relays[name].port, ROUND_S).result()
            found[name].append(statistics.quantiles(times_ms, n=100))
        relays["old"].stop()
        with contextlib.closing(sqlite3.connect(folder / "old/state/alarmrelay.db")) as db:
            old_ms = (time.time() - 30 * 86_400) * 1000
            left = "SELECT count(*) FROM alarm WHERE delivered_ms < ?"
            ((count,),) = db.execute(left, [old_ms])
        relays["old"].start()
    row("alarms deleted meanwhile; old ones before", [OLD // 2 - count], [OLD // 2])
    for percent in (50, 99):
        ours, none = ([cuts[percent - 1] for cuts in found[name]] for name in found)
        row(f"answer p{percent}, ms, old alarms are deleted; none", ours, none, "noise", "{:.2f}")


def measure_the_way(folder: Path) -> None:
    """Compare the time from a post to the room with that of a commit and urllib alone."""
    db = sqlite3.connect(folder.parent / "bare.db", isolation_level=None)
    db.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; CREATE TABLE a (body)")
    numbers, medians = itertools.count(1), dict[float, list[list[float]]]()
    with contextlib.ExitStack() as stack:
        relay, webex = stack.enter_context(running(folder, "at once"))
        client = stack.enter_context(socket.create_connection(("127.0.0.1", relay.port)))
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "text/plain"}
        counts, message = itertools.count(1), b""

        def post() -> None:
            post_ms(client, next(numbers))

        def post_bare() -> None:
            db.execute("INSERT INTO a VALUES (?)", [ALARM])
            request = urllib.request.Request(f"{webex.url()}/messages", message, headers)
            with urllib.request.urlopen(request) as answer:
                answer.read()

        def median_ms(work: Callable[[], None], rest_s: float, count: int) -> float:
            found = list[float]()
            for _ in range(count):
                time.sleep(rest_s)
                began_s, number = time.monotonic(), next(counts)
                work()
                while len(times_s := webex.times_s()) < number:
                    time.sleep(0.005)
                found.append((times_s[-1] - began_s) * 1000)
            return statistics.median(found)

        for rest_s, count in [*RESTS.items()] * ROUNDS:
            ours = median_ms(post, rest_s, count)
            sent = webex.messages()[-1]
            message = json.dumps({key: sent[key] for key in ("roomId", "markdown")}).encode()
            bare = median_ms(post_bare, rest_s, count)
            medians.setdefault(rest_s, []).append([ours, bare])
    for rest_s, pairs in medians.items():
        ours, bare = zip(*pairs)
        what = f"post until Webex has it, ms, {rest_s:g} s after another; a commit and urllib"
        row(what, ours, bare, "≤ 1.5", "{:.2f}")


def measure_storm(folder: Path, load: Load) -> int:
    """Measure a storm with a Webex that limits the bot; return how many alarms are missing."""
    with running(folder, "rate") as (relay, webex):
        time.sleep(1)
        rest_mib, began_s = memory_mib(relay), time.monotonic()
        load.start(saturate, relay.port, STORM_CONNECTIONS, True, 120, STORM).result()
        answered_s = time.monotonic() - began_s
        relay.told(f"0 waiting, {STORM} delivered", timeout_s=150)
        requests_s, texts = webex.times_s(), [m["markdown"] for m in webex.messages()]
        after_mib = memory_mib(relay)
    missing = STORM - len(set(re.findall(r"\bBR\d{10}\b", "\n".join(texts))))
    least = -(-sum(len(text.encode()) for text in texts) // 7439)
    row(f"storm of {STORM:,}, s until answered", [answered_s], form="{:.1f}")
    row("storm, s until in the room", [requests_s[-1] - began_s], form="{:.1f}")
    row("storm, messages; least possible", [len(texts)], [least])
    row("storm, requests that Webex limited", [len(requests_s) - len(texts)])
    row("storm, alarms missing", [missing], goal="≤ 0")
    row("memory after the storm, MiB more", [after_mib - rest_mib], goal="≤ 10", form="{:.1f}")
    return missing


def memory_after(relay: Relay, paths: Sequence[str]) -> float:
    """Return the MiB that it takes at rest after an alarm to each path."""
    for number, path in enumerate(paths):
        relay.post(ALARM % (number, number), path)
    relay.told(f" 0 waiting, {len(paths)} delivered")
    time.sleep(1)
    return memory_mib(relay)


def measure_rest(folder: Path) -> None:
    """Count wake-ups without work, while the spools for what comes next are written."""
    with running(folder, "at once") as (relay, webex):
        time.sleep(1)
        row("memory at rest, MiB", [memory_mib(relay)], goal="≤ 30", form="{:.1f}")
        began_s, before = time.monotonic(), wakeups(relay)
        for size in SIZES:
            fill(folder.parent / f"{size}", size)
        time.sleep(max(0.0, began_s + IDLE_S - time.monotonic()))
        rate = (wakeups(relay) - before) / (time.monotonic() - began_s)
        row("wake-ups a second at rest", [rate], goal="≤ 2", form="{:.1f}")
        after_mib = memory_after(relay, ["/"] * 100)
        rooms = {f"room_id_{number}": ROOM for number in range(ROOMS)}
        with relay_in(folder / "rooms", webex, **rooms) as many:
            paths = ["/", *(f"/{number}" for number in range(ROOMS))]
            more_mib = memory_after(many, paths * 5) - after_mib
    row("memory after 100 alarms, MiB", [after_mib], form="{:.1f}")
    row(f"memory, {ROOMS} rooms more, 5 alarms in each, MiB more", [more_mib], form="{:.1f}")


def costs_ms(relay: Relay, webex: Any) -> Iterator[tuple[str, float]]:
    """Yield what an alarm, a message and a page cost in this relay."""
    webex.be("hanging")
    first = next(BLOCKS) * 10**6
    with socket.create_connection(("127.0.0.1", relay.port)) as client:
        accept_ms = [post_ms(client, first + number) for number in range(GROWTH_ALARMS)]
        yield "accept an alarm, ms", statistics.median(accept_ms)
    webex.be("at once")
    time.sleep(0.2)
    while 'alarmrelay_alarms_waiting{room="/"} 0' not in get(relay, "/metrics")[1]:
        time.sleep(0.2)
    between_s = [after - before for before, after in zip(webex.times_s(), webex.times_s()[1:])]
    yield "deliver a message, ms", statistics.median(between_s) * 1000
    for path in ("/metrics", "/"):
        pages_ms = []
        for _ in range(GROWTH_PAGES if get(relay, path)[0] == 200 else 0):
            began_s = time.monotonic()
            get(relay, path)
            pages_ms.append((time.monotonic() - began_s) * 1000)
        if pages_ms:
            yield f"GET {path}, ms", statistics.median(pages_ms)


def measure_growth(folder: Path) -> None:
    """Compare what alarms cost with few and many retained, in relays that run side by side."""
    found = dict[str, dict[int, list[float]]]()
    with contextlib.ExitStack() as stack:
        pairs = {
            size: stack.enter_context(running(folder / f"{size}", "at once")) for size in SIZES
        }
        for size in [*SIZES] * ROUNDS:
            for what, ms in costs_ms(*pairs[size]):
                found.setdefault(what, {}).setdefault(size, []).append(ms)
    for what, by_size in found.items():
        for size in SIZES[1:]:
            name = f"{what}, {size:,} retained; {SIZES[0]:,}"
            row(name, by_size[size], by_size[SIZES[0]], "≤ 1.2", "{:.2f}")


def measure_starts(folder: Path) -> None:
    """Compare starts with a full spool, Webex paused, with those with an empty one."""
    fill(full := folder / f"{SIZES[-1]}", 0, WAITING)
    took_s, mib = {full: list[float](), folder / "empty": list[float]()}, dict[Path, float]()
    with Process(ctx=SPAWN) as holder:
        webex = holder.Webex()
        webex.be("limited")
        for place in [*took_s] * STARTS:
            relay, began_s = relay_in(place, webex), time.monotonic()
            relay.start()
            took_s[place].append(time.monotonic() - began_s)
            if len(took_s[place]) == STARTS:
                time.sleep(1)
                mib[place] = memory_mib(relay)
            relay.stop()
    ours, empty = took_s.values()
    row("start, s", empty, goal="≤ 0.3", form="{:.2f}")
    what = f"start, {WAITING:,} waiting, {SIZES[-1]:,} retained, s; none"
    row(what, ours, empty, "≤ 2", "{:.2f}")
    more_mib = mib[full] - mib[folder / "empty"]
    row(f"memory, {WAITING:,} waiting, MiB more", [more_mib], goal="≤ 10", form="{:.1f}")


def syncs_a_second(folder: Path) -> float:
    with (folder / "syncs").open("wb") as file:
        began_s = time.monotonic()
        for _ in range(200):
            file.write(b"-" * 4096)
            file.flush()
            os.fsync(file.fileno())
        return 200 / (time.monotonic() - began_s)


# === A profile ====================================================================================
PROFILED = 12_000  # alarms
PARTS = {  # the innermost of these functions that runs has the time
    "_transaction": "begin and commit, without others to share it",
    "refusal": "asking for free space",
    "store": "the spool's other statements, what is counted and kept for the page",
    "parse_alarms": "JSON, from the request",
    "dumps": "JSON, into the spool",
    "_read_header": "header",
    "_respond": "credentials, body and its hash",
    "info": "line in the log",
    "_answer": "answer",
}


def sampled_us(handle: Callable[[], object], client: socket.socket) -> dict[str, float]:
    """Return the processor time for an alarm, by part, and without hand-overs between threads."""
    hits = collections.Counter[str]()

    def look(_: int, frame: Any) -> None:
        while frame and frame.f_code.co_name not in PARTS:
            frame = frame.f_back
        hits[PARTS[frame.f_code.co_name] if frame else "all else"] += 1

    def go(first: int) -> None:
        for number in range(first, first + PROFILED):
            client.sendall(REQUEST % (number, number))
            handle()
            client.recv(4096)

    go(PROFILED)  # all is warm then
    signal.signal(signal.SIGPROF, look)
    began_s = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, 0.001, 0.001)  # of processor time, or each of its ticks
    go(2 * PROFILED)
    signal.setitimer(signal.ITIMER_PROF, 0)
    us = (time.process_time() - began_s) / PROFILED * 1e6
    return {part: us * count / sum(hits.values()) for part, count in hits.items()}


def print_profile(folder: Path) -> None:
    """Print what the two handlers spend their time on, each in a single thread."""
    import alarmrelay

    folder.mkdir()
    settings = alarmrelay.read_settings(environment(folder, "http://127.0.0.1:9"))
    logging.basicConfig(filename=folder / "log", level=logging.INFO)
    logging.root.handlers[0].setFormatter(alarmrelay.LineFormatter())
    spool = alarmrelay.Spool(folder / "state")
    courier: Any = alarmrelay.Courier("/", "room", settings, spool, Any)  # delivers nothing
    server, peer = alarmrelay.Server(settings, spool, courier), ("127.0.0.1", 1)
    ours, client = socket.socketpair()
    relay = alarmrelay.Handler(ours, peer, server, alarmrelay.HEADER_S)
    relay.rfile = io.BufferedReader(relay)
    parts = sampled_us(relay.handle_one_request, client)
    theirs, client = socket.socketpair()
    empty = EmptyHandler.__new__(EmptyHandler)
    empty.request, empty.client_address = theirs, peer
    empty.setup()
    empty_us = sum(sampled_us(empty.handle_one_request, client).values())
    print(f"\nprocessor time for an alarm, in one thread, us; the empty handler: {empty_us:.0f}")
    for part, us in sorted(parts.items(), key=lambda pair: -pair[1]):
        print(f"{us:6.0f}  {part}")
    print(f"{sum(parts.values()):6.0f}  in all")


def main() -> int:
    began_s = time.monotonic()
    sys.path.insert(0, str(PROGRAM.parent))
    with tempfile.TemporaryDirectory() as name, Load() as load:
        folder = Path(name)
        version = ".".join(map(str, sys.version_info[:3]))
        print(f"Python {version}, SQLite {sqlite3.sqlite_version}, {os.cpu_count()} cores,")
        print(f"a disk that syncs {syncs_a_second(folder):,.0f} times a second\n", flush=True)
        measure_accepting(folder / "accepting", load)
        measure_answering(folder / "answering", load)
        (folder / "retention").mkdir()
        measure_retention(folder / "retention", load)
        measure_the_way(folder / "way")
        missing = measure_storm(folder / "storm", load)
        measure_rest(folder / "rest")
        measure_growth(folder)
        measure_starts(folder)
        print_table()
        print_profile(folder / "profile")
    print(f"\nmedian (least…most); measured in {time.monotonic() - began_s:.0f} s")
    return int(missing > 0)


if __name__ == "__main__":
    sys.exit(main())
