#!/usr/bin/env python3
"""Relay alarm webhooks from Cisco vManage (Catalyst SD-WAN Manager) to a Webex room.

    vManage --POST, Basic auth--> Handler --> Spool (SQLite, fsync) --> 200
                                                |
                                             Courier --urllib, Bearer--> Webex POST /v1/messages

An alarm that was answered with 200 is on disk and reaches the room: at least once, oldest first,
whatever is killed, slow, down or misconfigured. vManage never waits for Webex.
"""

from __future__ import annotations

import argparse
import base64
import collections
import concurrent.futures
import email.utils
import hashlib
import html
import http.client
import http.server
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import re
import secrets
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
import zoneinfo
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone, tzinfo
from pathlib import Path
from typing import Any, Callable, NamedTuple

__version__ = "0.1.0"
log = logging.getLogger("alarmrelay")
# === Limits =======================================================================================
MESSAGE_BYTES, PLAIN_TEXT_BYTES = 7439, 1000  # of UTF-8, as Webex takes them; of the plain form
HEADER_BYTES, FIELDS = 2**17, 100  # of a request; a password may have 100 KB
BODY_BYTES, ALARMS = 4 * 2**20, 1000  # of a request; vManage sends one of 8 KB or less
BLOCK_BYTES, DRAIN_BYTES, ANSWER_BYTES = 2**16, 2**24, 2**20  # at a time; if refused; of Webex
HEADER_S, BODY_S = 10.0, 60.0  # for a TLS handshake, a header or silence; for a body
IDLE_S, GUESS_S = 75.0, 1.0  # of silence with credentials; between requests without
BACKLOG, CONNECTIONS, SPARE_FILES = 1024, 1024, 40  # that the kernel keeps; open; for all else
STOP_S, GRACE_S, LINGER_S = 10.0, 0.2, 2.0  # of a stop; for what is on its way; for a last word
DELAYED_MS, DUPLICATE_MS = 300_000, 600_000  # older is old news; sooner, a sender's retry
WAITING_ALARMS, FREE_BYTES = 100_000, 16 * 2**20  # else new alarms are refused, not deliveries
TICK_S, RETENTION_STEP = 1.0, 500  # between two status lines, and old alarms deleted in that time
REQUEST_S, CONNECT_S = 60.0, 10.0  # for one request to Webex; to connect to each of its addresses
RETRY_S, RETRY_MAX_S, RETRY_JITTER = 1.0, 300.0, 0.2  # after 5xx and network errors; doubles
PAUSE_S, PAUSE_MIN_S, PAUSE_MAX_S = 15.0, 1.0, 3600.0  # 429 and 423; 15 s as in Cisco's own SDKs
HOLD_S, STALL_S = 60.0, 15.0  # between attempts that need the operator; until a thread is stuck


# === Errors =======================================================================================
class RelayError(Exception):
    """What ends the program; sysexits.h: 74 I/O, 75 already running, 78 settings."""

    def __init__(self, text: str, exit_status: int = 74) -> None:
        super().__init__(text)
        self.exit_status = exit_status


class Refused(RelayError):
    """A request that is answered with this status and, as {"error": …}, this text."""

    def __init__(self, status: int, text: str, **headers: str) -> None:
        super().__init__(text, exit_status=1)
        self.status, self.headers = status, headers


# === Settings =====================================================================================
def parse_listen(text: str) -> tuple[str, int]:
    """Return address and port of `0.0.0.0:5001` or `[::]:5001`; raise ValueError or IndexError."""
    host, _, port = text.rpartition(":")
    return str(ipaddress.ip_address(host.strip("[]"))), range(65536)[int(port)]


ENV_FILE = "/etc/alarmrelay.env"  # where systemd takes the settings from
WORD, LINE = "[!-~]+", r"[^\x00-\x1f\x7f\ud800-\udfff]+"
HOST = r"(https://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\])|http://(localhost|127\.[0-9.]+|\[::1\]))"
URL = HOST + r"(:[0-9]{1,5})?(/[!\"$->A-~]*)?"  # visible ASCII without ?, # and @
# name: default ("" where required), form, type, what is expected. The README has the same table.
SETTINGS: Mapping[str, tuple[str, str, Callable[[str], Any], str]] = {
    "bearer_token": ("", WORD, str, "the Webex bot's token, in one word"),
    "room_id": ("", WORD, str, "the id of a Webex room, in one word"),
    "webhook_username": ("", f"(?!.*:){LINE}", str, "a name for vManage, without a colon"),
    "webhook_password": ("", LINE, str, "a password for vManage, in one line"),
    "listen": ("0.0.0.0:5001", r"([0-9.]+|\[.+\]):[0-9]{1,5}", parse_listen, "address:port"),
    "tls_certificate": ("", f"({LINE})?", str, "a PEM file, to serve https"),
    "tls_key": ("", f"({LINE})?", str, "a PEM file, the certificate's key without pass phrase"),
    "time_zone": ("Europe/Madrid", WORD, zoneinfo.ZoneInfo, "an IANA name, as Europe/Madrid"),
    "webex_url": ("https://webexapis.com/v1", URL, str, "https, or http to a loopback address"),
    "retention_days": ("30", "[1-9][0-9]{0,4}", int, "a number of days from 1 to 99999"),
}


def read_settings(environ: Mapping[str, str], names: Iterable[str] = SETTINGS) -> dict[str, Any]:
    """Return settings by name; raise RelayError with a line for each that is missing or wrong."""
    home = environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    state = environ.get("STATE_DIRECTORY", "").split(":")[0]  # systemd.exec(5)
    settings: dict[str, Any] = {"state": Path(state or f"{home}/alarmrelay")}
    problems = []
    for name in names:
        default, form, parse, expected = SETTINGS[name]
        text = environ.get(name, "").strip() or default
        credential = Path(environ.get("CREDENTIALS_DIRECTORY", "/nonexistent"), name)
        with suppress(OSError, LookupError, ValueError):  # ZoneInfo raises each of them
            if credential.exists():  # it wins over the variable; systemd.exec(5), "Credentials"
                text, expected = "", f"{expected}, in the file {credential}"
                text = credential.read_text(encoding="utf-8").strip() or default
                text = str(credential) if "-----BEGIN " in text else text  # the PEM file itself
            if re.fullmatch(form, text):
                settings[name] = parse(text)
                continue
        if name == "time_zone" and not zoneinfo.available_timezones():
            expected = "a time zone database, which this host lacks: install the package tzdata"
        shown = not name.startswith(("bearer", "room", "webhook")) and "@" not in text
        found = repr(text[:99]) if shown and "?" not in text else "a hidden value"
        found = found if text else f"nothing: export {name}=... or set it in {ENV_FILE}"
        problems.append(f"{name}: expected {expected}, found {found}")
    certificate, key = settings.get("tls_certificate", ""), settings.get("tls_key", "")
    settings["tls"] = tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if certificate + key else None
    try:
        if tls:
            tls.minimum_version = ssl.TLSVersion.TLSv1_2  # RFC 8996
            tls.options |= ssl.OP_NO_RENEGOTIATION
            tls.load_cert_chain(certificate, key, password="")  # else it would ask for it
    except OSError as error:  # ssl.SSLError is one
        found = f"{certificate or 'nothing'} and {key or 'nothing'}: {error}"
        problems.append(f"tls_certificate, tls_key: expected a pair as PEM, found {found}")
    if problems:
        raise RelayError("\n".join(problems), exit_status=78)
    return settings


