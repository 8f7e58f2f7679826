"""The spool: a real SQLite file, and what is true of it when a method has returned."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faults
import pytest
from harness import Relay, environment, run, wait_until

import alarmrelay
from alarmrelay import Alarm, Backlog, Day, Delivery, Spool, Unavailable

NUMBERS = itertools.count()
AT_MS = 1_700_000_000_000
DAY_MS = 86_400_000


def store(
    spool: Spool, *messages: str, request: bytes = b"", received_ms: int = AT_MS, room: str = "/"
) -> bool:
    """Store the alarms of a request, like no other unless its hash is given."""
    request = request or b"request %d" % next(NUMBERS)
    alarms = [Alarm({"message": message}, received_ms) for message in messages or ("",)]
    return spool.store(room, request, alarms, "127.0.0.1")


def deliver(spool: Spool, count: int | None = None, delivered_ms: int = AT_MS) -> list[str]:
    """Record the delivery of so many alarms of the next batch, and return what they say."""
    alarms = spool.next_batch("/").alarms[:count]
    spool.record(Delivery("message-of-webex", delivered_ms, alarms))
    return [stored.alarm.text() for stored in alarms]


def drain(spool: Spool) -> list[str]:
    messages: list[str] = []
    while spool.next_batch("/").alarms:
        messages += deliver(spool)
    return messages


def backlog(spool: Spool) -> Backlog:
    return spool.backlogs(["/"])["/"]


def day(spool: Spool, now_ms: int = AT_MS) -> Day:
    return spool.days(["/"], now_ms)["/"]


def rows(directory: Path, columns: str) -> list[tuple]:
    """Return what stands in the file of a spool that is closed."""
    with contextlib.closing(sqlite3.connect(directory / "alarmrelay.db")) as db:
        return db.execute(f"SELECT {columns} FROM alarm ORDER BY id").fetchall()


@contextlib.contextmanager
def opened(directory: Path):
    spool = Spool(directory)
    yield spool
    spool.close()


def test_every_commit_is_synced_and_the_file_is_the_spools_alone(spool):
    for pragma, value in {"synchronous": 2, "journal_mode": "wal"}.items():
        assert faults.ask(spool, f"PRAGMA {pragma}") == [(value,)]
    assert faults.ask(spool, "PRAGMA locking_mode") == [("exclusive",)]
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        rows(spool.directory, "id")


def test_alarms_come_out_oldest_first_and_once(spool):
    assert store(spool, "1")
    assert store(spool, "2", "3")
    assert [stored.spool_id for stored in spool.next_batch("/").alarms] == [1, 2, 3]
    assert backlog(spool).waiting == spool.waiting_total == 3
    assert drain(spool) == ["1", "2", "3"]
    assert backlog(spool) == Backlog(0, None)
    assert day(spool) == Day(3, AT_MS)
    assert spool.waiting_total == 0
    assert spool.next_batch("/").alarms == []


def test_alarms_survive_and_ids_go_on(tmp_path):
    with opened(tmp_path) as spool:
        store(spool, "1", "2")
        deliver(spool, 1)
    with opened(tmp_path) as spool:
        assert spool.waiting_total == backlog(spool).waiting == 1
        store(spool, "3")
        assert [stored.spool_id for stored in spool.next_batch("/").alarms] == [2, 3]
        assert drain(spool) == ["2", "3"]


def test_jobs_that_wait_share_one_transaction(spool):
    statements = faults.statements(spool)
    with ThreadPoolExecutor(16) as pool:
        with faults.busy(spool, jobs=16):
            answers = [pool.submit(store, spool, str(number)) for number in range(16)]
        assert all(answer.result(10) for answer in answers)
    assert statements.count("COMMIT") == 2  # that of the job which kept the thread busy, and theirs
    assert sorted(drain(spool), key=int) == [str(number) for number in range(16)]


# Whether a request that came at AT_MS is a duplicate so many milliseconds later.
AGAIN = {0: True, 599_999: True, 600_000: True, 600_001: False, -10: True, -DAY_MS: False}


@pytest.mark.parametrize("is_restarted", [False, True], ids=["running", "restarted"])
@pytest.mark.parametrize(("later_ms", "is_known"), AGAIN.items())
def test_the_same_request_within_ten_minutes_is_a_duplicate(
    tmp_path, later_ms, is_known, is_restarted
):
    spool = Spool(tmp_path)
    assert store(spool, "a", "b", request=b"r")
    assert store(spool, "a", "b", request=b"another")
    if is_restarted:
        spool.close()
        spool = Spool(tmp_path)
    is_new = store(spool, "a", "b", request=b"r", received_ms=AT_MS + later_ms)
    assert is_new is not is_known
    assert spool.waiting_total == (4 if is_known else 6)
    spool.close()


def test_two_equal_requests_in_one_transaction_are_stored_once(spool):
    with ThreadPoolExecutor(2) as pool:
        with faults.busy(spool, jobs=2):
            answers = [pool.submit(store, spool, "a", request=b"r") for _ in range(2)]
        assert sorted(answer.result(10) for answer in answers) == [False, True]
    assert drain(spool) == ["a"]


def test_retention_deletes_delivered_alarms_alone_and_a_hundred_at_a_time(tmp_path):
    left = []
    with opened(tmp_path) as spool:
        store(spool, *map(str, range(260)))
        while len(spool.next_batch("/").alarms) > 10:
            deliver(spool, 50, delivered_ms=1000)
        deliver(spool, 5, delivered_ms=2000)
        for _ in range(4):
            spool.delete_delivered(2000)
            left.append(len(faults.ask(spool, "SELECT id FROM alarm")))
    assert left == [160, 60, 10, 10]
    assert rows(tmp_path, "id, delivered_ms") == [
        *((number, 2000) for number in range(251, 256)),
        *((number, None) for number in range(256, 261)),
    ]


def test_no_question_reads_the_whole_table(spool):
    """But the page's, which reads it from its end and stops."""
    store(spool, "1")
    statements = faults.statements(spool)
    values = [{"host-name": "BR1"}]
    down = {"rulename": "BFD_TLOC_Down", "uuid": "u", "values": values}
    up = {"rulename": "BFD_TLOC_Up", "active": False, "cleared_events": ["u"], "values": values}
    spool.store("/", b"both", [Alarm(down, AT_MS), Alarm(up, AT_MS)], "127.0.0.1")
    while spool.next_batch("/").alarms:
        deliver(spool, 1)
    spool.backlogs(["/"])
    spool.days(["/"], AT_MS)
    spool.delete_delivered(AT_MS)
    questions = [text for text in statements if text.startswith(("SELECT", "UPDATE", "DELETE"))]
    plans = ""
    for question in questions:
        plan = [row[3] for row in faults.ask(spool, f"EXPLAIN QUERY PLAN {question}")]
        assert not any(re.match("SCAN (TABLE )?alarm", step) for step in plan), question
        if "delivered_ms IS NULL" in question:
            assert "USING INDEX waiting (room=?)" in plan[0]
            assert len(plan) == 1  # no sort
        plans += " ".join(plan)
    for index in ("request (request=?", "uuid (uuid=? AND room=?)", "down (down=? AND room=?)"):
        assert f"INDEX {index}" in plans
    for index in ("waiting", "delivered", "delivered_in_room"):
        assert f"INDEX {index} (" in plans


