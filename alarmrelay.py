#!/usr/bin/env python3
"""Relay alarm webhooks from Cisco vManage (Catalyst SD-WAN Manager) to a Webex room.

    vManage --POST, Basic auth--> Handler --> Spool (SQLite, fsync) --> 200
                                         |
                                         v   one thread per room
                                      Courier --urllib, Bearer--> Webex POST /v1/messages

An alarm that was answered with 200 is on disk and reaches the room: at least once,
oldest first, whatever is killed, full, slow or down in between. All else in this file
serves that sentence. Each section uses only what stands above it.
"""

from __future__ import annotations

import argparse
import base64
import concurrent.futures
import copy
import email.utils
import fcntl
import functools
import hashlib
import html
import http.client
import http.server
import io
import ipaddress
import json
import logging
import math
import os
import queue
import random
import re
import secrets
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
import zoneinfo
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

__version__ = "0.2.0.dev0"
log = logging.getLogger("alarmrelay")

# === Limits ===========================================================================
# Each with its unit, its reason and, where there is one, its source.

# --- Messages -------------------------------------------------------------------------
# Most bytes of `markdown` or `text`, in UTF-8: developer.webex.com/docs/api/v1/messages.
MESSAGE_BYTES = 7439
# Most bytes of a value in a message that is too long: two fit into its first line.
VALUE_BYTES = 3000
# Most bytes of the plain form: why Webex refused the other one is not known.
PLAIN_TEXT_BYTES = 1000
# Most alarms that wait for a room and still go one by one; more go together, in a digest.
SINGLY = 10
# Most alarms looked at for a digest: more do not fit into one message.
DIGEST_ALARMS = 150
# The age at which an alarm is old news, and its message says so.
DELAYED_MS = 300_000

# --- Requests -------------------------------------------------------------------------
# Most bytes of a header: http.server alone would take 100 lines of 64 KiB.
HEADER_BYTES = 128 * 2**10
# Most fields of a header, as in http.client.
FIELDS = 100
# Most bytes of a body: vManage's have 8 KB or less, one that sums up a storm may have MB.
BODY_BYTES = 4 * 2**20
# Most alarms of a request: vManage sends one, another sender may have a list.
ALARMS = 1000
# Bytes that are read at a time.
BLOCK_BYTES = 64 * 2**10
# Most blocks read of a body that was refused, so that its sender reads why: 1 GiB.
DRAIN_BLOCKS = 2**14
# Seconds for a header, for a TLS handshake, and for an answer to be read.
HEADER_S = 10.0
# Seconds for a body: 4 MiB at 560 kbit/s.
BODY_S = 60.0
# Seconds of silence once credentials were shown; nginx's keepalive_timeout.
IDLE_S = 75.0
# Seconds for a client to read its last answer before the connection closes.
LINGER_S = 2.0
# Most answers to a connection without credentials: some clients show them when asked.
STRANGER_ANSWERS = 2
# Connections that wait in the kernel while the relay is busy or away.
BACKLOG = 1024
# Most open connections, each with a thread of its own.
CONNECTIONS = 1024
# Descriptors for all but connections: the spool, Webex, systemd, Python itself.
SPARE_FILES = 40

# --- The spool ------------------------------------------------------------------------
# The time within which the same bytes again are a sender's retry.
DUPLICATE_MS = 600_000
# Most alarms that wait: at five messages a second Webex would need hours for more.
WAITING_ALARMS = 100_000
# Least free space to take alarms, so that deliveries can still be recorded.
FREE_BYTES = 16 * 2**20
# Free space, with less of which a write that failed means a full disk, else a broken one.
FULL_BYTES = 2**20
# Seconds until a courier asks a full disk again.
DISK_RETRY_S = 5.0
# Alarms deleted at a time when their days are over: no post waits for that for long.
RETENTION_ALARMS = 100
# Alarms on the status page.
NEWEST_ALARMS = 50
# Most characters of an alarm that is shown there: fifty of 4 MiB would take 200 MiB.
LARGE_CHARACTERS = 64 * 2**10
# Characters of JSON after which no more alarms are read for a digest.
LARGE_BATCH_CHARACTERS = 4 * 2**20
DAY_MS = 86_400_000

# --- Webex ----------------------------------------------------------------------------
# Seconds after which a read that brings nothing ends a request.
READ_S = 30.0
# Seconds for one message in all: a Webex that drips for longer counts as a hang.
SEND_S = 300.0
# Most bytes read of an answer; Webex's have 2 KB.
ANSWER_BYTES = 2**20
# Seconds of the first wait after 5xx and network errors; each in a row doubles it.
RETRY_S = 1.0
# Seconds of the longest of these waits.
RETRY_MAX_S = 300.0
# The part by which each of them varies, lest many relays come back at the same moment.
RETRY_JITTER = 0.2
# Seconds of a pause after 429 and 423 without a Retry-After, as in Cisco's own SDKs.
PAUSE_S = 15.0
# Seconds of the shortest and the longest pause that a Retry-After can ask for.
PAUSE_MIN_S = 1.0
PAUSE_MAX_S = 3600.0
# Seconds between two attempts while somebody has to mend something.
HOLD_S = 60.0

# --- The process ----------------------------------------------------------------------
# Seconds between two looks around: at the status, at a stop, at a place that is free.
TICK_S = 0.8
# Seconds without a sign of life after which the accept loop is stuck.
STALL_S = 15.0
# Seconds for requests and sends that are on their way when the relay is stopped.
STOP_S = 10.0
# Seconds for a request on its way then, on a connection that was silent until now.
GRACE_S = 0.2


class Deadline:
    """Until when a thread may go on with what it does now.

    That thread sets it, others only look. A float is set in one step: there is no lock.
    """

    def __init__(self) -> None:
        self._end_s = math.inf  # monotonic

    def allow(self, seconds: float) -> None:
        """Set it to so many seconds from now."""
        self._end_s = time.monotonic() + seconds

    def lift(self) -> None:
        """Set it to never."""
        self._end_s = math.inf

    def left_s(self) -> float:
        """Return the seconds left, 0 or less once it is over."""
        return self._end_s - time.monotonic()


# === Errors ===========================================================================
# A class for each cause. It holds what a caller does with it: the exit status of the
# program, or the status and header fields of an answer. The text says what is wrong,
# why, and what to do.
class RelayError(Exception):
    """Ends the program or a command.

    Its text is for the operator: what is wrong and what to do, a line for each problem.
    The exit statuses are those of sysexits.h.
    """

    exit_status = 74  # EX_IOERR


class AlreadyRunning(RelayError):
    """Another process has the spool."""

    exit_status = 75  # EX_TEMPFAIL


class SettingsError(RelayError):
    """Settings are missing or wrong. After this one, systemd leaves the relay stopped."""

    exit_status = 78  # EX_CONFIG


class CheckFailed(RelayError):
    """What a command was asked to look at is not well."""

    exit_status = 1


class Refused(RelayError):
    """Answers a request with the status of its class and {"error": text}.

    What the statuses mean: RFC 9110, 15.5 and 15.6. In the classes below, "it" is the
    request.
    """

    exit_status = 1
    status: int
    headers: Mapping[str, str] = {}  # of the answer
    # True: nobody knows where a next request begins, and the connection is closed.
    is_last = False


class BadRequest(Refused):
    """Its body is no alarm."""

    status = 400


class BadFraming(Refused):
    """Its header or the end of its body can be read in more than one way, or in none."""

    status = 400
    is_last = True


class WrongCredentials(Refused):
    """It has none, or others than those of the settings."""

    status = 401
    # RFC 7617, 2.1.
    headers: Mapping[str, str] = {
        "WWW-Authenticate": 'Basic realm="alarmrelay", charset="UTF-8"',
    }


class UnknownPath(Refused):
    """Nothing is at its path."""

    status = 404


class WrongMethod(Refused):
    """Its path has other methods."""

    status = 405

    def __init__(self, allowed: str) -> None:
        super().__init__(f"only {allowed} is answered here")
        self.headers = {"Allow": allowed}


class TooSlow(Refused):
    """Not all of it came in time."""

    status = 408
    is_last = True


class NoLength(Refused):
    """A POST without a body."""

    status = 411


class TooLarge(Refused):
    """Its body is over the limit."""

    status = 413


class LineTooLong(Refused):
    """Its first line is over http.server's own limit."""

    status = 414
    is_last = True


class HeaderTooLarge(Refused):
    """Its header is over the limits."""

    status = 431
    is_last = True


class UnknownCoding(Refused):
    """Its Transfer-Encoding is none that the relay reads."""

    status = 501
    is_last = True


class Unavailable(Refused):
    """The spool cannot take an alarm, or record a delivery, now."""

    status = 503
    headers: Mapping[str, str] = {"Retry-After": "30"}


@contextmanager
def guard(name: str) -> Iterator[None]:
    """Log an error in the relay itself: a bug.

    Its thread then goes on with the next piece of work: one odd alarm shall not end it.
    """
    try:
        yield
    except Exception:  # the one broad except
        log.exception("%s: an error in alarmrelay itself", name)


# === Settings =========================================================================
# Environment variables. A file of the same name in $CREDENTIALS_DIRECTORY wins over the
# variable (systemd.exec(5), "Credentials"). All that is wrong is told at once, before
# anything listens.
ENV_FILE = "/etc/alarmrelay.env"  # where systemd takes the variables from

WORD = "[!-~]+"  # ASCII that can be seen
# Without control characters, and with an UTF-8 form.
LINE = r"[^\x00-\x1f\x7f\ud800-\udfff]+"
OPTIONAL_LINE = f"({LINE})?"
# What follows room_id_ becomes a path; /healthz and /metrics are the relay's own.
ROOM_NAME = "room_id_(?!(healthz|metrics)$)[a-z0-9_]+"

# A URL holds a host and a path alone: a user name, a password or a query might be a
# secret.
HOST = r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:]+\])"
LOOPBACK = r"(localhost|127\.[0-9.]+|\[::1\])"
PORT_AND_PATH = "(:[0-9]{1,5})?(/[A-Za-z0-9._~%/-]*)?"


def parse_listen(text: str) -> tuple[str, int]:
    """Return host and port of `0.0.0.0:5001` or `[::]:5001`.

    Raises ValueError for anything else.
    """
    host, _, port_digits = text.rpartition(":")
    address = ipaddress.ip_address(host.strip("[]"))
    port = int(port_digits)
    if port > 65535:
        raise ValueError("ports end at 65535")
    return str(address), port


class Setting(NamedTuple):
    """What a setting may be: a row of the table below. The README has the same table."""

    form: str  # a regular expression of the whole text
    expected: str  # in words, for whoever has to mend it
    # Taken if nothing is set. A setting is required if its form refuses this.
    default: str = ""
    # Makes the value of a text of that form; raises one of OSError, LookupError and
    # ValueError if it cannot.
    parse: Callable[[str], Any] = str
    is_secret: bool = False  # its text is shown to nobody


SETTINGS: Mapping[str, Setting] = {
    "bearer_token": Setting(WORD, "the Webex bot's token, in one word", is_secret=True),
    "room_id": Setting(WORD, "the id of a Webex room, in one word", is_secret=True),
    # Stands for any number of rooms: list_settings().
    "room_id_NAME": Setting(
        f"({WORD})?",
        "a room's id; NAME: a-z, 0-9, _, not healthz, metrics",
        is_secret=True,
    ),
    # A colon would end it: RFC 7617, 2.
    "webhook_username": Setting(
        f"(?!.*:){LINE}",
        "a name for vManage, without a colon",
        is_secret=True,
    ),
    "webhook_password": Setting(
        LINE,
        "a password for vManage, in one line",
        is_secret=True,
    ),
    "listen": Setting(
        r"([0-9.]+|\[.+\]):[0-9]{1,5}",
        "address:port",
        "0.0.0.0:5001",
        parse_listen,
    ),
    "tls_certificate": Setting(OPTIONAL_LINE, "a PEM file, to serve https"),
    "tls_key": Setting(
        OPTIONAL_LINE,
        "a PEM file, the certificate's key without pass phrase",
    ),
    "time_zone": Setting(
        WORD, "an IANA name, as Europe/Madrid", "Europe/Madrid", zoneinfo.ZoneInfo
    ),
    # Plain http to a loopback address alone, since the token travels with it.
    "webex_url": Setting(
        f"(https://{HOST}|http://{LOOPBACK}){PORT_AND_PATH}",
        "https, or http to a loopback host",
        "https://webexapis.com/v1",
    ),
    "vmanage_url": Setting(
        f"(https?://{HOST}{PORT_AND_PATH})?", "https or http, host and path alone"
    ),
    "retention_days": Setting(
        "[1-9][0-9]{0,4}",
        "a number of days from 1 to 99999",
        "30",
        int,
    ),
}


@dataclass(frozen=True)
class Settings:
    """What the relay runs with: each value checked, and of its own type."""

    bearer_token: str
    room_ids: Mapping[str, str]  # by path: {"/": "Y2lz…", "/noc": "Y2lz…"}
    webhook_username: str
    webhook_password: str
    listen: tuple[str, int]  # host, port
    tls: ssl.SSLContext | None  # None: plain http
    time_zone: zoneinfo.ZoneInfo
    webex_url: str
    vmanage_url: str  # "": messages have no link
    retention_days: int
    state_directory: Path

    def basic_credentials(self) -> str:
        """Return what follows `Basic ` in vManage's header; RFC 7617, 2."""
        return base64.b64encode(
            f"{self.webhook_username}:{self.webhook_password}".encode()
        ).decode()


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Return all settings.

    Raises SettingsError with a line for each that is missing or wrong.
    """
    values: dict[str, Any] = {}
    room_ids = {}
    tls = None
    problems: list[str] = []
    for name, setting in list_settings(environ).items():
        with collected(problems):
            value = read_setting(name, setting, environ)
            if not name.startswith("room_id"):
                values[name] = value
            elif value:
                room_ids[room_path(name)] = value
    with collected(problems):
        tls = read_tls(values.pop("tls_certificate", ""), values.pop("tls_key", ""))
    if problems:
        raise SettingsError("\n".join(problems))
    return Settings(
        **values,
        room_ids=room_ids,
        tls=tls,
        state_directory=find_state(environ),
    )


@contextmanager
def collected(problems: list[str]) -> Iterator[None]:
    """Note what is wrong with a setting, and go on with the next."""
    try:
        yield
    except SettingsError as error:
        problems.append(str(error))


def room_path(name: str) -> str:
    """Return the path of a room's setting: `/noc` of room_id_noc, `/` of room_id."""
    if name == "room_id":
        return "/"
    return "/" + name[len("room_id_") :]


