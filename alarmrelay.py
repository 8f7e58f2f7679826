#!/usr/bin/env python3
"""Relay alarm webhooks from Cisco vManage (Catalyst SD-WAN Manager) to a Webex room.

    vManage --POST, Basic auth--> Handler --> Spool (SQLite, fsync) --> 200
                                                |
                                             Courier --urllib, Bearer--> Webex POST /v1/messages

An alarm that was answered with 200 is on disk and reaches the room, at least once, oldest first.
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
import json
import logging
import os
import re
import secrets
import select
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
import uuid
import zoneinfo
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any, Callable, NamedTuple

__version__ = "0.1.0"
log = logging.getLogger("alarmrelay")
# === Limits =======================================================================================
MESSAGE_BYTES, PLAIN_TEXT_BYTES = 7439, 1000  # of UTF-8, as Webex takes them; of the plain form
SINGLY, DIGEST = 10, 150  # alarms that wait, or they go together; alarms in a message, at most
HEADER_BYTES, FIELDS = 2**17, 100  # of a request; a password may have 100 KB
BODY_BYTES, ALARMS = 4 * 2**20, 1000  # of a request; vManage sends one of 8 KB or less
BLOCK_BYTES, DRAIN_BYTES, ANSWER_BYTES = 2**16, 2**24, 2**20  # at a time; if refused; of Webex
HEADER_S, BODY_S, IDLE_S = 10.0, 60.0, 75.0  # of a header, a body, silence with credentials
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
class RelayError(Exception):  # ends the program: 74 I/O, 75 already running, 78 settings
    def __init__(self, text: str, exit_status: int = 74) -> None:
        super().__init__(text)
        self.exit_status = exit_status


class Refused(RelayError):  # answers a request with this status, {"error": text} and fields
    def __init__(self, status: int, text: str, **fields: str) -> None:
        super().__init__(text, exit_status=1)
        self.status, self.headers = status, fields


# === Settings =====================================================================================
def parse_listen(text: str) -> tuple[str, int]:
    """Return address and port of `0.0.0.0:5001` or `[::]:5001`; raise ValueError or IndexError."""
    host, _, port = text.rpartition(":")
    return str(ipaddress.ip_address(host.strip("[]"))), range(65536)[int(port)]


ENV_FILE = "/etc/alarmrelay.env"  # where systemd takes the settings from
WORD, LINE = "[!-~]+", r"[^\x00-\x1f\x7f\ud800-\udfff]+"
HOST, REST = r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:]+\])", "(:[0-9]{1,5})?(/[A-Za-z0-9._~%/-]*)?"
WEBEX_URL = rf"(https://{HOST}|http://(localhost|127\.[0-9.]+|\[::1\])){REST}"
ROOM = "id of one more room, for alarms to /NAME: a-z, 0-9, _; not healthz or metrics"
# name: default ("" where required), form, type, what is expected. The README has the same table.
SETTINGS: Mapping[str, tuple[str, str, Callable[[str], Any], str]] = {
    "bearer_token": ("", WORD, str, "the Webex bot's token, in one word"),
    "room_id": ("", WORD, str, "the id of a Webex room, in one word"),
    "room_id_NAME": ("", f"({WORD})?", str, ROOM),
    "webhook_username": ("", f"(?!.*:){LINE}", str, "a name for vManage, without a colon"),
    "webhook_password": ("", LINE, str, "a password for vManage, in one line"),
    "listen": ("0.0.0.0:5001", r"([0-9.]+|\[.+\]):[0-9]{1,5}", parse_listen, "address:port"),
    "tls_certificate": ("", f"({LINE})?", str, "a PEM file, to serve https"),
    "tls_key": ("", f"({LINE})?", str, "a PEM file, the certificate's key without pass phrase"),
    "time_zone": ("Europe/Madrid", WORD, zoneinfo.ZoneInfo, "an IANA name, as Europe/Madrid"),
    "webex_url": ("https://webexapis.com/v1", WEBEX_URL, str, "https, or http to a loopback host"),
    "vmanage_url": ("", f"(https?://{HOST}{REST})?", str, "https or http, host and path alone"),
    "retention_days": ("30", "[1-9][0-9]{0,4}", int, "a number of days from 1 to 99999"),
}


def read_settings(environ: Mapping[str, str], names: Collection[str] = SETTINGS) -> dict[str, Any]:
    """Return settings by name; raise RelayError with a line for each that is missing or wrong."""
    state = f"{environ.get('XDG_STATE_HOME') or os.path.expanduser('~/.local/state')}/alarmrelay"
    state = environ.get("STATE_DIRECTORY", "").split(":")[0] or state  # systemd.exec(5)
    settings: dict[str, Any] = {"state": Path(state), "rooms": {}, "tls": None}
    credentials, problems = Path(environ.get("CREDENTIALS_DIRECTORY", "/nonexistent")), []
    known = sorted({*environ, *(path.name for path in credentials.glob("room_id_*"))})
    rooms = [name for name in known if name.startswith("room_id_")] if "room_id" in names else []
    for name in dict.fromkeys([*names, *rooms]):
        default, form, parse, expected = SETTINGS.get(name, SETTINGS["room_id_NAME"])
        if name in rooms and not re.fullmatch("room_id_(?!(healthz|metrics)$)[a-z0-9_]+", name):
            form = ""
        text, credential = environ.get(name, "").strip() or default, credentials / name
        with suppress(OSError, LookupError, ValueError):  # ZoneInfo raises each of them
            if credential.exists():  # it wins over the variable; systemd.exec(5), "Credentials"
                text, expected = "", f"{expected}, in the file {credential}"
                text = credential.read_text(encoding="utf-8").strip() or default
                text = str(credential) if "-----BEGIN " in text else text  # the PEM file itself
            if re.fullmatch(form, text):
                settings[name] = parse(text)
                if name.startswith("room_id") and text:
                    settings["rooms"][name] = text
                continue
        if name == "time_zone" and not zoneinfo.available_timezones():
            expected = "a time zone database, which this host lacks: install the package tzdata"
        found = f"nothing: export {name}=... or set it in {ENV_FILE}"
        if text:
            is_secret = name.startswith(("bearer", "room", "webhook")) or {"@", "?"} & {*text}
            found = "a hidden value" if is_secret else repr(text[:99])
        problems.append(f"{name}: expected {expected}, found {found}")
    pair = settings.get("tls_certificate", ""), settings.get("tls_key", "")
    try:
        if any(pair):
            settings["tls"] = tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.minimum_version = ssl.TLSVersion.TLSv1_2  # RFC 8996
            tls.options |= ssl.OP_NO_RENEGOTIATION
            tls.load_cert_chain(*pair, password="")  # else it would ask for it
    except OSError as error:  # ssl.SSLError is one
        found = " and ".join(text or "nothing" for text in pair)
        problems.append(f"tls_certificate, tls_key: expected a pair as PEM, found {found}: {error}")
    given = f"{settings.get('webhook_username')}:{settings.get('webhook_password')}"
    settings["credentials"] = base64.b64encode(given.encode())  # RFC 7617, section 2
    if problems:
        raise RelayError("\n".join(problems), exit_status=78)
    return settings


# === Message ======================================================================================
# Pure functions of an alarm, the JSON object that vManage posts; none of its fields is certain:
#   {"rule_name_display": "OMP_State_Change", "message": "OMP state changed", "severity": "Major",
#    "active": true, "receive_time": 1579323421121, "values_short_display": [{"color": "lte"}], …}
MARKS = {"Critical": "🔴", "Major": "🟡", "Medium": "🔵", "Minor": "🟢"}  # vManage's own colours
# What ends a line, turns its direction or has no UTF-8: control characters, separators, bidi
# controls, lone surrogates. Then what Webex takes for markup; inside a word an underscore is not.
BREAKING = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
MARKUP = re.compile(r"[\\`*\[\]~]|(?<!\w)_+|(?<!_)_+(?!\w)")
ATOMS = re.compile(r"(\\.|&\w+;|\*\*[\w ]+\*\*|[^\\&*])*")  # what does not end in the middle of one
# Lenient: neither a tab in a string nor more digits than int() takes is a reason to lose an alarm.
DECODER = json.JSONDecoder(parse_int=lambda n: int(n) if len(n) < 400 else n, strict=False)


def show(value: object) -> str:
    """Return text, or anything else as JSON, such that Webex shows it literally in one line."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = BREAKING.sub(" ", text[:MESSAGE_BYTES])  # the rest would be cut off anyway
    return html.escape(MARKUP.sub(lambda m: re.sub("(.)", r"\\\1", m[0]), text), quote=False)