def test_a_backlog_of_a_hundred_thousand_is_refused_and_drained(spool, monkeypatch):
    assert alarmrelay.WAITING_ALARMS == 100_000
    monkeypatch.setattr(alarmrelay, "WAITING_ALARMS", 3)
    store(spool, "1", "2", "3")
    with pytest.raises(Unavailable, match="too many alarms wait") as caught:
        store(spool, "4")
    assert caught.value.status == spool.refusal().status == 503
    assert "Retry-After" in caught.value.headers
    deliver(spool, 1)
    assert store(spool, "4")


def test_a_directory_that_cannot_be_asked_for_free_space_takes_nothing_until_it_can(spool):
    away = spool.directory.with_name("away")
    spool.directory.rename(away)
    for _ in range(2):
        with pytest.raises(Unavailable, match="the disk is full, or under 16 MiB free"):
            store(spool, "refused")
    away.rename(spool.directory)
    assert store(spool, "taken")
    assert drain(spool) == ["taken"]


def test_the_oldest_is_the_oldest_that_waits(spool):
    assert backlog(spool) == Backlog(0, None)
    for number in range(3):
        store(spool, str(number), received_ms=AT_MS + number)
        assert backlog(spool) == Backlog(number + 1, AT_MS)
    deliver(spool, 1)
    assert backlog(spool) == Backlog(2, AT_MS + 1)


def test_a_day_is_the_24_hours_until_now(spool):
    assert day(spool) == Day(0, None)
    store(spool, "1", "2", "3")
    deliver(spool, 1, delivered_ms=AT_MS + 10)
    deliver(spool, 2, delivered_ms=AT_MS + 20)
    assert day(spool, AT_MS + 30) == Day(3, AT_MS + 20)
    assert day(spool, AT_MS + 10 + DAY_MS) == Day(2, AT_MS + 20)
    assert day(spool, AT_MS + 20 + DAY_MS) == Day(0, None)