def room_setting(path: str) -> str:
    """Return the name of a room's setting: room_path() the other way."""
    if path == "/":
        return "room_id"
    return "room_id_" + path[1:]


def list_settings(environ: Mapping[str, str]) -> dict[str, Setting]:
    """Return the table, in which each room that is given has the row of room_id_NAME."""
    settings = dict(SETTINGS)
    room = settings.pop("room_id_NAME")
    names = {name for name in environ if name.startswith("room_id_")}
    names.update(path.name for path in credentials_directory(environ).glob("room_id_*"))
    for name in sorted(names):
        if re.fullmatch(ROOM_NAME, name):
            settings[name] = room
        else:
            # Nobody can post there. A form that takes no text makes any id a problem.
            settings[name] = room._replace(form="")
    return settings


def read_setting(name: str, setting: Setting, environ: Mapping[str, str]) -> Any:
    """Return a setting's value; raise SettingsError with what was expected and found."""
    text = ""
    try:
        text = find_text(name, environ) or setting.default
        if not re.fullmatch(setting.form, text):
            raise ValueError("of another form")
        return setting.parse(text)
    except (OSError, LookupError, ValueError) as error:
        expected = setting.expected
        credential = credentials_directory(environ) / name
        if credential.exists():
            expected += f", in the file {credential}"
        if name == "time_zone" and not zoneinfo.available_timezones():
            expected = "a time zone database: install the package tzdata on this host"
        # As in https://user:password@host and in ?token=...
        may_hold_a_password = "@" in text or "?" in text
        if not text and isinstance(error, (OSError, UnicodeError)):
            found = f"a file that cannot be read: {error}"
        elif not text:
            found = f"nothing: export {name}=... or set it in {ENV_FILE}"
        elif setting.is_secret or may_hold_a_password:
            found = "a hidden value"
        else:
            found = repr(text[:99])
        raise SettingsError(f"{name}: expected {expected}, found {found}") from error


def credentials_directory(environ: Mapping[str, str]) -> Path:
    """Return where systemd puts credentials; a path where nothing is if it has none."""
    return Path(environ.get("CREDENTIALS_DIRECTORY", "/nonexistent"))


def find_text(name: str, environ: Mapping[str, str]) -> str:
    """Return the text of a setting, "" if it is not set; raise OSError or ValueError.

    A file that cannot be read is told: with the variable instead, nobody would notice.
    """
    credential = credentials_directory(environ) / name
    if not credential.exists():
        return environ.get(name, "").strip()
    text = credential.read_text(encoding="utf-8").strip()
    if "-----BEGIN " in text:
        return str(credential)  # OpenSSL reads PEM files itself
    return text


def read_tls(certificate: str, key: str) -> ssl.SSLContext | None:
    """Return how https is served, None for plain http.

    Raises SettingsError if one of the two files is missing or they are no pair.
    """
    if not certificate and not key:
        return None
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.minimum_version = ssl.TLSVersion.TLSv1_2  # RFC 8996
    # A handshake costs the server more than the client, which may not ask for another.
    tls.options |= ssl.OP_NO_RENEGOTIATION
    try:
        # Without this, OpenSSL would ask the terminal for the password of a key.
        tls.load_cert_chain(certificate, key, password="")
    except OSError as error:  # ssl.SSLError is one
        found = f"{certificate or 'nothing'} and {key or 'nothing'}: {error}"
        expected = "tls_certificate, tls_key: expected a pair as PEM"
        raise SettingsError(f"{expected}, found {found}") from error
    return tls


def find_state(environ: Mapping[str, str]) -> Path:
    """Return where the spool is: where systemd says, or in the user's home."""
    # systemd.exec(5): there is a colon between two, if the unit has several.
    first = environ.get("STATE_DIRECTORY", "").split(":")[0]
    if first:
        return Path(first)
    home = environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(home, "alarmrelay")


# === Alarm and messages ===============================================================
# Pure functions: no clock, no disk, no network. What vManage sends is in SAMPLE, with
# the commands; no field of it is certain, and none that is missing or odd loses the
# alarm.

# vManage's own colours.
MARKS = {"Critical": "🔴", "Major": "🟡", "Medium": "🔵", "Minor": "🟢"}
OTHER_MARK = "⚪"
CLEAR_MARK = "✅"
# What ends a line, turns its direction (CVE-2021-42574) or has no UTF-8 form.
BREAKING = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# What Webex takes for markup. An underscore inside a word is none:
# System_Reboot_Issued.
MARKUP = re.compile(r"[\\`*\[\]~]|(?<!\w)_+|(?<!_)_+(?!\w)")
CUT = "…"  # at the end of what is not shown in full


def parse_integer(digits: str) -> int | str:
    """Return an integer of JSON, as text if it is long: int() refuses 4,300 digits."""
    if len(digits) > 400:
        return digits
    return int(digits)


# Strict JSON forbids a tab inside a string; that is no reason to lose an alarm.
DECODER = json.JSONDecoder(parse_int=parse_integer, strict=False)


def one_line(value: object) -> str:
    """Return text, or anything else as JSON, without what would break the line."""
    text = value
    if not isinstance(text, str):
        try:
            text = json.dumps(value, ensure_ascii=False)
        except RecursionError:
            # Some hundred levels: parse_alarms() may have had more stack left than this.
            text = "nested too deeply to be shown"
    return BREAKING.sub(" ", text)


def cap(text: str, most_bytes: int, escape: Callable[[str], str]) -> str:
    """Return text, escaped, in so many bytes of UTF-8 at most; `…` ends what is cut."""
    shown = escape(text)
    while len(shown.encode()) > most_bytes:
        # Some characters need more room than others: take a part that may fit, and look
        # again.
        part = len(text) * most_bytes // len(shown.encode())
        text = text[: max(0, part - 1)]
        shown = escape(text) + CUT
    return shown


def escape_match(match: re.Match[str]) -> str:
    """Return a backslash before each character: Webex then shows it."""
    return "".join("\\" + character for character in match[0])


def escape_markdown(text: str) -> str:
    """Return text as Webex shows it literally."""
    return html.escape(MARKUP.sub(escape_match, text), quote=False)


def show(value: object, most_bytes: int | None = None) -> str:
    """Return any value of an alarm in one line of markdown, of so many bytes if any."""
    # Escaping costs time. One more than fits, so that message() sees that it is too long.
    text = one_line(value)[: MESSAGE_BYTES + 1]
    if most_bytes is None:
        return escape_markdown(text)
    return cap(text, most_bytes, escape_markdown)


def describe_age(ms: int) -> str:
    """Return `5 s`, `14 min` or `3 h`."""
    seconds = max(0, ms) // 1000
    if seconds < 120:
        return f"{seconds} s"
    if seconds < 7200:
        return f"{seconds // 60} min"
    return f"{seconds // 3600} h"


def local_time(epoch_ms: object, zone: tzinfo) -> str | None:
    """Return `Sat Jan 18 05:57:01 2020 CET`, in any locale; None for what is no time."""
    if isinstance(epoch_ms, bool) or not isinstance(epoch_ms, (int, float)):
        return None
    try:
        moment = datetime.fromtimestamp(epoch_ms / 1000, zone)
    except (OverflowError, ValueError, OSError):  # NaN, or outside the years 1 to 9999
        return None
    return f"{moment.ctime()} {moment.tzname()}"


@dataclass(frozen=True)
class Alarm:
    """An alarm as vManage has posted it."""

    fields: Mapping[str, Any]  # the JSON object
    received_ms: int  # epoch, by this host's clock

    def is_clear(self) -> bool:
        """Return whether it says that another one is over."""
        return self.fields.get("active") is False

    def name(self) -> str:
        """Return the rule's name as people know it."""
        for key in ("rule_name_display", "rulename", "type", "eventname"):
            name = self.fields.get(key)
            # Correlated alarms carry the literal eventname "rulename".
            if isinstance(name, str) and name.strip() and name != "rulename":
                return name
        return "unknown alarm"

    def text(self) -> object:
        """Return what happened, in vManage's words."""
        return self.fields.get("message", "unknown")

    def severity(self) -> str:
        """Return vManage's word for how bad it is."""
        return one_line(self.fields.get("severity", "unknown"))

    def mark(self) -> str:
        """Return the sign by which people tell its severity at a glance."""
        if self.is_clear():
            return CLEAR_MARK
        return MARKS.get(self.severity(), OTHER_MARK)

    def time(self, zone: tzinfo) -> str:
        """Return when vManage took it; else when it was raised, else when it came in."""
        for epoch_ms in (self.fields.get("receive_time"), self.fields.get("entry_time")):
            shown = local_time(epoch_ms, zone)
            if shown:
                return shown
        return local_time(self.received_ms, zone) or "unknown"

    def values(self) -> list[tuple[str, object]]:
        """Return every key and value of the first of three fields that holds some."""
        for key in ("values_short_display", "values", "devices"):
            entries = self.fields.get(key)
            if not isinstance(entries, list):
                entries = [entries]
            pairs: list[tuple[str, object]] = []
            for entry in entries:
                if isinstance(entry, dict):
                    pairs += entry.items()
            if pairs:
                return pairs
        return []

    # --- What a clear is matched by: Spool.record() ---
    def uuid(self) -> str:
        """Return its uuid, "" if it has none."""
        return one_line(self.fields.get("uuid") or "")

    def cleared_uuids(self) -> list[str]:
        """Return the uuids of the alarms that it clears."""
        cleared = self.fields.get("cleared_events")
        if not self.is_clear() or not isinstance(cleared, list):
            return []
        return [one_line(cleared_uuid) for cleared_uuid in cleared if cleared_uuid]

    def outage(self) -> str | None:
        """Return what is down by it, or up again: `["BFD_TLOC", "color=lte", …]`.

        Correlated alarms clear one another without uuids: BFD_TLOC_Up clears the
        BFD_TLOC_Down that has the same values. None: it is neither.
        """
        rule, _, way = self.name().rpartition("_")
        expected_way = "Up" if self.is_clear() else "Down"
        values = sorted(f"{key}={one_line(value)}" for key, value in self.values())
        if way != expected_way or not values:
            return None
        return json.dumps([rule, *values])

    # --- What people read ---
    def message(self, now_ms: int, zone: tzinfo, vmanage_url: str = "") -> str:
        """Return its message in markdown; with vManage's address it ends in a link."""
        end = self._last_lines(now_ms, vmanage_url)
        whole = "<br>".join(self._lines(zone) + end)
        if len(whole.encode()) <= MESSAGE_BYTES:
            return whole
        lines = self._lines(zone, VALUE_BYTES)
        widest_end = "<br>".join([f"{CUT} ({len(lines)} more lines)", *end])
        left_bytes = MESSAGE_BYTES - len(f"<br>{widest_end}".encode())
        kept: list[str] = []
        for line in lines:
            left_bytes -= len(f"<br>{line}".encode())
            if left_bytes < 0:
                end.insert(0, f"{CUT} ({len(lines) - len(kept)} more lines)")
                break
            kept.append(line)
        return "<br>".join(kept + end)

    def _lines(self, zone: tzinfo, most_bytes: int | None = None) -> list[str]:
        """Return its lines, with values of so many bytes each if any."""
        name = show(self.name(), most_bytes)
        text = show(self.text(), most_bytes)
        severity = show(self.severity(), most_bytes)
        if self.is_clear():
            severity = f"cleared ({severity})"
        lines = [
            f"Team, **Alarm Event** : {name}, **Message** : {text}, "
            "is received from vManage and here are the complete details",
            f"**Severity:** {self.mark()} {severity}",
            f"**Receive Time:** {self.time(zone)}",
        ]
        for key, value in self.values():
            label = show(key, most_bytes).strip()
            lines.append(f" **{label}:** {show(value, most_bytes)}")
        return lines

    def _last_lines(self, now_ms: int, vmanage_url: str) -> list[str]:
        """Return what the relay itself says of it: that it is late, and where to look."""
        lines = []
        late_ms = now_ms - self.received_ms
        if late_ms > DELAYED_MS:
            lines.append(f"**Delayed:** relayed {describe_age(late_ms)} after it came in")
        page = urllib.parse.quote(self.uuid()[:99], safe="")
        if vmanage_url and page:
            alarms_page = f"{vmanage_url.rstrip('/')}/#/app/monitor/alarms/details"
            lines.append(f"[Open in vManage]({alarms_page}/{page})")
        return lines

    def plain_text(self, zone: tzinfo) -> str:
        """Return it in ASCII without markup, for a Webex that refuses its message."""
        lines = [
            f"Team, Alarm Event : {self.name()}, Message : {one_line(self.text())}, "
            "is received from vManage and here are the complete details",
            f"Severity: {self.severity()}{' (cleared)' if self.is_clear() else ''}",
            f"Receive Time: {self.time(zone)}",
        ]
        lines += [f"{key}: {one_line(value)}" for key, value in self.values()]
        text = "\n".join(one_line(line) for line in lines)
        return text.encode("ascii", "replace")[:PLAIN_TEXT_BYTES].decode()


def parse_alarms(body: bytes, received_ms: int) -> list[Alarm]:
    """Return the alarms of a body: one JSON object, or an array of them.

    Raises BadRequest for anything else.
    """
    try:
        # A garbled byte shall not lose an alarm either.
        content = DECODER.decode(body.decode(json.detect_encoding(body), "replace"))
    except (ValueError, RecursionError) as error:
        words = f"the body is empty or no JSON that can be read: {error}"
        raise BadRequest(words) from error
    objects = content
    if not isinstance(content, list):
        objects = [content]
    are_alarms = all(isinstance(one, dict) for one in objects)
    if not objects or not are_alarms or len(objects) > ALARMS:
        words = f"expected an alarm, a JSON object, or an array of up to {ALARMS}"
        raise BadRequest(words)
    return [Alarm(one, received_ms) for one in objects]


def format_digest(alarms: Sequence[Alarm], now_ms: int, zone: tzinfo) -> tuple[str, int]:
    """Return one message for alarms, oldest first, and how many of them it takes."""
    late_ms = now_ms - alarms[0].received_ms
    late = ""
    if late_ms > DELAYED_MS:
        late = f", the oldest {describe_age(late_ms)} ago"
    lines = ""
    fitting = ""
    for count, alarm in enumerate(alarms):
        lines += f"\n- {digest_line(alarm, zone)}"
        longer = f"Team, **{count + 1} alarms** are received from vManage{late}:{lines}"
        if len(longer.encode()) > MESSAGE_BYTES:
            return fitting, count
        fitting = longer
    return fitting, len(alarms)