@dataclass(frozen=True)
class Alarm:
    fields: dict[str, Any]
    received_ms: int  # by this host's clock, epoch milliseconds
    spool_id: int = 0

    def name(self) -> str:
        """Return the rule's name as people know it."""
        for key in ("rule_name_display", "rulename", "type", "eventname"):
            name = self.fields.get(key)
            # Correlated alarms carry the literal eventname "rulename".
            if isinstance(name, str) and name.strip() and (key, name) != ("eventname", "rulename"):
                return name
        return "unknown alarm"

    def time(self, zone: tzinfo) -> str:
        """Return when vManage saw it as `Sat Jan 18 05:57:01 2020 CET`, in any locale."""
        for epoch_ms in (*map(self.fields.get, ("receive_time", "entry_time")), self.received_ms):
            if isinstance(epoch_ms, (int, float)) and not isinstance(epoch_ms, bool):
                # Not a number, or outside the years 1 to 9999, is as good as missing.
                with suppress(OverflowError, ValueError, OSError):
                    moment = datetime.fromtimestamp(epoch_ms / 1000, zone)
                    return f"{moment.ctime()} {moment.tzname()}"
        return "unknown"

    def values(self) -> list[tuple[str, object]]:
        """Return every key and value of values_short_display, else of values, else of devices."""
        for key in ("values_short_display", "values", "devices"):
            entries = value if isinstance(value := self.fields.get(key), list) else [value]
            pairs = [pair for entry in entries if isinstance(entry, dict) for pair in entry.items()]
            if pairs:
                return pairs
        return []

    def threads(self) -> dict[str, str | None]:
        """Return its uuid, the uuids it clears (JSON), and what is down or up by it."""
        # Which is a rule and values: BFD_TLOC_Up clears BFD_TLOC_Down without a uuid.
        (rule, _, way), fields = self.name().rpartition("_"), self.fields
        values = sorted(f"{key}={value}" for key, value in self.values())
        is_clear, cleared = fields.get("active") is False, fields.get("cleared_events")
        cleared = cleared if is_clear and isinstance(cleared, list) else []
        uuid, *clears = [BREAKING.sub(" ", str(u or "")) for u in (fields.get("uuid"), *cleared)]
        is_thing = bool(values) and way == ("Up" if is_clear else "Down")
        thing = {"up" if is_clear else "down": json.dumps([rule, *values]) if is_thing else None}
        keys = {"uuid": uuid or None, "clears": json.dumps(clears), "up": None, "down": None}
        return keys | thing

    def late(self, now_ms: int, words: str) -> str:
        """Return the words with its age as `14 min` or `3 h`, nothing while it is no old news."""
        minutes = (now_ms - self.received_ms) // 60_000
        age = f"{minutes} min" if minutes < 120 else f"{minutes // 60} h"
        return words.format(age) if now_ms - self.received_ms > DELAYED_MS else ""

    def _head(self) -> list[str]:
        keys = self.name(), *(self.fields.get(key, "unknown") for key in ("message", "severity"))
        name, text, severity = map(show, keys)
        is_clear = self.fields.get("active") is False
        return [name, text, "✅" if is_clear else MARKS.get(severity, "⚪"), severity]

    def line(self, zone: tzinfo) -> str:
        """Return its line in a digest; Webex markdown, as all messages."""
        name, text, mark, _ = self._head()
        pairs = [f"{show(key).strip()} {show(value)}" for key, value in self.values()]
        return ", ".join([f"- {mark} **{name.strip()}** : {text}", self.time(zone), *pairs])

    def message(self, now_ms: int, zone: tzinfo, url: str = "", limit: int = MESSAGE_BYTES) -> str:
        """Return its own message, with a link to vManage at this address, of so many bytes."""
        name, text, mark, severity = self._head()
        first = f"Team, **Alarm Event** : {name}, **Message** : {text}, "
        first += "is received from vManage and here are the complete details"
        severity = f"cleared ({severity})" if mark == "✅" else severity
        lines = [first, f"**Severity:** {mark} {severity}", f"**Receive Time:** {self.time(zone)}"]
        lines += [f" **{show(key).strip()}:** {show(value)}" for key, value in self.values()]
        last = [self.late(now_ms, "**Delayed:** relayed {} after it came in")]
        if url and self.fields.get("uuid"):
            page = urllib.parse.quote(str(self.fields["uuid"])[:99], "", errors="replace")
            last += [f"[Open in vManage]({url.rstrip('/')}/#/app/monitor/alarms/details/{page})"]
        return fit(lines, [*filter(None, last)], limit)


def parse_alarms(body: bytes, received_ms: int) -> list[tuple[str, Alarm]]:
    """Return a request's alarms, each with the JSON text to keep; raise Refused."""
    try:
        text = body.decode(json.detect_encoding(body), "replace")  # a garbled name beats no alarm
        content = DECODER.decode(text.lstrip("\ufeff"))
        alarms = content if isinstance(content, list) and content else [content]
        texts = [json.dumps(alarm) for alarm in alarms]
        DECODER.decode("[" * 99 + json.dumps(alarms) + "]" * 99)  # not too deep to be shown
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is empty or no JSON that can be read: {error}") from error
    if not all(isinstance(alarm, dict) for alarm in alarms) or len(alarms) > ALARMS:
        raise Refused(400, f"expected an alarm, a JSON object, or an array of up to {ALARMS}")
    return [(text, Alarm(alarm, received_ms)) for text, alarm in zip(texts, alarms)]


def fit(lines: Sequence[str], last: Sequence[str], limit: int = MESSAGE_BYTES) -> str:
    """Return the lines, and `last` in any case, as one message of so many bytes of UTF-8."""
    whole = "<br>".join([*lines, *last])
    if len(whole.encode()) <= limit:
        return whole
    end = "".join(f"<br>{line}" for line in last)
    left = limit - len(f"{end}<br>… ({len(lines)} more lines)".encode())
    text = ("<br>".join(lines) + "<br>").encode()[:left].decode(errors="ignore")
    text, is_cut_between_lines, _ = text.rpartition("<br>")  # escaped text holds no other <br>
    if not is_cut_between_lines:
        text = ATOMS.match(lines[0].encode()[:left].decode(errors="ignore"))[0]  # type: ignore[index]
    return f"{text}{end}<br>… ({len(lines) - 1 - text.count('<br>')} more lines)"