# === Message ======================================================================================
# Pure functions. An alarm is the JSON object that vManage posts, and none of its fields is certain:
#   {"rule_name_display": "OMP_State_Change", "message": "OMP state changed", "severity": "Major",
#    "active": true, "receive_time": 1579323421121, "values_short_display": [{"color": "lte"}], …}
Alarm = dict[str, Any]
MARKS = {"Critical": "🔴", "Major": "🟡", "Medium": "🔵", "Minor": "🟢"}  # vManage's own colours
# What ends a line, turns its direction or has no UTF-8: control characters, separators, bidi
# controls, lone surrogates. Then what Webex takes for markup; inside a word an underscore is not.
BREAKING = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
MARKUP = re.compile(r"[\\`*\[\]~<>&]|(?<!\w)_+|_+(?!\w)")
ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
ATOMS = re.compile(r"(\\.|&\w+;|\*\*[\w ]+\*\*|[^\\&*])*")  # what does not end in the middle of one
# Lenient: neither a tab in a string nor more digits than int() takes is a reason to lose an alarm.
DECODER = json.JSONDecoder(parse_int=lambda n: int(n) if len(n) < 400 else n, strict=False)


def parse_alarms(body: bytes) -> list[tuple[str, Alarm]]:
    """Return a request's alarms, each with the JSON text to keep; raise Refused."""
    if not body.strip():
        raise Refused(400, "the body is empty, expected an alarm as JSON")
    try:
        text = body.decode(json.detect_encoding(body), "replace")  # a garbled name beats no alarm
        content = DECODER.decode(text.lstrip("\ufeff"))
        alarms = content if isinstance(content, list) else [content]
        texts = [json.dumps(alarm) for alarm in alarms]
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is no JSON that can be read: {error}") from error
    if len(alarms) > ALARMS:
        raise Refused(413, f"a request has {ALARMS} alarms at most")
    if not alarms or not all(isinstance(alarm, dict) for alarm in alarms):
        raise Refused(400, "expected an alarm, a JSON object, or an array of them")
    return list(zip(texts, alarms))


def show(value: object) -> str:
    """Return text, or anything else as JSON, such that Webex shows it literally in one line."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = BREAKING.sub(" ", text[:MESSAGE_BYTES])  # the rest would be cut off anyway
    return MARKUP.sub(lambda m: ENTITIES.get(m[0]) or re.sub("(.)", r"\\\1", m[0]), text)


def alarm_name(alarm: Alarm) -> str:
    """Return the rule's name as people know it."""
    for key in ("rule_name_display", "rulename", "type", "eventname"):
        name = alarm.get(key)
        # Correlated alarms carry the literal eventname "rulename".
        if isinstance(name, str) and name.strip() and (key, name) != ("eventname", "rulename"):
            return name
    return "unknown alarm"


def alarm_time(alarm: Alarm, received_ms: int, zone: tzinfo) -> str:
    """Return when vManage saw it as `Sat Jan 18 05:57:01 2020 CET`, in any locale of the host."""
    for epoch_ms in (alarm.get("receive_time"), alarm.get("entry_time"), received_ms):
        if isinstance(epoch_ms, (int, float)) and not isinstance(epoch_ms, bool):
            # Not a number, or outside the years 1 to 9999, is as good as missing.
            with suppress(OverflowError, ValueError, OSError):
                moment = datetime.fromtimestamp(epoch_ms / 1000, zone)
                return f"{moment.ctime()} {moment.tzname()}"
    return "unknown"


def alarm_values(alarm: Alarm) -> list[tuple[str, object]]:
    """Return every key and value of values_short_display, else of values, else of devices."""
    for key in ("values_short_display", "values", "devices"):
        entries = alarm.get(key)
        entries = entries if isinstance(entries, list) else [entries]
        pairs = [pair for entry in entries if isinstance(entry, dict) for pair in entry.items()]
        if pairs:
            return pairs
    return []


def fit(lines: Sequence[str], last: Sequence[str]) -> str:
    """Return the lines, and `last` in any case, as one message of at most MESSAGE_BYTES."""
    whole = "<br>".join([*lines, *last])
    if len(whole.encode()) <= MESSAGE_BYTES:
        return whole
    end = "".join(f"<br>{line}" for line in last)
    left = MESSAGE_BYTES - len(f"{end}<br>… ({len(lines)} more lines)".encode())
    text = ("<br>".join(lines) + "<br>").encode()[:left].decode(errors="ignore")
    text, is_cut_between_lines, _ = text.rpartition("<br>")  # escaped text holds no other <br>
    if not is_cut_between_lines:
        text = ATOMS.match(lines[0].encode()[:left].decode(errors="ignore"))[0]  # type: ignore[index]
    return f"{text}{end}<br>… ({len(lines) - 1 - text.count('<br>')} more lines)"


def format_message(alarm: Alarm, received_ms: int, now_ms: int, zone: tzinfo) -> str:
    """Return the Webex markdown of an alarm that came in at received_ms (epoch milliseconds)."""
    severity, text = (show(alarm.get(key, "unknown")) for key in ("severity", "message"))
    mark = f"{MARKS.get(severity, '⚪')} {severity}"
    lines = [
        f"Team, **Alarm Event** : {show(alarm_name(alarm))}, **Message** : {text}, "
        "is received from vManage and here are the complete details",
        f"**Severity:** {f'✅ cleared ({severity})' if alarm.get('active') is False else mark}",
        f"**Receive Time:** {alarm_time(alarm, received_ms, zone)}",
    ]
    lines += [f" **{show(key).strip()}:** {show(value)}" for key, value in alarm_values(alarm)]
    minutes = (now_ms - received_ms) // 60_000
    age = f"{minutes} min" if minutes < 120 else f"{minutes // 60} h"
    late = [f"**Delayed:** relayed {age} after it came in"]
    return fit(lines, late if now_ms - received_ms > DELAYED_MS else [])


def plain_text(markdown: str) -> str:
    """Return a message as ASCII without markup, for a Webex that refuses its markdown."""
    text = re.sub(r"\\(.)|\*\*", r"\1", re.sub(r"<br> ?", "\n", markdown))
    return html.unescape(text).encode("ascii", "replace")[:PLAIN_TEXT_BYTES].decode()


# === Spool ========================================================================================
# Only this class touches the database. Every method is one transaction under one lock, and none
# calls out while holding it. What a method has returned from is on disk: with WAL, FULL is one
# fsync for each commit (sqlite.org/pragma.html). EXCLUSIVE before WAL: nobody else opens the file.
SCHEMA_VERSION = 1  # files without a version, 0, have the same tables
PRAGMAS = "PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL"
SCHEMA = f"""BEGIN;
    PRAGMA user_version = {SCHEMA_VERSION};
    CREATE TABLE IF NOT EXISTS alarm (
        id INTEGER PRIMARY KEY, room TEXT NOT NULL, received_ms INTEGER NOT NULL,
        request BLOB NOT NULL, body TEXT NOT NULL, delivered_ms INTEGER, message_id TEXT);
    CREATE INDEX IF NOT EXISTS waiting ON alarm (room, id) WHERE delivered_ms IS NULL;
    CREATE INDEX IF NOT EXISTS delivered ON alarm (delivered_ms) WHERE delivered_ms IS NOT NULL;
    COMMIT;
"""
RETRY = {"Retry-After": "30"}  # of what can pass by itself
DAMAGE = re.compile("malformed|not a database")
UNDAMAGED = re.compile("locked|full|disk I/O|unable to open")  # any other error at the start is
INSERT = "INSERT INTO alarm (id, room, received_ms, request, body) VALUES (?, ?, ?, ?, ?)"
OLDEST_WAITING = """SELECT id, received_ms, body FROM alarm WHERE room = ?
    AND delivered_ms IS NULL AND id NOT IN (SELECT value FROM json_each(?)) ORDER BY id LIMIT 1"""