def digest_line(alarm: Alarm, zone: tzinfo) -> str:
    """Return all of an alarm in one line."""
    parts = [f"{alarm.mark()} **{show(alarm.name()).strip()}** : {show(alarm.text())}"]
    parts.append(alarm.time(zone))
    parts += [f"{show(key).strip()} {show(value)}" for key, value in alarm.values()]
    return ", ".join(parts)


# === Spool ============================================================================
# Only the spool's own thread touches the database. Others hand it a job and wait for
# the outcome. All jobs that wait when it looks share one transaction, and so one fsync.
# No job fails for itself: what makes a transaction fail is told to all of them.
#
# EXCLUSIVE keeps other programs out. FULL with WAL is one fsync a commit, before it
# returns: sqlite.org/pragma.html#pragma_synchronous.
PRAGMAS = """
    PRAGMA locking_mode = EXCLUSIVE;
    PRAGMA journal_mode = WAL;
    PRAGMA synchronous = FULL;
    PRAGMA journal_size_limit = 8388608;  -- bytes of the -wal file, after a storm
"""
# The file's user_version. The file of a newer relay is left alone.
SCHEMA_VERSION = 3
TABLE = """CREATE TABLE IF NOT EXISTS alarm (
    id INTEGER PRIMARY KEY,
    room TEXT NOT NULL,            -- the path to which it was posted: /noc
    received_ms INTEGER NOT NULL,  -- epoch, as all times
    request BLOB NOT NULL,         -- a hash of path and body, by which a retry is known
    body TEXT NOT NULL,            -- the alarm's JSON
    -- This and what follows is set when it is delivered. NULL: it waits.
    delivered_ms INTEGER,
    message_id TEXT,               -- Webex's
    uuid TEXT,                     -- the alarm's
    down TEXT                      -- Alarm.outage() of a raise, until that is cleared
)"""
# The columns that every version has; uuid and down came with version 2.
FIRST_COLUMNS = {
    "id",
    "room",
    "received_ms",
    "request",
    "body",
    "delivered_ms",
    "message_id",
}
# Each index answers the question beside it, however many alarms there are.
INDEXES = """
    CREATE INDEX IF NOT EXISTS waiting           -- what comes next?
        ON alarm (room, id) WHERE delivered_ms IS NULL;
    CREATE INDEX IF NOT EXISTS request           -- did this request come before?
        ON alarm (request);
    CREATE INDEX IF NOT EXISTS uuid              -- where is the alarm of this uuid?
        ON alarm (uuid, room) WHERE uuid IS NOT NULL;
    CREATE INDEX IF NOT EXISTS down              -- where is what is down like this?
        ON alarm (down, room) WHERE down IS NOT NULL;
    CREATE INDEX IF NOT EXISTS delivered         -- which alarms are old enough to go?
        ON alarm (delivered_ms) WHERE delivered_ms IS NOT NULL;
    CREATE INDEX IF NOT EXISTS delivered_in_room -- how many were delivered in a day?
        ON alarm (room, delivered_ms) WHERE delivered_ms IS NOT NULL;
"""
UUID_FORM = "[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}"  # RFC 9562, 4


class DamagedFile(sqlite3.DatabaseError):
    """What SQLite itself would not find."""


def decode_leniently(text: bytes) -> str:
    """Return text of the database, whatever damage has made of it."""
    return text.decode(errors="replace")


def as_ms(value: object) -> int:
    """Return a time of the database, 0 where damage has left none."""
    return value if isinstance(value, int) else 0


@dataclass(frozen=True)
class StoredAlarm:
    """An alarm on disk."""

    spool_id: int
    room: str  # its path
    alarm: Alarm
    delivered_ms: int | None  # epoch; None: it waits

    @classmethod
    def from_row(cls, row: tuple[int, str, str, int, int | None]) -> StoredAlarm:
        """Return the alarm of a row `id, room, body, received_ms, delivered_ms`.

        If damage has left no JSON of it, what is left is its text.
        """
        spool_id, room, body, received_ms, delivered_ms = row
        if delivered_ms is not None:
            delivered_ms = as_ms(delivered_ms)
        try:
            fields = dict(DECODER.decode(body))
        except (ValueError, TypeError, RecursionError):
            fields = {"message": f"This alarm is damaged on disk: {body}"}
        return cls(spool_id, room, Alarm(fields, as_ms(received_ms)), delivered_ms)

    def stand_in(self) -> str:
        """Return a sentence for a Webex that refuses whatever the alarm itself says."""
        name = f"alarm {self.spool_id}"
        if re.fullmatch(UUID_FORM, self.alarm.uuid()):
            name += f" ({self.alarm.uuid()})"
        return f"Webex refuses the text of {name}. It stands in the relay's log."


@dataclass(frozen=True)
class ClearedAlarm:
    """A delivered alarm that a clear clears."""

    spool_id: int
    message_id: str  # Webex's, of the message in which it stands


@dataclass(frozen=True)
class Batch:
    """What comes next for a room."""

    alarms: list[StoredAlarm]  # the oldest that wait, oldest first
    parent_id: str  # Webex's, of the message to which the first is a reply; "" for none


@dataclass(frozen=True)
class Delivery:
    """A message that Webex has taken."""

    message_id: str
    delivered_ms: int
    alarms: Sequence[StoredAlarm]  # in it, all of one room


@dataclass(frozen=True)
class Backlog:
    """What waits for a room."""

    waiting: int  # alarms
    oldest_ms: int | None  # when the oldest of them came in


@dataclass(frozen=True)
class Day:
    """What has been delivered to a room in 24 hours."""

    delivered: int  # alarms
    last_ms: int | None  # when the last of them was


class Job(NamedTuple):
    """Work for the spool's thread."""

    work: Callable[[], Any]
    outcome: concurrent.futures.Future[Any]


Method = TypeVar("Method", bound=Callable[..., Any])


def in_spool_thread(method: Method) -> Method:
    """Let the spool's thread do what a method of Spool does, in a transaction.

    The method itself then needs no lock and no commit, and no other thread runs it.

    Whoever calls it waits. When it has returned, what it did is on disk; it may raise
    Unavailable.
    """

    @functools.wraps(method)
    def hand_over(spool: Spool, *arguments: Any) -> Any:
        return spool.run_job(functools.partial(method, spool, *arguments))

    return cast(Method, hand_over)


