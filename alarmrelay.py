#!/usr/bin/env python3
"""Relay alarm webhooks from Cisco vManage (Catalyst SD-WAN Manager) to a Webex room.

    vManage --POST, Basic auth--> Handler --> Spool (SQLite, fsync) --> 200
                                  Courier --urllib, Bearer--> Webex POST /v1/messages

An alarm that was answered with 200 is on disk and reaches the room, at least once, oldest first.
"""

from __future__ import annotations

import base64
import collections
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
import sys
import threading
import time
import urllib.parse
import urllib.request
import zoneinfo
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, tzinfo
from pathlib import Path

__version__ = "0.1.0"
log = logging.getLogger("alarmrelay")
Counts = collections.Counter[str]
TYPE_CHECKING = False  # as it is at run time: typing would take half a MiB
if TYPE_CHECKING:
    from typing import Any
# === Limits =======================================================================================
MESSAGE_BYTES, PLAIN_TEXT_BYTES = 7439, 1000  # of UTF-8, as Webex takes them; of the plain form
SINGLY, DIGEST = 10, 150  # alarms that go one by one; most in a message
NEWEST_ALARMS, ROOMS_SHOWN, LARGE_BYTES = 50, 30, 2**16  # on the page, without larger alarms
HEADER_BYTES, FIELDS = 2**17, 100  # of a request; a password may have 100 KB
BODY_BYTES, ALARMS = 4 * 2**20, 1000  # of a request; vManage sends one of 8 KB or less
BLOCK_BYTES, DRAIN_BLOCKS, ANSWER_BYTES = 2**16, 2**14, 2**20  # at a time; if refused; of Webex
HEADER_S, BODY_S, IDLE_S = 10.0, 60.0, 75.0  # of a header, a body, silence with credentials
BACKLOG, CONNECTIONS, SPARE_FILES = 1024, 1024, 40  # that the kernel keeps; open; for all else
STOP_S, GRACE_S, LINGER_S = 10.0, 0.2, 2.0  # of a stop; for what is on its way; for a last word
DELAYED_MS, DUPLICATE_MS = 300_000, 600_000  # older is old news; sooner, a sender's retry
WAITING_ALARMS, FREE_BYTES = 100_000, 16 * 2**20  # else new alarms are refused, not deliveries
BUCKETS_S = (0.5, 1, 2, 5, 10, 30, 60, 300, 900, 3600, 14_400)  # of delivery times, in /metrics
TICK_S, RETENTION_STEP = 0.8, 100  # between two status lines, and old alarms deleted in that time
REQUEST_S, CONNECT_S = 60.0, 10.0  # for Webex's answer; to connect to each of its addresses
RETRY_S, RETRY_MAX_S, RETRY_JITTER = 1.0, 300.0, 0.2  # after 5xx and network errors; doubles
PAUSE_S, PAUSE_MIN_S, PAUSE_MAX_S = 15.0, 1.0, 3600.0  # 429 and 423; 15 s as in Cisco's own SDKs
HOLD_S, STALL_S = 60.0, 15.0  # between attempts that need the operator; until a thread is stuck


# === Errors =======================================================================================
class RelayError(Exception):  # ends the program: 74 I/O, 75 already running, 78 settings
    def __init__(self, status: int, text: str, **fields: str) -> None:
        super().__init__(text)
        self.status, self.fields = status, fields


class Refused(RelayError):
    """Answers a request with this HTTP status, {"error": text} and header fields."""


# === Settings =====================================================================================
def parse_listen(text: str) -> tuple[str, int]:  # of `0.0.0.0:5001` or `[::]:5001`
    host, _, port = text.rpartition(":")
    return str(ipaddress.ip_address(host.strip("[]"))), range(65536)[int(port)]