SET_DELIVERED = "UPDATE alarm SET delivered_ms = ?, message_id = ? WHERE id = ?"
DELETE_DELIVERED = """DELETE FROM alarm WHERE id IN
    (SELECT id FROM alarm WHERE delivered_ms < ? LIMIT ?)"""


class Spool:
    def __init__(self, directory: Path) -> None:
        self._lock = threading.RLock()  # guards the connection and all below
        self._posted = collections.deque[Any]()  # what store() is called with, and a future
        self._unrecorded: dict[int, Sequence[object]] = {}  # by id; deliveries, for a full disk
        self.error: Refused | None = None  # what broke it
        self.delivered = 0  # since the start
        self._path = directory / "alarmrelay.db"
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                self._open()
            except (sqlite3.Error, TypeError, ValueError) as error:
                is_ours = not self._path.exists() or os.access(self._path, os.W_OK)
                if UNDAMAGED.search(str(error)) or not is_ours:
                    raise
                self._move_aside(error)
                self._open()
        except (OSError, sqlite3.Error, TypeError, ValueError) as error:
            if str(error) == "database is locked":
                raise RelayError(f"another relay runs on {directory}: stop it first", 75) from error
            raise RelayError(f"no spool can be opened in {directory}: {error}") from error

    def _open(self) -> None:
        db = sqlite3.connect(self._path, timeout=0, isolation_level=None, check_same_thread=False)
        self._db, db.text_factory = db, lambda text: text.decode(errors="replace")
        path, wal = self._path, Path(f"{self._path}-wal")
        if wal.exists() and wal.stat().st_size and not (path.exists() and path.stat().st_size):
            raise ValueError("its -wal stands alone")  # SQLite would throw it away
        db.executescript(PRAGMAS)
        ((version,),) = db.execute("PRAGMA user_version")
        if version > SCHEMA_VERSION:
            raise RelayError(f"{self._path} is of a newer relay, version {version}: install that")
        if version < SCHEMA_VERSION:  # else there is nothing to write, for which a disk may be full
            db.executescript(SCHEMA)
        ((self._last_id,),) = db.execute("SELECT ifnull(max(id), 0) FROM alarm")
        ((self.waiting,),) = db.execute("SELECT count(*) FROM alarm WHERE delivered_ms IS NULL")
        # A relay that was killed between its commit and its answer meets the sender's retry.
        now_ms = int(time.time() * 1000)
        newest = db.execute("SELECT request, received_ms FROM alarm ORDER BY id DESC")
        recent = list(itertools.takewhile(lambda row: abs(now_ms - row[1]) < DUPLICATE_MS, newest))
        self._recent: dict[bytes, int] = dict(reversed(recent))  # received_ms by request

    def _move_aside(self, error: Exception) -> None:
        """Rename the damaged file, so that the next one to be opened is new."""
        aside = f"{self._path}.damaged-{datetime.now():%Y-%m-%d-%H%M%S}"
        log.error("the spool is damaged (%s), what waited in it may be lost: see %s", error, aside)
        self._db.close()
        for end in ("", "-wal"):
            with suppress(FileNotFoundError):
                os.rename(f"{self._path}{end}", f"{aside}{end}")

    def check(self) -> None:
        """Raise Refused unless an alarm can be stored now."""
        if self.error:
            raise self.error
        if self.waiting >= WAITING_ALARMS:
            raise Refused(503, "too many alarms wait for Webex", **RETRY)
        if shutil.disk_usage(self._path.parent).free < FREE_BYTES:
            raise Refused(503, f"under {FREE_BYTES >> 20} MiB free in {self._path.parent}", **RETRY)

    def _execute(self, statement: str, *rows: Sequence[object]) -> list[Any]:
        with self._lock:
            if self.error:
                raise self.error
            try:
                self._db.execute("BEGIN IMMEDIATE")
                found = [result for row in rows for result in self._db.execute(statement, row)]
                self._db.execute("COMMIT")
                return found
            except (sqlite3.Error, ArithmeticError, MemoryError, ValueError) as error:
                with suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                if str(error) == "database or disk is full":
                    raise Refused(503, f"{error}: {self._path.parent}", **RETRY) from error
                if DAMAGE.search(str(error)):
                    self._move_aside(error)  # a new process begins a new one
                # For good: after a failed fsync the kernel may have dropped the pages, and the next
                # says that all is well. Only a new process that reads the file knows what it holds.
                self.error = Refused(503, f"the spool cannot be read or written: {error}")
                raise self.error from error

    def store(self, room: str, request: bytes, received_ms: int, bodies: Sequence[str]) -> range:
        """Put the alarms of a request (its hash) on disk; return their ids; raise Refused."""
        self.check()
        # Whoever gets the lock first commits for all that came during the commit before. Queued
        # before the lock is taken, so that who finds the queue empty under the lock is on disk.
        stored = concurrent.futures.Future[range]()
        self._posted.append((room, request, received_ms, bodies, stored))
        with self._lock:
            if stored.done():
                return stored.result()
            rows, batch, recent = [], [], self._recent
            while self._posted:
                room, request, received_ms, bodies, future = self._posted.popleft()
                # Oldest first; by abs(), or a clock that was set back would keep them for long.
                while recent and abs(received_ms - next(iter(recent.values()))) > DUPLICATE_MS:
                    del recent[next(iter(recent))]
                count = 0 if request in recent else len(bodies)
                ids = range(self._last_id + 1, self._last_id + 1 + count)
                for self._last_id, body in zip(ids, bodies):
                    rows.append((self._last_id, room, received_ms, request, body))
                recent.setdefault(request, received_ms)
                batch.append((request, ids, future))
            try:
                if rows:
                    self._execute(INSERT, *rows)
                self.waiting += len(rows)
                for _, ids, future in batch:
                    future.set_result(ids)
            except Refused as refusal:
                for request, _, future in batch:
                    recent.pop(request, None)
                    future.set_exception(refusal)
        return stored.result(0)

    def oldest_waiting(self, room: str) -> Sequence[Any] | None:
        """Return id, received_ms and body of the alarm that is to be delivered next."""
        found = self._execute(OLDEST_WAITING, (room, json.dumps([*self._unrecorded])))
        return next(iter(found), None)

    def set_delivered(self, spool_id: int, message_id: str, delivered_ms: int) -> None:
        """Record that an alarm stands in the room, in the Webex message with this id."""
        with self._lock:
            self._unrecorded[spool_id] = (delivered_ms, message_id, spool_id)
            self.waiting, self.delivered = self.waiting - 1, self.delivered + 1
            self._record()

    def _record(self) -> None:
        with suppress(Refused):  # later, then; until then it is not sent again
            self._execute(SET_DELIVERED, *self._unrecorded.values())
            self._unrecorded.clear()

    def delete_delivered(self, before_ms: int) -> None:
        """Delete some that were delivered before that; record what a full disk has kept from it."""
        with self._lock, suppress(Refused):
            self._record()
            self._execute(DELETE_DELIVERED, (before_ms, RETENTION_STEP))

    def close(self) -> None:
        with self._lock:
            self._db.close()


# === Webex ========================================================================================
Answer = tuple[int, str, Mapping[str, str], bytes]  # status, or 0 for none; reason, headers, body