class Spool:
    """The alarms on disk, and all that can be asked of them.

    Its methods can be called from any thread. Those marked in_spool_thread are jobs; the
    others look at nothing but the directory, an error and a number.
    """

    def __init__(self, directory: Path) -> None:
        """Open the file, or begin one; raise RelayError if that cannot be."""
        self.directory = directory
        self.path = directory / "alarmrelay.db"
        self.error = ""  # why nothing can be stored any more, if so
        self.waiting_total = 0  # alarms that wait, in all rooms; others may read it
        # Kept, since to count them takes 5 ms with 100,000; for the spool's thread alone.
        self._waiting_by_room: dict[str, int] = {}
        self._taken: list[str] = []  # lines for the log once the alarms are on disk
        # None ends the thread.
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._lock_directory()
        self._open_or_begin()
        # Shown in the verdict until they are moved away. Their names end in a digit; those
        # of their -wal files do not.
        self.damaged_files = sorted(directory.glob("*.damaged-*[0-9]"))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    # --- Opening: before the thread begins --------------------------------------------
    def _lock_directory(self) -> None:
        """Keep the directory for this process; the lock ends with it, however it ends."""
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._directory_lock = os.open(self.directory, os.O_RDONLY)
            fcntl.flock(self._directory_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            problem = f"another relay runs on {self.directory}: stop it first"
            raise AlreadyRunning(problem) from error
        except OSError as error:
            raise self._cannot_open(error) from error

    def _cannot_open(self, error: Exception) -> RelayError:
        return RelayError(f"no spool can be opened in {self.directory}: {error}")

    def _open_or_begin(self) -> None:
        """Open the file; move a damaged one aside and begin a new one."""
        try:
            self._open()
        except sqlite3.OperationalError as error:
            raise self._cannot_open(error) from error
        except (sqlite3.DatabaseError, ValueError) as error:  # ValueError: of no UTF-8
            if not self._is_damaged(error):
                raise self._cannot_open(error) from error
            # The relay must come up: an alarm that finds none is lost as well.
            self._move_aside(error)
            self._open()

    def _open(self) -> None:
        """Open the database.

        Raises OperationalError for the disk, and DatabaseError itself for a damaged file.
        """
        self._db = sqlite3.connect(
            self.path,
            timeout=0,
            isolation_level=None,  # no transactions but ours
            check_same_thread=False,  # from now on it is in the spool's thread alone
        )
        self._check_header()
        self._db.text_factory = decode_leniently
        self._db.executescript(PRAGMAS)
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise RelayError(f"{self.path} is of a newer relay, version {version}: use that")
        try:
            # A disk that takes no write is found now, and not after a message was sent
            # that cannot be recorded, again at each restart.
            self._make_tables()
        except sqlite3.OperationalError:
            is_full = self._free_bytes() < FULL_BYTES
            if not (is_full and version == SCHEMA_VERSION):
                raise
            self._db.rollback()  # what waits can still be delivered
        self._count_waiting()

    def _check_header(self) -> None:
        """Raise DamagedFile for what SQLite does not find, or takes for a read-only file.

        Source: sqlite.org/fileformat2.html#the_database_header.
        """
        with self.path.open("rb") as file:
            header = file.read(100)
        if not header and Path(f"{self.path}-wal").exists():
            # SQLite would throw it away, and all that had not yet moved to the database.
            raise DamagedFile("its -wal stands alone")
        versions = header[18:20]  # of the file's format, for writing and for reading
        schema_format = int.from_bytes(header[44:48], "big")
        if any(version > 2 for version in versions) or schema_format > 4:
            raise DamagedFile("its header is none of SQLite's")

    def _make_tables(self) -> None:
        """Add what the file of an older version lacks, in one transaction."""
        self._db.execute("BEGIN IMMEDIATE")
        self._db.execute(TABLE)
        columns = {row[1] for row in self._db.execute("PRAGMA table_info(alarm)")}
        if not columns >= FIRST_COLUMNS:
            raise DamagedFile("it lacks columns")
        for name in ("uuid", "down"):
            if name not in columns:
                self._db.execute(f"ALTER TABLE alarm ADD COLUMN {name} TEXT")
        for statement in INDEXES.split(";"):
            self._db.execute(statement)
        self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        self._db.execute("COMMIT")

    def _is_damaged(self, error: Exception) -> bool:
        """Return whether the file is, since a disk that fails to read looks alike."""
        if isinstance(error, (DamagedFile, ValueError)):
            return True
        try:
            self._db.rollback()
            found: str = self._db.execute("PRAGMA integrity_check(1)").fetchone()[0]
        except sqlite3.OperationalError:
            return False
        except sqlite3.DatabaseError:
            return True
        return found != "ok"

    def _move_aside(self, error: Exception) -> None:
        """Keep a damaged file, out of the way, for whoever can recover what is in it."""
        aside = f"{self.path}.damaged-{datetime.now():%Y-%m-%d-%H%M%S}"
        words = "the spool is damaged (%s), what waited in it may be lost: see %s"
        log.error(words, error, aside)
        self._db.close()
        # In this order: SQLite would throw away a -wal that stands alone.
        for end in ("-wal", ""):
            with suppress(FileNotFoundError):
                os.rename(f"{self.path}{end}", f"{aside}{end}")

    # --- The thread -------------------------------------------------------------------
    def run_job(self, work: Callable[[], Any]) -> Any:
        """Have work done by the spool's thread, and return what it returns."""
        if self.error:
            raise Unavailable(self.error)
        outcome: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self._jobs.put(Job(work, outcome))
        return outcome.result()

    def close(self, timeout_s: float = STOP_S) -> None:
        """Do the jobs that wait, and close the file; a disk that hangs is not waited for."""
        self._jobs.put(None)
        self._thread.join(timeout_s)
        self.error = "the spool is closed"

    def _run(self) -> None:
        """Do jobs, all that wait at a time, until close()."""
        is_open = True
        while is_open:
            jobs = [self._jobs.get()]
            # While these are done, the next ones come together.
            while not self._jobs.empty():
                jobs.append(self._jobs.get())
            is_open = None not in jobs
            with guard("the spool"):
                self._share_transaction([job for job in jobs if job])
        self._db.close()
        os.close(self._directory_lock)

    def _share_transaction(self, jobs: Sequence[Job]) -> None:
        """Do jobs in one transaction, and tell each its outcome."""
        results: list[Any] | None = None  # None: nothing is on disk
        problem = "an error in alarmrelay itself: see its log"
        try:
            results = self._commit(jobs)
        except Unavailable as error:
            problem = str(error)
        finally:  # whatever it was, nobody waits for ever
            if results is None:
                self._forget()
                for job in jobs:
                    job.outcome.set_exception(Unavailable(problem))
            else:
                for job, result in zip(jobs, results):
                    job.outcome.set_result(result)
                self._log_taken()

    def _commit(self, jobs: Sequence[Job]) -> list[Any]:
        """Do jobs and return their results, which are then on disk; raise Unavailable."""
        if self.error:  # it broke while they waited
            raise Unavailable(self.error)
        try:
            self._db.execute("BEGIN IMMEDIATE")
            results = [job.work() for job in jobs]
            # Raises, too, if an error within a job has ended the transaction.
            self._db.execute("COMMIT")
        except (sqlite3.Error, MemoryError) as error:
            raise Unavailable(self._judge(error)) from error
        return results

    def _judge(self, error: Exception) -> str:
        """Return what an error of SQLite means to those who wait."""
        is_disk = isinstance(error, (sqlite3.OperationalError, MemoryError))
        if is_disk and self._free_bytes() < FULL_BYTES:
            return f"the disk is full: {self.directory}: {error}"
        # For good: after a failed fsync the kernel may have dropped the pages, and the
        # next fsync says that all is well. Only a new process that reads the file knows
        # what it holds.
        self.error = f"the spool cannot be read or written: {error}"
        if not is_disk and self._is_damaged(error):
            self._move_aside(error)  # that process begins a new one
        return self.error

    def _forget(self) -> None:
        """Undo what jobs have noted, in memory or in a transaction that goes on."""
        self._taken = []
        with suppress(sqlite3.Error, MemoryError):
            self._db.rollback()
            self._count_waiting()

    def _log_taken(self) -> None:
        """Write what was taken, after the answers are released."""
        if self._taken:
            # A list: LineFormatter makes a line of each, and all go in one write.
            log.info(self._taken)
            self._taken = []

    # --- Taking -----------------------------------------------------------------------
    def refusal(self) -> Unavailable | None:
        """Return why no alarm can be stored now, if so."""
        if self.error:
            return Unavailable(self.error)
        if self._free_bytes() < FREE_BYTES:
            free = f"under {FREE_BYTES >> 20} MiB free in {self.directory}"
            return Unavailable(f"the disk is full, or {free}")
        if self.waiting_total >= WAITING_ALARMS:
            return Unavailable("too many alarms wait for Webex")
        return None

    def _free_bytes(self) -> int:
        """Return what this user may still write."""
        try:
            return shutil.disk_usage(self.directory).free
        except OSError:  # what cannot be asked cannot be written
            return 0

    def store(
        self,
        room: str,
        request_hash: bytes,
        alarms: Sequence[Alarm],
        sender: str,
    ) -> bool:
        """Put the alarms of a request on disk.

        Returns False, and stores nothing, if the same request has come before. Raises
        Refused if it cannot be taken.
        """
        refusal = self.refusal()
        if refusal:
            raise refusal
        try:
            bodies = [json.dumps(alarm.fields) for alarm in alarms]
        except RecursionError as error:
            raise BadRequest("the alarm is nested too deeply") from error
        return self._insert(room, request_hash, alarms, bodies, sender)

    @in_spool_thread
    def _insert(
        self,
        room: str,
        request_hash: bytes,
        alarms: Sequence[Alarm],
        bodies: Sequence[str],
        sender: str,
    ) -> bool:
        """Store alarms and their lines for the log, unless the request is known."""
        received_ms = alarms[0].received_ms
        # Before and after: the clock may have been set back.
        known = self._db.execute(
            "SELECT id FROM alarm WHERE request = ? AND received_ms BETWEEN ? AND ?",
            (request_hash, received_ms - DUPLICATE_MS, received_ms + DUPLICATE_MS),
        )
        if known.fetchone():
            return False
        for alarm, body in zip(alarms, bodies):
            cursor = self._db.execute(
                """INSERT INTO alarm (room, request, received_ms, body)
                VALUES (?, ?, ?, ?)""",
                (room, request_hash, received_ms, body),
            )
            name = f"rule={alarm.name()[:99]!r} uuid={alarm.uuid()[:99]!r}"
            line = f"alarm {cursor.lastrowid} taken: room={room} {name} sender={sender}"
            self._taken.append(line)
        self._add_waiting(room, len(alarms))
        return True

    def _add_waiting(self, room: str, number: int) -> None:
        """Note that more alarms wait, or fewer: in the transaction in which they do."""
        self._waiting_by_room[room] = self._waiting_by_room.get(room, 0) + number
        self.waiting_total += number

    def _count_waiting(self) -> None:
        """Ask how many wait: at the start, and after a transaction that failed."""
        rows = self._db.execute(
            "SELECT room, count(*) FROM alarm WHERE delivered_ms IS NULL GROUP BY room"
        )
        self._waiting_by_room = dict(rows)
        self.waiting_total = sum(self._waiting_by_room.values())

    # --- Delivering -------------------------------------------------------------------
    @in_spool_thread
    def next_batch(self, room: str) -> Batch:
        """Return what comes next for a room."""
        rows = self._db.execute(
            """SELECT id, room, body, received_ms, delivered_ms FROM alarm
            WHERE room = ? AND delivered_ms IS NULL ORDER BY id LIMIT ?""",
            (room, DIGEST_ALARMS),
        )
        alarms: list[StoredAlarm] = []
        characters = 0
        for row in rows:
            # Large alarms are read a few at a time, lest they take hundreds of MB.
            if characters > LARGE_BATCH_CHARACTERS and len(alarms) > SINGLY:
                break
            alarms.append(StoredAlarm.from_row(row))
            characters += len(str(row[2]))
        parent_id = ""
        cleared = self._find_cleared(alarms[0]) if alarms else []
        if cleared:
            parent_id = cleared[0].message_id
        return Batch(alarms, parent_id)

    @in_spool_thread
    def record(self, delivery: Delivery) -> None:
        """Record that alarms stand in their room."""
        for stored in delivery.alarms:  # in their order: down, up and down again
            for cleared in self._find_cleared(stored):
                self._db.execute(
                    "UPDATE alarm SET down = NULL WHERE id = ?",
                    (cleared.spool_id,),
                )
            alarm = stored.alarm
            self._db.execute(
                """UPDATE alarm SET delivered_ms = ?, message_id = ?, uuid = ?, down = ?
                WHERE id = ?""",
                (
                    delivery.delivered_ms,
                    delivery.message_id,
                    alarm.uuid() or None,
                    None if alarm.is_clear() else alarm.outage(),
                    stored.spool_id,
                ),
            )
            self._add_waiting(stored.room, -1)

    def _find_cleared(self, stored: StoredAlarm) -> list[ClearedAlarm]:
        """Return the delivered alarms that a clear clears, the newest first.

        They are those of its uuids, else the newest that is down by the same outage.
        """
        if not stored.alarm.is_clear():
            return []
        by_uuid = self._db.execute(
            """SELECT id, message_id FROM alarm WHERE room = ?
            AND uuid IN (SELECT value FROM json_each(?)) ORDER BY id DESC""",
            (stored.room, json.dumps(stored.alarm.cleared_uuids())),
        ).fetchall()
        by_outage = self._db.execute(
            """SELECT id, message_id FROM alarm WHERE room = ? AND down = ?
            ORDER BY id DESC LIMIT 1""",
            (stored.room, stored.alarm.outage()),
        ).fetchall()
        return [ClearedAlarm(*row) for row in by_uuid or by_outage]

    @in_spool_thread
    def delete_delivered(self, before_ms: int) -> None:
        """Delete some of the alarms that were delivered before that."""
        self._db.execute(
            """DELETE FROM alarm WHERE id IN
            (SELECT id FROM alarm WHERE delivered_ms < ? LIMIT ?)""",
            (before_ms, RETENTION_ALARMS),
        )

    # --- Telling ----------------------------------------------------------------------
    @in_spool_thread
    def backlogs(self, rooms: Iterable[str]) -> dict[str, Backlog]:
        """Return what waits for each of these rooms, and for any other."""
        backlogs = {}
        for room in {*rooms, *self._waiting_by_room}:
            oldest = self._db.execute(
                """SELECT received_ms FROM alarm
                WHERE room = ? AND delivered_ms IS NULL ORDER BY id LIMIT 1""",
                (room,),
            ).fetchone()
            oldest_ms = as_ms(oldest[0]) if oldest else None
            backlogs[room] = Backlog(self._waiting_by_room.get(room, 0), oldest_ms)
        return backlogs

    @in_spool_thread
    def days(self, rooms: Iterable[str], now_ms: int) -> dict[str, Day]:
        """Return what has been delivered to each of these rooms."""
        days = {}
        for room in rooms:
            row = self._db.execute(
                """SELECT count(*), max(delivered_ms) FROM alarm
                WHERE room = ? AND delivered_ms > ?""",
                (room, now_ms - DAY_MS),
            ).fetchone()
            days[room] = Day(*row)
        return days

    @in_spool_thread
    def newest(self) -> list[StoredAlarm]:
        """Return the newest alarms, newest first, without the largest of them."""
        try:
            rows = self._db.execute(
                """SELECT id, room, body, received_ms, delivered_ms FROM alarm
                WHERE id IN (SELECT id FROM alarm ORDER BY id DESC LIMIT ?)
                AND length(body) < ? ORDER BY id DESC""",
                (NEWEST_ALARMS, LARGE_CHARACTERS),
            ).fetchall()
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError:
            # Damage to what only the page reads decides nothing about the spool.
            return []
        return [StoredAlarm.from_row(row) for row in rows]


# === Webex ============================================================================
# Facts about its API: developer.webex.com/docs/basics,
# developer.webex.com/docs/api/v1/messages.
@dataclass(frozen=True)
class Answer:
    """What came of a request."""

    status: int  # 0: no answer
    reason: str  # `401 Unauthorized`, or why there is none
    headers: Mapping[str, str]
    body: bytes


class Client:
    """Asks Webex or, for the command `send`, the relay itself.

    One is enough for all rooms: it keeps nothing of a request.
    """

    def __init__(self, url: str, authorization: str, is_local: bool = False) -> None:
        """Take the root of an API, and what its requests show.

        is_local: it is on this host; go past any proxy, and trust any certificate.
        """
        self._url = url.rstrip("/")
        self._headers = {
            "Content-Type": "application/json",
            "Authorization": authorization,
        }
        self._secret = authorization.split()[-1].encode()
        # No handler follows redirects (urllib's own would send the token to the other
        # host, by GET), and none raises an error for a status.
        self._opener = urllib.request.OpenerDirector()
        self._opener.add_handler(urllib.request.HTTPHandler())
        context = ssl.create_default_context()
        if is_local:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        self._opener.add_handler(urllib.request.HTTPSHandler(context=context))
        # Plain http goes to a loopback address, where no proxy reaches.
        if url.startswith("https:") and not is_local:
            self._opener.add_handler(urllib.request.ProxyHandler())

    def ask(self, path: str, payload: bytes | None = None) -> Answer:
        """Get a path, as /people/me, or post a payload to it."""
        request = urllib.request.Request(self._url + path, payload, self._headers)
        try:
            # The time-out is for each read; that for the whole is kept by the watchdog:
            # SEND_S.
            with self._opener.open(request, timeout=READ_S) as reply:
                content = reply.read(ANSWER_BYTES).replace(self._secret, b"[hidden]")
                reason = f"{reply.status} {reply.reason}"
                return Answer(reply.status, reason, reply.headers, content)
        except socket.timeout:
            reason = f"no answer within {READ_S:g} s"
        except urllib.error.URLError as error:
            reason = f"no answer: {error.reason}"
        except (OSError, http.client.HTTPException, ValueError) as error:
            # Not its text, which may hold the password of a proxy.
            reason = f"no answer: {type(error).__name__}"
        return Answer(0, reason, {}, b"")


@dataclass(frozen=True)
class Delivered:
    """Webex has the message."""

    message_id: str


class Meaning(NamedTuple):
    """What an answer tells an operator."""

    does: str  # what Webex does
    advice: str = ""  # what to do about it


@dataclass(frozen=True)
class Failure:
    """Webex has not taken the message, or nobody knows whether it has."""

    # "refused": Webex does not like this message. "held": somebody has to mend the token
    # or the room. "paused": Webex has said for how long. "failed": it passes by itself.
    kind: str
    wait_s: float  # until it is tried again
    reason: str  # `401 Unauthorized: …`, with Webex's own words
    meaning: Meaning
    tracking_id: str  # for Cisco's support, or ""


FAILURE_KINDS = ("held", "refused", "paused", "failed")


MEANINGS = {
    0: Meaning(
        "does not answer",
        "check network, clock and https_proxy; if a proxy opens TLS, SSL_CERT_FILE",
    ),
    400: Meaning(
        "refuses the message",
        "check room_id; `alarmrelay.py preview` shows the message",
    ),
    401: Meaning(
        "refuses the token",
        "replace bearer_token and restart",
    ),
    403: Meaning(
        "refuses the bot",
        "the bot must be a member of the room and allowed to post in it",
    ),
    404: Meaning(
        "has no such room",
        "check room_id and webex_url, and that the bot is a member of the room",
    ),
    423: Meaning("limits the bot"),
    429: Meaning("limits the bot"),
}
NO_MESSAGE = Meaning("fails", "check webex_url; does a proxy answer for Webex?")
OTHER_FAILURE = Meaning("fails")


def judge(answer: Answer, failures: int, now_s: float) -> Delivered | Failure:
    """Decide what an answer means for the message, after so many failures in a row."""
    content = read_object(answer.body)
    message_id = content.get("id")
    is_id = isinstance(message_id, str) and message_id.isprintable()
    if answer.status == 200 and message_id and is_id:
        return Delivered(message_id)
    meaning = MEANINGS.get(answer.status, OTHER_FAILURE)
    said = content.get("message")
    if 200 <= answer.status < 400:  # or a redirect, which is never followed
        meaning = NO_MESSAGE
        said = "no id in it"
    reason = answer.reason
    if said:
        reason += f": {one_line(said)}"
    kind, wait_s = decide(answer, failures, now_s)
    tracking_id = content.get("trackingId") or answer.headers.get("trackingId", "")
    return Failure(
        kind,
        wait_s,
        one_line(reason)[:300],  # bounded, since STATUS= holds it
        meaning,
        one_line(tracking_id)[:100],
    )


def decide(answer: Answer, failures: int, now_s: float) -> tuple[str, float]:
    """Return the kind of a failure, and in how many seconds to try again."""
    if answer.status in (423, 429):
        return "paused", pause_s(answer.headers.get("Retry-After", ""), now_s)
    if answer.status == 400:
        return "refused", HOLD_S
    if 400 < answer.status < 500:
        return "held", HOLD_S
    return "failed", min(RETRY_S * 2 ** min(failures, 30), RETRY_MAX_S)


def pause_s(retry_after: str, now_s: float) -> float:
    """Return the seconds that Webex asks for, within bounds; RFC 9110, 10.2.3."""
    asked = retry_after.strip()
    try:
        if re.fullmatch("-?[0-9]+", asked):
            wait_s = float(asked)
        else:
            wait_s = email.utils.parsedate_to_datetime(asked).timestamp() - now_s
    except (TypeError, ValueError, IndexError, OverflowError):
        wait_s = PAUSE_S  # it is junk; Python 3.9 raises TypeError for that
    return min(max(wait_s, PAUSE_MIN_S), PAUSE_MAX_S)


def read_object(body: bytes) -> dict[str, Any]:
    """Return a JSON object, an empty one for anything else."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


# === Courier ==========================================================================
# A thread for each room, so that rooms do not wait for one another. What it decides from
# Webex's answer is judge(), above; what is on disk is the spool's to say. Its own is what
# is in the way of delivery, and for how long.
# Upper bounds of the histogram in /metrics, in seconds.
BUCKETS_S = (0.5, 1, 2, 5, 10, 30, 60, 300, 900, 3600, 14_400)
# The statuses that a request is answered with: those of all refusals, and 200.
STATUSES = sorted({200, *(refused.status for refused in Refused.__subclasses__())})


@dataclass
class RoomTotals:
    """What has happened in a room since the start."""

    accepted: int = 0  # alarms put on disk
    duplicates: int = 0  # alarms posted again within ten minutes
    messages: int = 0  # that Webex has taken
    delivered: int = 0  # alarms in them
    # Attempts, by Failure.kind.
    failures: Counter[str] = field(default_factory=Counter)
    # From an alarm's post to the room: the sum, and how many took so long or less.
    took_s: float = 0.0
    took_at_most: Counter[float] = field(default_factory=Counter)


class Totals:
    """What has happened since the start, for /metrics; whoever did it counts it here."""

    def __init__(self, rooms: Iterable[str]) -> None:
        self.started_s = time.time()
        # Guards what follows, for reading, too: a sum is read, changed and written, and
        # an alarm is counted in several.
        self.lock = threading.Lock()
        self.rooms = {room: RoomTotals() for room in rooms}  # by path
        self.answers: Counter[int] = Counter()  # by status

    def delivered(self) -> int:
        """Return how many alarms are in the rooms."""
        with self.lock:
            return sum(totals.delivered for totals in self.rooms.values())

    def count_delivery(self, room: str, took_s: Sequence[float]) -> None:
        """Count a message, whose alarms took so many seconds each."""
        with self.lock:
            totals = self.rooms[room]
            totals.messages += 1
            totals.delivered += len(took_s)
            totals.took_s += sum(took_s)
            for limit_s in BUCKETS_S:
                totals.took_at_most[limit_s] += sum(one_s <= limit_s for one_s in took_s)


@dataclass(frozen=True)
class Trouble:
    """What is in the way of a room's alarms.

    Never changed, but replaced by another: whoever looks at it sees what belongs together.
    """

    failure: Failure
    since_s: float  # epoch; when Webex began to do what it does
    again_s: float  # epoch; when it is tried again


class Courier:
    """Delivers the alarms of one room, oldest first.

    step() is one attempt, run() the loop around it.
    """

    def __init__(
        self,
        room: str,
        settings: Settings,
        spool: Spool,
        webex: Client,
        totals: Totals,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.room = room  # its path
        self.trouble: Trouble | None = None
        # An alarm for this room; set by whoever stored it.
        self.arrived = threading.Event()
        self.deadline = Deadline()  # for the watchdog
        self._settings = settings
        self._spool = spool
        self._webex = webex
        self._totals = totals
        self._clock = clock
        self._stopping = threading.Event()
        self._failures = 0  # in a row
        self._singly = 0  # alarms of a digest that was refused, which still go one by one
        self._unrecorded: Delivery | None = None  # it did not fit on the disk

    def run(self) -> None:
        """Deliver until stop()."""
        while not self._stopping.is_set():
            wait_s: float | None = HOLD_S  # if an error in the relay itself ends the step
            # For a message, and for the spool, whose disk may be slow.
            self.deadline.allow(SEND_S)
            with guard(f"room {self.room}"):
                wait_s = self._step_or_pause()
            self.deadline.lift()
            if wait_s is None:
                self.arrived.wait()
            else:
                self._stopping.wait(wait_s)
            # Before the next look into the spool: an alarm that comes after this is
            # seen there, or sets the event anew.
            self.arrived.clear()

    def _step_or_pause(self) -> float | None:
        try:
            return self.step()
        except Unavailable:  # what the spool says of itself is in the log and on the page
            return DISK_RETRY_S

    def stop(self) -> None:
        """Let the send in flight be the last."""
        self._stopping.set()
        self.arrived.set()

    def step(self) -> float | None:
        """Try to deliver what came first.

        Returns the seconds to wait, None to wait for an arrival. Raises Unavailable.
        """
        if self._unrecorded:
            # Nothing else is sent before: after a kill, no more than this message comes
            # twice.
            self._record(self._unrecorded)
        batch = self._spool.next_batch(self.room)
        if not batch.alarms:
            return None
        if len(batch.alarms) > SINGLY and not self._singly:
            alarms = [stored.alarm for stored in batch.alarms]
            zone = self._settings.time_zone
            text, count = format_digest(alarms, self._now_ms(), zone)
            if count > 1:
                return self._deliver_together(batch.alarms[:count], text)
        return self._deliver_singly(batch.alarms[0], batch.parent_id)

    def _now_ms(self) -> int:
        """Return the time in the unit of the spool."""
        return int(self._clock() * 1000)

    # --- The forms of a message: each only if Webex refuses the one before -----------
    def _deliver_together(self, alarms: Sequence[StoredAlarm], text: str) -> float:
        """Send a digest; if Webex refuses it, let its alarms go one by one."""
        outcome = self._send({"markdown": text})
        if isinstance(outcome, Failure) and outcome.kind == "refused":
            log.warning("%d alarms go one by one: %s", len(alarms), outcome.reason)
            self._singly = len(alarms)
            return 0.0
        return self._conclude(alarms, outcome)

    def _deliver_singly(self, stored: StoredAlarm, parent_id: str) -> float:
        """Send an alarm, in up to three forms, so that none can hold up the others."""
        zone = self._settings.time_zone
        alarm = stored.alarm
        text = alarm.message(self._now_ms(), zone, self._settings.vmanage_url)
        outcome = self._send({"markdown": text}, parent_id)
        if isinstance(outcome, Failure) and outcome.kind == "refused":
            self._say_once(stored, "goes again as plain text", outcome)
            outcome = self._send({"text": alarm.plain_text(zone)}, parent_id)
        if isinstance(outcome, Failure) and outcome.kind == "refused":
            self._say_once(stored, "goes without its text", outcome)
            outcome = self._send({"text": stored.stand_in()})
            if isinstance(outcome, Delivered):
                content = json.dumps(alarm.fields)
                words = "alarm %d is not in the room but here: %s"
                log.error(words, stored.spool_id, content)
        # Refused in every form: it is the room, and that is held.
        return self._conclude([stored], outcome)

    def _say_once(self, stored: StoredAlarm, words: str, failure: Failure) -> None:
        """Log that an alarm goes in another form, unless it is held and has been told."""
        is_held = self.trouble is not None and self.trouble.failure.kind == "refused"
        if not is_held:
            log.warning("alarm %d %s: %s", stored.spool_id, words, failure.reason)

    def _send(
        self,
        content: Mapping[str, str],
        parent_id: str = "",
    ) -> Delivered | Failure:
        """Post a message, as a reply if there is a message to reply to."""
        message = {"roomId": self._settings.room_ids[self.room], **content}
        if parent_id:
            message["parentId"] = parent_id
        self.deadline.allow(SEND_S)
        answer = self._webex.ask("/messages", json.dumps(message).encode())
        self.deadline.allow(SEND_S)  # anew: what follows is the spool's
        outcome = judge(answer, self._failures, self._clock())
        if isinstance(outcome, Failure):
            with self._totals.lock:
                self._totals.rooms[self.room].failures[outcome.kind] += 1
        if parent_id and answer.status in (400, 404):
            return self._send(content)  # the message to reply to may have been deleted
        return outcome

    # --- What came of it ---
    def _conclude(
        self,
        alarms: Sequence[StoredAlarm],
        outcome: Delivered | Failure,
    ) -> float:
        """Note what came of an attempt; return the seconds to wait."""
        if isinstance(outcome, Failure):
            return self._wait(alarms[0], outcome)
        self._failures = 0
        self._singly = max(0, self._singly - len(alarms))
        self.trouble = None
        now_ms = self._now_ms()
        took_s = []
        for stored in alarms:
            one_s = max(0, now_ms - stored.alarm.received_ms) / 1000
            took_s.append(one_s)
            words = f"message={outcome.message_id} after {one_s:.1f} s"
            log.info("alarm %d delivered: %s", stored.spool_id, words)
        self._totals.count_delivery(self.room, took_s)
        self._record(Delivery(outcome.message_id, now_ms, alarms))
        return 0.0

    def _record(self, delivery: Delivery) -> None:
        """Let the spool record a delivery; keep it while that cannot be."""
        self._unrecorded = delivery
        self._spool.record(delivery)  # or raises Unavailable, and it is kept
        self._unrecorded = None

    def _wait(self, first: StoredAlarm, failure: Failure) -> float:
        """Note what is in the way, log it if it is news; return the seconds to wait."""
        wait_s = failure.wait_s
        if failure.kind == "failed":
            self._failures += 1
            wait_s *= random.uniform(1 - RETRY_JITTER, 1 + RETRY_JITTER)  # noqa: S311
        else:
            self._failures = 0
        now_s = self._clock()
        before = self.trouble
        since_s = now_s
        if before and before.failure.meaning.does == failure.meaning.does:
            since_s = before.since_s
        self.trouble = Trouble(failure, since_s, now_s + wait_s)
        # What the operator has to mend is said once; of what passes, every attempt is
        # news.
        is_known = before is not None and before.failure.reason == failure.reason
        needs_mending = failure.kind in ("held", "refused")
        if not (needs_mending and is_known):
            level = logging.ERROR if needs_mending else logging.WARNING
            words = describe(failure, wait_s)
            log.log(level, "room %s, alarm %d: %s", self.room, first.spool_id, words)
        return wait_s


def describe(failure: Failure, wait_s: float) -> str:
    """Return what the log says of an attempt that failed."""
    advice = f"; {failure.meaning.advice}" if failure.meaning.advice else ""
    tracking_id = f"trackingId {failure.tracking_id or 'none'}"
    again = f"tried again in {wait_s:.0f} s"
    return f"delivery {failure.kind}: {failure.reason}{advice} ({tracking_id}); {again}"


# === HTTP =============================================================================
# http.server's own classes, hardened where a method below says so. What could be read
# in two ways is refused: a sender or a proxy in between might read it in the other (RFC
# 9112, 11.2).
TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110, 5.6.2
VALUE = rb"[^\x00-\x08\x0a-\x1f\x7f]*"  # RFC 9110, 5.5: no control character but the tab
# A path; `http://host` in front of it is passed over: RFC 9112, 3.2.2.
TARGET = rb"(?:https?://[^/?#\s]*)?(/[!-~]*)"
# A method, a target, a version.
REQUEST_LINE = re.compile(rb"(%b) %b (HTTP/1\.[0-9])\r\n" % (TOKEN, TARGET))
FIELD_LINE = re.compile(rb"(%b):(%b)\r\n" % (TOKEN, VALUE))
# The size of a chunk, in hexadecimal; what may follow it is passed over.
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;%b)?\r\n" % VALUE)
# int() would take a sign, an underscore and the digits of other scripts.
LENGTH = "[0-9]{1,18}"
TLS_HANDSHAKE = b"\x16"  # the first byte of a client that speaks TLS: RFC 8446, 5.1
# Two of one of these would have two readings.
SINGLE_FIELDS = ("Authorization", "Content-Length", "Host", "Transfer-Encoding")
# A browser shall run, load and send nothing: what the page shows comes from strangers.
CONTENT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
)
NO_HEADERS: Mapping[str, str] = {}


class Stream(io.RawIOBase):
    """The bytes of a connection, both ways, until a deadline that no dripping moves.

    A socket's own time-out is for one recv() or send(): who drips never meets it.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.deadline = Deadline()
        self._connection = connection

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Read what is there; 0 is the end. Raise TooSlow at the deadline."""
        try:
            self._arm()
            return self._connection.recv_into(buffer)
        except socket.timeout as error:
            raise TooSlow("the request came too slowly") from error

    def write(self, data: Any) -> int:
        """Write some of it; raise socket.timeout at the deadline."""
        self._arm()
        return self._connection.send(data)

    def _arm(self) -> None:
        left_s = self.deadline.left_s()
        if left_s <= 0:
            raise socket.timeout("the time for it is over")
        self._connection.settimeout(left_s)


@dataclass
class Place:
    """What the server has to know of an open connection; its thread sets it."""

    # A stop may end it: no request of it is on its way.
    is_idle: bool = True
    # Bytes of a request may still come: the client needs time to read its answer.
    is_unread: bool = False


class Resource(NamedTuple):
    """What a GET with credentials is answered with."""

    render: Callable[[], str]
    content_type: str


class Handler(http.server.BaseHTTPRequestHandler):
    """A connection and its requests, one after another, in a thread of its own.

    close_connection is True until a header has been understood; from then on until the
    next request it only turns True.
    """

    server: Server
    protocol_version = "HTTP/1.1"
    body: Iterator[bytes]  # the blocks of the request's body that have not been read
    # http.server's own, for a type checker.
    raw_requestline: bytes
    rfile: io.BufferedReader

    # --- The connection: socketserver's setup() and handle() --------------------------
    def setup(self) -> None:
        """Put the streams of StreamRequestHandler over one that has a deadline."""
        self.place = self.server.places[self.request]
        self.connection: socket.socket = self.request
        self.stream = Stream(self.connection)
        self.rfile = io.BufferedReader(self.stream)
        # Header and body leave together: apart, one would wait for the other's
        # acknowledgement.
        self.wfile = io.BufferedWriter(self.stream)
        self.is_trusted = False  # credentials have been shown on this connection
        self.stranger_answers = 0  # given before credentials were shown
        # Seconds for silence, and for a header, before credentials are shown.
        self.patience_s = self.server.patience_s()

    def handle(self) -> None:
        """Answer all requests of the connection, over TLS after the handshake."""
        if isinstance(self.connection, ssl.SSLSocket):
            # Here, and not where connections are accepted, a silent client holds up
            # nobody else. A stop waits for it, since an alarm may follow.
            self.place.is_idle = False
            self.connection.settimeout(self.patience_s)
            self.connection.do_handshake()
        super().handle()

    def handle_one_request(self) -> None:
        """Answer the next request, and read past its body."""
        self.close_connection = True  # until a header has been understood
        self.command = ""  # these two for an answer to what cannot be parsed
        self.request_version = self.protocol_version
        self.body = iter(())
        self.expects_continue = False  # the client waits to be asked for the body
        if not self.wait_for_request():
            return
        is_framed = True  # it is known where the request ends
        try:
            super().handle_one_request()
        except Refused as refusal:
            self.refuse(refusal)
            is_framed = not refusal.is_last
        self.wfile.flush()
        # Answered: a stop need not wait for the rest of a refused body.
        self.place.is_idle = True
        if is_framed and self.skip_body():
            self.place.is_unread = False
        else:
            self.close_connection = True

    def wait_for_request(self) -> bool:
        """Return whether one begins before the client's time for silence is over."""
        self.place.is_idle = True
        self.stream.deadline.allow(IDLE_S if self.is_trusted else self.patience_s)
        try:
            # An empty line may come first: RFC 9112, 2.2.
            starts_with_cr = self.rfile.peek(1)[:1] == b"\r"
            if starts_with_cr and self.rfile.readline(2) != b"\r\n":
                return False
            has_begun = bool(self.rfile.peek(1))
        except (TooSlow, OSError):  # it has nothing more to say, and needs no answer
            return False
        self.place.is_idle = False
        self.place.is_unread = has_begun
        self.stream.deadline.allow(HEADER_S if self.is_trusted else self.patience_s)
        return has_begun

    # --- The header ---
    def parse_request(self) -> bool:
        """Read the header; raise Refused unless it is clear, and from whom it should be.

        In the place of http.server's own, which splits at any white space, ends a header
        at a line without a colon and takes one of two lengths. Returns True, always.
        """
        start = REQUEST_LINE.fullmatch(self.raw_requestline)
        if not start:
            self.check_line_ended(self.raw_requestline)
            hint = ""
            if self.raw_requestline[:1] == TLS_HANDSHAKE:
                hint = ": https would need tls_certificate"
            raise BadFraming(f"the first line cannot be read{hint}")
        self.command = start[1].decode()
        self.path = start[2].decode().partition("?")[0]
        self.request_version = start[3].decode()
        self.headers = self.read_fields()
        is_old = self.request_version == "HTTP/1.0"
        # RFC 9112, 9.3. There may be several such fields, each with several options.
        options = ",".join(self.headers.get_all("Connection", [])).lower().split(",")
        has_close = "close" in [option.strip() for option in options]
        self.close_connection = is_old or has_close
        expected = self.headers.get("Expect", "").lower()
        self.expects_continue = expected == "100-continue" and not is_old
        self.body = self.frame_body()
        self.admit()
        return True

    def read_fields(self) -> http.client.HTTPMessage:
        """Return the header's fields, read up to the empty line."""
        fields = http.client.HTTPMessage()
        left_bytes = HEADER_BYTES
        while True:
            line = self.rfile.readline(left_bytes + 1)
            left_bytes -= len(line)
            if line == b"\r\n":
                return fields
            if left_bytes < 0 or len(fields) == FIELDS:
                words = f"a header has {HEADER_BYTES} bytes and {FIELDS} fields at most"
                raise HeaderTooLarge(words)
            field_line = FIELD_LINE.fullmatch(line)
            if not field_line:
                self.check_line_ended(line)
                raise BadFraming("a header field cannot be read")
            fields[field_line[1].decode()] = field_line[2].decode("latin-1").strip(" \t")

    def check_line_ended(self, line: bytes) -> None:
        """Raise ConnectionError if the stream has ended within a line."""
        if not line.endswith(b"\n"):
            raise ConnectionError("the client left in the middle of a header")

    def frame_body(self) -> Iterator[bytes]:
        """Return the body's blocks by RFC 9112, 6.3; raise if its end is in doubt."""
        for name in SINGLE_FIELDS:
            if len(self.headers.get_all(name, [])) > 1:
                raise BadFraming(f"there are two of the header field {name}")
        length = self.headers.get("Content-Length")
        coding = self.headers.get("Transfer-Encoding")
        if coding is None:
            if length is not None and not re.fullmatch(LENGTH, length):
                raise BadFraming("the Content-Length is no number")
            return self.blocks_of_length(int(length or 0))
        if coding.lower() != "chunked":
            raise UnknownCoding("the only Transfer-Encoding known is chunked")
        if length is not None or self.request_version == "HTTP/1.0":
            raise BadFraming("Transfer-Encoding with a length or in HTTP/1.0")
        return self.blocks_of_chunks()

    def admit(self) -> None:
        """Raise Refused unless credentials, path and method are right, in this order.

        Part of parse_request(), so that no do_ method can run without.
        """
        # RFC 7617, 2.
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        # Hashes are compared, lest the time tells how long the password is.
        given = hashlib.sha256(token.strip(" ").encode("latin-1")).digest()
        is_right = secrets.compare_digest(given, self.server.credentials_hash)
        if scheme.lower() == "basic" and is_right:
            self.is_trusted = True
        elif self.path != "/healthz":
            raise WrongCredentials("wrong credentials" if scheme else "no credentials")
        allowed = self.server.methods.get(self.path)
        if allowed is None:
            words = "no room has this path: post to /, or to /NAME of a room_id_NAME"
            raise UnknownPath(words)
        if self.command not in allowed:
            raise WrongMethod(", ".join(allowed))

    # --- The body ---
    def blocks_of_length(self, left_bytes: int) -> Iterator[bytes]:
        """Yield the blocks of a body, or of a chunk, that has so many bytes."""
        while left_bytes:
            block = self.rfile.read(min(left_bytes, BLOCK_BYTES))
            if not block:
                raise ConnectionError("the client left in the middle of a body")
            left_bytes -= len(block)
            yield block

    def blocks_of_chunks(self) -> Iterator[bytes]:
        """Yield the blocks of a body in chunks: RFC 9112, 7.1, without trailer fields."""
        while True:
            line = self.rfile.readline(BLOCK_BYTES)
            chunk_line = CHUNK_LINE.fullmatch(line)
            if not chunk_line:
                self.check_line_ended(line)
                raise BadFraming("a chunk does not begin with its size")
            size = int(chunk_line[1], 16)
            yield from self.blocks_of_length(size)
            if self.rfile.read(2) != b"\r\n":
                raise BadFraming("a chunk is not as long as its size says")
            if size == 0:  # the last
                return

    def read_body(self) -> bytes:
        """Return the body, asked for if the client waits for that; raise Refused."""
        length = self.headers.get("Content-Length")
        if length is None and "Transfer-Encoding" not in self.headers:
            words = "the relay is reached, but the request has no length and no alarm"
            raise NoLength(words)
        too_large = f"a body has {BODY_BYTES} bytes at most"
        if int(length or 0) > BODY_BYTES:
            raise TooLarge(too_large)
        if self.expects_continue:
            self.expects_continue = False
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.wfile.flush()
        self.stream.deadline.allow(BODY_S)
        content = bytearray()
        for block in self.body:
            content += block
            if len(content) > BODY_BYTES:
                raise TooLarge(too_large)
        return bytes(content)

    def skip_body(self) -> bool:
        """Read what a refusal has left of a body, and return whether that was all of it.

        Some senders read no answer before they have sent it.
        """
        if self.expects_continue:
            return False  # the client may or may not send it
        try:
            for number, _ in enumerate(self.body):
                if number == DRAIN_BLOCKS:
                    return False
        except (OSError, Refused):  # it has its answer
            return False
        return True

    # --- The methods ---
    def do_GET(self) -> None:
        """Answer health, page and metrics: admit() lets no other path through."""
        if self.path == "/healthz":
            refusal = self.server.spool.refusal()
            if refusal:
                raise refusal
            self.answer(200, json.dumps({"status": "ok"}))
        else:
            resource = self.server.resources[self.path]
            self.answer(200, resource.render(), resource.content_type)

    def do_POST(self) -> None:
        """Take alarms: put them on disk, wake the courier, and only then answer 200."""
        content = self.read_body()
        alarms = parse_alarms(content, int(time.time() * 1000))
        posted = self.path.encode() + b"\n" + content
        # When this has returned, they are on disk.
        is_new = self.server.spool.store(
            self.path,
            hashlib.blake2b(posted, digest_size=16).digest(),
            alarms,
            self.address_string(),
        )
        totals = self.server.totals
        if is_new:
            with totals.lock:
                totals.rooms[self.path].accepted += len(alarms)
            self.server.couriers[self.path].arrived.set()
            self.answer(200, json.dumps({"status": "accepted"}))
        else:
            with totals.lock:
                totals.rooms[self.path].duplicates += len(alarms)
            self.log_message("sent again what was taken before: not stored twice")
            self.answer(200, json.dumps({"status": "duplicate"}))

    # --- The answer ---
    def answer(
        self,
        code: int,
        text: str,
        content_type: str = "application/json",
        headers: Mapping[str, str] = NO_HEADERS,
    ) -> None:
        """Send an answer as a whole."""
        body = text.encode(errors="replace")
        # Time for the client to read this, and to send what is left of its body.
        self.stream.deadline.allow(HEADER_S)
        self.send_response(code)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_response(self, code: int, message: str | None = None) -> None:
        """Begin an answer; http.server's own would name versions in a field Server."""
        self.log_request(code)
        self.send_response_only(code, message)
        self.send_header("Date", self.date_time_string())

    def end_headers(self) -> None:
        """Decide whether the connection goes on, and end the header."""
        if not self.is_trusted:
            self.stranger_answers += 1
            if self.stranger_answers == STRANGER_ANSWERS:
                self.close_connection = True
        if self.expects_continue or self.server.is_stopping:
            self.close_connection = True
        self.send_header("Connection", "close" if self.close_connection else "keep-alive")
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Security-Policy", CONTENT_POLICY)
        super().end_headers()

    def refuse(self, refusal: Refused) -> None:
        """Answer {"error": …}; close where a next request could not be found."""
        self.log_error("refused: %d %s", refusal.status, refusal)
        if refusal.is_last:
            self.close_connection = True
        text = json.dumps({"error": str(refusal)})
        self.answer(refusal.status, text, headers=refusal.headers)

    def send_error(
        self,
        code: int,
        message: str | None = None,
        explain: str | None = None,
    ) -> None:
        """Refuse in JSON what http.server itself refuses: a first line over 64 KiB."""
        self.refuse(LineTooLong("the first line of a request has 64 KiB at most"))

    # --- The log ---
    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Count an answer; each alarm and each refusal has a line of its own."""
        with self.server.totals.lock:
            self.server.totals.answers[int(code)] += 1

    def log_error(self, format: str, *args: Any) -> None:
        log.warning(f"%s {format}", self.address_string(), *args)

    def log_message(self, format: str, *args: Any) -> None:
        log.info(f"%s {format}", self.address_string(), *args)


def list_methods(read: Iterable[str], posted_to: Iterable[str]) -> dict[str, list[str]]:
    """Return the methods of each path: of those that are read, and of those of rooms."""
    methods = {path: ["GET"] for path in read}
    for path in posted_to:
        methods.setdefault(path, []).append("POST")
    return methods


def count_places() -> int:
    """Return how many connections may be open at a time: each has a descriptor."""
    return max(8, min(CONNECTIONS, os.sysconf("SC_OPEN_MAX") - SPARE_FILES))


class Server(http.server.ThreadingHTTPServer):
    """Accepts connections, each into a thread of its own, as many as there are places.

    Those for which there is no place wait in the kernel, which costs nothing and loses none.
    """

    def __init__(
        self,
        listener: socket.socket,
        settings: Settings,
        spool: Spool,
        couriers: Mapping[str, Courier],
        totals: Totals,
        resources: Mapping[str, Resource],
    ) -> None:
        # TCPServer makes a socket of its own, and ours takes its place. Bound elsewhere, it
        # does not look up the host's name: DNS may be down.
        super().__init__(listener.getsockname(), Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        # A client may be gone between select() and accept().
        self.socket.setblocking(False)
        self.tls = settings.tls
        credentials = settings.basic_credentials().encode()
        self.credentials_hash = hashlib.sha256(credentials).digest()
        self.spool = spool
        self.couriers = couriers  # by the path of their room
        self.totals = totals
        self.resources = resources  # by path
        self.methods = list_methods(["/healthz", *resources], couriers)
        self.is_stopping = False  # each answer is its connection's last
        self.deadline = Deadline()  # for the watchdog
        self._most_places = count_places()
        # Guards what follows; notified when a connection ends.
        self._changed = threading.Condition()
        self.places: dict[socket.socket, Place] = {}  # of each open connection

    def patience_s(self) -> float:
        """Return how long a new connection may be silent: less when places become few."""
        if len(self.places) > self._most_places / 2:
            return TICK_S
        return HEADER_S

    # --- Accepting: socketserver's hooks, in the order in which it calls them ---------
    def service_actions(self) -> None:
        """Give a sign of life: called after each look at the listening socket."""
        self.deadline.allow(STALL_S)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection; if none can be, raise OSError, and it is tried again."""
        with self._changed:
            # Those for which there is no place wait in the kernel, at no cost.
            has_place = self._changed.wait_for(self._has_place, TICK_S)
        if not has_place:
            words = "no connection can be accepted: all %d places are taken"
            log.warning(words, self._most_places)
            raise BlockingIOError
        try:
            connection, address = super().get_request()
        except (BlockingIOError, ConnectionError):
            raise  # that client has gone: there is nothing to wait for
        except OSError as error:
            # No descriptors: select() would return at once, again and again.
            self._wait_for_an_end(str(error))
            raise
        if self.tls:  # the handshake is for Handler.handle()
            connection = self.tls.wrap_socket(
                connection,
                server_side=True,
                do_handshake_on_connect=False,
            )
        with self._changed:
            self.places[connection] = Place()
        return connection, address

    def _has_place(self) -> bool:
        return len(self.places) < self._most_places

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a connection its thread, or close it if there is none to be had."""
        try:
            super().process_request(request, client_address)
        except (RuntimeError, MemoryError) as error:  # no more threads
            self.close_request(request)
            self._wait_for_an_end(str(error))

    def _wait_for_an_end(self, trouble: str) -> None:
        """Wait until a connection has ended, which may free what is short."""
        with self._changed:
            if not self._changed.wait(TICK_S):
                log.warning("no connection can be accepted: %s", trouble)

    # --- Ending ---
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what has ended a connection; http.server's own prints a traceback."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            log.warning("%s is gone unanswered: %s", client_address[0], error)
        else:
            log.exception("%s: an error in alarmrelay itself", client_address[0])

    def shutdown_request(self, request: Any) -> None:
        """Close a connection so that the client can read the last answer."""
        with suppress(OSError, Refused):
            request.settimeout(0)
            if isinstance(request, ssl.SSLSocket):
                with suppress(OSError, ValueError):
                    request.unwrap()  # says goodbye (RFC 8446, 6.1), and waits for none
            # Not SSLSocket's own, which would drop the TLS state, and read ciphertext.
            socket.socket.shutdown(request, socket.SHUT_WR)
            # To close while bytes come in is a reset, which can overtake the answer.
            stream = Stream(request)
            stream.deadline.allow(LINGER_S)
            while self.places[request].is_unread and stream.read(BLOCK_BYTES):
                pass
        self.close_request(request)

    def close_request(self, request: Any) -> None:
        """Close a connection, and give its place to another."""
        super().close_request(request)
        with self._changed:
            del self.places[request]
            self._changed.notify_all()

    def run(self) -> None:
        """Serve until stop(), then see each request on its way answered."""
        self.serve_forever(poll_interval=TICK_S)
        self.server_close()
        with self._changed:
            while not self._changed.wait_for(lambda: not self.places, GRACE_S):
                # Reading ends, and so does its thread; those not idle have time left.
                for connection, place in self.places.items():
                    if place.is_idle:
                        with suppress(OSError):  # it has ended
                            socket.socket.shutdown(connection, socket.SHUT_RD)

    def stop(self) -> None:
        """Let run() come to its end."""
        self.is_stopping = True
        # It returns once serve_forever() has, which may be stuck: nobody waits for it.
        threading.Thread(target=self.shutdown, daemon=True).start()


# === Status ===========================================================================
# How it is, for people (GET / and STATUS=) and for Prometheus (GET /metrics). It changes
# nothing: it asks the spool, the couriers and the totals, and puts that into words.

SINCE_DATE_S = 80_000  # what began longer ago is told with its date
STATUS_CHARACTERS = 900  # of a verdict in STATUS=: systemd takes 4096 bytes in all
CELL_BYTES = 160  # of a value on the page, lest fifty hostile alarms make it huge
VERDICT_BYTES = 2000  # of the verdict there
ROOMS_SHOWN = 30
# Kinds of verdict, the mildest first; on the page they are colours.
KINDS = ("good", "late", "bad")

PAGE_HEAD = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>alarmrelay</title>
<meta name="viewport" content="width=device-width">
<meta http-equiv="refresh" content="10">
<style>
:root { color-scheme: light dark; font: 95%/1.5 system-ui, sans-serif }
body { margin: 1rem }
h1 { font-size: 1.2rem; padding: 1rem; border-radius: .5rem; color: #fff }
h1 { background: #17672e }
.late { background: #8a5200 }
.bad { background: #b3261e }
table, tbody { display: block }
table { margin: 2rem 0 }
tr { display: flex; flex-wrap: wrap; gap: 0 1rem }
tr { padding: .4rem 0; border-top: 1px solid #8885 }
td { overflow-wrap: anywhere }
td:last-child { white-space: nowrap }
td:nth-child(3), .waiting :last-child { font-weight: 600 }
@media (min-width: 60rem) {
  td { flex: 2 14rem }
  :nth-child(2), :nth-child(n+5) { flex: 1 9rem }
}
</style>
"""


class Verdict(NamedTuple):
    """How it is, and why, since when and what to do."""

    kind: str  # of KINDS
    text: str


class Status:
    """Looks at the relay's parts, and puts what it sees into words."""

    def __init__(
        self,
        settings: Settings,
        spool: Spool,
        couriers: Mapping[str, Courier],
        totals: Totals,
    ) -> None:
        self._time_zone = settings.time_zone
        self._spool = spool
        self._couriers = couriers
        self._totals = totals

    def resources(self) -> dict[str, Resource]:
        """Return what can be read over HTTP, by path."""
        return {
            "/": Resource(self.page, "text/html; charset=utf-8"),
            "/metrics": Resource(self.metrics, "text/plain; version=0.0.4"),
        }

    def backlogs(self) -> dict[str, Backlog]:
        """Return what waits, by room; also for rooms that no setting has any more."""
        return self._spool.backlogs(self._couriers)

    # --- The verdict ---
    def verdict(self, backlogs: Mapping[str, Backlog]) -> Verdict:
        """Return the verdict on all: of its parts the worst kind, and every text."""
        parts = []
        for damaged in self._spool.damaged_files:
            words = f"recover those in {damaged}, move it away and restart"
            parts.append(Verdict("bad", f"alarms may be lost: {words}"))
        refusal = self._spool.refusal()
        if refusal:
            parts.append(Verdict("bad", f"New alarms are refused: {refusal}"))
        for room, backlog in sorted(backlogs.items()):
            if backlog.waiting:
                where = f" for room {room}" if len(backlogs) > 1 else ""
                parts.append(self._verdict_on_room(room, backlog.waiting, where))
        if parts:
            worst = max((part.kind for part in parts), key=KINDS.index)
            return Verdict(worst, "; ".join(part.text for part in parts))
        if len(backlogs) == 1:
            return Verdict("good", "All alarms are in the room")
        return Verdict("good", "All alarms are in their rooms")

    def _verdict_on_room(self, room: str, waiting: int, where: str) -> Verdict:
        """Return why the alarms of a room wait, since when, and what to do."""
        words = f"{waiting} alarms wait{where}"
        if waiting == 1:
            words = f"1 alarm waits{where}"
        courier = self._couriers.get(room)
        if not courier:
            return Verdict("bad", f"{words}: set {room_setting(room)}")
        trouble = courier.trouble
        if not trouble:
            return Verdict("late", words)
        failure = trouble.failure
        now_s = time.time()
        left_s = max(0, trouble.again_s - now_s)
        since = datetime.fromtimestamp(trouble.since_s, self._time_zone)
        day = f"{since:%b %d}, " if now_s - trouble.since_s > SINCE_DATE_S else ""
        words += f": Webex {failure.meaning.does} ({failure.reason}) since {day}{since:%H:%M}"
        words += f", tried again in {left_s:.0f} s"
        if failure.meaning.advice:
            words += f"; {failure.meaning.advice}"
        needs_mending = failure.kind in ("held", "refused")
        return Verdict("bad" if needs_mending else "late", words)

    # --- The page ---
    def page(self) -> str:
        """Return the page for people, in HTML of less than 100 KB."""
        now_ms = int(time.time() * 1000)
        backlogs = self.backlogs()
        days = self._spool.days(backlogs, now_ms)
        verdict = self.verdict(backlogs)
        words = cap(one_line(verdict.text), VERDICT_BYTES, html.escape)
        rows = [
            PAGE_HEAD,
            f'<h1 class="{verdict.kind}">{words}</h1>',
            '<table class="rooms">',
        ]
        for room in sorted(backlogs)[:ROOMS_SHOWN]:
            cells = self._room_cells(room, backlogs[room], days[room], now_ms)
            rows.append(table_row("", cells))
        rows.append("</table>")
        rows.append(f"<p>As of {local_time(now_ms, self._time_zone)}</p>")
        rows.append('<table class="alarms">')
        for stored in self._spool.newest():
            cells = self._alarm_cells(stored)
            state = cells[-1].split()[0]
            rows.append(table_row(state, cells))
        rows.append("</table>")
        return "\n".join(rows)

    def _room_cells(
        self,
        room: str,
        backlog: Backlog,
        day: Day,
        now_ms: int,
    ) -> list[str]:
        """Return the row of a room."""
        oldest = ""
        if backlog.oldest_ms is not None:
            oldest = f"oldest {describe_age(now_ms - backlog.oldest_ms)}"
        last = local_time(day.last_ms, self._time_zone) or "none in 24 h"
        return [
            room,
            f"{backlog.waiting} waiting",
            oldest,
            f"last delivered: {last}",
            f"{day.delivered} delivered in 24 h",
        ]

    def _alarm_cells(self, stored: StoredAlarm) -> list[str]:
        """Return the row of an alarm; its last cell begins with its state."""
        alarm = stored.alarm
        severity = alarm.severity()
        if alarm.is_clear():
            severity = f"cleared ({severity})"
        state = "waiting"
        if stored.delivered_ms is not None:
            took_s = max(0, stored.delivered_ms - alarm.received_ms) / 1000
            state = f"delivered after {took_s:.1f} s"
        return [
            alarm.time(self._time_zone),
            f"{alarm.mark()} {severity}",
            alarm.name(),
            one_line(alarm.text()),
            device_of(alarm),
            state,
        ]

    # --- The metrics ------------------------------------------------------------------
    def metrics(self) -> str:
        """Return Prometheus's text format.

        Source: prometheus.io/docs/instrumenting/exposition_formats.
        """
        with self._totals.lock:
            rooms = copy.deepcopy(self._totals.rooms)
            answers = self._totals.answers.copy()
        requests = {f'{{code="{status}"}}': answers[status] for status in STATUSES}
        version = {f'{{version="{__version__}"}}': 1}
        started = {"": self._totals.started_s}
        return "".join(
            [
                *totals_metrics(rooms),
                *backlog_metrics(self.backlogs(), time.time()),
                metric("alarmrelay_requests_total", "Requests, by status.", requests),
                metric("alarmrelay_build_info", "Its version.", version),
                metric("process_start_time_seconds", "Epoch seconds.", started),
            ]
        )


def table_row(row_class: str, cells: Iterable[str]) -> str:
    """Return a row of a table in HTML; cells are text."""
    row = f'<tr class="{row_class}">'
    for cell in cells:
        row += f"<td>{cap(one_line(cell), CELL_BYTES, html.escape)}</td>"
    return row + "</tr>"


def device_of(alarm: Alarm) -> str:
    """Return the values of the first key that says what an alarm is about."""
    for wanted in ("host-name", "system-ip", "site-id"):
        devices = []
        for key, value in alarm.values():
            if key == wanted and value:
                devices.append(one_line(value))
        if devices:
            return ", ".join(devices)
    return ""


# By what follows the metric's name: {'{room="/"}': 3}.
Samples = Mapping[str, float]


def metric(name: str, words: str, samples: Samples) -> str:
    """Return a metric's lines; its name and its samples tell its type."""
    kind = "gauge"
    if name.endswith("_total"):
        kind = "counter"
    elif any(labels.startswith("_bucket") for labels in samples):
        kind = "histogram"
    lines = [f"# HELP {name} {words}", f"# TYPE {name} {kind}"]
    lines += [f"{name}{labels} {number}" for labels, number in samples.items()]
    return "\n".join(lines) + "\n"


def totals_metrics(rooms: Mapping[str, RoomTotals]) -> list[str]:
    """Return the metrics of what has happened in each room."""

    def each(read: Callable[[RoomTotals], float]) -> Samples:
        return {f'{{room="{room}"}}': read(totals) for room, totals in rooms.items()}

    accepted = each(lambda totals: totals.accepted)
    duplicates = each(lambda totals: totals.duplicates)
    messages = each(lambda totals: totals.messages)
    delivered = each(lambda totals: totals.delivered)
    return [
        metric("alarmrelay_alarms_accepted_total", "Alarms put on disk.", accepted),
        metric("alarmrelay_duplicates_total", "Alarms posted twice.", duplicates),
        metric("alarmrelay_messages_delivered_total", "Messages posted.", messages),
        metric("alarmrelay_alarms_delivered_total", "Alarms in the room.", delivered),
        metric("alarmrelay_delivery_failures_total", "Failed attempts.", failure_samples(rooms)),
        metric("alarmrelay_delivery_seconds", "From post to room.", duration_samples(rooms)),
    ]


def failure_samples(rooms: Mapping[str, RoomTotals]) -> Samples:
    """Return how many attempts failed, by room and kind."""
    samples = {}
    for room, totals in rooms.items():
        for kind in FAILURE_KINDS:
            samples[f'{{room="{room}",reason="{kind}"}}'] = totals.failures[kind]
    return samples


def duration_samples(rooms: Mapping[str, RoomTotals]) -> Samples:
    """Return a histogram of the times from an alarm's post to the room."""
    samples: dict[str, float] = {}
    for room, totals in rooms.items():
        for limit_s in BUCKETS_S:
            labels = f'{{room="{room}",le="{limit_s}"}}'
            samples[f"_bucket{labels}"] = totals.took_at_most[limit_s]
        samples[f'_bucket{{room="{room}",le="+Inf"}}'] = totals.delivered
        samples[f'_sum{{room="{room}"}}'] = totals.took_s
        samples[f'_count{{room="{room}"}}'] = totals.delivered
    return samples


def backlog_metrics(backlogs: Mapping[str, Backlog], now_s: float) -> list[str]:
    """Return the metrics of what waits for each room."""
    waiting = {}
    oldest_s = {}
    for room, backlog in backlogs.items():
        label = f'{{room="{room}"}}'
        waiting[label] = backlog.waiting
        oldest_s[label] = 0.0
        if backlog.oldest_ms is not None:
            oldest_s[label] = max(0.0, now_s - backlog.oldest_ms / 1000)
    return [
        metric("alarmrelay_alarms_waiting", "Alarms not in the room yet.", waiting),
        metric("alarmrelay_oldest_waiting_seconds", "Age of the oldest.", oldest_s),
    ]


# === systemd ==========================================================================
# How the relay is run: its unit, its lines for the journal, and what the two tell one
# another. Without systemd all of it does nothing, and the relay runs all the same.
PROGRAM_FILE = "/usr/local/bin/alarmrelay.py"
UNIT_FILE = "/etc/systemd/system/alarmrelay.service"
# As alarmrelay.service in the repository. The directives are those of systemd 247,
# Debian 11.
UNIT = f"""\
[Unit]
Description=Relay of vManage alarms to a Webex room
Wants=network-online.target
After=network-online.target
# Never give up: an alarm that is posted meanwhile is lost.
StartLimitIntervalSec=0

[Service]
Type=notify
ExecStart=/usr/bin/python3 {PROGRAM_FILE}
EnvironmentFile=-{ENV_FILE}
Restart=always
RestartSec=1
# Settings that are wrong stay wrong until somebody mends them.
RestartPreventExitStatus=78
WatchdogSec=90
# An abort would leave a core file each time.
WatchdogSignal=SIGKILL
# Connections wait in the listening socket while the relay is away.
FileDescriptorStoreMax=1
LimitNOFILE={CONNECTIONS + 64}

# A user of its own, made at the start, and a directory for it: /var/lib/alarmrelay.
DynamicUser=yes
StateDirectory=alarmrelay
StateDirectoryMode=0700

# It needs its directory, the network and nothing else.
CapabilityBoundingSet=
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
SystemCallErrorNumber=EPERM
SystemCallArchitectures=native
MemoryDenyWriteExecute=yes
LockPersonality=yes
RestrictRealtime=yes
RestrictNamespaces=yes
PrivateDevices=yes
PrivateUsers=yes
ProtectHome=yes
ProtectClock=yes
ProtectHostname=yes
ProtectControlGroups=yes
ProtectKernelLogs=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectProc=invisible
ProcSubset=pid

[Install]
WantedBy=multi-user.target
"""
PRIORITIES = {logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3}  # sd-daemon(3)


class LineFormatter(logging.Formatter):
    """Makes one line of an event, whatever it holds; of a list of events, a line each."""

    def __init__(self) -> None:
        super().__init__()
        self._is_journal = False
        if sys.stderr:
            status = os.fstat(sys.stderr.fileno())
            stream = f"{status.st_dev}:{status.st_ino}"
            # systemd.exec(5).
            self._is_journal = os.environ.get("JOURNAL_STREAM") == stream

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines of a record, of which msg may be a list of events."""
        if isinstance(record.msg, list):
            return "\n".join(self._line(record, event) for event in record.msg)
        return self._line(record, super().format(record))

    def _line(self, record: logging.LogRecord, event: str) -> str:
        """Return an event in a line: with a priority for the journal, else with a time."""
        # What would begin a line of its own is shown as \n, \x1b, \u2028.
        line = BREAKING.sub(lambda match: ascii(match[0])[1:-1], event)
        if self._is_journal:
            return f"<{PRIORITIES.get(record.levelno, 3)}>{line}"
        return f"{self.formatTime(record)} {record.levelname} {line}"


def notify(*lines: str, descriptors: Sequence[int] = ()) -> None:
    """Tell systemd, where there is one, `READY=1`, `STATUS=…` and so on: sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]  # an abstract one: unix(7)
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.connect(address)
        message = "\n".join(lines).encode(errors="backslashreplace")  # a path may be odd
        socket.send_fds(systemd, [message], descriptors)