def format_digest(alarms: Sequence[Alarm], now_ms: int, zone: tzinfo) -> tuple[str, int]:
    """Return one message for alarms, oldest first, with as many as it takes, and their number."""
    late, lines = alarms[0].late(now_ms, ", the oldest {} ago"), list[str]()
    first = f"Team, **{{}} alarms** are received from vManage{late}:"
    for alarm in alarms:
        lines.append(alarm.line(zone))
        if len("\n".join([first.format(len(lines)), *lines]).encode()) > MESSAGE_BYTES:
            lines.pop()
            break
    return "\n".join([first.format(len(lines)), *lines]), len(lines)


def plain_text(markdown: str) -> str:
    """Return a message as ASCII without markup, for a Webex that refuses its markdown."""
    text = re.sub(r"\\(.)|\*\*", r"\1", re.sub(r"<br> ?", "\n", markdown))
    return html.unescape(text).encode("ascii", "replace")[:PLAIN_TEXT_BYTES].decode()


# === Spool ========================================================================================
# Only this class touches the database. Every method is one transaction under one lock; none calls
# out while holding it. What has returned is on disk: with WAL, FULL is one fsync for each commit
# (sqlite.org/pragma.html). EXCLUSIVE before WAL: nobody else opens the file.
PRAGMAS = "PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL"
# Each makes a file one of the next version; 0 has the tables of 1. uuid, down: filled on delivery.
MIGRATIONS = (
    """CREATE TABLE IF NOT EXISTS alarm (
        id INTEGER PRIMARY KEY, room TEXT NOT NULL, received_ms INTEGER NOT NULL,
        request BLOB NOT NULL, body TEXT NOT NULL, delivered_ms INTEGER, message_id TEXT);
    CREATE INDEX IF NOT EXISTS waiting ON alarm (room, id) WHERE delivered_ms IS NULL;
    CREATE INDEX IF NOT EXISTS delivered ON alarm (delivered_ms) WHERE delivered_ms IS NOT NULL""",
    """ALTER TABLE alarm ADD COLUMN uuid TEXT; ALTER TABLE alarm ADD COLUMN down TEXT;
    CREATE INDEX request ON alarm (request); CREATE INDEX message ON alarm (message_id);
    CREATE INDEX uuid ON alarm (uuid, room) WHERE uuid IS NOT NULL;
    CREATE INDEX down ON alarm (down, room) WHERE down IS NOT NULL""",
)
RETRY = {"Retry-After": "30"}  # of what can pass by itself
DAMAGE = re.compile("malformed|not a database")
UNDAMAGED = re.compile("locked|full|disk I/O|unable to open|readonly")  # at the start, else it is
FIND_REQUEST = "SELECT id FROM alarm WHERE request = ? AND received_ms BETWEEN ? AND ?"
INSERT = "INSERT INTO alarm (room, request, received_ms, body) VALUES (?, ?, ?, ?)"
ROOMS = "SELECT room, count(*) FROM alarm WHERE delivered_ms IS NULL GROUP BY room"
OLDEST_WAITING = """SELECT id, received_ms, body FROM alarm WHERE room = ? AND
    delivered_ms IS NULL AND id NOT IN (SELECT value FROM json_each(?)) ORDER BY id LIMIT ?"""
SET_DELIVERED = """UPDATE alarm SET delivered_ms = :delivered_ms, message_id = :message_id,
    uuid = :uuid, down = :down WHERE id = :spool_id"""
CLEARED = """SELECT 1 AS rank, id, message_id FROM alarm WHERE room = :room
    AND uuid IN (SELECT value FROM json_each(:clears)) UNION ALL SELECT * FROM (
    SELECT 2, id, message_id FROM alarm WHERE room = :room AND down = :up ORDER BY id DESC LIMIT 1)
    ORDER BY rank, id DESC"""
DELETE = "DELETE FROM alarm WHERE id IN (SELECT id FROM alarm WHERE delivered_ms < ? LIMIT ?)"


class Spool:
    def __init__(self, directory: Path) -> None:
        self._lock = threading.RLock()  # guards the connection and all below
        self._posted = collections.deque[Any]()  # what store() is called with, and a future
        self._unrecorded: dict[int, Any] = {}  # by id; deliveries, when the disk is full
        self.error: Refused | None = None  # what broke it
        self.delivered = 0  # since the start
        self._path = directory / "alarmrelay.db"
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                self._open()
            except (sqlite3.Error, TypeError, ValueError) as error:
                if UNDAMAGED.search(str(error)):
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
        if version > len(MIGRATIONS):
            raise RelayError(f"{self._path} is of a newer relay, version {version}: install that")
        for number, migration in [*enumerate(MIGRATIONS, 1)][version:]:
            db.executescript(f"BEGIN; {migration}; PRAGMA user_version = {number}; COMMIT")
        self.rooms = dict(db.execute(ROOMS).fetchall())
        self.waiting = sum(self.rooms.values())

    def _move_aside(self, error: Exception) -> None:
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

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            if self.error:
                raise self.error
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
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

    def store(self, room: str, request: bytes, received_ms: int, bodies: list[str]) -> list[int]:
        """Put the alarms of a request (its hash) on disk; return their ids; raise Refused."""
        self.check()
        # Whoever gets the lock first commits for all that came during the commit before. Queued
        # before the lock is taken, so that who finds the queue empty under the lock is on disk.
        stored, taken = concurrent.futures.Future[list[int]](), list[list[int]]()
        self._posted.append((stored, bodies, room, request, received_ms))
        with self._lock:
            if stored.done():
                return stored.result()
            batch = [self._posted.popleft() for _ in range(len(self._posted))]
            try:
                with self._transaction() as db:
                    for _, bodies, room, request, ms in batch:
                        window = request, ms - DUPLICATE_MS, ms + DUPLICATE_MS
                        new = [] if db.execute(FIND_REQUEST, window).fetchone() else bodies
                        rows = ((room, request, ms, body) for body in new)
                        taken.append([db.execute(INSERT, row).lastrowid or 0 for row in rows])
                for (future, *_), ids in zip(batch, taken):
                    self.waiting += len(ids)
                    future.set_result(ids)
            except Refused as refusal:
                for future, *_ in batch:
                    future.set_exception(refusal)
        return stored.result(0)

    def oldest_waiting(self, room: str, aside: Collection[int]) -> tuple[list[Alarm], str]:
        """Return alarms to be delivered next, without those set aside, and the first's parent."""
        found, size = list[Alarm](), 0
        with self._transaction() as db:
            skipped = json.dumps([*self._unrecorded, *aside])
            for spool_id, received_ms, body in db.execute(OLDEST_WAITING, (room, skipped, DIGEST)):
                fields = {"message": f"This alarm is damaged on disk: {body}"}
                with suppress(ValueError, TypeError):
                    fields = DECODER.decode(body)
                found.append(Alarm(fields, received_ms, spool_id))
                size += len(str(body))
                if size > BODY_BYTES and len(found) > SINGLY:
                    break
            cleared = found and db.execute(CLEARED, {"room": room, **found[0].threads()}).fetchone()
        return found, cleared[2] if cleared else ""

    def set_gone(self, gone: str) -> None:
        """Record that the message with this id was deleted, so that no clear is a reply to it."""
        with suppress(Refused), self._transaction() as db:
            db.execute("UPDATE alarm SET uuid = NULL, down = NULL WHERE message_id = ?", [gone])

    def set_delivered(self, room: str, message_id: str, delivered_ms: int, *alarms: Alarm) -> None:
        """Record that alarms stand in the room, in the Webex message with this id."""
        sent = {"room": room, "message_id": message_id, "delivered_ms": delivered_ms}
        with self._lock:
            for alarm in alarms:
                self._unrecorded[alarm.spool_id] = {**vars(alarm), **alarm.threads(), **sent}
            self.waiting, self.delivered = self.waiting - len(alarms), self.delivered + len(alarms)
            self._record()

    def _record(self) -> None:
        with suppress(Refused):  # later, then; until then they are not sent again
            with self._transaction() as db:
                for delivery in self._unrecorded.values():  # in their order: down, up, down again
                    found = db.execute(CLEARED, delivery).fetchall()  # by uuid, else by what is up
                    cleared = [(spool_id,) for rank, spool_id, _ in found if rank == found[0][0]]
                    db.executemany("UPDATE alarm SET down = NULL WHERE id = ?", cleared)
                    db.execute(SET_DELIVERED, delivery)
            self._unrecorded.clear()

    def delete_delivered(self, before_ms: int) -> None:
        """Delete some that were delivered before that; record what a full disk has kept from it."""
        with self._lock, suppress(Refused):
            self._record()
            with self._transaction() as db:
                db.execute(DELETE, (before_ms, RETENTION_STEP))

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
    status: int = 200


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
    with suppress(TypeError, ValueError, IndexError, OverflowError):
        is_number, parse_date = re.fullmatch("-?[0-9]+", text), email.utils.parsedate_to_datetime
        wait_s = float(text) if is_number else parse_date(text).timestamp() - now_s
    return min(max(wait_s, PAUSE_MIN_S), PAUSE_MAX_S)


