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
from datetime import timezone
from pathlib import Path

import pytest
from harness import Relay, environment, run
from page import Page
from webex_standin import ROOM, Fault

from alarmrelay import MIGRATIONS, Alarm, Courier, Refused, Spool

MEBIBYTE = 2**20


def numbered(number: int) -> dict[str, str]:
    return {"message": f"number {number}"}


def numbers(webex) -> list[int]:
    return [int(text.split("number ")[1].split(",")[0]) for text in webex.alarms()]


def rows(path: Path, columns: str = "delivered_ms IS NOT NULL") -> list[object]:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return [row[0] for row in db.execute(f"SELECT {columns} FROM alarm ORDER BY id")]


class Disk:
    """A small file system that only the relay sees, as its state directory."""

    def __init__(self, relay: Relay, folder: Path, mebibytes: int) -> None:
        folder.mkdir()
        words = f'mount -t tmpfs -o size={mebibytes}m tmpfs {folder} && exec "$@"'
        relay.command[:0] = ["unshare", "--mount", "sh", "-c", words, "sh"]
        self.relay, self.folder = relay, folder

    @property
    def path(self) -> Path:
        return Path(f"/proc/{self.relay.process.pid}/root{self.folder}")

    def leave_free(self, size: int) -> None:
        """Let others take up all but so many bytes."""
        filler = self.path / "filler"
        filler.unlink(missing_ok=True)
        with filler.open("wb") as stream, contextlib.suppress(OSError):
            for _ in range(max(0, shutil.disk_usage(self.path).free - size) // 4096):
                stream.write(b"x" * 4096)
        if size == 0:
            with filler.open("ab", buffering=0) as stream, contextlib.suppress(OSError):
                while stream.write(b"x" * 4096):
                    pass


@pytest.fixture
def disk(tmp_path, webex):
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]
    if not shutil.which("unshare") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this user may not mount a small disk")
    relay = Relay(tmp_path, webex.url, {"TICK_S": 0.1, "HOLD_S": 0.2})
    disk = Disk(relay, tmp_path / "state", 40)
    with relay:
        yield disk


def health(relay: Relay) -> int:
    connection = relay.connect()
    with contextlib.closing(connection):
        connection.request("GET", "/healthz")
        return connection.getresponse().status


def test_under_the_floor_new_alarms_are_refused_and_waiting_ones_delivered(disk, webex):
    relay = disk.relay
    webex.fault_for = lambda _: Fault(status=404)
    assert relay.post(numbered(1))[0] == 200
    disk.leave_free(15 * MEBIBYTE)
    status, answer = relay.post(numbered(2))
    assert status == 503
    assert answer["error"] == f"the disk is full, or under 16 MiB free in {disk.folder}"
    assert health(relay) == 503
    webex.fault_for = lambda _: None
    relay.told("0 waiting, 1 delivered")
    disk.leave_free(20 * MEBIBYTE)
    assert health(relay) == 200
    assert relay.post(numbered(2))[0] == 200
    relay.told("0 waiting, 2 delivered")
    assert numbers(webex) == [1, 2]


def test_on_a_full_disk_each_alarm_is_sent_once_and_recorded_when_there_is_space(disk, webex):
    relay = disk.relay
    webex.fault_for = lambda _: Fault(status=404)
    for number in range(30):
        assert relay.post({**numbered(number), "x": "y" * 30_000})[0] == 200
    disk.leave_free(0)
    webex.fault_for = lambda _: None
    relay.told("0 waiting, 30 delivered")
    assert numbers(webex) == list(range(30))
    assert relay.post(numbered(99))[0] == 503
    copy = relay.log_path.parent / "copy"
    shutil.copytree(disk.path, copy, ignore=shutil.ignore_patterns("filler"))
    assert 0 in rows(copy / "alarmrelay.db")  # not all could be recorded
    disk.leave_free(20 * MEBIBYTE)
    assert relay.post(numbered(30))[0] == 200
    relay.told("0 waiting, 31 delivered")
    shutil.rmtree(copy)
    shutil.copytree(disk.path, copy, ignore=shutil.ignore_patterns("filler"))
    assert rows(copy / "alarmrelay.db") == [1] * 31
    assert numbers(webex) == list(range(31))
    assert relay.process.poll() is None  # all without a restart