def listen(host: str, port: int) -> socket.socket:
    """Return the socket that systemd has kept over a restart or crash, or a new one."""
    is_ours = os.environ.get("LISTEN_PID") == str(os.getpid())  # sd_listen_fds(3)
    if is_ours and os.environ.get("LISTEN_FDS") == "1":
        kept = socket.socket(fileno=3)
        kept_host, kept_port = kept.getsockname()[:2]
        if kept_host == host and port in (0, kept_port):
            return kept
        kept.close()  # the setting has changed
        notify("FDSTOREREMOVE=1", "FDNAME=listen")
        time.sleep(TICK_S)  # until systemd has closed it as well
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise RelayError(f"listen: {host} port {port} cannot be had: {error}") from error
    notify("FDSTORE=1", "FDNAME=listen", descriptors=[listener.fileno()])
    return listener


# === Commands =========================================================================
# Each prints what there is to say and returns the exit status; what it cannot do, it
# raises.
SAMPLE = """{"rule_name_display": "System_Reboot_Issued", "rulename": "system-reboot-issued",
"type": "system-reboot-issued", "severity": "Critical", "message": "The device rebooted",
"active": true, "values_short_display": [{"host-name": "DC1-VEDGE1", "system-ip": "10.1.0.1"}]}"""
RELAY_HINT = "systemctl status alarmrelay; if listen, webhook_... or tls_... changed: restart it"