class Verdict(NamedTuple):
    kind: str  # "delivered", "refused" (the message), "held" (token, room), "paused", "failed"
    wait_s: float
    reason: str  # for people, with what to do; the message's id if it is delivered
    tracking_id: str = ""  # Cisco's support asks for it


ADVICE = {
    0: "check network, clock and https_proxy; if a proxy opens TLS, SSL_CERT_FILE",
    400: "check room_id; `alarmrelay.py preview` shows the message",
    401: "replace bearer_token and restart",
    403: "the bot must be a member of the room and allowed to post in it",
    404: "check room_id and webex_url, and that the bot is a member of the room",
}


def parse_retry_after(text: str, now_s: float) -> float:
    """Return the seconds that a Retry-After field asks for (RFC 9110, 10.2.3), within bounds."""
    wait_s = PAUSE_S
    with suppress(ValueError, TypeError, IndexError, OverflowError):
        if re.fullmatch("-?[0-9]+", text):
            wait_s = float(text)  # unlike int(), takes any number of digits
        else:
            moment = email.utils.parsedate_to_datetime(text)
            wait_s = moment.replace(tzinfo=moment.tzinfo or timezone.utc).timestamp() - now_s
    return min(max(wait_s, PAUSE_MIN_S), PAUSE_MAX_S)


def judge(answer: Answer, failures: int, now_s: float) -> Verdict:
    """Decide what an answer means for the message, after so many failures in a row before it."""
    status, reason, headers, body = answer
    content: Any = None
    with suppress(ValueError, RecursionError):
        content = json.loads(body)
    content = content if isinstance(content, dict) else {}
    message_id = content.get("id")
    if status == 200 and message_id and isinstance(message_id, str) and message_id.isprintable():
        return Verdict("delivered", 0.0, message_id)
    said, advice = content.get("message"), ADVICE.get(status)
    if 200 <= status < 400:  # a redirect is never followed
        said, advice = "no id in it", "check webex_url; does a proxy answer for Webex?"
    reason = f"{status} {reason}" if status else reason
    reason = BREAKING.sub(" ", f"{reason}: {said}" if said else reason)[:300]  # into STATUS=, too
    reason += f"; {advice}" if advice else ""
    tracking_id = str(content.get("trackingId") or headers.get("trackingId", ""))[:100]
    if status in (423, 429):
        wait_s = parse_retry_after(headers.get("Retry-After", "").strip(), now_s)
        return Verdict("paused", wait_s, reason, tracking_id)
    if 400 <= status < 500:
        return Verdict("refused" if status == 400 else "held", HOLD_S, reason, tracking_id)
    wait_s = min(RETRY_S * 2 ** min(failures, 30), RETRY_MAX_S)
    return Verdict("failed", wait_s, reason, tracking_id)


class Webex(urllib.request.HTTPSHandler, urllib.request.HTTPHandler):
    def __init__(self, url: str, bearer_token: str, timeout_s: float = REQUEST_S) -> None:
        super().__init__()
        self._tls = ssl.create_default_context()
        self._url, self._timeout_s, self._secret = url.rstrip("/"), timeout_s, bearer_token.encode()
        self._headers = {"Content-Type": "application/json"}
        self._headers["Authorization"] = f"Bearer {bearer_token}"
        # urllib bounds neither lookups nor drips: this thread may be late, and the next one waits.
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "webex")
        self._thread.submit(int).result()

    def ask(self, path: str, message: Mapping[str, str] | None = None) -> Answer:
        """Get `people/me` or post {"roomId": …, …} to `messages`; return the answer in time."""
        self._late_s, self._wires = time.monotonic() + self._timeout_s, list[socket.socket]()
        answer = self._thread.submit(self._ask, path, message)
        try:
            return answer.result(self._timeout_s)
        except concurrent.futures.TimeoutError:
            reason = f"no answer from Webex within {self._timeout_s:g} s"
        except (OSError, http.client.HTTPException, ValueError) as error:
            # Not the text of all of them: it may hold the password of a proxy.
            reason = f"no answer from Webex: {getattr(error, 'reason', type(error).__name__)}"
        finally:
            answer.cancel()
            for wire in self._wires:
                with wire, suppress(OSError):
                    wire.shutdown(socket.SHUT_RDWR)
        return 0, reason, {}, b""

    def _ask(self, path: str, message: Mapping[str, str] | None) -> Answer:
        payload = json.dumps(message).encode() if message else None
        request = urllib.request.Request(f"{self._url}/{path}", payload, self._headers)
        # Plain http only goes to a loopback address. No handler follows redirects: urllib's would
        # send the token to the other host, by GET.
        proxies = {k: v for k, v in urllib.request.getproxies().items() if k == "https"}
        opener = urllib.request.OpenerDirector()
        opener.add_handler(urllib.request.ProxyHandler(proxies))
        opener.add_handler(self)
        with opener.open(request, timeout=self._timeout_s) as reply:
            content = reply.read(ANSWER_BYTES).replace(self._secret, b"[bearer_token]")
            return reply.status, reply.reason, reply.headers, content

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connect, req)

    https_open = http_open

    def _connect(self, host: str, /, **options: Any) -> http.client.HTTPConnection:
        late_s, wires = self._late_s, self._wires  # this request's, not the next one's

        def _dial(address: tuple[str, int], *_: object) -> socket.socket:
            wire = socket.create_connection(address, CONNECT_S)
            try:
                wires.append(wire.dup())  # the same connection, whatever TLS makes of the socket
                if time.monotonic() > late_s:  # nobody waits: the message would stand there twice
                    raise TimeoutError("too late to send the message")
            except OSError:
                for one in (wire, *wires):
                    one.close()
                raise
            wire.settimeout(REQUEST_S)
            return wire

        secure = {"context": self._tls} if self._url.startswith("https:") else {}
        kind: Any = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(host, **options, **secure)
        connection._create_connection = _dial
        return connection  # type: ignore[no-any-return]


# === Courier ======================================================================================
@contextmanager
def guard(name: str, pause_s: float = 0.0) -> Iterator[None]:
    """Log whatever goes wrong, so that a thread goes on with its next piece of work."""
    try:
        yield
    except Exception:  # the one broad except
        log.exception("%s: an error in alarmrelay itself", name)
        time.sleep(pause_s)