def test_a_start_on_a_full_disk_delivers_what_waits_and_refuses_the_rest(tmp_path, webex):
    relay = Relay(tmp_path, webex.url, {"TICK_S": 0.1, "HOLD_S": 0.2})
    disk = Disk(relay, tmp_path / "state", 40)
    # It is started again within the same file system.
    place = relay.command.index("-c") + 1
    relay.command[place] = relay.command[place].replace('exec "$@"', '{ "$@"; "$@"; }')
    webex.fault_for = lambda _: Fault(status=404)
    with relay:
        shell = relay.process.pid
        for number in range(3):
            assert relay.post(numbered(number))[0] == 200
        disk.leave_free(0)
        (first,) = children(shell)
        os.kill(first, signal.SIGKILL)
        relay.told("READY=1")
        relay.port = int(re.findall(r" listening on \S+ port (\d+);", relay.log())[-1])
        assert relay.post(numbered(3))[0] == 503
        webex.fault_for = lambda _: None
        relay.told("0 waiting, 3 delivered")
        assert numbers(webex) == [0, 1, 2]
        (second,) = children(shell)
        os.kill(second, signal.SIGTERM)
        assert relay.process.wait(20) == 0


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_commit_that_finds_the_disk_full_acknowledges_nothing_and_passes(tmp_path, webex):
    """The floor is looked at before; between that and the commit others may have been faster."""
    relay = Relay(tmp_path, webex.url, {"TICK_S": 0.1, "FREE_BYTES": 0})
    disk = Disk(relay, tmp_path / "state", 40)
    with relay:
        disk.leave_free(0)
        status, answer = relay.post({**numbered(1), "x": "y" * 2_000_000})
        assert status == 503
        assert "full" in answer["error"]
        disk.leave_free(20 * MEBIBYTE)
        assert relay.post({**numbered(1), "x": "y" * 2_000_000}) == (200, {"status": "accepted"})
        relay.told("1 delivered")
    assert numbers(webex) == [1]


def fill(directory: Path, count: int = 300) -> None:
    spool = Spool(directory)
    for number in range(count):
        alarm = Alarm({**numbered(number), "x": "y" * 500}, int(time.time() * 1000))
        spool.store("/", b"%d" % number, [alarm])
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
    assert relay.post({"message": "after"}) == (200, {"status": "accepted"})
    webex.wait_for(lambda: any("after" in text for text in webex.texts()))
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
        assert relay.post(numbered(1))[0] == 200
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
        assert relay.post(numbered(2))[0] == 200
        damaged.unlink()
        relay.kill()
        relay.start()
        relay.told("STATUS=1 alarm waits")


@pytest.mark.parametrize("damage", ["page", "type"])
def test_what_is_damaged_of_delivered_alarms_keeps_no_waiting_one(tmp_path, webex, damage):
    spool, path = Spool(tmp_path / "state"), tmp_path / "state" / "alarmrelay.db"
    for number in range(400):
        body = {"message": f"number {number},", "padding": "x" * 500}
        spool.store("/", b"%d" % number, [Alarm(body, int(time.time() * 1000))])
        if number == 299:
            while waiting := spool.oldest_waiting("/", [])[0]:
                spool.set_delivered("/", "m", int(time.time() * 1000), *waiting)
    if damage == "type":
        spool._db.execute("UPDATE alarm SET delivered_ms = 'x' WHERE id = 5")
    spool.close()
    data = bytearray(path.read_bytes())
    if damage == "page":
        start = data.find(b"number 5,") // 4096 * 4096
        data[start : start + 4096] = b"\xee" * 4096
        path.write_bytes(data)
    with Relay(tmp_path, webex.url):
        webex.wait_for(lambda: "number 399," in "".join(webex.texts()))
    found = re.findall(r"number (\d+),", "".join(webex.texts()))
    assert found == [str(number) for number in range(300, 400)]
    assert not [*path.parent.glob("*.damaged-*")]


class TakesAll:
    """In place of the client for Webex."""

    def ask(self, path: str, payload: bytes) -> tuple[int, str, dict[str, str], bytes]:
        return 200, "OK", {}, b'{"id": "m"}'


def lives_until_well(directory: Path) -> int:
    """Start the relay's parts as systemd would until they deliver all and take an alarm."""
    for life in range(4):
        spool = Spool(directory)
        settings = {"time_zone": timezone.utc, "vmanage_url": ""}
        courier = Courier("/", "room", settings, spool, TakesAll())
        with contextlib.suppress(Refused):
            while courier.step() is not None:
                pass
            spool.delete_delivered(1)
            if not spool.error and spool.store("/", b"new", [Alarm({}, 1)]):
                spool.close()
                return life
        assert spool.error
        spool.close()
    raise AssertionError("it does not come up")