def say(line: str) -> None:
    """Print a line at once, since the next one may take seconds to find out."""
    print(line, flush=True)


def read_file(name: str) -> bytes:
    """Return a file's content, standard input's for `-`."""
    if name == "-":
        name = "/dev/stdin"
    return Path(name).read_bytes()


def preview(arguments: argparse.Namespace) -> int:
    """Print the message for each alarm in FILE, or in standard input; send nothing."""
    zone = read_setting("time_zone", SETTINGS["time_zone"], os.environ)
    vmanage_url = read_setting("vmanage_url", SETTINGS["vmanage_url"], os.environ)
    now_ms = int(time.time() * 1000)
    for alarm in parse_alarms(read_file(arguments.file), now_ms):
        say(alarm.message(now_ms, zone, vmanage_url))
    return 0


def send(arguments: argparse.Namespace) -> int:
    """Post the alarm in FILE, or the workshop's as of now, to the relay on this host."""
    settings = read_settings(os.environ)
    if arguments.file:
        content = read_file(arguments.file)
    else:
        now = {"uuid": str(uuid.uuid4()), "receive_time": int(time.time() * 1000)}
        content = json.dumps({**json.loads(SAMPLE), **now}).encode()
    url = relay_url(settings)
    relay = Client(url, f"Basic {settings.basic_credentials()}", is_local=True)
    answer = relay.ask("/", content)
    if answer.status:
        say(f"{answer.status} {answer.body.decode(errors='replace')}")
    if answer.status in (0, 401):
        raise CheckFailed(f"{url}: {answer.reason}; {RELAY_HINT}")
    if answer.status != 200:
        raise CheckFailed(f"{url}: {answer.reason}")
    return 0