@dataclass
class Courier:
    room: str  # its path
    room_id: str
    zone: tzinfo
    spool: Spool
    webex: Webex
    clock: Callable[[], float] = time.time
    trouble: str = ""  # what is in the way of delivery
    failures: int = 0  # in a row
    due_s: float = math.inf  # monotonic; without another sign of life by then it is stuck
    arrived: threading.Event = field(default_factory=threading.Event)
    stopping: threading.Event = field(default_factory=threading.Event)

    def step(self) -> float | None:
        """Try to deliver the oldest alarm; return the seconds to wait, None for an arrival."""
        self.arrived.clear()  # before the look into the spool, or an arrival in between is missed
        if (oldest := self.spool.oldest_waiting(self.room)) is None:
            return None
        (spool_id, received_ms, body), now_s = oldest, self.clock()
        alarm = {"message": f"This alarm is damaged on disk: {body}"}
        with suppress(ValueError, TypeError):
            alarm = DECODER.decode(body)
        message = format_message(alarm, received_ms, int(now_s * 1000), self.zone)
        verdict = self._send("markdown", message)
        if verdict.kind == "refused":
            log.warning("alarm %d goes again as plain text: %s", spool_id, verdict.reason)
            verdict = self._send("text", plain_text(message))
        self.failures = self.failures + 1 if verdict.kind == "failed" else 0
        if verdict.kind != "delivered":
            return self._report(spool_id, verdict)
        now_s, self.trouble = self.clock(), ""
        self.spool.set_delivered(spool_id, verdict.reason, int(now_s * 1000))
        words = f"message={verdict.reason} after {now_s - received_ms / 1000:.1f} s"
        log.info("alarm %d delivered: %s", spool_id, words)
        return 0.0

    def _send(self, form: str, message: str) -> Verdict:
        self.due_s = time.monotonic() + REQUEST_S + STALL_S
        answer = self.webex.ask("messages", {"roomId": self.room_id, form: message})
        self.due_s = time.monotonic() + STALL_S
        return judge(answer, self.failures, self.clock())

    def _report(self, spool_id: int, verdict: Verdict) -> float:
        jitter = RETRY_JITTER if verdict.kind == "failed" else 0.0
        wait_s = verdict.wait_s * secrets.SystemRandom().uniform(1 - jitter, 1 + jitter)
        trouble, self.trouble = self.trouble, f"delivery {verdict.kind}: {verdict.reason}"
        # What the operator has to mend is said once; of what passes, every attempt is news.
        passes = verdict.kind in ("paused", "failed")
        if passes or trouble != self.trouble:
            words = f"{self.trouble} (trackingId {verdict.tracking_id or 'none'})"
            words = f"room {self.room}, alarm {spool_id}: {words}; tried again in {wait_s:.0f} s"
            log.log(logging.WARNING if passes else logging.ERROR, "%s", words)
        return wait_s

    def run(self) -> None:
        """Deliver until stopped."""
        while not self.stopping.is_set():
            wait_s: float | None = HOLD_S
            self.due_s = time.monotonic() + STALL_S
            with guard(f"room {self.room}"), suppress(Refused):  # by a spool that broke: all ends
                wait_s = self.step()
            self.due_s = math.inf
            if wait_s is not None:
                self.stopping.wait(wait_s)
            elif not self.stopping.is_set():  # set before arrived, which step() clears
                self.arrived.wait()


# === HTTP =========================================================================================
# What could be read in two ways is refused. Each part of a request has a deadline and a bound.
CHALLENGE = {"WWW-Authenticate": 'Basic realm="alarmrelay", charset="UTF-8"'}
TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
FIRST_LINE = re.compile(rb"(%b) (?:https?://[^/?#\s]*)?(/[!-~]*) (HTTP/1\.[0-9])\r\n" % TOKEN)
FIELD_LINE = re.compile(rb"(%b):([^\x00-\x08\x0a-\x1f\x7f]*)\r\n" % TOKEN)
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\x00-\x08\x0a-\x1f\x7f]*)?\r\n")


def body_length(version: str, fields: http.client.HTTPMessage) -> int | None:
    """Return a body's bytes, None for chunks; raise Refused if in doubt (RFC 9112, 6.3)."""
    length, coding = fields.get("Content-Length"), fields.get("Transfer-Encoding")
    single = ("Authorization", "Content-Length", "Host", "Transfer-Encoding")
    if any(len(fields.get_all(name, [])) > 1 for name in single):
        raise Refused(400, "a header field is doubled", Connection="close")
    if coding is not None and coding.lower() != "chunked":
        raise Refused(501, "the only Transfer-Encoding known is chunked", Connection="close")
    if coding is not None and (length is not None or version == "HTTP/1.0"):
        raise Refused(400, "Transfer-Encoding with a length or HTTP/1.0", Connection="close")
    digits = "0" if length is None else length
    if not re.fullmatch("[0-9]{1,18}", digits):  # int() takes a sign, an underscore, other scripts
        raise Refused(400, "Content-Length is no number", Connection="close")
    return None if coding else int(digits)


def read_body(stream: io.BufferedReader, length: int | None) -> Iterator[bytes]:
    """Yield a body in blocks; raise Refused, or ConnectionError if the client leaves."""
    while True:
        size = length
        if size is None:
            if not (match := CHUNK_LINE.fullmatch(stream.readline(BLOCK_BYTES))):
                raise Refused(400, "a chunk does not begin with its size", Connection="close")
            size = int(match[1], 16)
        for left in range(size, 0, -BLOCK_BYTES):
            block = stream.read(min(left, BLOCK_BYTES))
            if len(block) < min(left, BLOCK_BYTES):
                raise ConnectionError("the client left in the middle of a body")
            yield block
        if length is None and stream.read(2) != b"\r\n":
            raise Refused(400, "a chunk is not as long as its size says", Connection="close")
        if length is not None or size == 0:
            return