def judge(answer: Answer, failures: int, now_s: float) -> Verdict:
    """Decide what an answer means for the message, after so many failures in a row before it."""
    status, reason, headers, body = answer
    content: dict[str, Any] = {}
    with suppress(TypeError, ValueError, RecursionError):
        content = dict(json.loads(body))
    message_id = content.get("id")
    if status == 200 and message_id and isinstance(message_id, str) and message_id.isprintable():
        return Verdict("delivered", 0.0, message_id)
    said, advice = content.get("message"), ADVICE.get(status)
    if 200 <= status < 400:  # a redirect is never followed
        said, advice = "no id in it", "check webex_url; does a proxy answer for Webex?"
    reason = BREAKING.sub(" ", f"{reason}: {said}" if said else reason)[:300]  # into STATUS=, too
    reason += f"; {advice}" if advice else ""
    tracking_id = str(content.get("trackingId") or headers.get("trackingId", ""))[:100]
    kind, wait_s = "failed", min(RETRY_S * 2 ** min(failures, 30), RETRY_MAX_S)
    if status in (423, 429):
        kind, wait_s = "paused", parse_retry_after(headers.get("Retry-After", "").strip(), now_s)
    elif 400 <= status < 500:
        kind, wait_s = "refused" if status == 400 else "held", HOLD_S
    return Verdict(kind, wait_s, reason, tracking_id, status)


class Client(urllib.request.HTTPSHandler, urllib.request.HTTPHandler):
    def __init__(self, url: str, authorization: str, timeout_s: float = REQUEST_S) -> None:
        super().__init__()
        self.tls, self._url, self._timeout_s = ssl.create_default_context(), url, timeout_s
        self._headers = {"Content-Type": "application/json", "Authorization": authorization}

    def ask(self, path: str, payload: bytes | None = None) -> Answer:
        """Get a path, as /people/me, or post a payload to it; return the answer in time."""
        request = urllib.request.Request(self._url.rstrip("/") + path, payload, self._headers)
        # Plain http only goes to a loopback address. No handler follows redirects: urllib's would
        # send the token to the other host, by GET.
        proxies = {k: v for k, v in urllib.request.getproxies().items() if k == "https"}
        opener, secret = urllib.request.OpenerDirector(), self._headers["Authorization"].split()[-1]
        opener.add_handler(urllib.request.ProxyHandler(proxies))
        opener.add_handler(self)
        self._is_late, self._wires = False, list[socket.socket]()
        timer = threading.Timer(self._timeout_s, self._cut)  # urllib bounds each wait, not all
        try:
            timer.start()
            with opener.open(request, timeout=self._timeout_s) as reply:
                content = reply.read(ANSWER_BYTES).replace(secret.encode(), b"[hidden]")
                return reply.status, f"{reply.status} {reply.reason}", reply.headers, content
        except (OSError, http.client.HTTPException, ValueError, RuntimeError) as error:
            # Not the text of all of them: it may hold the password of a proxy.
            reason = f"no answer: {getattr(error, 'reason', type(error).__name__)}"
        finally:
            timer.cancel()
            is_late = self._is_late
            self._cut()
        return 0, f"no answer within {self._timeout_s:g} s" if is_late else reason, {}, b""

    def _cut(self) -> None:
        self._is_late = True
        for wire in self._wires:
            with wire, suppress(OSError):
                wire.shutdown(socket.SHUT_RDWR)

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connect, req)

    https_open = http_open

    def _connect(self, host: str, /, **options: Any) -> http.client.HTTPConnection:
        is_tls = self._url.startswith("https:")
        kind: Any = http.client.HTTPSConnection if is_tls else http.client.HTTPConnection
        connection = kind(host, **options, **({"context": self.tls} if is_tls else {}))
        connection._create_connection = self._dial
        return connection  # type: ignore[no-any-return]

    def _dial(self, address: tuple[str, int], *_: object) -> socket.socket:
        wire = socket.create_connection(address, CONNECT_S)
        self._wires.append(wire)
        self._wires.append(wire.dup())  # the same connection, whatever TLS makes of the socket
        if self._is_late:  # nobody waits: the message would stand there twice
            raise TimeoutError("too late to send the message")
        wire.settimeout(REQUEST_S)
        return wire


# === Courier ======================================================================================
@contextmanager
def guard(name: str) -> Iterator[None]:
    """Log whatever goes wrong, so that a thread goes on with its next piece of work."""
    try:
        yield
    except Exception:  # the one broad except
        log.exception("%s: an error in alarmrelay itself", name)