ENV_FILE = "/etc/alarmrelay.env"  # where systemd takes the settings from
WORD, LINE = "[!-~]+", r"[^\x00-\x1f\x7f\ud800-\udfff]+"
HOST, REST = r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:]+\])", "(:[0-9]{1,5})?(/[A-Za-z0-9._~%/-]*)?"
WEBEX_URL = rf"(https://{HOST}|http://(localhost|127\.[0-9.]+|\[::1\])){REST}"
# name: default ("" where required), form, type, what is expected. The README has the same table.
SETTINGS: Mapping[str, tuple[str, str, Callable[[str], Any], str]] = {
    "bearer_token": ("", WORD, str, "the Webex bot's token, in one word"),
    "room_id": ("", WORD, str, "the id of a Webex room, in one word"),
    "room_id_NAME": ("", f"({WORD})?", str, "a room's id; NAME: a-z, 0-9, _, not healthz, metrics"),
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
    settings: dict[str, Any] = {"state": Path(state), "tls": None}
    credentials, problems = Path(environ.get("CREDENTIALS_DIRECTORY", "/nonexistent")), []
    known = sorted({*environ, *(path.name for path in credentials.glob("room_id_*"))})
    rooms = [name for name in known if name.startswith("room_id_") and "room_id" in names]
    for name in dict.fromkeys([*names, *rooms]):
        default, form, parse, expected = SETTINGS.get(name, SETTINGS["room_id_NAME"])
        if name in rooms and not re.fullmatch("room_id_(?!(healthz|metrics)$)[a-z0-9_]+", name):
            form = ""
        text, credential = environ.get(name, "").strip() or default, credentials / name
        try:
            if credential.exists():  # it wins over the variable; systemd.exec(5), "Credentials"
                text, expected = "", f"{expected}, in the file {credential}"
                text = credential.read_text(encoding="utf-8").strip() or default
                text = str(credential) if "-----BEGIN " in text else text  # the PEM file itself
            settings[name] = parse(re.fullmatch(form, text)[0])  # type: ignore[index]
        except (OSError, LookupError, TypeError, ValueError):  # no match; ZoneInfo raises others
            if name == "time_zone" and not zoneinfo.available_timezones():
                expected = "a time zone database, which this host lacks: install the package tzdata"
            is_secret = name.startswith(("bearer", "room", "webhook")) or {"@", "?"} & {*text}
            found = "a hidden value" if is_secret else repr(text[:99])
            found = found if text else f"nothing: export {name}=... or set it in {ENV_FILE}"
            problems.append(f"{name}: expected {expected}, found {found}")
    settings["rooms"] = {k: v for k, v in settings.items() if k.startswith("room_id") and v}
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
        raise RelayError(78, "\n".join(problems))
    return settings


# === Message ======================================================================================
# Pure functions of an alarm, a JSON object as SAMPLE that vManage posts; no field is certain.
MARKS = {"Critical": "🔴", "Major": "🟡", "Medium": "🔵", "Minor": "🟢"}  # vManage's own colours
# What ends a line, turns its direction or has no UTF-8; then what Webex takes for markup.
BREAKING = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
MARKUP = re.compile(r"[\\`*\[\]~]|(?<!\w)_+|(?<!_)_+(?!\w)")
# Lenient: no tab in a string, garbled byte or number too long for int() shall lose an alarm.
DECODER = json.JSONDecoder(parse_int=lambda n: int(n) if len(n) < 400 else n, strict=False)


def one_line(value: object, most: int = MESSAGE_BYTES) -> str:  # text, or anything else as JSON
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return BREAKING.sub(" ", text[:most])


def age(ms: int) -> str:
    s = max(0, ms) // 1000
    return f"{s} s" if s < 120 else f"{s // 60} min" if s < 7200 else f"{s // 3600} h"


def show(value: object) -> str:  # as text that Webex shows literally
    text = MARKUP.sub(lambda match: re.sub("(.)", r"\\\1", match[0]), one_line(value))
    return html.escape(text, quote=False)


class Alarm:
    def __init__(self, fields: dict[str, Any], received_ms: int, *stored: int) -> None:
        self.fields, self.received_ms = fields, received_ms  # by this host's clock, epoch ms
        self.spool_id, self.delivered_ms = (*stored, 0, 0)[:2]  # 0: not stored, not delivered
        self.is_clear = fields.get("active") is False

    def name(self) -> str:
        """Return the rule's name as people know it."""
        names = map(self.fields.get, ("rule_name_display", "rulename", "type", "eventname"))
        # Correlated alarms carry the literal eventname "rulename".
        known = (n for n in names if isinstance(n, str) and n.strip() and n != "rulename")
        return next(known, "unknown alarm")

    def time(self, zone: tzinfo) -> str:
        """Return when vManage saw it as `Sat Jan 18 05:57:01 2020 CET`, in any locale."""
        for epoch_ms in (*map(self.fields.get, ("receive_time", "entry_time")), self.received_ms):
            # Not a number in JSON, or outside the years 1 to 9999, is as good as missing.
            with suppress(OverflowError, ValueError, OSError):
                moment = datetime.fromtimestamp(float(json.dumps(epoch_ms)) / 1000, zone)
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
        rule, _, way = self.name().rpartition("_")
        values = sorted(f"{key}={value}" for key, value in self.values())
        cleared = self.fields.get("cleared_events") if self.is_clear else []
        uuids = [self.fields.get("uuid"), *(cleared if isinstance(cleared, list) else [])]
        uuid, *clears = [BREAKING.sub(" ", str(uuid or "")) for uuid in uuids]
        keys = {"uuid": uuid or None, "clears": json.dumps(clears), "up": None, "down": None}
        if values and way == ("Up" if self.is_clear else "Down"):
            keys[way.lower()] = json.dumps([rule, *values])
        return keys

    def head(self, form: Callable[[object], str] = show) -> list[str]:
        """Return its name, text, mark and severity, in a form such as show()."""
        keys = self.name(), *(self.fields.get(key, "unknown") for key in ("message", "severity"))
        name, text, severity = map(form, keys)
        clear = [name, text, "✅", f"cleared ({severity})"]
        return clear if self.is_clear else [name, text, MARKS.get(severity, "⚪"), severity]

    def message(self, now_ms: int, zone: tzinfo, url: str = "", limit: int = MESSAGE_BYTES) -> str:
        """Return its own message, with a link to vManage at this address, of so many bytes."""
        name, text, mark, severity = self.head()
        first = f"Team, **Alarm Event** : {name}, **Message** : {text}, "
        first += "is received from vManage and here are the complete details"
        lines = [first, f"**Severity:** {mark} {severity}", f"**Receive Time:** {self.time(zone)}"]
        lines += [f" **{show(key).strip()}:** {show(value)}" for key, value in self.values()]
        text = "<br>".join(lines)
        late_ms, end = now_ms - self.received_ms, ""
        if late_ms > DELAYED_MS:
            end = f"<br>**Delayed:** relayed {age(late_ms)} after it came in"
        page = urllib.parse.quote(str(self.fields.get("uuid") or "")[:99], "", errors="replace")
        if url and page:
            end += f"<br>[Open in vManage]({url.rstrip('/')}/#/app/monitor/alarms/details/{page})"
        if len(f"{text}{end}".encode()) > limit:
            left = limit - len(f"{end}<br>… ({len(lines)} more lines)".encode())
            text = text.encode()[:left].decode(errors="ignore")
            # Between lines (escaped text holds no other <), or in no escape, entity or bold word.
            whole = r".*(?=<br>)|(\\.|&\w+;|\*\*[\w ]+\*\*|[^\\&*<])*"
            text = re.match(whole, text)[0]  # type: ignore[index]
            end += f"<br>… ({len(lines) - 1 - text.count('<br>')} more lines)"
        return f"{text}{end}"


def parse_alarms(body: bytes, received_ms: int) -> list[Alarm]:
    """Return a request's alarms; raise Refused."""
    try:
        content = DECODER.decode(body.decode(json.detect_encoding(body), "replace"))
        alarms = content if isinstance(content, list) and content else [content]
        if body.count(b"[") + body.count(b"{") > 99:
            DECODER.decode("[" * 99 + json.dumps(alarms) + "]" * 99)  # not too deep to be shown
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is empty or no JSON that can be read: {error}") from error
    if not all(isinstance(alarm, dict) for alarm in alarms) or len(alarms) > ALARMS:
        raise Refused(400, f"expected an alarm, a JSON object, or an array of up to {ALARMS}")
    return [Alarm(alarm, received_ms) for alarm in alarms]


def format_digest(alarms: Sequence[Alarm], now_ms: int, zone: tzinfo) -> tuple[str, int]:
    """Return one message for alarms, oldest first, with as many as it takes, and their number."""
    late_ms, fitting, lines = now_ms - alarms[0].received_ms, "", ""
    late = f", the oldest {age(late_ms)} ago" if late_ms > DELAYED_MS else ""
    for count, alarm in enumerate(alarms):
        name, text, mark, _ = alarm.head()
        pairs = [f"{show(key).strip()} {show(value)}" for key, value in alarm.values()]
        lines += ", ".join([f"\n- {mark} **{name.strip()}** : {text}", alarm.time(zone), *pairs])
        longer = f"Team, **{count + 1} alarms** are received from vManage{late}:{lines}"
        if len(longer.encode()) > MESSAGE_BYTES:
            return fitting, count
        fitting = longer
    return fitting, len(alarms)


def plain_text(markdown: str) -> str:  # ASCII, for a Webex that refuses a message's markdown
    text = re.sub(r"\\(.)|\*\*", r"\1", re.sub(r"<br> ?", "\n", markdown))
    return html.unescape(text).encode("ascii", "replace")[:PLAIN_TEXT_BYTES].decode()


# === Spool ========================================================================================
# Only this class touches the database. Each method is one transaction under one lock. What has
# returned is on disk (sqlite.org/pragma.html, FULL with WAL). EXCLUSIVE first: no others open it.
PRAGMAS = """PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;
    PRAGMA temp_store = MEMORY; PRAGMA cache_size = -256"""  # KiB; the kernel holds the file anyway
# Each makes a file one of the next version; 0 has the tables of 1. uuid, down: filled on delivery.
MIGRATIONS = (
    """CREATE TABLE IF NOT EXISTS alarm (
        id INTEGER PRIMARY KEY, room TEXT NOT NULL, received_ms INTEGER NOT NULL,
        request BLOB NOT NULL, body TEXT NOT NULL, delivered_ms INTEGER, message_id TEXT);
    CREATE INDEX IF NOT EXISTS waiting ON alarm (room, id) WHERE delivered_ms IS NULL;
    CREATE INDEX IF NOT EXISTS delivered ON alarm (delivered_ms) WHERE delivered_ms IS NOT NULL""",
    """ALTER TABLE alarm ADD COLUMN uuid TEXT; ALTER TABLE alarm ADD COLUMN down TEXT;
    CREATE INDEX request ON alarm (request);
    CREATE INDEX uuid ON alarm (uuid, room) WHERE uuid IS NOT NULL;
    CREATE INDEX down ON alarm (down, room) WHERE down IS NOT NULL""",
)
RETRY = {"Retry-After": "30"}  # of what can pass by itself
INSERT = "INSERT INTO alarm (room, request, received_ms, body) VALUES (?1, ?2, ?3, ?4)"
FIND_REQUEST = "SELECT id FROM alarm WHERE request = ?2 AND received_ms BETWEEN ?3 - ?5 AND ?3 + ?5"
NEWEST = """SELECT body, received_ms, id, delivered_ms FROM alarm WHERE length(body) < ?
    ORDER BY id DESC LIMIT ?"""
HOURS = """SELECT room, delivered_ms / 3600000, count(*), max(delivered_ms) FROM alarm
    WHERE delivered_ms > ? GROUP BY 1, 2 ORDER BY 2"""
ROOMS = """SELECT room, count(*), received_ms, min(id) FROM alarm
    WHERE delivered_ms IS NULL GROUP BY room"""
OLDEST_WAITING = """SELECT body, received_ms, id FROM alarm WHERE room = ? AND
    delivered_ms IS NULL AND id NOT IN (SELECT value FROM json_each(?)) ORDER BY id LIMIT ?"""
SET_DELIVERED = """UPDATE alarm SET delivered_ms = :delivered_ms, message_id = :message_id,
    uuid = :uuid, down = :down WHERE id = :spool_id"""
CLEARED = """SELECT 1, id, message_id FROM alarm WHERE room = :room AND uuid IN
    (SELECT value FROM json_each(:clears)) UNION ALL SELECT 2, max(id), message_id FROM alarm
    WHERE room = :room AND down = :up GROUP BY down ORDER BY 1, 2 DESC"""
DELETE = "DELETE FROM alarm WHERE id IN (SELECT id FROM alarm WHERE delivered_ms < ? LIMIT ?)"


class Spool:
    def __init__(self, directory: Path) -> None:
        self.path, self._lock = directory / "alarmrelay.db", threading.RLock()  # guards all below
        self._posted: collections.deque[Any] = collections.deque()  # to store(), with its outcome
        self._unsaved: dict[int, Any] = {}  # by id; deliveries, when the disk is full
        self.error: Refused | None = None  # what broke it
        self._full_s = 0.0  # monotonic; until then the disk counts as full: SQLite said so
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._open()
        except (OSError, sqlite3.Error, TypeError, ValueError) as error:
            if str(error) == "database is locked":
                raise RelayError(75, f"another relay runs on {directory}: stop it first") from error
            if re.search("full|disk I/O|unable to open|readonly|Errno", str(error)):  # it is well
                raise RelayError(74, f"no spool can be opened in {directory}: {error}") from error
            self._move_aside(error)
            self._open()
        lost = "alarms may be lost: recover those in {}, move it away and restart".format
        self.losses = [*map(lost, directory.glob("*.damaged-*[0-9]"))]

    def _open(self) -> None:
        db = sqlite3.connect(self.path, timeout=0, isolation_level=None, check_same_thread=False)
        self._db, db.text_factory = db, lambda text: text.decode(errors="replace")
        if not self.path.stat().st_size and Path(f"{self.path}-wal").exists():
            raise ValueError("its -wal stands alone")  # SQLite would throw it away
        db.executescript(PRAGMAS)
        ((version,),) = db.execute("PRAGMA user_version")
        if version > len(MIGRATIONS):
            raise RelayError(74, f"{self.path} is of a newer relay, version {version}: use that")
        for number, migration in [*enumerate(MIGRATIONS, 1)][version:]:
            db.executescript(f"BEGIN; {migration}; PRAGMA user_version = {number}; COMMIT")
        self.rooms = collections.defaultdict[str, Counts](Counts)  # what is told, by path
        for room, waiting, oldest_ms, _ in db.execute(ROOMS):  # of the row with min(id)
            self.count(room, {"waiting": waiting}, oldest_ms=oldest_ms)
        self.newest = collections.deque[Alarm]((), NEWEST_ALARMS)
        with suppress(sqlite3.Error, ValueError):  # for the page alone: not worth a new file
            for row in db.execute(NEWEST, (LARGE_BYTES, NEWEST_ALARMS)):
                self.newest.append(self._read(*row))
            for room, hour, number, last_ms in db.execute(HOURS, [(time.time() - 90_000) * 1000]):
                self.count(room, {f"hour {hour}": number}, last_ms=int(last_ms))

    def _move_aside(self, error: Exception) -> None:
        aside = f"{self.path}.damaged-{datetime.now():%Y-%m-%d-%H%M%S}"
        log.error("the spool is damaged (%s), what waited in it may be lost: see %s", error, aside)
        self._db.close()
        for end in ("-wal", ""):  # SQLite would throw away a -wal that stands alone
            with suppress(FileNotFoundError):
                os.rename(f"{self.path}{end}", f"{aside}{end}")

    def refusal(self) -> Refused | None:
        """Return why no alarm can be stored now, if so."""
        waiting = sum(room["waiting"] for room in [*self.rooms.values()])
        found = "too many alarms wait for Webex" if waiting >= WAITING_ALARMS else ""
        if shutil.disk_usage(self.path.parent).free < FREE_BYTES or time.monotonic() < self._full_s:
            found = f"the disk is full, or under {FREE_BYTES >> 20} MiB free in {self.path.parent}"
        return self.error or (Refused(503, found, **RETRY) if found else None)

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
                    self._full_s = time.monotonic() + HOLD_S
                    raise Refused(503, f"{error}: {self.path.parent}", **RETRY) from error
                if re.search("malformed|not a database", str(error)):
                    self._move_aside(error)  # a new process begins a new one
                # For good: after a failed fsync the kernel may have dropped the pages, and the next
                # says that all is well. Only a new process that reads the file knows what it holds.
                self.error = Refused(503, f"the spool cannot be read or written: {error}")
                raise self.error from error

    def store(self, room: str, request: bytes, alarms: Sequence[Alarm]) -> list[int]:
        """Put the alarms of a request (its hash) on disk; return their ids; raise Refused."""
        rows = [(room, request, alarm.received_ms, json.dumps(alarm.fields)) for alarm in alarms]
        outcome: list[Any] = []  # the ids, or why there are none
        # Whoever gets the lock first commits for all that came during the commit before. Queued
        # before the lock is taken, so that who finds the queue empty under the lock is on disk.
        self._posted.append((outcome, room, alarms, rows))
        with self._lock:
            if not outcome:
                self._commit([self._posted.popleft() for _ in range(len(self._posted))])
        if not isinstance(outcome[0], list):
            raise outcome[0]
        return outcome[0]

    def _commit(self, batch: Sequence[Any]) -> None:  # what store() has queued
        try:
            self._full_s = 0.0  # unless it says so again
            if refused := self.refusal():
                raise refused
            with self._transaction() as db:
                for *_, alarms, rows in batch:
                    known = db.execute(FIND_REQUEST, (*rows[0], DUPLICATE_MS)).fetchone()
                    for alarm, row in zip(alarms, [] if known else rows):
                        alarm.spool_id = db.execute(INSERT, row).lastrowid or 0
        except (Refused, OSError) as error:  # OSError: free space cannot be asked for
            for outcome, *_ in batch:
                outcome.append(error)
            return
        for outcome, room, alarms, rows in batch:
            outcome.append(ids := [alarm.spool_id for alarm in alarms if alarm.spool_id])
            kind, told = "accepted" if ids else "duplicates", self.rooms[room]
            oldest_ms = told["oldest_ms"] if told["waiting"] else alarms[0].received_ms
            self.count(room, {kind: len(alarms), "waiting": len(ids)}, oldest_ms=oldest_ms)
            self.newest.extendleft(a for a, row in zip(alarms, rows) if len(row[-1]) < LARGE_BYTES)

    def count(self, room: str, changes: Mapping[str, int], **others: int) -> None:  # sets others
        with self._lock:  # readers take none: they see all of it or nothing
            self.rooms[room] = Counts({**(self.rooms[room] + Counts(changes)), **others})

    def _read(self, body: str, *row: int) -> Alarm:  # or what is left of it
        with suppress(ValueError, TypeError, RecursionError):
            return Alarm(dict(DECODER.decode(body)), *row)
        return Alarm({"message": f"This alarm is damaged on disk: {body}"}, *row)

    def oldest_waiting(self, room: str, aside: Collection[int]) -> tuple[list[Alarm], str]:
        """Return alarms to be delivered next, without those set aside, and the first's parent."""
        found, size = list[Alarm](), 0
        with self._transaction() as db:
            for row in db.execute(OLDEST_WAITING, (room, f"{[*self._unsaved, *aside]}", DIGEST)):
                found.append(self._read(*row))
                size += len(str(row[0]))
                if size > BODY_BYTES and len(found) > SINGLY:
                    break
            one = found[0] if found else Alarm({}, 0)
            sent = one.is_clear and db.execute(CLEARED, dict(one.threads(), room=room)).fetchone()
            for row in db.execute(OLDEST_WAITING, (room, f"{[*self._unsaved]}", bool(aside))):
                one = self._read(*row)  # the oldest may be set aside
            self.count(room, {}, oldest_ms=one.received_ms)
        return found, sent[2] if sent else ""

    def set_delivered(self, room: str, message_id: str, delivered_ms: int, *alarms: Alarm) -> None:
        """Record that alarms stand in the room, in the Webex message with this id."""
        sent = {"room": room, "message_id": message_id, "delivered_ms": delivered_ms}
        n, took_ms = len(alarms), [max(0, delivered_ms - alarm.received_ms) for alarm in alarms]
        hour, ids = delivered_ms // 3_600_000, {alarm.spool_id for alarm in alarms}
        counts = {"messages": 1, "delivered": n, "+Inf": n, "waiting": -n, f"hour {hour}": n}
        counts |= {str(s): sum(ms <= s * 1000 for ms in took_ms) for s in BUCKETS_S}
        counts["ms"] = sum(took_ms)
        with self._lock:
            old = [key for key in self.rooms[room] if "hour " < key < f"hour {hour - 24}"]
            self.count(room, counts, last_ms=delivered_ms, **dict.fromkeys(old, 0))
            for alarm in self.newest:
                alarm.delivered_ms = delivered_ms if alarm.spool_id in ids else alarm.delivered_ms
            self._unsaved |= {a.spool_id: {**vars(a), **a.threads(), **sent} for a in alarms}
            self.delete_delivered()

    def delete_delivered(self, before_ms: int = 0) -> None:
        """Record deliveries not yet recorded; delete some alarms delivered before that."""
        with self._lock, suppress(Refused):  # later, then; until then they are not sent again
            with self._transaction() as db:
                for delivery in self._unsaved.values():  # in their order: down, up, down again
                    found = db.execute(CLEARED, delivery).fetchall()  # by uuid, else by what is up
                    cleared = [(spool_id,) for rank, spool_id, _ in found if rank == found[0][0]]
                    db.executemany("UPDATE alarm SET down = NULL WHERE id = ?", cleared)
                    db.execute(SET_DELIVERED, delivery)
                db.execute(DELETE, (before_ms, RETENTION_STEP))
            self._unsaved.clear()

    def close(self) -> None:
        with self._lock:
            self._db.close()


# === Webex ========================================================================================
class Wire(io.RawIOBase):  # the bytes that come over a connection
    def __init__(self, connection: socket.socket, deadline_s: float) -> None:
        self.connection, self.deadline_s = connection, deadline_s  # monotonic

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Wait for bytes, 0 is the end; raise Refused at the deadline, however slowly they come."""
        with suppress(socket.timeout):
            if (left_s := self.deadline_s - time.monotonic()) > 0:
                self.connection.settimeout(left_s)
                return int(self.connection.recv_into(buffer))
        raise Refused(408, "the request came too slowly")


# kind: "delivered", "refused" (the message), "held" (token, room), "paused", "failed"; reason: for
# people, or the message's id; meaning: that Webex does; advice: with its semicolon, or "".
Verdict = collections.namedtuple(
    "Verdict", "kind wait_s reason meaning advice tracking_id", defaults=("", "", "")
)
Answer = tuple[int, str, Mapping[str, str], bytes]  # status, or 0 for none; reason, headers, body
# By status, what it means that Webex does; what to do. 0: no answer; 200: one without an id.
MEANING = {
    0: "does not answer; check network, clock and https_proxy; if a proxy opens TLS, SSL_CERT_FILE",
    200: "fails; check webex_url; does a proxy answer for Webex?",
    400: "refuses the message; check room_id; `alarmrelay.py preview` shows the message",
    401: "refuses the token; replace bearer_token and restart",
    403: "refuses the bot; the bot must be a member of the room and allowed to post in it",
    404: "has no such room; check room_id and webex_url, and that the bot is a member of the room",
    **dict.fromkeys((423, 429), "limits the bot"),
}


def judge(answer: Answer, failures: int, now_s: float) -> Verdict:
    """Decide what an answer means for the message, after so many failures in a row before it."""
    status, reason, headers, body = answer
    content: dict[str, Any] = {}
    with suppress(TypeError, ValueError, RecursionError):
        content = dict(json.loads(body))
    message_id = content.get("id")
    if status == 200 and message_id and isinstance(message_id, str) and message_id.isprintable():
        return Verdict("delivered", 0.0, message_id)
    is_odd = 200 <= status < 400  # a redirect is never followed
    said = "no id in it" if is_odd else content.get("message")
    reason = one_line(f"{reason}: {said}" if said else reason, 300)  # into STATUS=, too
    meaning, *advice = MEANING.get(200 if is_odd else status, "fails").partition(";")
    tracking_id = str(content.get("trackingId") or headers.get("trackingId", ""))[:100]
    kind, wait_s = "failed", min(RETRY_S * 2 ** min(failures, 30), RETRY_MAX_S)
    if status in (423, 429):
        kind, wait_s, asked = "paused", PAUSE_S, headers.get("Retry-After", "").strip()
        with suppress(TypeError, ValueError, IndexError, OverflowError):
            is_number, to_date = re.fullmatch("-?[0-9]+", asked), email.utils.parsedate_to_datetime
            wait_s = float(asked) if is_number else to_date(asked).timestamp() - now_s
        wait_s = min(max(wait_s, PAUSE_MIN_S), PAUSE_MAX_S)  # RFC 9110, 10.2.3
    elif 400 <= status < 500:
        kind, wait_s = "refused" if status == 400 else "held", HOLD_S
    return Verdict(kind, wait_s, reason, meaning, "".join(advice), tracking_id)


class Reply(http.client.HTTPResponse):
    def __init__(self, connection: socket.socket, *args: Any, **options: Any) -> None:
        super().__init__(connection, *args, **options)
        self.kept: Any = self.fp  # or the connection would be closed
        self.fp = io.BufferedReader(Wire(connection, time.monotonic() + REQUEST_S))


class Client(urllib.request.HTTPSHandler, urllib.request.HTTPHandler):
    def __init__(self, url: str, authorization: str) -> None:
        self.tls, self._url = ssl.create_default_context(), url.rstrip("/")
        super().__init__(context=self.tls)
        # No handler follows redirects: urllib's would send the token to the other host, by GET.
        self._opener = urllib.request.OpenerDirector()
        self._opener.add_handler(self)
        if url.startswith("https:"):  # plain http only goes to a loopback address
            self._opener.add_handler(urllib.request.ProxyHandler())
        self._headers = {"Content-Type": "application/json", "Authorization": authorization}

    def ask(self, path: str, payload: bytes | None = None) -> Answer:
        """Get a path, as /people/me, or post a payload to it; return the answer in time."""
        request = urllib.request.Request(self._url + path, payload, self._headers)
        secret = self._headers["Authorization"].split()[-1]
        try:
            with self._opener.open(request, timeout=CONNECT_S) as reply:
                content = reply.read(ANSWER_BYTES).replace(secret.encode(), b"[hidden]")
                return reply.status, f"{reply.status} {reply.reason}", reply.headers, content
        except Refused:
            reason = f"no answer within {REQUEST_S:g} s"
        except (OSError, http.client.HTTPException, ValueError) as error:
            # Not the text of all of them: it may hold the password of a proxy.
            reason = f"no answer: {getattr(error, 'reason', type(error).__name__)}"
        return 0, reason, {}, b""

    def do_open(self, http_class: Any, req: Any, **options: Any) -> http.client.HTTPResponse:
        connection: Any = type("Connection", (http_class,), {"response_class": Reply})
        return super().do_open(connection, req, **options)


# === Courier ======================================================================================
@contextmanager
def guard(name: str) -> Iterator[None]:
    """Log whatever goes wrong, so that a thread goes on with its next piece of work."""
    try:
        yield
    except Exception:  # the one broad except
        log.exception("%s: an error in alarmrelay itself", name)


class Courier:
    def __init__(self, room: str, room_id: str, settings: Any, spool: Spool, webex: Client) -> None:
        self.room, self.room_id, self.settings = room, room_id, settings  # its path, Webex's id
        self.spool, self.webex, self.clock = spool, webex, time.time
        self.spool.count(room, {})  # told from the start
        self.trouble: Verdict | None = None  # what is in the way of delivery
        self.since_s = self.retry_s = 0.0  # when that began, and when it is tried again
        self.failures, self.most = 0, DIGEST  # in a row; in the next digest, fewer if refused
        self.aside = list[int]()  # ids of refused alarms, the next to try first
        self.refused: tuple[Verdict | None, float] = None, 0.0  # why, and since when
        self.due_s = float("inf")  # monotonic; without another sign of life by then it is stuck
        self.arrived, self.stopping = threading.Event(), threading.Event()

    def step(self) -> float | None:
        """Try to deliver what came first; return the seconds to wait, None for an arrival."""
        now_ms, zone = int(self.clock() * 1000), self.settings["time_zone"]
        waiting, parent = self.spool.oldest_waiting(self.room, self.aside)
        if not waiting:  # then one that Webex has refused, once a minute or after a delivery
            if not self.aside or 0 < self.retry_s - now_ms / 1000 <= HOLD_S:
                return None
            waiting, parent = self.spool.oldest_waiting(self.room, self.aside[1:])
        if len(waiting) > SINGLY:
            message, count = format_digest(waiting[: self.most], now_ms, zone)
            if count > 1:
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
        # A message to reply to may have been deleted.
        return self._send(**content) if parent and answer[0] in (400, 404) else verdict

    def _conclude(self, alarms: Sequence[Alarm], verdict: Verdict) -> float:
        now_s, spool_id = self.clock(), alarms[0].spool_id
        self.aside = [refused for refused in self.aside if refused != spool_id]
        self.failures = self.failures + 1 if verdict.kind == "failed" else 0
        if verdict.kind == "delivered":
            self.spool.set_delivered(self.room, verdict.reason, int(now_s * 1000), *alarms)
            for alarm in alarms:
                words = f"message={verdict.reason} after {now_s - alarm.received_ms / 1000:.1f} s"
                log.info("alarm %d delivered: %s", alarm.spool_id, words)
            self.retry_s, self.most = 0.0, DIGEST
            self.trouble, self.since_s = self.refused if self.aside else (None, 0.0)
            return 0.0
        self.spool.count(self.room, {verdict.kind: 1})
        if verdict.kind == "refused" and len(alarms) > 1:
            log.warning("%d alarms go again in parts: %s", len(alarms), verdict.reason)
            self.most = len(alarms) // 2
            return 0.0
        jitter = RETRY_JITTER if verdict.kind == "failed" else 0.0
        wait_s = verdict.wait_s * secrets.SystemRandom().uniform(1 - jitter, 1 + jitter)
        before, self.retry_s = self.trouble, now_s + wait_s
        self.since_s = self.since_s if before and before.meaning == verdict.meaning else now_s
        self.trouble = verdict
        # What the operator has to mend is said once; of what passes, every attempt is news.
        level = logging.WARNING if verdict.kind in ("paused", "failed") else logging.ERROR
        if level == logging.WARNING or not before or before[:3] != verdict[:3]:
            words = f"delivery {verdict.kind}: {verdict.reason}{verdict.advice}"
            words += f" (trackingId {verdict.tracking_id or 'none'}); tried again in {wait_s:.0f} s"
            log.log(level, "room %s, alarm %d: %s", self.room, spool_id, words)
        if verdict.kind == "refused":  # it does not hold the others
            self.aside, self.refused = [*self.aside, spool_id], (verdict, self.since_s)
        return RETRY_S if verdict.kind == "refused" else wait_s

    def run(self) -> None:
        """Deliver until stopped."""
        while not self.stopping.is_set():
            wait_s: float | None = HOLD_S
            self.due_s = time.monotonic() + STALL_S
            with guard(f"room {self.room}"), suppress(Refused):  # by a spool that broke: all ends
                wait_s = self.step()
            self.due_s = float("inf")
            woken = self.arrived if wait_s is None else self.stopping
            woken.wait(HOLD_S if wait_s is None else wait_s)
            self.arrived.clear()  # before the looks at the stop and into the spool: none is missed


# === HTTP =========================================================================================
# What could be read in two ways is refused. Each part of a request has a deadline and a bound.
CSP = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
CHALLENGE = {"WWW-Authenticate": 'Basic realm="alarmrelay", charset="UTF-8"'}
ALLOWED = {"/healthz": "GET", "/metrics": "GET", "/": "GET, POST"}  # else, for a room, POST
HTML = {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": CSP}
TOKEN, VALUE = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+", rb"[^\x00-\x08\x0a-\x1f\x7f]*"
FIRST_LINE = re.compile(rb"(%b) (?:https?://[^/?#\s]*)?(/[!-~]*) HTTP/(1\.[0-9])\r\n" % TOKEN)
FIELD_LINE = re.compile(rb"(%b):(%b)\r\n" % (TOKEN, VALUE))
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;%b)?\r\n" % VALUE)
SINGLE = ("Content-Length", "Transfer-Encoding", "Authorization", "Host")
CODES = (200, 400, 401, 404, 405, 408, 411, 413, 431, 501, 503)  # that a request is answered with
# Type, help, and what is counted for each sample; "%s" is the room's path.
LABEL, CODE = '{room="%s"}', {f'{{code="{code}"}}': f"HTTP {code}" for code in CODES}
REASON = {f'{{room="%s",reason="{k}"}}': k for k in ("held", "refused", "paused", "failed")}
TOOK = {f'_bucket{{room="%s",le="{limit}"}}': f"{limit}" for limit in (*BUCKETS_S, "+Inf")}
TOOK |= {f"_sum{LABEL}": "took_s", f"_count{LABEL}": "+Inf"}
METRICS = {
    "alarmrelay_alarms_accepted_total": ("counter", "Alarms put on disk.", {LABEL: "accepted"}),
    "alarmrelay_duplicates_total": ("counter", "Alarms posted twice.", {LABEL: "duplicates"}),
    "alarmrelay_messages_delivered_total": ("counter", "Messages posted.", {LABEL: "messages"}),
    "alarmrelay_alarms_delivered_total": ("counter", "Alarms in the room.", {LABEL: "delivered"}),
    "alarmrelay_delivery_failures_total": ("counter", "Attempts that failed.", REASON),
    "alarmrelay_alarms_waiting": ("gauge", "Alarms not in the room yet.", {LABEL: "waiting"}),
    "alarmrelay_oldest_waiting_seconds": ("gauge", "Age of the oldest alarm.", {LABEL: "oldest_s"}),
    "alarmrelay_delivery_seconds": ("histogram", "From an alarm's post to the room.", TOOK),
    "alarmrelay_requests_total": ("counter", "Requests, by the status of their answer.", CODE),
    "alarmrelay_build_info": ("gauge", "Its version.", {f'{{version="{__version__}"}}': "one"}),
    "process_start_time_seconds": ("gauge", "Seconds since the epoch.", {"": "started_s"}),
}
PAGE = """<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>alarmrelay</title>
<meta name="viewport" content="width=device-width"><meta http-equiv="refresh" content="10"><style>
:root { color-scheme: light dark; font: 95%/1.5 system-ui, sans-serif } body { margin: 1rem }
h1 { font-size: 1.2rem; padding: 1rem; border-radius: .5rem; color: #fff; background: #17672e }
.late { background: #8a5200 } .bad { background: #b3261e } .duplicate { opacity: .7 }
table, tbody { display: block } table { margin: 2rem 0 } td:last-child { white-space: nowrap }
tr { display: flex; flex-wrap: wrap; gap: 0 1rem; padding: .4rem 0; border-top: 1px solid #8885 }
@media (min-width: 60rem) { td { flex: 2 14rem } :nth-child(2), :nth-child(n+5) { flex: 1 9rem } }
td { overflow-wrap: anywhere } td:nth-child(3), .waiting :last-child { font-weight: 600 }</style>"""


def cells(most: int, *values: object) -> str:
    """Return cells of a table, as HTML of so many bytes each."""
    texts = [html.escape(one_line(value), quote=False).encode() for value in values]
    shown = [re.sub("&[^;]*$", "", text[:most].decode(errors="ignore")) for text in texts]
    return "<td>".join(cut + "…"[: len(text) > most] for cut, text in zip(shown, texts))


class Handler(http.server.BaseHTTPRequestHandler, Wire):  # a connection and its bytes
    def __init__(self, client: socket.socket, address: Any, server: Server, wait_s: float) -> None:
        self.connection: Any = client  # or, over TLS, ssl's
        self.address, self.relay = address[0].removeprefix("::ffff:"), server  # RFC 4291
        # Until credentials are shown; some clients show them only when asked: two answers.
        self.idle_s, self.header_s, self.left_answers = wait_s, wait_s, 2.0
        # No stop cuts off what is amid. Nobody knows where a request begins after one that is lost.
        self.is_amid = self.is_lost = False

    def run(self) -> None:
        """Answer all requests, and close so that the client can read the last answer."""
        with guard(self.address), suppress(Refused):  # it has no more to say
            self.rfile: io.BufferedReader = io.BufferedReader(self)  # no earlier: a cycle
            try:
                if tls := self.relay.tls:
                    self.connection.settimeout(self.header_s)  # for the handshake as a whole
                    self.connection = tls.wrap_socket(self.connection, True, False)
                    self.connection.do_handshake()
                self.handle()
            except OSError as error:
                self.is_amid = True
                log.warning("%s is gone unanswered: %s", self.address, error)
        with guard(self.address), suppress(OSError, Refused), self.connection as ended:
            ended.settimeout(0)
            with suppress(OSError, AttributeError):  # TLS: a goodbye that waits for none
                ended.unwrap()  # RFC 8446, 6.1
            ended.shutdown(socket.SHUT_WR)
            # To close while bytes come in is a reset, which can overtake the answer.
            self.deadline_s = time.monotonic() + LINGER_S
            while self.is_amid and self.rfile.read1(BLOCK_BYTES):
                pass
        with self.relay.ended:
            self.relay.connections.remove(self)
            self.relay.ended.notify_all()

    def handle_one_request(self) -> None:
        """Answer a request; raise OSError if the connection breaks, Refused if none comes."""
        self.deadline_s = time.monotonic() + self.idle_s
        first = self.rfile.peek(1)[:1]  # an empty line may come first; RFC 9112, 2.2
        is_odd = first == b"\r" and self.rfile.readline(2) != b"\r\n"
        if is_odd or not (first and self.rfile.peek(1)):
            raise Refused(400, "there is no further request")
        self.deadline_s = time.monotonic() + self.header_s
        self.command, self.is_amid, self.is_lost = "", True, True
        try:
            self._read_header()
            self._answer(200, *self._respond())
        except Refused as refusal:
            log.warning("%s refused: %d %s", self.address, refusal.status, refusal)
            self._answer(refusal.status, json.dumps({"error": str(refusal)}), refusal.fields)
        # Read the rest, or nobody knows where the next request begins: the connection is lost.
        self.is_amid = False  # it has its answer
        with suppress(OSError, Refused):
            self.is_lost = self.is_lost or all(self._read_block() for _ in range(DRAIN_BLOCKS))
        self.is_amid, self.close_connection = self.is_lost, self.is_lost or self.close_connection

    def _read_header(self) -> None:  # or raise Refused, ConnectionError if the client leaves
        self.headers, form, left_bytes = http.client.HTTPMessage(), FIRST_LINE, HEADER_BYTES + 1
        while (line := self.rfile.readline(left_bytes)) != b"\r\n" or form is FIRST_LINE:
            left_bytes -= len(line)
            if not left_bytes or len(self.headers) == FIELDS:
                raise Refused(431, f"a header has {HEADER_BYTES} bytes and {FIELDS} fields at most")
            if not line.endswith(b"\n"):
                raise ConnectionError("the client left in the middle of a header")
            if not (match := form.fullmatch(line)):
                raise Refused(400, "the header cannot be read: https would need tls_certificate")
            if form is FIRST_LINE:
                self.command, path, version = map(bytes.decode, match.groups())
                self.path, form = path.partition("?")[0], FIELD_LINE
            else:
                self.headers[match[1].decode()] = match[2].decode("latin-1").strip(" \t")
        # Where the body ends; RFC 9112, 6.3. Others must not read one of two that we read.
        lengths, codings, *others = (self.headers.get_all(name, []) for name in SINGLE)
        self.is_chunked, is_1_0 = bool(codings), version == "1.0"
        if self.is_chunked and codings[0].lower() != "chunked":
            raise Refused(501, "the only Transfer-Encoding known is chunked")
        is_clear = max(map(len, [lengths + codings, *others])) < 2 and not (codings and is_1_0)
        if not is_clear or not all(re.fullmatch("[0-9]{1,18}", length) for length in lengths):
            raise Refused(400, "a header field is doubled, or the body's length is in doubt")
        self.left_bytes = sum(map(int, lengths))
        connection = ",".join(self.headers.get_all("Connection", [])).lower().split(",")
        self.close_connection = is_1_0 or "close" in map(str.strip, connection)
        # A client that waits to be asked for the body may send it all the same, or not.
        self.is_lost = self.headers.get("Expect", "").lower() == "100-continue" and not is_1_0

    def _read_block(self) -> bytes:  # of the body, b"" at its end; raises as _read_header()
        if self.is_lost:
            self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.is_lost, is_chunk = True, self.is_chunked
        if is_chunk and not self.left_bytes:
            if not (match := CHUNK_LINE.fullmatch(self.rfile.readline(BLOCK_BYTES))):
                raise Refused(400, "a chunk does not begin with its size")
            self.left_bytes = int(match[1], 16)
            self.is_chunked = self.left_bytes > 0  # the last one is empty
        block = self.rfile.read(min(self.left_bytes, BLOCK_BYTES))
        if len(block) < min(self.left_bytes, BLOCK_BYTES):
            raise ConnectionError("the client left in the middle of a body")
        self.left_bytes -= len(block)
        if is_chunk and not self.left_bytes and self.rfile.read(2) != b"\r\n":
            raise Refused(400, "a chunk is not as long as its size says")
        self.is_lost = False
        return block

    def _respond(self) -> tuple[str, Mapping[str, str]]:  # does what is asked, or raises Refused
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")  # RFC 7617, 2
        given = hashlib.sha256(token.strip(" ").encode("latin-1")).digest()  # lest its length shows
        if scheme.lower() == "basic" and secrets.compare_digest(given, self.relay.digest):
            self.idle_s, self.header_s, self.left_answers = IDLE_S, HEADER_S, float("inf")
        elif self.path != "/healthz":
            raise Refused(401, "wrong credentials" if scheme else "no credentials", **CHALLENGE)
        allowed = ALLOWED.get(self.path, "POST")
        if self.path not in {**ALLOWED, **self.relay.couriers}:
            raise Refused(404, "no room has this path: post to /, or to /NAME of a room_id_NAME")
        if self.command not in allowed.split(", "):
            raise Refused(405, f"only {allowed} is answered here", Allow=allowed)
        if self.path == "/metrics":
            return self.relay.metrics(), {"Content-Type": "text/plain; version=0.0.4"}
        if self.path == "/healthz":
            if refused := self.relay.spool.refusal():
                raise refused
            return '{"status": "ok"}', {}
        if self.command == "GET":
            return self.relay.page(), HTML
        if not self.is_chunked and "Content-Length" not in self.headers:
            raise Refused(411, "the relay is reached, but the request has no length and no alarm")
        content, self.deadline_s = bytearray(), time.monotonic() + BODY_S
        while block := len(content) + self.left_bytes <= BODY_BYTES and self._read_block():
            content += block
        if block is False:
            raise Refused(413, f"a body has {BODY_BYTES} bytes at most")
        alarms = parse_alarms(bytes(content), int(time.time() * 1000))
        request = hashlib.blake2b(self.path.encode() + b"\n" + content, digest_size=16).digest()
        ids = self.relay.spool.store(self.path, request, alarms)  # now they are on disk
        self.relay.couriers[self.path].arrived.set()
        for spool_id, alarm in zip(ids, alarms):
            words = f"rule={alarm.name()[:99]!r} uuid={str(alarm.fields.get('uuid'))[:99]!r}"
            log.info(f"alarm {spool_id} taken: room={self.path} {words} sender={self.address}")
        if not ids:
            log.info("%s sent again what was taken before: not stored twice", self.address)
        return '{"status": "accepted"}' if ids else '{"status": "duplicate"}', {}

    def _answer(self, status: int, text: str, headers: Mapping[str, str]) -> None:
        # Header and body at once: apart, one waits for the other's acknowledgement.
        body = text.encode(errors="replace")
        with self.relay.counting:
            self.relay.answers[f"HTTP {status}"] += 1
        self.left_answers -= 1
        self.close_connection |= self.is_lost or self.relay.stopping or not self.left_answers
        closing = "close" if self.close_connection else "keep-alive"
        fields = {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}
        fields |= {"Date": self.date_time_string(), "Connection": closing}
        fields |= {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        head = f"HTTP/1.1 {status} {http.client.responses[status]}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in fields.items()) + "\r\n"
        self.connection.settimeout(HEADER_S)
        self.connection.sendall(head.encode() + (b"" if self.command == "HEAD" else body))


class Server:
    def __init__(self, settings: Mapping[str, Any], spool: Spool, *couriers: Courier) -> None:
        self.digest, self.tls = hashlib.sha256(settings["credentials"]).digest(), settings["tls"]
        self.spool, self.zone, self.started_s = spool, settings["time_zone"], time.time()
        self.couriers = {courier.room: courier for courier in couriers}
        self.counting, self.answers = threading.Lock(), Counts()
        self.stopping, self.due_s, (self._stop, self.stopper) = False, float("inf"), os.pipe()
        self.connections, self.ended = set[Handler](), threading.Condition()
        self._most = max(8, min(CONNECTIONS, os.sysconf("SC_OPEN_MAX") - SPARE_FILES))

    def verdict(self) -> tuple[str, str]:
        """Return how it is, good, late or bad, and a sentence: why, since when and what to do."""
        refused, rooms, now_s = self.spool.refusal(), self.spool.rooms, time.time()
        found = [*self.spool.losses, *([f"New alarms are refused: {refused}"] if refused else [])]
        kind = "bad" if found else "late"
        for room in sorted(room for room in rooms if rooms[room]["waiting"]):
            number, courier = rooms[room]["waiting"], self.couriers.get(room)
            words = "1 alarm waits" if number == 1 else f"{number} alarms wait"
            words += f" for room {room}" if len(rooms) > 1 else ""
            words += f", {len(courier.aside)} set aside" if courier and courier.aside else ""
            if not courier:
                kind, words = "bad", f"{words}: set room_id{room.replace('/', '_')}"
            elif trouble := courier.trouble:
                kind = "bad" if trouble.kind in ("held", "refused") else kind  # not by itself
                since = datetime.fromtimestamp(courier.since_s, self.zone)
                day = "%b %d, " if now_s - courier.since_s > 80_000 else ""
                words += f": Webex {trouble.meaning} ({trouble.reason}) since {since:{day}%H:%M}"
                words += f", tried again in {max(0, courier.retry_s - now_s):.0f} s{trouble.advice}"
            found.append(words)
        said = f"All alarms are in {'the room' if len(rooms) == 1 else 'their rooms'}"
        return kind if found else "good", "; ".join(found) or said

    def page(self) -> str:
        """Return the page for people, of less than 50 KB, of what is in memory alone."""
        (kind, said), now_ms = self.verdict(), int(time.time() * 1000)
        page = f'{PAGE}<h1 class="{kind}">{cells(2000, said)}</h1><table class="rooms">'
        for room, told in sorted(self.spool.rooms.items())[:ROOMS_SHOWN]:
            day = sum(told[f"hour {now_ms // 3_600_000 - n}"] for n in range(25))
            last = Alarm({}, told["last_ms"]).time(self.zone) if told["last_ms"] else "none in 24 h"
            oldest = f"oldest {age(now_ms - told['oldest_ms'])}" if told["waiting"] else ""
            shown = f"{told['waiting']} waiting", oldest, f"last delivered: {last}"
            page += f"<tr><td>{cells(160, room, *shown, f'{day} delivered in 24 h')}"
        page += f'</table><p>As of {Alarm({}, now_ms).time(self.zone)}<table class="alarms">'
        for alarm in self.spool.newest.copy():
            name, text, mark, severity = alarm.head(one_line)
            pairs, took_ms = alarm.values(), (alarm.delivered_ms or 0) - alarm.received_ms
            found = next(filter(dict(pairs).get, ("host-name", "system-ip", "site-id")), "")
            device = ", ".join(one_line(value) for key, value in pairs if key == found)
            took = f"delivered after {max(0, took_ms) / 1000:.1f} s"
            state = took if alarm.delivered_ms else "waiting" if alarm.spool_id else "duplicate"
            row = cells(160, alarm.time(self.zone), f"{mark} {severity}", name, text, device, state)
            page += f'<tr class="{state.split()[0]}"><td>{row}'
        return page

    def metrics(self) -> str:
        """Return Prometheus's text format; prometheus.io/docs/instrumenting/exposition_formats."""
        of_all = {"one": 1, "started_s": self.started_s, **self.answers}
        lines, now_s = list[str](), time.time()
        for name, (kind, text, samples) in METRICS.items():
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
            for room, counts in sorted(self.spool.rooms.items()):
                waited_s = max(0, now_s - counts["oldest_ms"] / 1000) if counts["waiting"] else 0
                sums = {**counts, "oldest_s": waited_s, "took_s": counts["ms"] / 1000, **of_all}
                for sample, key in samples.items():
                    lines.append(f"{name}{sample.replace('%s', room)} {sums.get(key, 0)}")
        return "\n".join([*dict.fromkeys(lines), ""])  # what has no room once

    def run(self, listener: socket.socket) -> None:
        """Accept connections until the stop, then see each request on its way answered."""
        while not self.stopping:
            self.due_s, taken = time.monotonic() + STALL_S, len(self.connections)
            connection: Handler | None = None  # one that got no thread is closed
            try:
                if taken >= self._most:
                    raise OSError(f"all {taken} places are taken")
                select.select([listener.fileno(), self._stop], [], [], STALL_S / 3)
                wait_s = HEADER_S if taken < self._most / 2 else TICK_S  # lest places run out
                connection = Handler(*listener.accept(), self, wait_s)
                with self.ended:  # which it needs to end
                    threading.Thread(target=connection.run, daemon=True).start()
                    self.connections.add(connection)
            except (BlockingIOError, ConnectionError):
                continue
            except (OSError, MemoryError, RuntimeError) as error:  # no more descriptors, threads
                with self.ended:
                    if not self.ended.wait(TICK_S):
                        log.warning("no connection can be accepted: %s", error)
        listener.close()
        with self.ended:
            while not self.ended.wait_for(lambda: not self.connections, GRACE_S):
                for connection in [c for c in self.connections if not c.is_amid]:
                    with suppress(OSError):  # it has ended; TLS has no say in this
                        socket.socket.shutdown(connection.connection, socket.SHUT_RD)


# === systemd ======================================================================================
PROGRAM_FILE, UNIT_FILE = "/usr/local/bin/alarmrelay.py", "/etc/systemd/system/alarmrelay.service"
# What `install` writes, two spaces for a line's end; alarmrelay.service is the same text.
UNIT = f"""[Unit]  Description=Relay of vManage alarms to a Webex room
Wants=network-online.target  After=network-online.target  StartLimitIntervalSec=0
  [Service]  Type=notify  ExecStart=/usr/bin/python3 {PROGRAM_FILE}  EnvironmentFile=-{ENV_FILE}
DynamicUser=yes  StateDirectory=alarmrelay  StateDirectoryMode=0700  WatchdogSignal=SIGKILL
WatchdogSec=90  Restart=always  RestartSec=1  RestartPreventExitStatus=78  FileDescriptorStoreMax=1
LimitNOFILE={CONNECTIONS + 64}  CapabilityBoundingSet=  LockPersonality=yes  PrivateDevices=yes
MemoryDenyWriteExecute=yes  PrivateUsers=yes  ProcSubset=pid  ProtectClock=yes  ProtectHostname=yes
ProtectControlGroups=yes  ProtectHome=yes  ProtectKernelLogs=yes  ProtectKernelTunables=yes
ProtectKernelModules=yes  RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX  ProtectProc=invisible
RestrictNamespaces=yes  SystemCallErrorNumber=EPERM  SystemCallArchitectures=native
RestrictRealtime=yes  SystemCallFilter=@system-service  SystemCallFilter=~@privileged @resources
  [Install]  WantedBy=multi-user.target
""".replace("  ", "\n")
STDERR = "{0.st_dev}:{0.st_ino}".format(os.fstat(2)) if sys.stderr else ""


class LineFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """Return one line, which no event can make two; for the journal as in sd-daemon(3)."""
        line = BREAKING.sub(lambda match: ascii(match[0])[1:-1], super().format(record))
        if os.environ.get("JOURNAL_STREAM") != STDERR:
            return f"{self.formatTime(record)} {record.levelname} {line}"
        return f"<{ {logging.INFO: 6, logging.WARNING: 4}.get(record.levelno, 3) }>{line}"


def notify(*lines: str, descriptors: Sequence[int] = ()) -> None:
    """Tell systemd, where there is one, `READY=1`, `STATUS=…` and the like (sd_notify(3))."""
    with suppress(KeyError, OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.connect(os.environ["NOTIFY_SOCKET"].replace("@", "\0", 1))  # unix(7)
        socket.send_fds(systemd, ["\n".join(lines).encode()], [*descriptors])


def listen(host: str, port: int) -> socket.socket:
    """Return the socket in which connections wait over restarts and crashes, or a new one."""
    if os.environ.get("LISTEN_PID") == str(os.getpid()) and os.environ.get("LISTEN_FDS") == "1":
        kept = socket.socket(fileno=3)
        if kept.getsockname()[:2] == (host, port or kept.getsockname()[1]):
            return kept
        kept.close()  # `listen` has changed
        notify("FDSTOREREMOVE=1", "FDNAME=listen")
        time.sleep(TICK_S)  # until systemd has closed it as well
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise RelayError(74, f"listen: {host} port {port} cannot be had: {error}") from error
    notify("FDSTORE=1", "FDNAME=listen", descriptors=[listener.fileno()])
    return listener


# === Commands =====================================================================================
# They yield the lines to print, and raise RelayError. Their docstrings are their --help.
SAMPLE = """{"rule_name_display": "System_Reboot_Issued", "rulename": "system-reboot-issued",
"type": "system-reboot-issued", "severity": "Critical", "message": "The device rebooted",
"active": true, "values_short_display": [{"host-name": "DC1-VEDGE1", "system-ip": "10.1.0.1"}]}"""


def preview(path: str) -> Iterator[str]:
    """Print the message for each alarm in FILE, or in standard input; send nothing."""
    settings = read_settings(os.environ, ["time_zone", "vmanage_url"])
    for alarm in parse_alarms(Path(path or "/dev/stdin").read_bytes(), int(time.time() * 1000)):
        yield alarm.message(alarm.received_ms, settings["time_zone"], settings["vmanage_url"])


def install(root: str) -> Iterator[str]:
    """Write program, unit and, if there are none, settings; below DIR, or on this host as root."""
    import subprocess

    text = "# 'Quote odd values so.' After a change: sudo systemctl restart alarmrelay\n"
    for name, (default, form, _type, expected) in SETTINGS.items():
        needed, mark = (", required", "") if not re.fullmatch(form, default) else ("", "#")
        text += f"\n# {name}{needed}: {expected}\n{mark}{name}={default}\n"
    files = [(PROGRAM_FILE, Path(__file__).read_text("utf-8"), "755"), (UNIT_FILE, UNIT, "644")]
    files += [] if Path(f"{root}{ENV_FILE}").exists() else [(ENV_FILE, text, "600")]
    for name, text, mode in files:
        command = ["install", "-D", "-m", mode, "/dev/stdin", f"{root}{name}"]
        if subprocess.run(command, input=text.encode()).returncode:
            raise RelayError(74, "install needs root and systemd, or --root DIR")
        yield f"written: {root}{name}"
    yield f"next: sudoedit {ENV_FILE}"  # then `enable` lets systemd read the unit, too
    yield "      sudo systemctl enable alarmrelay && sudo systemctl restart alarmrelay"


def check(_: str) -> Iterator[str]:
    """Tell whether settings, disk, token and rooms are right, in a line for each."""
    settings = read_settings(os.environ)
    zone, state = settings["time_zone"], settings["state"]
    yield f"ok: settings; in {zone} it is {Alarm({}, int(time.time() * 1000)).time(zone)}"
    free = shutil.disk_usage(place := next(p for p in (state, *state.parents) if p.exists())).free
    is_good = place.is_dir() and os.access(place, os.W_OK | os.X_OK) and free >= FREE_BYTES
    words = "" if is_good else f"; must have {FREE_BYTES >> 20} and be writable by the relay's user"
    yield f"{'ok' if is_good else 'wrong'}: state directory {state}: {free >> 20} MiB free{words}"
    webex = Client(settings["webex_url"], f"Bearer {settings['bearer_token']}")
    for name, room_id in {"bearer_token": "", **settings["rooms"]}.items():
        path = f"/rooms/{urllib.parse.quote(room_id, '')}" if room_id else "/people/me"
        verdict = judge(answer := webex.ask(path), 0, time.time())
        line = f"wrong: {name}: {verdict.reason}{verdict.advice}"
        if verdict.kind == "delivered":
            found = json.loads(answer[3])
            line = f"ok: {name}: {one_line(found.get('title') or found.get('displayName'))}"
            if found.get("type") == "person":
                line = f"warning{line[2:]}, a person's, which ends after 12 hours: create a bot"
        yield line


def send(path: str) -> Iterator[str]:
    """Post the alarm in FILE, or the workshop's as of now, to the relay on this host."""
    settings = read_settings(os.environ)
    uuid = Path("/proc/sys/kernel/random/uuid").read_text().strip()  # random(4)
    now = {"uuid": uuid, "receive_time": int(time.time() * 1000)}
    content = Path(path).read_bytes() if path else json.dumps(json.loads(SAMPLE) | now).encode()
    scheme, (host, port) = "https" if settings["tls"] else "http", settings["listen"]
    url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"  # 0.0.0.0 is this host, too
    relay = Client(url, f"Basic {settings['credentials'].decode()}")
    relay.tls.check_hostname, relay.tls.verify_mode = False, ssl.CERT_NONE  # it is this host
    os.environ["no_proxy"] = "*"
    status, reason, _, answer = relay.ask("/", content)
    if status:
        yield f"{status} {answer.decode(errors='replace')}"
    if status != 200:
        hint = "systemctl status alarmrelay; if listen, webhook_... or tls_... changed: restart it"
        raise RelayError(1, f"{url}: {reason}" + (f"; {hint}" if status in (0, 401) else ""))


def serve(_: str) -> None:
    """Relay alarms until SIGTERM or SIGINT; raise RelayError if that is not possible."""
    settings = read_settings(os.environ)
    os.umask(0o077)
    # Taken by sigtimedwait() alone: a handler may run while its thread holds the lock it needs.
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # for the threads to come as well
    spool, rooms = Spool(settings["state"]), settings["rooms"].items()
    webex = Client(settings["webex_url"], f"Bearer {settings['bearer_token']}")  # 1 MiB, for all
    couriers = [Courier(f"/{key[8:]}", room_id, settings, spool, webex) for key, room_id in rooms]
    server, (host, port) = Server(settings, spool, *couriers), settings["listen"]
    listener = listen(host, port)
    listener.setblocking(False)
    threads = [threading.Thread(target=server.run, args=[listener], daemon=True)]
    threads += [threading.Thread(target=courier.run, daemon=True) for courier in couriers]
    for thread in threads:
        thread.start()
    if not (settings["tls"] or ipaddress.ip_address(host).is_loopback):
        log.warning("no tls_certificate: password and alarms come over the network in plain text")
    where, tick_s = f"listening on {host} port {listener.getsockname()[1]}", 0.0
    while not signal.sigtimedwait(signals, tick_s) and not spool.error:
        (kind, said), told = server.verdict(), sum(spool.rooms.values(), Counts())
        words = f"{said[:900]}; {where}; {told['waiting']} waiting, {told['delivered']} delivered"
        if not tick_s:  # it has just begun
            (log.warning if kind == "bad" else log.info)("alarmrelay %s: %s", __version__, words)
            notify("READY=1")
        notify(f"STATUS={words}")
        now_s, tick_s = time.monotonic(), min(TICK_S, int(os.getenv("WATCHDOG_USEC", 2**32)) / 3e6)
        if os.getenv("WATCHDOG_USEC") and now_s < min(server.due_s, *(c.due_s for c in couriers)):
            notify("WATCHDOG=1")  # sd_watchdog_enabled(3)
        spool.delete_delivered(int((time.time() - settings["retention_days"] * 86_400) * 1000))
    deadline_s, server.stopping = time.monotonic() + STOP_S, True
    os.close(server.stopper)
    notify("STOPPING=1")
    for courier in couriers:
        courier.stopping.set()  # the send in flight is the last
        courier.arrived.set()
    for thread in threads:
        thread.join(max(0.0, deadline_s - time.monotonic()))
    if spool.error:
        raise RelayError(74, str(spool.error))
    spool.close()


def main(run: Callable[[str], Any] = serve, argument: str = "") -> int:
    """Run the command that the arguments name; return the exit status."""
    status, is_set = 0, {"STATE_DIRECTORY", *SETTINGS} & os.environ.keys()
    if sys.argv[1:]:  # no memory of the daemon's is spent on what commands import
        import argparse
        import subprocess

        parser = argparse.ArgumentParser(description="Relay alarms from Cisco vManage to Webex.")
        parser.add_argument("--version", action="version", version=f"alarmrelay {__version__}")
        commands = parser.add_subparsers(metavar="COMMAND", help="none: relay alarms")
        for do in (check, preview, send, install):
            one = commands.add_parser(do.__name__, help=do.__doc__, description=do.__doc__)
            one.set_defaults(run=do, argument="")
            if do in (preview, send):
                one.add_argument("argument", nargs="?", default="", metavar="FILE", help="or -")
        one.add_argument("--root", dest="argument", default="", metavar="DIR")
        arguments = parser.parse_args(namespace=argparse.Namespace(run=run, argument=argument))
        run, argument = arguments.run, arguments.argument
    logging.basicConfig(level=logging.INFO)
    logging.root.handlers[0].setFormatter(LineFormatter())
    try:
        if run in (check, send) and not is_set and Path(ENV_FILE).exists():
            # As the relay on this host: with its settings and, while it runs, its credentials.
            words = f"""systemd-run --quiet --pipe --wait --same-dir -p EnvironmentFile={ENV_FILE}
                -E STATE_DIRECTORY=/var/lib/alarmrelay
                -E CREDENTIALS_DIRECTORY=/run/credentials/alarmrelay.service"""
            return subprocess.run([*words.split(), sys.executable, *sys.argv]).returncode
        for line in run(re.sub("^-$", "/dev/stdin", argument)) or ():
            os.write(1, f"{line}\n".encode())  # in UTF-8, whatever the locale
            status |= line.startswith("wrong: ")
    except (RelayError, OSError, sqlite3.Error) as error:
        for line in str(error).splitlines():
            log.error("%s", line)
        notify(f"STATUS={BREAKING.sub('; ', str(error))}")
        return 1 if run is check or isinstance(error, Refused) else getattr(error, "status", 74)
    return status


if __name__ == "__main__":
    # At once: threads may still wait for idle clients, and Python would abort on their output.
    os._exit(main())