class Handler(http.server.BaseHTTPRequestHandler):  # a connection, from its accept to its end
    server: Server  # type: ignore[assignment]
    headers: http.client.HTTPMessage

    def __init__(self, connection: socket.socket, address: str, server: Server) -> None:
        self.connection, self.address, self.server = connection, address, server
        self.since_s = time.monotonic()  # without credentials, or silent with them, since then
        self.deadline_s = self.since_s + HEADER_S  # for what it has to send now, as a whole
        self.is_trusted = False  # has shown credentials
        self.is_amid = False  # its client may go on sending
        self.hung_up = ""  # why the server does not listen to it any more

    def serve(self) -> None:
        """Answer all requests, and close the connection; raise OSError if it breaks."""
        self.connection.settimeout(HEADER_S)  # the deadline is for who sends, but too slowly
        if tls := self.server.tls:
            self.connection = tls.wrap_socket(self.connection, True, False)
            self.connection.do_handshake()
        self.rfile: io.BufferedReader = io.BufferedReader(socket.SocketIO(self.connection, "r"))
        self.close_connection, pause_s = False, 0.0
        while not self.close_connection:
            now_s, self.is_amid = time.monotonic(), False
            self.since_s = now_s if self.is_trusted else self.since_s
            self.deadline_s = now_s + (IDLE_S if self.is_trusted else HEADER_S) + TICK_S
            with suppress(socket.timeout):
                self.is_amid = bool(self.rfile.peek(1))
            if not self.is_amid:
                return
            self.deadline_s = time.monotonic() + HEADER_S
            self.handle_one_request()
            if not self.is_trusted:  # the first is free, since some are asked for them
                self.server.stopping.wait(pause_s)
                pause_s = GUESS_S
            self.close_connection |= bool(self.hung_up)

    def end(self) -> None:
        """Close the connection so that its client can read the last answer."""
        with self.connection as ended, suppress(OSError):
            ended.settimeout(0)
            with suppress(OSError, AttributeError):  # TLS: a goodbye that waits for none
                ended.unwrap()  # RFC 8446, 6.1
            ended.settimeout(LINGER_S)
            ended.shutdown(socket.SHUT_WR)
            # To close while bytes come in is a reset, which can overtake the answer.
            self.deadline_s, left_bytes = time.monotonic() + LINGER_S, DRAIN_BYTES
            while self.is_amid and left_bytes > 0 and (block := ended.recv(BLOCK_BYTES)):
                left_bytes -= len(block)

    def handle_one_request(self) -> None:
        """Answer; the connection stays if it is certain where the next request begins."""
        self.command, self.close_connection, self.awaits_continue = "", True, False
        is_lost, body = False, iter(list[bytes]())
        try:
            if not self.parse_request():
                return
            self.close_connection |= self.server.stopping.is_set()
            body = read_body(self.rfile, body_length(self.request_version, self.headers))
            self.answer(200, self.respond(body))
        except (Refused, ConnectionError, socket.timeout) as error:
            refusal, is_cut = error, not isinstance(error, Refused) or error.status == 400
            if (is_cut and self.hung_up == "late") or isinstance(error, socket.timeout):
                refusal = Refused(408, "the request came too slowly", Connection="close")
            if not isinstance(refusal, Refused):
                raise
            log.warning("%s refused: %d %s", self.address, refusal.status, refusal)
            is_lost = "Connection" in refusal.headers or self.awaits_continue
            self.close_connection |= is_lost
            self.answer(refusal.status, {"error": str(refusal)}, **refusal.headers)
        # Read the rest, so that it is certain where the next request begins.
        self.deadline_s, self.is_amid = time.monotonic() + HEADER_S, False  # it has its answer
        left_bytes, is_whole = DRAIN_BYTES if self.is_trusted else HEADER_BYTES, False
        with suppress(OSError, Refused):
            while not is_lost and left_bytes > 0 and (block := next(body, b"")):
                left_bytes -= len(block) + 8  # no chunk is free
            is_whole = not is_lost and left_bytes > 0
        self.is_amid, self.close_connection = not is_whole, self.close_connection or not is_whole

    def parse_request(self) -> bool:
        """Read the header; return False if the client has left without a word; raise Refused."""
        self.headers, self.left_bytes = http.client.HTTPMessage(), HEADER_BYTES + 1
        if self.rfile.peek(1)[:1] == b"\x16":  # a handshake; RFC 8446, 5.1
            words = "this is TLS: the URL must begin with http://, or set tls_certificate"
            raise Refused(400, words, Connection="close")
        if not (first := self.read_line(FIRST_LINE) or self.read_line(FIRST_LINE)):
            return False
        self.command, path, self.request_version = (part.decode() for part in first.groups())
        self.path = path.partition("?")[0]
        while field := self.read_line(FIELD_LINE):
            self.headers[field[1].decode()] = field[2].decode("latin-1").strip(" \t")
            if len(self.headers) > FIELDS:
                raise Refused(431, f"a header has {FIELDS} fields at most", Connection="close")
        connection = ",".join(self.headers.get_all("Connection", [])).lower().split(",")
        is_1_0 = self.request_version == "HTTP/1.0"
        self.close_connection = is_1_0 or "close" in map(str.strip, connection)
        expected = "" if is_1_0 else self.headers.get("Expect", "").lower()
        self.awaits_continue = expected == "100-continue"
        return True

    def read_line(self, form: re.Pattern[bytes]) -> re.Match[bytes] | None:
        """Return a line of the header, None for an empty one or the end; raise Refused."""
        line = self.rfile.readline(self.left_bytes)
        self.left_bytes -= len(line)
        if not self.left_bytes:
            raise Refused(431, f"a header has {HEADER_BYTES} bytes at most", Connection="close")
        match = form.fullmatch(line)
        if not match and line.endswith(b"\n") and line != b"\r\n":
            raise Refused(400, "the header cannot be read", Connection="close")
        if not match and line != b"\r\n" and (line or form is FIELD_LINE):
            raise ConnectionError("the client left in the middle of a header")
        return match

    def respond(self, body: Iterator[bytes]) -> Mapping[str, str]:
        """Do what the request asks and return the answer; raise Refused."""
        allowed = "GET" if self.path == "/healthz" else "POST"
        if self.path != "/healthz":
            self.authorise()
        if self.path not in ("/healthz", *self.server.couriers):
            raise Refused(404, "no room has this path: alarms are posted to /")
        if self.command != allowed:
            raise Refused(405, f"only {allowed} is answered here", Allow=allowed)
        if self.path == "/healthz":
            self.server.spool.check()
            return {"status": "ok"}
        if not {"content-length", "transfer-encoding"} & {name.lower() for name in self.headers}:
            raise Refused(411, "the relay is reached, but the request has no length and no alarm")
        content, length = bytearray(), int(self.headers.get("Content-Length", "0"))
        if self.awaits_continue and length <= BODY_BYTES:
            self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.awaits_continue = False
        self.deadline_s = time.monotonic() + BODY_S
        for block in itertools.chain([b""], body):
            content += block
            if max(len(content), length) > BODY_BYTES:
                raise Refused(413, f"a body has {BODY_BYTES} bytes at most")
        return self.take(self.server.couriers[self.path], bytes(content))

    def authorise(self) -> None:
        """Raise Refused unless the request has the credentials (RFC 7617, section 2)."""
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        # Hashes, since compare_digest() tells how long the things are that it compares.
        given = hashlib.sha256(token.strip(" ").encode("latin-1")).digest()
        if not secrets.compare_digest(given, self.server.credentials) or scheme.lower() != "basic":
            raise Refused(401, "wrong credentials" if scheme else "no credentials", **CHALLENGE)
        self.is_trusted = True
        self.connection.settimeout(IDLE_S)

    def take(self, courier: Courier, content: bytes) -> Mapping[str, str]:
        """Store a request's alarms; what this returns may be answered with 200."""
        alarms = parse_alarms(content)
        bodies, now_ms = [text for text, _ in alarms], int(time.time() * 1000)
        request = hashlib.blake2b(courier.room.encode() + b"\n" + content, digest_size=16).digest()
        ids = self.server.spool.store(courier.room, request, now_ms, bodies)
        courier.arrived.set()
        for spool_id, (_, alarm) in zip(ids, alarms):
            words = f"rule={alarm_name(alarm)[:99]!r} uuid={str(alarm.get('uuid'))[:99]!r}"
            words += f" sender={self.address}"
            log.info("alarm %d taken: room=%s %s", spool_id, courier.room, words)
        if not ids:
            log.info("%s sent again what was taken before: not stored twice", self.address)
        return {"status": "accepted" if ids else "duplicate"}

    def answer(self, status: int, content: Mapping[str, str], **headers: str) -> None:
        """Send header and body at once: apart, one waits for the other's acknowledgement."""
        body = json.dumps(content).encode()
        self.close_connection |= self.awaits_continue
        closing = "close" if self.close_connection else "keep-alive"
        headers = {"Content-Type": "application/json", **headers, "Connection": closing}
        head = f"HTTP/1.1 {status} {http.client.responses[status]}\r\n"
        head += f"Content-Length: {len(body)}\r\nDate: {self.date_time_string()}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n"
        self.connection.sendall(head.encode() + (b"" if self.command == "HEAD" else body))