@dataclass
class Courier:
    room: str  # its path
    room_id: str
    settings: Mapping[str, Any]  # time_zone, vmanage_url
    spool: Spool
    webex: Client
    clock: Callable[[], float] = time.time
    trouble: str = ""  # what is in the way of delivery
    failures: int = 0  # in a row
    most: int = DIGEST  # alarms in the next digest, fewer after one that was refused
    aside: list[int] = field(default_factory=list)  # ids of refused alarms, the next to try first
    retry_s: float = 0.0  # when that is
    due_s: float = float("inf")  # monotonic; without another sign of life by then it is stuck
    arrived: threading.Event = field(default_factory=threading.Event)
    stopping: threading.Event = field(default_factory=threading.Event)

    def step(self) -> float | None:
        """Try to deliver what came first; return the seconds to wait, None for an arrival."""
        self.arrived.clear()  # before the look into the spool, or an arrival in between is missed
        now_ms, zone = int(self.clock() * 1000), self.settings["time_zone"]
        waiting, parent = self.spool.oldest_waiting(self.room, self.aside)
        if not waiting:  # then one that Webex has refused, once a minute or after a delivery
            if not self.aside or 0 < self.retry_s - now_ms / 1000 <= HOLD_S:
                return None
            waiting, parent = self.spool.oldest_waiting(self.room, self.aside[1:])
        message, count = format_digest(waiting[: self.most], now_ms, zone)
        if len(waiting) > SINGLY and count > 1:
            return self._conclude(waiting[:count], self._send(markdown=message))
        alarm, look = waiting[0], (now_ms, zone, self.settings["vmanage_url"])
        verdict = self._send(parent, markdown=alarm.message(*look))
        if verdict.kind == "refused":
            log.warning("alarm %d goes again as plain text: %s", alarm.spool_id, verdict.reason)
            verdict = self._send(parent, text=plain_text(alarm.message(*look, PLAIN_TEXT_BYTES)))
        return self._conclude([alarm], verdict)

    def _send(self, parent: str = "", **content: str) -> Verdict:
        self.due_s = time.monotonic() + 5 * REQUEST_S  # a lookup of names is not bounded
        message = {"roomId": self.room_id, **content, **({"parentId": parent} if parent else {})}
        answer = self.webex.ask("/messages", json.dumps(message).encode())
        self.due_s = time.monotonic() + STALL_S
        verdict = judge(answer, self.failures, self.clock())
        if parent and verdict.status in (400, 404):
            verdict = self._send(**content)
            if verdict.kind not in ("held", "refused"):  # else it is not the parent that is wrong
                self.spool.set_gone(parent)
        return verdict

    def _conclude(self, alarms: Sequence[Alarm], verdict: Verdict) -> float:
        now_s, spool_id = self.clock(), alarms[0].spool_id
        self.aside = [refused for refused in self.aside if refused != spool_id]
        self.failures = self.failures + 1 if verdict.kind == "failed" else 0
        if verdict.kind == "delivered":
            self.spool.set_delivered(self.room, verdict.reason, int(now_s * 1000), *alarms)
            for alarm in alarms:
                words = f"message={verdict.reason} after {now_s - alarm.received_ms / 1000:.1f} s"
                log.info("alarm %d delivered: %s", alarm.spool_id, words)
            self.retry_s, self.most, self.trouble = 0.0, DIGEST, self.trouble if self.aside else ""
            return 0.0
        if verdict.kind == "refused" and len(alarms) > 1:
            log.warning("%d alarms go again in parts: %s", len(alarms), verdict.reason)
            self.most = len(alarms) // 2
            return 0.0
        jitter = RETRY_JITTER if verdict.kind == "failed" else 0.0
        wait_s = verdict.wait_s * secrets.SystemRandom().uniform(1 - jitter, 1 + jitter)
        words = f"delivery {verdict.kind}: {verdict.reason}"
        trouble, self.trouble = self.trouble, f"room {self.room}: {words}"
        # What the operator has to mend is said once; of what passes, every attempt is news.
        passes = verdict.kind in ("paused", "failed")
        if passes or trouble != self.trouble:
            words += f" (trackingId {verdict.tracking_id or 'none'}); tried again in {wait_s:.0f} s"
            level = logging.WARNING if passes else logging.ERROR
            log.log(level, "room %s, alarm %d: %s", self.room, spool_id, words)
        if verdict.kind == "refused":  # it does not hold the others
            self.aside, self.retry_s, wait_s = [*self.aside, spool_id], now_s + HOLD_S, RETRY_S
        return wait_s

    def run(self) -> None:
        """Deliver until stopped."""
        while not self.stopping.is_set():
            wait_s: float | None = HOLD_S
            self.due_s = time.monotonic() + STALL_S
            with guard(f"room {self.room}"), suppress(Refused):  # by a spool that broke: all ends
                wait_s = self.step()
            self.due_s = float("inf")
            if wait_s is not None:
                self.stopping.wait(wait_s)
            elif not self.stopping.is_set():  # set before arrived, which step() clears
                self.arrived.wait(HOLD_S if self.aside else None)


# === HTTP =========================================================================================
# What could be read in two ways is refused. Each part of a request has a deadline and a bound.
CHALLENGE = {"WWW-Authenticate": 'Basic realm="alarmrelay", charset="UTF-8"'}
TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
FIRST_LINE = re.compile(rb"(%b) (?:https?://[^/?#\s]*)?(/[!-~]*) (HTTP/1\.[0-9])\r\n" % TOKEN)
FIELD_LINE = re.compile(rb"(%b):([^\x00-\x08\x0a-\x1f\x7f]*)\r\n" % TOKEN)
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\x00-\x08\x0a-\x1f\x7f]*)?\r\n")