def relay_url(settings: Settings) -> str:
    """Return where the relay listens; 0.0.0.0 is this host, too."""
    host, port = settings.listen
    scheme = "https" if settings.tls else "http"
    if ":" in host:
        return f"{scheme}://[{host}]:{port}"
    return f"{scheme}://{host}:{port}"


def check(_: argparse.Namespace) -> int:
    """Tell whether settings, disk, token and rooms are right, in a line for each."""
    status = 0
    for line in check_all():
        say(line)
        if line.startswith("wrong: "):
            status = 1
    return status


def check_all() -> Iterator[str]:
    """Yield `ok: …`, `warning: …` or `wrong: …` for each thing; raise CheckFailed."""
    try:
        settings = read_settings(os.environ)
    except SettingsError as error:
        raise CheckFailed(str(error)) from error
    now = local_time(int(time.time() * 1000), settings.time_zone)
    yield f"ok: settings; in {settings.time_zone} it is {now}"
    yield check_directory(settings.state_directory)
    webex = Client(settings.webex_url, f"Bearer {settings.bearer_token}")
    yield check_webex(webex, "bearer_token", "/people/me")
    for room, room_id in settings.room_ids.items():
        path = "/rooms/" + urllib.parse.quote(room_id, safe="")
        yield check_webex(webex, room_setting(room), path)