class Server:
    def __init__(self, settings: Mapping[str, Any], spool: Spool, *couriers: Courier) -> None:
        credentials = "{webhook_username}:{webhook_password}".format_map(settings).encode()
        self.credentials = hashlib.sha256(base64.b64encode(credentials)).digest()
        self.spool, self.couriers = spool, {courier.room: courier for courier in couriers}
        self.tls: ssl.SSLContext | None = settings["tls"]
        self._connections = set[Handler]()
        self._ended = threading.Condition()  # guards the connections
        self._most = max(8, min(CONNECTIONS, os.sysconf("SC_OPEN_MAX") - SPARE_FILES))
        self.stopping, (self._stop, self.stopper) = threading.Event(), os.pipe()
        self.due_s = math.inf  # monotonic; without another sign of life by then it is stuck

    def run(self, listener: socket.socket) -> None:
        """Accept connections until the stop, and return when the last of them has ended."""
        listener.setblocking(False)
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        poll.register(self._stop, 0)  # hangs up at a stop
        while not self.stopping.is_set():
            self._sweep()
            with guard("the door", TICK_S):
                if (taken := len(self._connections)) >= self._most:
                    self._make_room(taken, f"all {taken} are taken")
                elif poll.poll(1000 * (TICK_S if taken else HEADER_S)):
                    self._accept(listener)
        listener.close()
        with self._ended:  # what is on its way is still answered
            while not self._ended.wait_for(lambda: not self._connections, GRACE_S):
                self._sweep()

    def _hang_up(self, reason: str, connections: Iterable[Handler]) -> None:
        """Let the threads of these find an end behind what has come in."""
        for connection in connections:
            connection.hung_up = reason
            with suppress(OSError):  # it has ended; TLS has no say in this
                socket.socket.shutdown(connection.connection, socket.SHUT_RD)

    def _sweep(self) -> None:
        """Hang up on those that are late, which at a stop are those that have nothing to send."""
        now_s, runs = time.monotonic(), not self.stopping.is_set()
        self.due_s = now_s + HEADER_S + STALL_S
        with self._ended:
            late = [c for c in self._connections if now_s > c.deadline_s or not (runs or c.is_amid)]
            self._hang_up("late", late)

    def _make_room(self, taken: int, reason: str) -> None:
        """Hang up on those without credentials, else on silent ones with them; wait for a place."""
        with self._ended:
            others = [c for c in self._connections if not c.is_trusted]
            idle = others or [c for c in self._connections if not c.is_amid]
            slow = [c for c in idle if c.since_s < time.monotonic() - TICK_S and not c.hung_up]
            self._hang_up("full", slow)
            if slow:
                words = {connection.address for connection in slow}
                log.warning("%d slow connections give way: %.300s", len(slow), words)
            if not self._ended.wait_for(lambda: len(self._connections) < taken, TICK_S):
                log.warning("no connection can be accepted for %g s: %s", TICK_S, reason)

    def _accept(self, listener: socket.socket) -> None:
        try:
            client, (host, *_) = listener.accept()
        except BlockingIOError:  # its client is gone, or it is time to stop
            return
        except OSError as error:  # the host has no more descriptors or memory
            self._make_room(len(self._connections), str(error))
            return
        connection = Handler(client, host.removeprefix("::ffff:"), self)  # RFC 4291, 2.5.5.2
        with self._ended:
            self._connections.add(connection)
        while True:
            with suppress(RuntimeError, MemoryError):  # a thread that has failed cannot start again
                threading.Thread(target=self._serve, args=[connection], daemon=True).start()
                return
            self._sweep()
            self._make_room(len(self._connections), "the host has no more threads")

    def _serve(self, connection: Handler) -> None:
        with guard(connection.address):
            try:
                connection.serve()
            except OSError as error:
                connection.is_amid = True
                if connection.hung_up != "full":  # which has been said
                    log.warning("%s is gone unanswered: %s", connection.address, error)
            connection.end()
        with self._ended:
            self._connections.remove(connection)
            self._ended.notify_all()


# === systemd ======================================================================================
# What `install` writes; alarmrelay.service in the repository is the same text.
PROGRAM_FILE = "/usr/local/bin/alarmrelay.py"
UNIT_FILE = "/etc/systemd/system/alarmrelay.service"
WANTED_FILE = "/etc/systemd/system/multi-user.target.wants/alarmrelay.service"  # if enabled
HARDENING = """
    StateDirectoryMode=0700 UMask=0077 AmbientCapabilities= CapabilityBoundingSet=
    DevicePolicy=closed KeyringMode=private LockPersonality=yes MemoryDenyWriteExecute=yes
    NoNewPrivileges=yes PrivateDevices=yes PrivateMounts=yes PrivateTmp=yes PrivateUsers=yes
    ProcSubset=pid ProtectClock=yes ProtectControlGroups=yes ProtectHome=yes ProtectHostname=yes
    ProtectKernelLogs=yes ProtectKernelModules=yes ProtectKernelTunables=yes ProtectProc=invisible
    ProtectSystem=strict RemoveIPC=yes RestrictNamespaces=yes RestrictRealtime=yes
    RestrictSUIDSGID=yes SystemCallArchitectures=native SystemCallErrorNumber=EPERM"""
UNIT = f"""\
[Unit]
Description=Relay of vManage alarms to a Webex room
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=0

[Service]
Type=notify
ExecStart=/usr/bin/python3 {PROGRAM_FILE}
EnvironmentFile=-{ENV_FILE}
DynamicUser=yes
StateDirectory=alarmrelay
Restart=always
RestartSec=1
RestartPreventExitStatus=78
WatchdogSec=90
WatchdogSignal=SIGKILL
# The listening socket, so that no connection is refused during a restart.
FileDescriptorStoreMax=1
LimitNOFILE={CONNECTIONS + 64}

RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
{os.linesep.join(HARDENING.split())}

[Install]
WantedBy=multi-user.target
"""