class Handler(http.server.BaseHTTPRequestHandler, io.RawIOBase):  # a connection and its bytes
    server: Server  # type: ignore[assignment]

    def __init__(self, client: socket.socket, address: str, server: Server, wait_s: float) -> None:
        self.connection, self.address, self.server, self.wait_s = client, address, server, wait_s
        # Credentials were shown; or were not, once; its client may go on sending.
        self.is_trusted = self.is_answered = self.is_amid = self.close_connection = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Wait for bytes, 0 is the end; raise Refused at the deadline, however slowly they come."""
        with suppress(socket.timeout):
            if (left_s := self.deadline_s - time.monotonic()) > 0:
                self.connection.settimeout(left_s)
                return int(self.connection.recv_into(buffer))
        raise Refused(408, "the request came too slowly", Connection="close")

    def serve(self) -> None:
        """Answer all requests, and close the connection; raise OSError if it breaks."""
        if tls := self.server.tls:
            self.connection.settimeout(self.wait_s)  # for the handshake as a whole
            self.connection = tls.wrap_socket(self.connection, True, False)
            self.connection.do_handshake()
        self.rfile: io.BufferedReader = io.BufferedReader(self)
        while not self.close_connection:
            self.is_amid = False
            self.deadline_s = time.monotonic() + (IDLE_S if self.is_trusted else self.wait_s)
            with suppress(Refused):
                if self.rfile.peek(1)[:1] == b"\r" and self.rfile.readline(2) != b"\r\n":
                    return  # an empty line may stand before a request; RFC 9112, 2.2
                self.is_amid = bool(self.rfile.peek(1))
            if not self.is_amid:
                return
            self.deadline_s = time.monotonic() + (HEADER_S if self.is_trusted else self.wait_s)
            self.handle_one_request()

    def end(self) -> None:
        """Close the connection so that its client can read the last answer."""
        with self.connection as ended, suppress(OSError, Refused):
            ended.settimeout(0)
            with suppress(OSError, AttributeError):  # TLS: a goodbye that waits for none
                ended.unwrap()  # RFC 8446, 6.1
            ended.shutdown(socket.SHUT_WR)
            # To close while bytes come in is a reset, which can overtake the answer.
            self.deadline_s = time.monotonic() + LINGER_S
            while self.is_amid and self.read(BLOCK_BYTES):
                pass

    def handle_one_request(self) -> None:
        """Answer; the connection stays if it is certain where the next request begins."""
        self.command, self.close_connection, self.awaits_continue = "", True, False
        is_lost, body = False, iter(list[bytes]())
        try:
            self.parse_request()
            self.close_connection |= self.server.stopping
            body = self.read_body(self.body_length())
            self.answer(200, self.respond(body))
        except Refused as refusal:
            log.warning("%s refused: %d %s", self.address, refusal.status, refusal)
            is_lost = "Connection" in refusal.headers
            self.close_connection |= is_lost
            self.answer(refusal.status, {"error": str(refusal)}, **refusal.headers)
        # Read the rest, so that it is certain where the next request begins.
        self.deadline_s, self.is_amid = time.monotonic() + HEADER_S, False  # it has its answer
        left_bytes = DRAIN_BYTES if self.is_trusted else HEADER_BYTES
        left_bytes, is_lost = 0 if is_lost or self.awaits_continue else left_bytes, True
        with suppress(OSError, Refused):
            while left_bytes > 0 and (block := next(body, b"")):
                left_bytes -= len(block) + 8  # no chunk is free
            is_lost = left_bytes <= 0
        self.is_amid, self.close_connection = is_lost, self.close_connection or is_lost

    def parse_request(self) -> None:  # type: ignore[override]
        """Read the header; raise Refused, or ConnectionError if the client leaves."""
        if self.rfile.peek(1)[:1] == b"\x16":  # a handshake; RFC 8446, 5.1
            words = "this is TLS: the URL must begin with http://, or set tls_certificate"
            raise Refused(400, words, Connection="close")
        self.headers, form, left_bytes = http.client.HTTPMessage(), FIRST_LINE, HEADER_BYTES + 1
        while (line := self.rfile.readline(left_bytes)) != b"\r\n" or form is FIRST_LINE:
            left_bytes -= len(line)
            if not left_bytes or len(self.headers) == FIELDS:
                words = f"a header has {HEADER_BYTES} bytes and {FIELDS} fields at most"
                raise Refused(431, words, Connection="close")
            if not line.endswith(b"\n"):
                raise ConnectionError("the client left in the middle of a header")
            if not (match := form.fullmatch(line)):
                raise Refused(400, "the header cannot be read", Connection="close")
            if form is FIRST_LINE:
                self.command, path, self.request_version = map(bytes.decode, match.groups())
                self.path, form = path.partition("?")[0], FIELD_LINE
            else:
                self.headers[match[1].decode()] = match[2].decode("latin-1").strip(" \t")
        connection = ",".join(self.headers.get_all("Connection", [])).lower().split(",")
        is_1_0 = self.request_version == "HTTP/1.0"
        self.close_connection = is_1_0 or "close" in map(str.strip, connection)
        expected = self.headers.get("Expect", "").lower()
        self.awaits_continue = expected == "100-continue" and not is_1_0

    def body_length(self) -> int | None:
        """Return a body's bytes, None for chunks; raise Refused if in doubt (RFC 9112, 6.3)."""
        length = self.headers.get("Content-Length", "0")
        coding = self.headers.get("Transfer-Encoding")
        single = ("Authorization", "Content-Length", "Host", "Transfer-Encoding")
        if any(len(self.headers.get_all(name, [])) > 1 for name in single):
            raise Refused(400, "a header field is doubled", Connection="close")
        if coding is not None and coding.lower() != "chunked":
            raise Refused(501, "the only Transfer-Encoding known is chunked", Connection="close")
        if coding and ("Content-Length" in self.headers or self.request_version == "HTTP/1.0"):
            raise Refused(400, "Transfer-Encoding with a length or HTTP/1.0", Connection="close")
        if not re.fullmatch("[0-9]{1,18}", length):  # int() takes signs, underscores, other digits
            raise Refused(400, "Content-Length is no number", Connection="close")
        return None if coding else int(length)

    def read_body(self, length: int | None) -> Iterator[bytes]:
        """Yield a body in blocks; raise Refused, or ConnectionError if the client leaves."""
        while True:
            size = length
            if size is None:
                if not (match := CHUNK_LINE.fullmatch(self.rfile.readline(BLOCK_BYTES))):
                    raise Refused(400, "a chunk does not begin with its size", Connection="close")
                size = int(match[1], 16)
            for left in range(size, 0, -BLOCK_BYTES):
                block = self.rfile.read(min(left, BLOCK_BYTES))
                if len(block) < min(left, BLOCK_BYTES):
                    raise ConnectionError("the client left in the middle of a body")
                yield block
            if length is None and self.rfile.read(2) != b"\r\n":
                raise Refused(400, "a chunk is not as long as its size says", Connection="close")
            if length is not None or size == 0:
                return

    def respond(self, body: Iterator[bytes]) -> Mapping[str, str]:
        """Do what the request asks and return the answer; raise Refused."""
        allowed = "GET" if self.path == "/healthz" else "POST"
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")  # RFC 7617, 2
        # Hashes, since compare_digest() tells how long the things are that it compares.
        given = hashlib.sha256(token.strip(" ").encode("latin-1")).digest()
        is_right = scheme.lower() == "basic" and secrets.compare_digest(given, self.server.digest)
        self.is_trusted |= is_right
        if self.path != "/healthz" and not is_right:
            raise Refused(401, "wrong credentials" if scheme else "no credentials", **CHALLENGE)
        if self.path not in ("/healthz", *self.server.couriers):
            raise Refused(404, "no room has this path: post to /, or to /NAME of a room_id_NAME")
        if self.command != allowed:
            raise Refused(405, f"only {allowed} is answered here", Allow=allowed)
        if self.path == "/healthz":
            self.server.spool.check()
            return {"status": "ok"}
        if "Content-Length" not in self.headers and "Transfer-Encoding" not in self.headers:
            raise Refused(411, "the relay is reached, but the request has no length and no alarm")
        content, length = bytearray(), int(self.headers.get("Content-Length", "0"))
        if self.awaits_continue and length <= BODY_BYTES:
            self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.awaits_continue = False
        self.deadline_s = time.monotonic() + BODY_S
        while max(len(content), length) <= BODY_BYTES and (block := next(body, b"")):
            content += block
        if max(len(content), length) > BODY_BYTES:
            raise Refused(413, f"a body has {BODY_BYTES} bytes at most")
        return self.take(self.server.couriers[self.path], bytes(content))

    def take(self, courier: Courier, content: bytes) -> Mapping[str, str]:
        """Store a request's alarms; what this returns may be answered with 200."""
        now_ms = int(time.time() * 1000)
        alarms = parse_alarms(content, now_ms)
        request = hashlib.blake2b(courier.room.encode() + b"\n" + content, digest_size=16).digest()
        ids = self.server.spool.store(courier.room, request, now_ms, [text for text, _ in alarms])
        courier.arrived.set()
        for spool_id, (_, alarm) in zip(ids, alarms):
            words = f"rule={alarm.name()[:99]!r} uuid={str(alarm.fields.get('uuid'))[:99]!r}"
            log.info(f"alarm {spool_id} taken: room={courier.room} {words} sender={self.address}")
        if not ids:
            log.info("%s sent again what was taken before: not stored twice", self.address)
        return {"status": "accepted" if ids else "duplicate"}

    def answer(self, status: int, content: Mapping[str, str], **headers: str) -> None:
        """Send header and body at once: apart, one waits for the other's acknowledgement."""
        body = json.dumps(content).encode()
        # Some clients show credentials only when asked: two answers. Or a body may come, or not.
        is_last = self.awaits_continue or (self.is_answered and not self.is_trusted)
        self.close_connection, self.is_answered = self.close_connection or is_last, True
        closing = "close" if self.close_connection else "keep-alive"
        fields = {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}
        fields |= {"Date": self.date_time_string(), "Connection": closing}
        head = f"HTTP/1.1 {status} {http.client.responses[status]}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in fields.items()) + "\r\n"
        self.connection.settimeout(HEADER_S)
        self.connection.sendall(head.encode() + (b"" if self.command == "HEAD" else body))


