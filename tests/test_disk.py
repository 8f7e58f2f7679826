"""What a disk can do to the spool: fill up, turn read-only, fail, damage the file."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import faults
import pytest
from harness import FAST, Relay, environment, get, run
from page import Page
from webex_standin import ROOM, Fault

from alarmrelay import (
    SCHEMA_VERSION,
    Alarm,
    Answer,
    Courier,
    Delivery,
    Spool,
    Totals,
    Unavailable,
    read_settings,
)

MEBIBYTE = 2**20
ACCEPTED = (200, {"status": "accepted"})
FULL = {**FAST, "DISK_RETRY_S": 0.1}
UNREACHABLE = "http://127.0.0.1:9/v1"


def numbered(number: int) -> dict[str, str]:
    return {"message": f"number {number}"}


def numbers(webex) -> list[int]:
    return [int(text.split("number ")[1].split(",")[0]) for text in webex.alarms()]


def rows(path: Path, columns: str = "delivered_ms IS NOT NULL") -> list[object]:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return [row[0] for row in db.execute(f"SELECT {columns} FROM alarm ORDER BY id")]


class Disk:
    """A small file system that only the relay sees, as its state directory.

    The relay can be killed and begun again within it, once.
    """

    def __init__(self, relay: Relay, folder: Path) -> None:
        folder.mkdir()
        words = f'mount -t tmpfs -o size=40m tmpfs {folder} && {{ "$@" || "$@"; }}'
        relay.command[:0] = ["unshare", "--mount", "sh", "-c", words, "sh"]
        self.relay = relay
        self.folder = folder

    @property
    def path(self) -> Path:
        return Path(f"/proc/{self.relay.process.pid}/root{self.folder}")

    def leave_free(self, size: int) -> None:
        """Let others take up all but so many bytes."""
        filler = self.path / "filler"
        filler.unlink(missing_ok=True)
        free = shutil.disk_usage(self.path).free
        with filler.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
            for _ in range(max(0, free - size) // 4096):
                stream.write(b"x" * 4096)
            while size == 0:
                stream.write(b"x" * 4096)

    def spool(self) -> list[object]:
        """Return of each alarm in the spool whether it is recorded as delivered."""
        copy = self.relay.log_path.parent / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.path, copy, ignore=shutil.ignore_patterns("filler"))
        return rows(copy / "alarmrelay.db")

    def signal(self, number: int) -> None:
        """Send the relay a signal, past the shell around it."""
        shell = self.relay.process.pid
        (child,) = Path(f"/proc/{shell}/task/{shell}/children").read_text().split()
        os.kill(int(child), number)

    def kill(self) -> None:
        """Kill the relay, and wait until the next one is ready."""
        self.signal(signal.SIGKILL)
        self.relay.told("READY=1")
        self.relay.port = int(re.findall(r" listening on \S+ port (\d+);", self.relay.log())[-1])


@pytest.fixture
def disk(tmp_path, webex, request):
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]
    if not shutil.which("unshare") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this user may not mount a small disk")
    relay = Relay(tmp_path, webex.url, {**FULL, **getattr(request, "param", {})})
    disk = Disk(relay, tmp_path / "state")
    with relay:
        yield disk
        disk.signal(signal.SIGTERM)
        assert relay.process.wait(20) == 0


def test_under_the_floor_new_alarms_are_refused_and_waiting_ones_delivered(disk, webex):
    relay = disk.relay
    webex.fault_for = lambda _: Fault(status=404)
    assert relay.post(numbered(1)) == ACCEPTED
    disk.leave_free(15 * MEBIBYTE)
    error = f"the disk is full, or under 16 MiB free in {disk.folder}"
    assert relay.post(numbered(2)) == (503, {"error": error})
    assert get(relay, "/healthz")[0] == 503
    webex.fault_for = lambda _: None
    relay.told("0 waiting, 1 delivered")
    disk.leave_free(20 * MEBIBYTE)
    assert get(relay, "/healthz")[0] == 200
    assert relay.post(numbered(2)) == ACCEPTED
    relay.told("0 waiting, 2 delivered")
    assert numbers(webex) == [1, 2]


def deliver_on_a_full_disk(disk: Disk, webex, count: int) -> None:
    """Let alarms wait, fill the disk, and wait until a message has not been recorded twice."""
    webex.fault_for = lambda _: Fault(status=404)
    for number in range(count):
        assert disk.relay.post({**numbered(number), "x": "y" * 30_000}) == ACCEPTED
    disk.leave_free(0)
    webex.fault_for = lambda _: None
    webex.wait_for(lambda: webex.messages)
    for _ in range(10):  # of 0.05 s, while the courier tries every 0.1 s
        disk.relay.told("STATUS=New alarms are refused: the disk is full, ")
    assert disk.relay.post(numbered(99))[0] == 503


def test_on_a_full_disk_one_message_is_sent_and_the_rest_once_there_is_space(disk, webex):
    deliver_on_a_full_disk(disk, webex, 10)
    assert disk.spool() == [0] * 10
    assert numbers(webex) == [0]
    disk.leave_free(20 * MEBIBYTE)
    assert disk.relay.post(numbered(10)) == ACCEPTED
    disk.relay.told("0 waiting, 11 delivered")
    assert disk.spool() == [1] * 11
    assert numbers(webex) == list(range(11))


def test_a_kill_on_a_full_disk_repeats_one_message_and_the_start_delivers_the_rest(disk, webex):
    deliver_on_a_full_disk(disk, webex, 3)
    disk.kill()
    assert disk.relay.post(numbered(99))[0] == 503
    webex.wait_for(lambda: len(webex.messages) > 1)
    disk.leave_free(20 * MEBIBYTE)
    disk.relay.told("0 waiting, 3 delivered")
    assert numbers(webex) == [0, 0, 1, 2]


@pytest.mark.parametrize("disk", [{"FREE_BYTES": 0}], indirect=True)
def test_a_commit_that_finds_the_disk_full_acknowledges_nothing_and_passes(disk, webex):
    """The floor is looked at before; between that and the commit others may have been faster."""
    relay = disk.relay
    disk.leave_free(0)
    large = {**numbered(1), "x": "y" * 2_000_000}
    status, answer = relay.post(large)
    assert status == 503
    assert "full" in answer["error"]
    disk.leave_free(20 * MEBIBYTE)
    assert relay.post(large) == ACCEPTED
    relay.told("0 waiting, 1 delivered")
    assert numbers(webex) == [1]


def fill(directory: Path, count: int = 300, first: int = 0) -> None:
    spool = Spool(directory)
    for number in range(first, first + count):
        alarm = Alarm({**numbered(number), "x": "y" * 500}, int(time.time() * 1000))
        spool.store("/", b"%d" % number, [alarm], "127.0.0.1")
    spool.close()


DAMAGES = {
    "noise": lambda data, dice: dice.randbytes(len(data)),
    "noise in front": lambda data, dice: dice.randbytes(100) + data[100:],
    "noise after the first page": lambda data, dice: data[:4096] + dice.randbytes(len(data) - 4096),
    "truncated": lambda data, dice: data[: len(data) // 2 + 7],
    "truncated to a page": lambda data, dice: data[:4096],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_file_is_moved_aside_and_the_relay_comes_up(tmp_path, webex, damage):
    fill(tmp_path / "state")
    path = tmp_path / "state" / "alarmrelay.db"
    damaged = damage(path.read_bytes(), random.Random(7))
    path.write_bytes(damaged)
    # What does not show at the start shows when the courier looks, and then systemd starts it anew.
    relay = Relay(tmp_path, webex.url)
    for _ in range(2):
        with contextlib.suppress(AssertionError):
            relay.start()
            relay.wait_for_log("is damaged", timeout_s=5)
        if relay.process.poll() is None:
            break
    assert relay.post({"message": "after"}) == ACCEPTED
    webex.wait_for_texts("after")
    assert relay.stop() == 0
    (aside,) = path.parent.glob("alarmrelay.db.damaged-????-??-??-??????")
    assert aside.read_bytes()[-500:] == damaged[-500:]
    assert f"see {aside}" in relay.log()
    assert "Traceback" not in relay.log()


@pytest.mark.parametrize("is_there", [True, False], ids=["empty", "missing"])
def test_a_wal_without_its_database_is_kept_and_said(tmp_path, webex, is_there):
    webex.fault_for = lambda _: Fault(status=401)
    relay = Relay(tmp_path, webex.url)
    path = tmp_path / "state" / "alarmrelay.db"
    with relay:
        assert relay.post(numbered(1)) == ACCEPTED
        relay.kill()
        path.unlink()
        if is_there:
            path.touch()
        wal = Path(f"{path}-wal").read_bytes()
        relay.start()
        assert "the spool is damaged (its -wal stands alone), what waited in it" in relay.log()
        (aside,) = path.parent.glob("alarmrelay.db.damaged-*-wal")
        assert aside.read_bytes() == wal
        assert b"number 1" in wal
        damaged = aside.with_name(aside.name[:-4])
        words = f"alarms may be lost: recover those in {damaged}, move it away and restart"
        assert relay.told(f"STATUS={words}; listening on ")
        assert Page(relay).h1 == ["bad", words]
        assert relay.post(numbered(2)) == ACCEPTED
        damaged.unlink()
        relay.kill()
        relay.start()
        relay.told("STATUS=1 alarm waits")


@pytest.mark.parametrize("damage", ["page", "type"])
def test_what_is_damaged_of_delivered_alarms_keeps_no_waiting_one(tmp_path, webex, damage):
    path = tmp_path / "state" / "alarmrelay.db"
    fill(tmp_path / "state", 300)
    spool = Spool(tmp_path / "state")
    while waiting := spool.next_batch("/").alarms:
        spool.record(Delivery("m", int(time.time() * 1000), waiting))
    spool.close()
    fill(tmp_path / "state", 100, first=300)
    if damage == "type":
        with contextlib.closing(sqlite3.connect(path)) as db, db:
            db.execute("UPDATE alarm SET delivered_ms = 'x' WHERE id = 5")
    else:
        data = bytearray(path.read_bytes())
        start = data.find(b'"number 5"') // 4096 * 4096
        data[start : start + 4096] = b"\xee" * 4096
        path.write_bytes(data)
    with Relay(tmp_path, webex.url):
        webex.wait_for_texts("number 399,")
    assert numbers(webex) == list(range(300, 400))
    assert not [*path.parent.glob("*.damaged-*")]


@pytest.mark.parametrize("count", [3, 12], ids=["singly", "digest"])
def test_alarms_whose_time_is_damaged_wait_and_are_delivered_as_others(tmp_path, webex, count):
    fill(tmp_path / "state", count)
    with contextlib.closing(sqlite3.connect(tmp_path / "state" / "alarmrelay.db")) as db, db:
        db.execute("UPDATE alarm SET received_ms = 'x' WHERE id < 3")  # also the oldest's
    webex.fault_for = lambda _: Fault(status=404)
    with Relay(tmp_path, webex.url, FAST) as relay:
        relay.told(f"STATUS={count} alarms wait: Webex has no such room")
        assert get(relay, "/")[0] == get(relay, "/metrics")[0] == 200
        webex.fault_for = lambda _: None
        relay.told(f"0 waiting, {count} delivered")
        assert get(relay, "/")[0] == get(relay, "/metrics")[0] == 200
    assert numbers(webex) == list(range(count))


def test_a_look_that_fails_at_a_whole_file_ends_the_relay_with_74_and_moves_nothing(
    tmp_path, webex
):
    """The disk may have misread it; what waits is delivered by the next start that can read."""
    flag = tmp_path / "misread"
    webex.fault_for = lambda _: Fault(status=404)
    relay = Relay(tmp_path, webex.url, FAST, faults.let(faults.misread, flag))
    relay.start()
    assert relay.post(numbered(1)) == ACCEPTED
    assert relay.post(numbered(2)) == ACCEPTED
    flag.touch()
    assert relay.process.wait(20) == 74
    assert "the spool cannot be read or written: database disk image is malf" in relay.log()
    flag.touch()
    with pytest.raises(AssertionError, match="was not told 'READY=1'"):
        relay.start()
    assert relay.process.wait(20) == 74
    assert f"no spool can be opened in {tmp_path / 'state'}: database disk image" in relay.log()
    assert not flag.exists()
    webex.fault_for = lambda _: None
    with relay:
        relay.told("0 waiting, 2 delivered")
    assert numbers(webex) == [1, 2]
    assert "the spool is damaged" not in relay.log()
    assert not [*(tmp_path / "state").glob("*.damaged-*")]


class TakesAll:
    """In place of the client for Webex."""

    def ask(self, path: str, payload: bytes) -> Answer:
        return Answer(200, "200 OK", {}, b'{"id": "m"}')


def lives_until_well(directory: Path) -> int:
    """Start the relay's parts as systemd would until they deliver all and take an alarm."""
    settings = read_settings(environment(directory, UNREACHABLE))
    for life in range(4):
        spool = Spool(directory)
        courier = Courier("/", settings, spool, TakesAll(), Totals(["/"]))
        with contextlib.suppress(Unavailable):
            while courier.step() is not None:
                pass
            spool.delete_delivered(1)
            if spool.store("/", b"new", [Alarm({}, 1)], "127.0.0.1"):
                spool.close()
                return life
        assert spool.error
        spool.close()
    raise AssertionError("it does not come up")