class LineFormatter(logging.Formatter):
    def __init__(self, environ: Mapping[str, str]) -> None:
        stderr = os.fstat(2)
        self._is_journal = environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}"
        super().__init__(("" if self._is_journal else "%(asctime)s %(levelname)s ") + "%(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Return one line, which no event can make two; for the journal as in sd-daemon(3)."""
        line = super().format(record)
        line = BREAKING.sub(lambda match: match[0].encode("unicode_escape").decode(), line)
        priority = {logging.INFO: 6, logging.WARNING: 4}.get(record.levelno, 3)
        return f"<{priority}>{line}" if self._is_journal else line


def notify(environ: Mapping[str, str], *lines: str, descriptors: Sequence[int] = ()) -> None:
    """Tell systemd, where there is one, `READY=1`, `STATUS=…` and the like (sd_notify(3))."""
    with suppress(KeyError, OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.connect(environ["NOTIFY_SOCKET"].replace("@", "\0", 1))  # unix(7)
        socket.send_fds(systemd, ["\n".join(lines).encode()], [*descriptors])


def listen(environ: Mapping[str, str], host: str, port: int) -> socket.socket:
    """Return the socket in which connections wait over restarts and crashes, or a new one."""
    if environ.get("LISTEN_PID") == str(os.getpid()) and environ.get("LISTEN_FDS") == "1":
        kept = socket.socket(fileno=3)
        if kept.getsockname()[:2] == (host, port or kept.getsockname()[1]):
            return kept
        kept.close()  # `listen` has changed
        notify(environ, "FDSTOREREMOVE=1", "FDNAME=listen")
        done, barrier = os.pipe()  # systemd closes it once it has closed the socket
        notify(environ, "BARRIER=1", descriptors=[barrier])
        os.close(barrier)
        select.select([done], [], [], TICK_S)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise RelayError(f"listen: {host} port {port} cannot be had: {error}") from error
    notify(environ, "FDSTORE=1", "FDNAME=listen", descriptors=[listener.fileno()])
    return listener


# === Commands =====================================================================================
def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())  # in UTF-8, whatever the locale


def preview(path: str, environ: Mapping[str, str]) -> None:
    """Print the message for each alarm in a file, or in standard input for "-"; send nothing."""
    zone, now_ms = read_settings(environ, ["time_zone"])["time_zone"], int(time.time() * 1000)
    content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    for _, alarm in parse_alarms(content):
        say(format_message(alarm, now_ms, now_ms, zone))


def install(root: str) -> None:
    """Write program and unit below root, and the settings if there are none; print what next."""
    lines = ["# 'Quote odd values so.' After a change: sudo systemctl restart alarmrelay"]
    for name, (default, form, _, expected) in SETTINGS.items():
        needed, mark = (", required", "") if not re.fullmatch(form, default) else ("", "#")
        lines += ["", f"# {name}{needed}: {expected}", f"{mark}{name}={default}"]
    files = [(PROGRAM_FILE, Path(__file__).read_text("utf-8"), 0o755), (UNIT_FILE, UNIT, 0o644)]
    os.umask(0o022)
    root = root.rstrip("/")
    if not Path(f"{root}{ENV_FILE}").exists():
        files.append((ENV_FILE, "\n".join([*lines, ""]), 0o600))
    try:
        for name, text, mode in files:
            path, new = Path(f"{root}{name}"), Path(f"{root}{name}.new")
            path.parent.mkdir(parents=True, exist_ok=True)
            new.unlink(missing_ok=True)
            new.touch(mode)
            new.write_text(text, "utf-8")
            new.rename(path)  # a relay that starts now has the old file or the new one
            say(f"written: {path}")
        if not root:
            subprocess.run(["systemctl", "daemon-reload"], check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise RelayError(f"{error}: install needs root and systemd, or --root DIR") from error
    verb = "restart" if Path(f"{root}{WANTED_FILE}").is_symlink() else "enable --now"
    say(f"next: sudoedit {ENV_FILE}\n      sudo systemctl {verb} alarmrelay")


def as_installed(environ: Mapping[str, str]) -> Mapping[str, str]:
    """Return the environment; if there is no setting in it, that of the relay on this host."""
    if SETTINGS.keys() & environ.keys() or not Path(ENV_FILE).exists():
        return environ
    try:
        lines = Path(ENV_FILE).read_text("utf-8").splitlines()
        pairs = [line.partition("=") for line in lines if not re.match(r"\s*([#;]|$)", line)]
        installed = {name.strip(): " ".join(shlex.split(value)) for name, _, value in pairs}
    except (OSError, ValueError) as error:
        raise RelayError(f"{ENV_FILE} cannot be read: {error}: mend it, or use sudo") from error
    installed["CREDENTIALS_DIRECTORY"] = "/run/credentials/alarmrelay.service"  # while it runs
    return {"STATE_DIRECTORY": "/var/lib/alarmrelay", **installed, **environ}


def check(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield "ok", "warning" or "wrong" with what to do, for each thing that must be right."""
    try:
        os.environ.update(as_installed(environ))  # for https_proxy, SSL_CERT_FILE
        settings = read_settings(os.environ)
    except RelayError as error:
        yield from (("wrong", line) for line in str(error).splitlines())
        return
    zone, state = settings["time_zone"], settings["state"]
    yield "ok", f"settings; in {zone} it is {alarm_time({}, int(time.time() * 1000), zone)}"
    place = next(path for path in (state, *state.parents) if path.exists())
    free = shutil.disk_usage(place).free
    is_good = place.is_dir() and os.access(place, os.W_OK | os.X_OK) and free >= FREE_BYTES
    words = "" if is_good else f"; must have {FREE_BYTES >> 20} and be writable by the relay's user"
    yield "ok" if is_good else "wrong", f"state directory {state}: {free >> 20} MiB free{words}"
    webex = Webex(settings["webex_url"], settings["bearer_token"])
    room = urllib.parse.quote(settings["room_id"], "")
    for name, path in (("bearer_token", "people/me"), ("room_id", f"rooms/{room}")):
        verdict = judge(answer := webex.ask(path), 0, time.time())
        if verdict.kind != "delivered":
            yield "wrong", f"{name}: {verdict.reason}"
            return
        found = json.loads(answer[3])
        shown = BREAKING.sub(" ", str(found.get("title") or found.get("displayName")))
        is_person = found.get("type") == "person"
        advice = ", a person's, which ends after 12 hours: create a bot" if is_person else ""
        yield "warning" if is_person else "ok", f"{name}: {shown}{advice}"


def serve(environ: Mapping[str, str]) -> None:
    """Relay alarms until SIGTERM or SIGINT; raise RelayError if that is not possible."""
    settings = read_settings(environ)
    os.umask(0o077)
    # Taken by sigtimedwait() alone: a handler may run while its thread holds the lock it needs.
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # for the threads to come as well
    spool = Spool(settings["state"])
    webex = Webex(settings["webex_url"], settings["bearer_token"])
    courier = Courier("/", settings["room_id"], settings["time_zone"], spool, webex)
    server, listener = Server(settings, spool, courier), listen(environ, *settings["listen"])
    (delivery := threading.Thread(target=courier.run, name="courier", daemon=True)).start()
    (accepting := threading.Thread(target=server.run, args=[listener], daemon=True)).start()
    if not (settings["tls"] or ipaddress.ip_address(settings["listen"][0]).is_loopback):
        log.warning("no tls_certificate: password and alarms come over the network in plain text")
    where = f"listening on {settings['listen'][0]} port {listener.getsockname()[1]}"
    said, wait_s = "", 0.0
    tick_s = min(TICK_S, int(environ.get("WATCHDOG_USEC", 2**32)) / 3e6)  # sd_watchdog_enabled(3)
    while not signal.sigtimedwait(signals, wait_s) and not spool.error:
        counts = f"{spool.waiting} waiting, {spool.delivered} delivered"
        words = "; ".join(filter(None, [where, counts, courier.trouble]))
        if not said:
            log.info("alarmrelay %s %s", __version__, words)
            notify(environ, "READY=1")
        if words != said:
            notify(environ, f"STATUS={words}")
        said, wait_s = words, tick_s
        began_s = time.monotonic()
        spool.delete_delivered(int((time.time() - settings["retention_days"] * 86_400) * 1000))
        is_slow = time.monotonic() > began_s + TICK_S  # the disk: a courier may be waiting for it
        if "WATCHDOG_USEC" in environ and (is_slow or began_s < min(server.due_s, courier.due_s)):
            notify(environ, "WATCHDOG=1")
    deadline = time.monotonic() + STOP_S
    courier.stopping.set()  # the send in flight is the last
    courier.arrived.set()
    server.stopping.set()
    os.close(server.stopper)
    notify(environ, "STOPPING=1")
    accepting.join(STOP_S)
    delivery.join(max(0.0, deadline - time.monotonic()))
    if spool.error:
        raise RelayError(str(spool.error))
    spool.close()


def main() -> int:
    """Run the command that the arguments name; return the exit status."""
    parser = argparse.ArgumentParser(description="Relay alarms from Cisco vManage to Webex.")
    parser.add_argument("--version", action="version", version=f"alarmrelay {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", help="none: relay alarms")
    commands.add_parser("check", help="tell whether settings, disk, token and room are right")
    one = commands.add_parser("preview", help="print an alarm's message, send nothing")
    one.add_argument("file", nargs="?", default="-", metavar="FILE", help="or standard input")
    one = commands.add_parser("install", help="on a systemd host, as root: program, unit, settings")
    one.add_argument("--root", default="/", metavar="DIR", help="install into this tree")
    arguments, status = parser.parse_args(), 0
    logging.basicConfig(level=logging.INFO)
    logging.root.handlers[0].setFormatter(LineFormatter(os.environ))
    try:
        if arguments.command == "preview":
            preview(arguments.file, os.environ)
        elif arguments.command == "install":
            install(arguments.root)
        elif arguments.command == "check":
            for word, line in check(os.environ):
                say(f"{word}: {line}")
                status |= word == "wrong"
        else:
            serve(os.environ)
    except (RelayError, OSError) as error:
        for line in str(error).splitlines():
            log.error("%s", line)
        notify(os.environ, f"STATUS={BREAKING.sub('; ', str(error))}")
        return getattr(error, "exit_status", 74)
    return status


if __name__ == "__main__":
    # At once: threads may still wait for idle clients, and Python would abort on their output.
    os._exit(main())