class Server:
    def __init__(self, settings: Mapping[str, Any], spool: Spool, *couriers: Courier) -> None:
        self.digest, self.tls = hashlib.sha256(settings["credentials"]).digest(), settings["tls"]
        self.spool, self.couriers = spool, {courier.room: courier for courier in couriers}
        self.stopping, self.due_s, self._connections = False, float("inf"), set[Handler]()
        self._ended, (self._stop, self.stopper) = threading.Condition(), os.pipe()
        self._most = max(8, min(CONNECTIONS, os.sysconf("SC_OPEN_MAX") - SPARE_FILES))

    def run(self, listener: socket.socket) -> None:
        """Accept connections until the stop."""
        while not self.stopping:
            self.due_s = time.monotonic() + STALL_S
            self.accept(listener)
        listener.close()

    def accept(self, listener: socket.socket) -> None:
        """Begin the next connection, if one comes before the next tick or the stop."""
        taken = len(self._connections)
        try:
            if taken >= self._most:
                raise OSError(f"all {taken} places are taken")
            select.select([listener.fileno(), self._stop], [], [], TICK_S)
            client, (host, *_) = listener.accept()
            wait_s = HEADER_S if taken < self._most / 2 else TICK_S  # lest places run out
            connection = Handler(client, host.removeprefix("::ffff:"), self, wait_s)  # RFC 4291
            with self._ended:  # which it needs to end
                threading.Thread(target=self._serve, args=[connection], daemon=True).start()
                self._connections.add(connection)
        except (BlockingIOError, ConnectionError):
            return
        except (OSError, MemoryError, RuntimeError) as error:  # no more descriptors, threads
            with self._ended:
                if not self._ended.wait(TICK_S):
                    log.warning("no connection can be accepted: %s", error)

    def stop(self, deadline_s: float) -> None:
        """Return when the last connection has ended, whose request on its way is still answered."""
        with self._ended:
            while self._connections and time.monotonic() < deadline_s:
                self._ended.wait_for(lambda: not self._connections, GRACE_S)
                for connection in [c for c in self._connections if not c.is_amid]:
                    with suppress(OSError):  # it has ended; TLS has no say in this
                        socket.socket.shutdown(connection.connection, socket.SHUT_RD)

    def _serve(self, connection: Handler) -> None:
        with guard(connection.address):
            try:
                connection.serve()
            except OSError as error:
                connection.is_amid = True
                log.warning("%s is gone unanswered: %s", connection.address, error)
            finally:
                connection.end()
        with self._ended:
            self._connections.remove(connection)
            self._ended.notify_all()


# === systemd ======================================================================================
PROGRAM_FILE = "/usr/local/bin/alarmrelay.py"
UNIT_FILE = "/etc/systemd/system/alarmrelay.service"
# What `install` writes, two spaces for a line's end; alarmrelay.service is the same text.
UNIT = f"""[Unit]  Description=Relay of vManage alarms to a Webex room
Wants=network-online.target  After=network-online.target  StartLimitIntervalSec=0

[Service]  Type=notify  ExecStart=/usr/bin/python3 {PROGRAM_FILE}  EnvironmentFile=-{ENV_FILE}
DynamicUser=yes  UMask=0077  StateDirectory=alarmrelay  StateDirectoryMode=0700  WatchdogSec=90
WatchdogSignal=SIGKILL  Restart=always  RestartSec=1  RestartPreventExitStatus=78
FileDescriptorStoreMax=1  LimitNOFILE={CONNECTIONS + 64}  AmbientCapabilities=
CapabilityBoundingSet=  DevicePolicy=closed  KeyringMode=private  LockPersonality=yes
MemoryDenyWriteExecute=yes  NoNewPrivileges=yes  PrivateDevices=yes  PrivateMounts=yes
PrivateTmp=yes  PrivateUsers=yes  ProcSubset=pid  ProtectClock=yes  ProtectControlGroups=yes
ProtectHome=yes  ProtectHostname=yes  ProtectKernelLogs=yes  ProtectKernelModules=yes
ProtectKernelTunables=yes  ProtectProc=invisible  ProtectSystem=strict  RemoveIPC=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX  RestrictNamespaces=yes  RestrictRealtime=yes
RestrictSUIDSGID=yes  SystemCallArchitectures=native  SystemCallErrorNumber=EPERM
SystemCallFilter=@system-service  SystemCallFilter=~@privileged @resources

[Install]  WantedBy=multi-user.target
""".replace("  ", "\n")


class LineFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """Return one line, which no event can make two; for the journal as in sd-daemon(3)."""
        line = BREAKING.sub(lambda match: ascii(match[0])[1:-1], super().format(record))
        stderr = os.fstat(2)
        if os.environ.get("JOURNAL_STREAM") != f"{stderr.st_dev}:{stderr.st_ino}":
            return f"{self.formatTime(record)} {record.levelname} {line}"
        return f"<{ {logging.INFO: 6, logging.WARNING: 4}.get(record.levelno, 3) }>{line}"


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
        time.sleep(TICK_S)  # until systemd has closed it as well
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise RelayError(f"listen: {host} port {port} cannot be had: {error}") from error
    notify(environ, "FDSTORE=1", "FDNAME=listen", descriptors=[listener.fileno()])
    return listener


# === Commands =====================================================================================
# Each yields the lines to print, and raises RelayError. Their docstrings are their --help.
SAMPLE = """{"rule_name_display": "System_Reboot_Issued", "rulename": "system-reboot-issued",
"type": "system-reboot-issued", "severity": "Critical", "message": "The device rebooted",
"active": true, "values_short_display": [{"host-name": "DC1-VEDGE1", "system-ip": "10.1.0.1"}]}"""


def preview(environ: Mapping[str, str], path: str) -> Iterator[str]:
    """Print the message for each alarm in FILE, or in standard input; send nothing."""
    settings, now_ms = read_settings(environ, ["time_zone", "vmanage_url"]), int(time.time() * 1000)
    for _, alarm in parse_alarms(Path(path or "/dev/stdin").read_bytes(), now_ms):
        yield alarm.message(now_ms, settings["time_zone"], settings["vmanage_url"])