def check_directory(directory: Path) -> str:
    """Return whether the spool has its place and room on the disk."""
    place = directory
    # The relay makes it, in the first of its parents that is there.
    while not os.path.exists(place):
        place = place.parent
    free = shutil.disk_usage(place).free
    words = f"state directory {directory}: {free >> 20} MiB free"
    if place.is_dir() and os.access(place, os.W_OK | os.X_OK) and free >= FREE_BYTES:
        return f"ok: {words}"
    needs = f"must have {FREE_BYTES >> 20} MiB and be writable by the relay's user"
    return f"wrong: {words}; {needs}"


def check_webex(webex: Client, setting: str, path: str) -> str:
    """Return whether Webex knows whom, or what, a setting names."""
    answer = webex.ask(path)
    outcome = judge(answer, 0, time.time())
    if isinstance(outcome, Failure):
        advice = outcome.meaning.advice
        return f"wrong: {setting}: {outcome.reason}{'; ' if advice else ''}{advice}"
    found = read_object(answer.body)  # a person or a room
    name = one_line(found.get("title") or found.get("displayName"))
    if found.get("type") == "person":
        words = "a person's, which ends after 12 hours: create a bot"
        return f"warning: {setting}: {name}, {words}"
    return f"ok: {setting}: {name}"


def install(arguments: argparse.Namespace) -> int:
    """Write program, unit and, if there are none, settings; below DIR, or here as root."""
    root = arguments.root
    try:
        write_file(root + PROGRAM_FILE, Path(__file__).read_text(encoding="utf-8"), 0o755)
        write_file(root + UNIT_FILE, UNIT, 0o644)
        if not Path(root + ENV_FILE).exists():
            write_file(root + ENV_FILE, settings_file(), 0o600)
    except OSError as error:
        words = f"install needs root and systemd, or --root DIR: {error}"
        raise RelayError(words) from error
    say(f"next: sudoedit {ENV_FILE}")
    # `enable` lets systemd read the unit, too.
    say("      sudo systemctl enable alarmrelay && sudo systemctl restart alarmrelay")
    return 0


def write_file(name: str, text: str, mode: int) -> None:
    """Write a file whole or not at all, with these permissions from the first."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = Path(f"{name}.new")
    new.unlink(missing_ok=True)
    new.touch(mode)
    new.chmod(mode)  # whatever the umask
    new.write_text(text, encoding="utf-8")
    new.replace(path)
    say(f"written: {name}")


def settings_file() -> str:
    """Return a settings file in which each setting is explained."""
    text = "# 'Quote odd values so.' After a change: sudo systemctl restart alarmrelay\n"
    for name, setting in SETTINGS.items():
        is_required = not re.fullmatch(setting.form, setting.default)
        needed = ", required" if is_required else ""
        comment = "" if is_required else "#"
        text += f"\n# {name}{needed}: {setting.expected}\n"
        text += f"{comment}{name}={setting.default}\n"
    return text


def run_as_the_service() -> int:
    """Run this command with the settings of the service and, while it runs, its credentials."""
    words = [
        *("systemd-run", "--quiet", "--pipe", "--wait", "--same-dir"),
        *("-p", f"EnvironmentFile={ENV_FILE}"),
        *("-E", "STATE_DIRECTORY=/var/lib/alarmrelay"),
        *("-E", "CREDENTIALS_DIRECTORY=/run/credentials/alarmrelay.service"),
    ]
    return subprocess.run([*words, sys.executable, *sys.argv], check=False).returncode


# === main =============================================================================
# The order of the parts: what a part needs is built before it, and stopped after it.
class Relay:
    """The parts of the daemon, from start to stop."""

    def __init__(self, settings: Settings) -> None:
        """Build all parts; raise RelayError if one cannot be."""
        self.spool = Spool(settings.state_directory)
        self._settings = settings
        self._totals = Totals(settings.room_ids)
        webex = Client(settings.webex_url, f"Bearer {settings.bearer_token}")
        self._couriers = {
            room: Courier(room, settings, self.spool, webex, self._totals)
            for room in settings.room_ids
        }
        self._status = Status(settings, self.spool, self._couriers, self._totals)
        host, port = settings.listen
        listener = listen(host, port)
        self._where = f"listening on {host} port {listener.getsockname()[1]}"
        self._server = Server(
            listener,
            settings,
            self.spool,
            self._couriers,
            self._totals,
            self._status.resources(),
        )
        self._threads: list[threading.Thread] = []
        # sd_watchdog_enabled(3); 0: systemd waits for no sign of life.
        self._watchdog_s = int(os.environ.get("WATCHDOG_USEC") or 0) / 1e6
        self.tick_s = TICK_S
        if self._watchdog_s:
            self.tick_s = min(TICK_S, self._watchdog_s / 3)

    def start(self) -> None:
        """Begin to accept and to deliver, and say so."""
        couriers = self._couriers.values()
        for run in [self._server.run, *(courier.run for courier in couriers)]:
            thread = threading.Thread(target=run, daemon=True)
            thread.start()
            self._threads.append(thread)
        host, _ = self._settings.listen
        if not (self._settings.tls or ipaddress.ip_address(host).is_loopback):
            words = "password and alarms come over the network in plain text"
            log.warning("no tls_certificate: %s", words)
        level = logging.INFO
        words = self._where
        with suppress(Unavailable):  # a full disk: the next tick tells it
            verdict, words = self._look()
            if verdict.kind == "bad":
                level = logging.WARNING
        log.log(level, "alarmrelay %s: %s", __version__, words)
        notify("READY=1", f"STATUS={words}")

    def _look(self) -> tuple[Verdict, str]:
        """Return how it is, and that in a line for STATUS=."""
        backlogs = self._status.backlogs()
        verdict = self._status.verdict(backlogs)
        waiting = sum(backlog.waiting for backlog in backlogs.values())
        delivered = self._totals.delivered()
        numbers = f"{waiting} waiting, {delivered} delivered"
        return verdict, f"{verdict.text[:STATUS_CHARACTERS]}; {self._where}; {numbers}"

    def tick(self) -> None:
        """Tell systemd how it is, and delete what is older than retention_days."""
        # A full disk: the verdict tells it, and the next tick is near.
        with suppress(Unavailable):
            notify(f"STATUS={self._look()[1]}")
        self._tell_watchdog()
        with suppress(Unavailable):
            now_ms = int(time.time() * 1000)
            self.spool.delete_delivered(now_ms - self._settings.retention_days * DAY_MS)
        self._tell_watchdog()

    def _tell_watchdog(self) -> None:
        """Give a sign of life if accept loop and couriers do; the spool just did."""
        parts = [self._server.deadline]
        parts += [courier.deadline for courier in self._couriers.values()]
        if self._watchdog_s and all(deadline.left_s() > 0 for deadline in parts):
            notify("WATCHDOG=1")

    def stop(self) -> None:
        """Stop accepting, finish what is on its way, close the spool; in this order."""
        notify("STOPPING=1")
        deadline = Deadline()
        deadline.allow(STOP_S)
        self._server.stop()
        for courier in self._couriers.values():
            courier.stop()
        for thread in self._threads:
            thread.join(max(0.0, deadline.left_s()))
        self.spool.close(max(1.0, deadline.left_s()))


def serve(_: argparse.Namespace) -> int:
    """Relay alarms until SIGTERM or SIGINT."""
    settings = read_settings(os.environ)
    os.umask(0o077)  # nobody else reads the spool
    # No handlers: one would interrupt this thread, perhaps inside a lock that it needs.
    # The signals wait until sigtimedwait() takes them.
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # for the threads to come as well
    relay = Relay(settings)
    relay.start()
    is_stopping = False
    while not is_stopping and not relay.spool.error:
        relay.tick()
        taken = signal.sigtimedwait(signals, relay.tick_s)
        # Once SIGCONT has ended a wait, CPython may return what is no signal at all.
        is_stopping = taken is not None and taken.si_signo in signals
    error = relay.spool.error
    relay.stop()
    if error:
        raise RelayError(error)
    return 0


def parse_arguments() -> argparse.Namespace:
    """Return the command line, with its function in `run`; exit with 2 if it is wrong."""
    parser = argparse.ArgumentParser(description="Relay vManage's alarms to Webex.")
    version = f"alarmrelay {__version__}"
    parser.add_argument("--version", action="version", version=version)
    parser.set_defaults(run=serve, reads_settings=False)
    commands = parser.add_subparsers(metavar="COMMAND", help="none: relay alarms")

    def add(run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        """Add a command that is named and described as its function is."""
        words = run.__doc__
        command = commands.add_parser(run.__name__, help=words, description=words)
        command.set_defaults(run=run)
        return command

    add(check).set_defaults(reads_settings=True)
    add(preview).add_argument("file", nargs="?", default="-", metavar="FILE", help="or -")
    send_parser = add(send)
    send_parser.set_defaults(reads_settings=True)
    send_parser.add_argument("file", nargs="?", metavar="FILE", help="or -")
    add(install).add_argument("--root", default="", metavar="DIR")
    return parser.parse_args()


def main() -> int:
    """Run the command that the arguments name; return the exit status."""
    arguments = parse_arguments()
    logging.basicConfig(level=logging.INFO)
    logging.root.handlers[0].setFormatter(LineFormatter())
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Whatever the locale, and whatever bytes a path has.
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    # If any is set, the environment is taken, else the service's file: never a mixture.
    has_settings = any(name in os.environ for name in ("STATE_DIRECTORY", *SETTINGS))
    try:
        if arguments.reads_settings and not has_settings and Path(ENV_FILE).exists():
            return run_as_the_service()
        status: int = arguments.run(arguments)
        return status
    except BrokenPipeError:  # `alarmrelay.py preview | head -1`: the reader has enough
        return RelayError.exit_status
    except (RelayError, OSError, sqlite3.Error) as error:
        for line in str(error).splitlines():
            log.error("%s", line)
        notify(f"STATUS={BREAKING.sub('; ', str(error))}")
        if isinstance(error, RelayError):
            return error.exit_status
        return RelayError.exit_status


if __name__ == "__main__":
    # Not sys.exit(): threads may still wait for idle clients, and Python would abort on
    # their output.
    os._exit(main())