def test_each_room_has_its_own_alarms_also_one_that_is_not_set_any_more(spool):
    store(spool, "here")
    store(spool, "there", "there too", room="/there", received_ms=AT_MS + 1)
    there = Backlog(2, AT_MS + 1)
    backlogs = {"/": Backlog(1, AT_MS), "/there": there, "/new": Backlog(0, None)}
    assert spool.backlogs(["/", "/new"]) == backlogs
    assert drain(spool) == ["here"]
    assert spool.backlogs([]) == {"/": Backlog(0, None), "/there": there}
    assert spool.days(["/", "/there"], AT_MS) == {"/": Day(1, AT_MS), "/there": Day(0, None)}
    assert len(spool.next_batch("/there").alarms) == 2
    assert spool.next_batch("/new").alarms == []


def test_of_the_newest_fifty_the_largest_are_left_out(spool):
    store(spool, *map(str, range(60)))
    store(spool, "x" * 70_000)
    deliver(spool, 1)
    assert [stored.spool_id for stored in spool.newest()] == list(range(60, 11, -1))


def test_after_an_error_of_the_disk_nothing_is_acknowledged_any_more(spool):
    store(spool, "kept")
    faults.ask(spool, "ALTER TABLE alarm RENAME TO away")  # any error of SQLite will do
    for _ in range(2):
        with pytest.raises(alarmrelay.Unavailable, match="the spool cannot be read or written"):
            store(spool, "lost")
    assert spool.refusal().status == 503
    assert str(spool.refusal()) == spool.error
    with pytest.raises(alarmrelay.Unavailable):
        spool.next_batch("/")
    with pytest.raises(alarmrelay.Unavailable):
        spool.newest()


def test_every_request_of_a_failed_transaction_hears_of_it(spool):
    faults.ask(spool, "ALTER TABLE alarm RENAME TO away")
    with ThreadPoolExecutor(8) as pool:
        with faults.busy(spool, jobs=8):
            answers = [pool.submit(store, spool, str(number)) for number in range(8)]
        for answer in answers:
            with pytest.raises(alarmrelay.Unavailable, match="no such table"):
                answer.result(10)


def test_a_transaction_that_sqlite_has_ended_itself_is_no_success_for_any_job_of_it(tmp_path):
    spool = Spool(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        with faults.busy(spool, jobs=2):
            stored = pool.submit(store, spool, "lost")
            faults.wait_for_jobs(spool, 1)  # so that it is done first
            ended = pool.submit(faults.ask, spool, "ROLLBACK")
        for answer in (stored, ended):
            with pytest.raises(Unavailable, match="the spool cannot be read or written"):
                answer.result(10)
    assert spool.error
    spool.close()
    assert rows(tmp_path, "id") == []


def test_an_error_in_the_relay_itself_is_told_and_undone_and_the_spool_goes_on(spool, caplog):
    with ThreadPoolExecutor(2) as pool:
        with faults.busy(spool, jobs=2):
            stored = pool.submit(store, spool, "1")
            broken = pool.submit(spool.run_job, lambda: [].pop())
        for answer in (stored, broken):
            with pytest.raises(Unavailable, match="an error in alarmrelay itself: see its log"):
                answer.result(10)
    wait_until(lambda: "pop from empty list" in caplog.text)
    assert (spool.waiting_total, spool.error) == (0, "")
    assert "taken" not in caplog.text
    assert store(spool, "2")
    assert drain(spool) == ["2"]


def test_a_second_relay_on_the_same_directory_ends_with_75_and_says_so(tmp_path, relay):
    done = run(environment(tmp_path, relay.environ["webex_url"]))
    assert done.returncode == 75
    assert "another relay" in done.stderr
    assert "stop it first" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert relay.post({"message": "still served"})[0] == 200


def test_closing_does_what_was_asked_for_and_refuses_what_comes_later(tmp_path):
    spool = Spool(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        with faults.busy(spool, jobs=4):
            answers = [pool.submit(store, spool, str(number)) for number in range(4)]
        spool.close()
        assert all(answer.result(10) for answer in answers)
    with pytest.raises(Unavailable, match="the spool is closed"):
        store(spool)
    assert len(rows(tmp_path, "id")) == 4


def test_the_file_can_be_read_with_sqlite_once_the_relay_is_stopped(tmp_path, webex):
    body = {"rule_name_display": "R", "uuid": "u-1"}
    with Relay(tmp_path, webex.url) as relay:
        relay.post(body)
        relay.told("0 waiting, 1 delivered")
    columns = "id, room, message_id, uuid, body, delivered_ms"
    ((*found, stored_body, delivered_ms),) = rows(tmp_path / "state", columns)
    assert found == [1, "/", webex.messages[0]["id"], "u-1"]
    assert json.loads(stored_body) == body
    assert abs(delivered_ms / 1000 - time.time()) < 3600


def test_a_body_that_is_no_object_any_more_does_not_hold_the_others(spool):
    store(spool, "1")
    store(spool, "2")
    faults.ask(spool, "UPDATE alarm SET body = '[1]' WHERE id = 1")
    assert drain(spool) == ["This alarm is damaged on disk: [1]", "2"]