def install(_: Mapping[str, str], root: str) -> Iterator[str]:
    """Write program, unit and, if there are none, settings; below DIR, or on this host as root."""
    lines = ["# 'Quote odd values so.' After a change: sudo systemctl restart alarmrelay"]
    for name, (default, form, _type, expected) in SETTINGS.items():
        needed, mark = (", required", "") if not re.fullmatch(form, default) else ("", "#")
        lines += ["", f"# {name}{needed}: {expected}", f"{mark}{name}={default}"]
    files = [(PROGRAM_FILE, Path(__file__).read_text("utf-8"), "755"), (UNIT_FILE, UNIT, "644")]
    if not Path(f"{root}{ENV_FILE}").exists():
        files.append((ENV_FILE, "\n".join([*lines, ""]), "600"))
    try:
        for name, text, mode in files:
            command = ["install", "-D", "-m", mode, "/dev/stdin", f"{root}{name}"]
            subprocess.run(command, input=text.encode(), check=True)
            yield f"written: {root}{name}"
        if not root:
            subprocess.run(["systemctl", "daemon-reload"], check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise RelayError(f"{error}: install needs root and systemd, or --root DIR") from error
    yield f"next: sudoedit {ENV_FILE}"
    yield "      sudo systemctl enable alarmrelay && sudo systemctl restart alarmrelay"


def as_installed(environ: Mapping[str, str]) -> Mapping[str, str]:
    """Return the environment; if it holds no setting, end, having run anew with the relay's."""
    if {"STATE_DIRECTORY", *SETTINGS} & environ.keys() or not Path(ENV_FILE).exists():
        return environ
    run = f"systemd-run --quiet --pipe --wait --same-dir -p EnvironmentFile={ENV_FILE}".split()
    run += ["-E", "STATE_DIRECTORY=/var/lib/alarmrelay"]  # and, while it runs:
    run += ["-E", "CREDENTIALS_DIRECTORY=/run/credentials/alarmrelay.service"]
    sys.exit(subprocess.run([*run, sys.executable, *sys.argv], check=False).returncode)


def check(environ: Mapping[str, str], _: str) -> Iterator[str]:
    """Tell whether settings, disk, token and rooms are right, in a line for each."""
    settings = read_settings(as_installed(environ))
    zone, state = settings["time_zone"], settings["state"]
    yield f"ok: settings; in {zone} it is {Alarm({}, int(time.time() * 1000)).time(zone)}"
    place = next(path for path in (state, *state.parents) if path.exists())
    free = shutil.disk_usage(place).free
    is_good = place.is_dir() and os.access(place, os.W_OK | os.X_OK) and free >= FREE_BYTES
    words = "" if is_good else f"; must have {FREE_BYTES >> 20} and be writable by the relay's user"
    yield f"{'ok' if is_good else 'wrong'}: state directory {state}: {free >> 20} MiB free{words}"
    webex = Client(settings["webex_url"], f"Bearer {settings['bearer_token']}")
    for name, room_id in {"bearer_token": "", **settings["rooms"]}.items():
        path = f"/rooms/{urllib.parse.quote(room_id, '')}" if room_id else "/people/me"
        verdict = judge(answer := webex.ask(path), 0, time.time())
        if verdict.kind != "delivered":
            yield f"wrong: {name}: {verdict.reason}"
            continue
        found = json.loads(answer[3])
        shown = BREAKING.sub(" ", str(found.get("title") or found.get("displayName")))
        is_person = found.get("type") == "person"
        shown += ", a person's, which ends after 12 hours: create a bot" if is_person else ""
        yield f"{'warning' if is_person else 'ok'}: {name}: {shown}"


def send(environ: Mapping[str, str], path: str) -> Iterator[str]:
    """Post the alarm in FILE, or the workshop's as of now, to the relay on this host."""
    settings, sample = read_settings(as_installed(environ)), json.loads(SAMPLE)
    sample |= {"uuid": str(uuid.uuid4()), "receive_time": int(time.time() * 1000)}
    content = Path(path).read_bytes() if path else json.dumps(sample).encode()
    scheme, (host, port) = "https" if settings["tls"] else "http", settings["listen"]
    if ipaddress.ip_address(host).is_unspecified:
        host = "::1" if ":" in host else "127.0.0.1"
    url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
    relay = Client(url, f"Basic {settings['credentials'].decode()}")
    relay.tls.check_hostname, relay.tls.verify_mode = False, ssl.CERT_NONE  # it is this host
    os.environ["no_proxy"] = "*"
    status, reason, _, answer = relay.ask("/", content)
    if status:
        yield f"{status} {answer.decode(errors='replace')}"
    if status != 200:
        advice = (
            "systemctl status alarmrelay; if listen, webhook_... or tls_... changed: restart it"
        )
        raise RelayError(f"{url}: {reason}" + (f"; {advice}" if status in (0, 401) else ""), 1)


def serve(environ: Mapping[str, str], _: str) -> Iterator[str]:
    """Relay alarms until SIGTERM or SIGINT; raise RelayError if that is not possible."""
    settings = read_settings(environ)
    os.umask(0o077)
    # Taken by sigtimedwait() alone: a handler may run while its thread holds the lock it needs.
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # for the threads to come as well
    spool = Spool(settings["state"])
    couriers = list[Courier]()
    for name, room_id in settings["rooms"].items():
        webex = Client(settings["webex_url"], f"Bearer {settings['bearer_token']}")
        couriers.append(Courier(f"/{name[len('room_id_') :]}", room_id, settings, spool, webex))
    server, (host, port) = Server(settings, spool, *couriers), settings["listen"]
    listener = listen(environ, host, port)
    listener.setblocking(False)
    threads = [threading.Thread(target=server.run, args=[listener], daemon=True)]
    threads += [threading.Thread(target=courier.run, daemon=True) for courier in couriers]
    for thread in threads:
        thread.start()
    if not (settings["tls"] or ipaddress.ip_address(host).is_loopback):
        log.warning("no tls_certificate: password and alarms come over the network in plain text")
    strays = sorted(spool.rooms.keys() - server.couriers.keys())
    lost = [f"alarms wait for {room}: set room_id{room.replace('/', '_')}" for room in strays]
    where, said, wait_s = f"listening on {host} port {listener.getsockname()[1]}", "", 0.0
    tick_s = min(TICK_S, int(environ.get("WATCHDOG_USEC", 2**32)) / 3e6)  # sd_watchdog_enabled(3)
    while not signal.sigtimedwait(signals, wait_s) and not spool.error:
        words = f"{where}; {spool.waiting} waiting, {spool.delivered} delivered"
        words = "; ".join([words, *lost, *(one.trouble for one in couriers if one.trouble)])
        if not said:
            (log.warning if lost else log.info)("alarmrelay %s %s", __version__, words)
            notify(environ, "READY=1")
        if words != said:
            notify(environ, f"STATUS={words}")
        said, wait_s, now_s = words, tick_s, time.monotonic()
        spool.delete_delivered(int((time.time() - settings["retention_days"] * 86_400) * 1000))
        due_s = min(server.due_s, *(courier.due_s for courier in couriers))
        if "WATCHDOG_USEC" in environ and now_s < due_s:  # of before the wait for a slow disk
            notify(environ, "WATCHDOG=1")
    deadline_s, server.stopping = time.monotonic() + STOP_S, True
    os.close(server.stopper)
    notify(environ, "STOPPING=1")
    for courier in couriers:
        courier.stopping.set()  # the send in flight is the last
        courier.arrived.set()
    threads[0].join(STOP_S)
    server.stop(deadline_s)
    for thread in threads:
        thread.join(max(0.0, deadline_s - time.monotonic()))
    if spool.error:
        raise RelayError(str(spool.error))
    spool.close()
    yield from ()


def main() -> int:
    """Run the command that the arguments name; return the exit status."""
    parser = argparse.ArgumentParser(description="Relay alarms from Cisco vManage to Webex.")
    parser.add_argument("--version", action="version", version=f"alarmrelay {__version__}")
    parser.set_defaults(run=serve, argument="")
    commands = parser.add_subparsers(metavar="COMMAND", help="none: relay alarms")
    for run in (check, preview, send, install):
        one = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        one.set_defaults(run=run)
        if run in (preview, send):
            one.add_argument("argument", nargs="?", default="", metavar="FILE", help="or -")
    one.add_argument("--root", dest="argument", default="", metavar="DIR")
    arguments, status = parser.parse_args(), 0
    logging.basicConfig(level=logging.INFO)
    logging.root.handlers[0].setFormatter(LineFormatter())
    try:
        for line in arguments.run(os.environ, re.sub("^-$", "/dev/stdin", arguments.argument)):
            os.write(1, f"{line}\n".encode())  # in UTF-8, whatever the locale
            status |= line.startswith("wrong: ")
    except (RelayError, OSError) as error:
        for line in str(error).splitlines():
            log.error("%s", line)
        notify(os.environ, f"STATUS={BREAKING.sub('; ', str(error))}")
        return 1 if arguments.run is check else getattr(error, "exit_status", 74)
    return status


if __name__ == "__main__":
    # At once: threads may still wait for idle clients, and Python would abort on their output.
    os._exit(main())