def damages(data: bytes) -> Iterator[bytes]:
    dice = random.Random(20261124)
    for cut in range(1, 4097, 111):  # within the last page, and at its beginning
        yield data[:-cut]
    for _ in range(60):
        place = dice.randrange(200, len(data) - 512)
        yield data[:place] + dice.randbytes(512) + data[place + 512 :]
        yield data[:place] + bytes([data[place] ^ dice.randrange(1, 256)]) + data[place + 1 :]
        page = place // 4096 * 4096
        yield data[:page] + bytes(4096) + data[page + 4096 :]
    for place in (*range(16), 19, 20, 47, 56, 59):  # of the header
        yield data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :]


def test_no_damage_keeps_the_relay_from_coming_up(tmp_path, caplog):
    fill(tmp_path / "whole", 40)
    whole = (tmp_path / "whole" / "alarmrelay.db").read_bytes()
    state = tmp_path / "state"
    state.mkdir()
    for number, data in enumerate(damages(whole)):
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
    assert ["number 0," in webex.texts()[0], "number 2," in webex.texts()[2]] == [True, True]
    assert "This alarm is damaged on disk: " in webex.texts()[1]
    assert 'number 1"' in webex.texts()[1]


def test_a_file_of_a_newer_version_is_left_alone(tmp_path):
    fill(tmp_path / "state", 1)
    path = tmp_path / "state" / "alarmrelay.db"
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    before = path.read_bytes()
    done = run(environment(tmp_path, "http://127.0.0.1:9/v1"))
    assert done.returncode == 74
    assert f"is of a newer relay, version {len(MIGRATIONS) + 1}: use that" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert path.read_bytes() == before


OLD_TABLES = """
    CREATE TABLE alarm (
        id INTEGER PRIMARY KEY, room TEXT NOT NULL, received_ms INTEGER NOT NULL,
        request BLOB NOT NULL, body TEXT NOT NULL, delivered_ms INTEGER, message_id TEXT);
    CREATE INDEX waiting ON alarm (room, id) WHERE delivered_ms IS NULL;
    CREATE INDEX delivered ON alarm (delivered_ms) WHERE delivered_ms IS NOT NULL;"""


@pytest.mark.parametrize("version", [0, 1])
def test_a_file_of_an_older_version_is_taken_over(tmp_path, webex, version):
    path, now_ms = tmp_path / "state" / "alarmrelay.db", int(time.time() * 1000)
    path.parent.mkdir()
    raised = json.dumps({"uuid": "r\u00e9al", "message": "down"})
    row = "INSERT INTO alarm VALUES (?, '/', ?, ?, ?, ?, ?)"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.executescript(f"{OLD_TABLES} PRAGMA user_version = {version}")
        db.execute(row, (1, now_ms, b"1", raised, now_ms, "message-of-old"))
        db.execute(row, (2, now_ms, b"2", "no JSON", now_ms, "message-of-old-2"))
        db.execute(row, (3, now_ms, b"3", json.dumps(numbered(3)), None, None))
        db.execute(row, (4, now_ms, b"4", json.dumps({"uuid": "new"}), None, None))
    webex.take({"roomId": ROOM, "markdown": "of old"})["id"] = "message-of-old"
    with Relay(tmp_path, webex.url) as relay:
        relay.told("0 waiting, 2 delivered")
        for uuid in ("r\u00e9al", "new"):  # what was delivered before has no thread
            relay.post({"active": False, "cleared_events": [uuid]})
        webex.wait_for(lambda: len(webex.messages) == 5)
    parents = [message.get("parentId") for message in webex.messages[1:]]
    assert parents == [None, None, None, webex.messages[2]["id"]]
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
@pytest.mark.parametrize("call", ["fdatasync", "pwrite64"])
def test_an_io_error_acknowledges_nothing_and_ends_the_process_with_74(tmp_path, webex, call):
    relay = Relay(tmp_path, webex.url)
    relay.start()
    assert relay.post(numbered(1))[0] == 200
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
    assert relay.post(numbered(3))[0] == 200
    webex.wait_for(lambda: 3 in numbers(webex))
    assert relay.stop() == 0
    # What was refused may stand in the file all the same: it is only not promised.
    assert numbers(webex) in ([1, 3], [1, 2, 3])


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


def test_a_hundred_thousand_waiting_alarms_do_not_hold_the_start(tmp_path, webex):
    spool = Spool(tmp_path / "state")
    now_ms = int(time.time() * 1000)
    spool.store("/", b"many", [Alarm(numbered(number), now_ms) for number in range(100_000)])
    spool.close()
    webex.fault_for = lambda _: Fault(status=404)
    with Relay(tmp_path, webex.url) as relay:
        relay.told("100000 waiting")
        webex.wait_for(lambda: webex.requests)
        assert "number 0," in webex.requests[0]["content"]["markdown"]