def patched(data: bytes, place: int, new: bytes) -> bytes:
    return data[:place] + new + data[place + len(new) :]


def flipped(data: bytes, place: int, bits: int) -> bytes:
    return patched(data, place, bytes([data[place] ^ bits]))


def damaged_anywhere(data: bytes, dice: random.Random) -> Iterator[bytes]:
    for _ in range(60):
        place = dice.randrange(200, len(data) - 512)
        yield patched(data, place, dice.randbytes(512))
        yield patched(data, place // 4096 * 4096, bytes(4096))
        yield flipped(data, place, dice.randrange(1, 256))


SERIES = {
    "anywhere": damaged_anywhere,
    "last page": lambda data, _: (data[:-size] for size in range(1, 4097, 111)),
    # Before the version of the tables: a newer relay's is left alone.
    "header": lambda data, _: (flipped(data, place, 0x55) for place in range(60)),
    # SQLite shows the words for tables in its errors, and then they are no UTF-8.
    "words": lambda data, _: (
        flipped(data, place, 0x80)
        for place in range(data.index(b"CREATE "), data.rindex(b"CREATE "), 17)
    ),
}


@pytest.mark.parametrize("damages", SERIES.values(), ids=SERIES.keys())
def test_no_damage_keeps_the_relay_from_coming_up(tmp_path, caplog, damages):
    fill(tmp_path / "whole", 40)
    whole = (tmp_path / "whole" / "alarmrelay.db").read_bytes()
    state = tmp_path / "state"
    state.mkdir()
    for number, data in enumerate(damages(whole, random.Random(20261124))):
        for left in state.iterdir():
            left.unlink()
        caplog.clear()
        (state / "alarmrelay.db").write_bytes(data)
        lives = lives_until_well(state)
        aside = list(state.glob("alarmrelay.db.damaged-*"))
        assert bool(aside) == ("the spool is damaged" in caplog.text), number
        assert lives <= 1 + len(aside), number


def test_an_alarm_that_is_damaged_on_disk_is_sent_as_what_is_left_of_it(tmp_path, webex):
    fill(tmp_path / "state", 3)
    path = tmp_path / "state" / "alarmrelay.db"
    data = path.read_bytes()
    assert data.count(b'"message": "number 1"') == 1
    path.write_bytes(data.replace(b'"message": "number 1"', b'"message: \xff"number 1"'))
    with Relay(tmp_path, webex.url):
        webex.wait_for(lambda: len(webex.messages) == 3)
    first, damaged, last = webex.texts()
    assert "number 0," in first
    assert "This alarm is damaged on disk: " in damaged
    assert 'number 1"' in damaged
    assert "number 2," in last


def test_a_file_of_a_newer_version_is_left_alone(tmp_path):
    fill(tmp_path / "state", 1)
    path = tmp_path / "state" / "alarmrelay.db"
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    before = path.read_bytes()
    done = run(environment(tmp_path, UNREACHABLE))
    assert done.returncode == 74
    assert f"is of a newer relay, version {SCHEMA_VERSION + 1}: use that" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert path.read_bytes() == before


# The tables of 0.1.0 by their versions; 0 is that of a file in which no version was noted.
TABLES_1 = """
    CREATE TABLE alarm (
        id INTEGER PRIMARY KEY, room TEXT NOT NULL, received_ms INTEGER NOT NULL,
        request BLOB NOT NULL, body TEXT NOT NULL, delivered_ms INTEGER, message_id TEXT);
    CREATE INDEX waiting ON alarm (room, id) WHERE delivered_ms IS NULL;
    CREATE INDEX delivered ON alarm (delivered_ms) WHERE delivered_ms IS NOT NULL;
"""
TABLES_2 = """
    ALTER TABLE alarm ADD COLUMN uuid TEXT;
    ALTER TABLE alarm ADD COLUMN down TEXT;
    CREATE INDEX request ON alarm (request);
    CREATE INDEX uuid ON alarm (uuid, room) WHERE uuid IS NOT NULL;
    CREATE INDEX down ON alarm (down, room) WHERE down IS NOT NULL;
"""
THREADS_2 = """
    UPDATE alarm SET uuid = 'réal' WHERE id = 1;
    UPDATE alarm SET down = '["BFD_TLOC", "color=lte", "host-name=BR1"]' WHERE id = 3;
"""
VALUES = {"values_short_display": [{"host-name": "BR1", "color": "lte"}]}


@pytest.mark.parametrize("version", [0, 1, 2])
def test_a_file_of_an_older_version_is_taken_over_with_all_that_waits(tmp_path, webex, version):
    path = tmp_path / "state" / "alarmrelay.db"
    now_ms = int(time.time() * 1000)
    old = [
        ('{"uuid": "r\\u00e9al", "message": "down"}', now_ms, "message-of-old"),
        ("no JSON", now_ms, "message-of-old-2"),
        (json.dumps({"rule_name_display": "BFD_TLOC_Down", **VALUES}), now_ms, "message-of-old-3"),
        (json.dumps(numbered(4)), None, None),
        (json.dumps({**numbered(5), "uuid": "new"}), None, None),
    ]
    path.parent.mkdir()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.executescript(f"PRAGMA journal_mode = WAL; {TABLES_1} PRAGMA user_version = {version};")
        if version == 2:
            db.executescript(TABLES_2)
        for number, (body, delivered_ms, message_id) in enumerate(old, 1):
            db.execute(
                """INSERT INTO alarm
                (id, room, received_ms, request, body, delivered_ms, message_id)
                VALUES (?, '/', ?, ?, ?, ?, ?)""",
                (number, now_ms, b"%d" % number, body, delivered_ms, message_id),
            )
        if version == 2:
            db.executescript(THREADS_2)
    for message_id in ("message-of-old", "message-of-old-3"):
        webex.take({"roomId": ROOM, "markdown": "of old"})["id"] = message_id
    with Relay(tmp_path, webex.url) as relay:
        relay.told("0 waiting, 2 delivered")
        for uuid in ("réal", "new"):
            relay.post({"active": False, "cleared_events": [uuid]})
        relay.post({"rule_name_display": "BFD_TLOC_Up", "active": False, **VALUES})
        relay.told("0 waiting, 5 delivered")
    _, _, *messages = webex.messages
    assert "number 4," in messages[0]["markdown"]
    assert "number 5," in messages[1]["markdown"]
    parents = [message.get("parentId") for message in messages]
    new_id = messages[1]["id"]
    if version == 2:
        assert parents == [None, None, "message-of-old", new_id, "message-of-old-3"]
    else:  # what was delivered before has no thread
        assert parents == [None, None, None, new_id, None]
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
    assert len(rows(path)) == 8


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
@pytest.mark.parametrize("call", ["fdatasync", "pwrite64"])
def test_an_io_error_acknowledges_nothing_and_ends_the_process_with_74(tmp_path, webex, call):
    relay = Relay(tmp_path, webex.url)
    relay.start()
    assert relay.post(numbered(1)) == ACCEPTED
    webex.wait_for(lambda: webex.messages)
    relay.told("1 delivered")
    inject = ["-e", f"trace={call}", "-e", f"inject={call}:error=EIO"]
    command = ["strace", "-f", "-qq", *inject, "-o", "/dev/null", "-p", str(relay.process.pid)]
    with subprocess.Popen(command) as tracer:
        status_path = Path(f"/proc/{relay.process.pid}/status")
        while f"TracerPid:\t{tracer.pid}" not in status_path.read_text():
            assert tracer.poll() is None
        status, answer = relay.post(numbered(2))
        assert status == 503
        assert "I/O error" in answer["error"]
        assert relay.process.wait(20) == 74
    assert "the spool cannot be read or written: disk I/O error" in relay.log()
    relay.start()
    assert relay.post(numbered(3)) == ACCEPTED
    webex.wait_for(lambda: 3 in numbers(webex))
    assert relay.stop() == 0
    # What was refused may stand in the file all the same: it is only not promised.
    assert numbers(webex) in ([1, 3], [1, 2, 3])


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
def test_a_disk_that_refuses_writes_from_the_start_ends_each_start_before_anything_is_sent(
    tmp_path, webex
):
    """What has been sent could not be recorded, and would be sent again by each start."""
    fill(tmp_path / "state", 2)
    relay = Relay(tmp_path, webex.url)
    inject = ["-e", "trace=pwrite64", "-e", "inject=pwrite64:error=EIO"]
    command = ["strace", "-f", "-qq", *inject, "-o", "/dev/null", *relay.command]
    for _ in range(3):
        done = subprocess.run(
            command, env=relay.environ, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 74
        assert f"no spool can be opened in {tmp_path / 'state'}: disk I/O error" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert webex.requests == []
    with relay:
        relay.told("0 waiting, 2 delivered")
    assert numbers(webex) == [0, 1]


@pytest.mark.skipif(os.geteuid() != 0, reason="root is needed to make a file system read-only")
def test_a_read_only_file_system_is_an_error_that_names_the_directory(tmp_path, webex):
    (tmp_path / "state").mkdir()
    words = f'mount -t tmpfs -o ro tmpfs {tmp_path / "state"} && exec "$@"'
    relay = Relay(tmp_path, webex.url)
    command = ["unshare", "--mount", "sh", "-c", words, "sh", *relay.command]
    done = subprocess.run(command, env=relay.environ, capture_output=True, text=True, timeout=30)
    assert done.returncode == 74
    assert f"no spool can be opened in {tmp_path / 'state'}: " in done.stderr
    assert len(done.stderr.splitlines()) == 1
