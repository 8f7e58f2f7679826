"""The spool: a real SQLite file, and what is true of it when a method has returned."""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import sqlite3
import threading
import time

import pytest
from harness import Relay, environment, run

import alarmrelay
from alarmrelay import Alarm, Refused, Spool

NUMBERS = itertools.count()


def posted(*bodies: str, request: bytes | None = None, received_ms: int | None = None) -> tuple:
    """Return what Spool.store() is called with."""
    request = request or b"request %d" % next(NUMBERS)
    at_ms = int(time.time() * 1000) if received_ms is None else received_ms
    return "/", request, [Alarm({"message": body}, at_ms) for body in bodies or ("",)]


def traced(spool: Spool) -> list[str]:
    """Return a list to which every statement from now on is added."""
    statements: list[str] = []
    spool._db.set_trace_callback(statements.append)
    return statements


def drain(spool: Spool) -> list[str]:
    bodies = []
    while alarms := spool.oldest_waiting("/", [])[0]:
        bodies += [alarm.fields["message"] for alarm in alarms]
        spool.set_delivered("/", f"message-{len(bodies)}", int(time.time() * 1000), *alarms)
    return bodies


def test_every_commit_is_synced_and_no_other_process_can_open_the_file(spool):
    def pragma(name: str) -> object:
        return spool._db.execute(f"PRAGMA {name}").fetchone()[0]

    assert pragma("synchronous") == 2  # FULL
    assert pragma("journal_mode") == "wal"
    assert pragma("locking_mode") == "exclusive"


def test_sorts_need_no_temporary_directory_though_the_cache_is_small(spool):
    pragmas = ("cache_size", "temp_store")
    found = [spool._db.execute(f"PRAGMA {name}").fetchone()[0] for name in pragmas]
    assert found == [-256, 2]  # KiB; MEMORY


def test_alarms_come_out_oldest_first_and_once(spool):
    assert list(spool.store(*posted("1"))) == [1]
    assert list(spool.store(*posted("2", "3"))) == [2, 3]
    assert spool.rooms["/"]["waiting"] == 3
    assert drain(spool) == ["1", "2", "3"]
    assert (spool.rooms["/"]["waiting"], spool.rooms["/"]["delivered"]) == (0, 3)
    assert spool.oldest_waiting("/", []) == ([], "")


def test_alarms_survive_and_ids_go_on(tmp_path):
    spool = Spool(tmp_path)
    spool.store(*posted("1", "2"))
    spool.set_delivered("/", "m", 1, spool.oldest_waiting("/", [])[0][0])
    spool.close()
    again = Spool(tmp_path)
    assert again.rooms["/"]["waiting"] == 1
    assert list(again.store(*posted("3"))) == [3]
    assert drain(again) == ["2", "3"]
    again.close()


def test_requests_that_come_during_a_commit_share_the_next(spool):
    statements = traced(spool)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        with spool._lock:  # as while another's commit is under way
            answers = [pool.submit(spool.store, *posted(str(i))) for i in range(16)]
            while len(spool._posted) < 16:
                threading.Event().wait(0.001)
        ids = sorted(next(iter(answer.result(10))) for answer in answers)
    assert ids == list(range(1, 17))
    assert statements.count("COMMIT") == 1
    assert len(drain(spool)) == 16


def test_many_threads_lose_nothing(spool):
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        ranges = pool.map(lambda i: spool.store(*posted(str(i), f"{i} too")), range(500))
        ids = [spool_id for ids in ranges for spool_id in ids]
    assert sorted(ids) == list(range(1, 1001))
    assert spool.rooms["/"]["waiting"] == 1000
    assert sorted(drain(spool)) == sorted(
        [str(i) for i in range(500)] + [f"{i} too" for i in range(500)]
    )


def test_the_same_request_within_ten_minutes_is_a_duplicate(spool):
    at = 1_700_000_000_000
    assert list(spool.store(*posted("a", request=b"r", received_ms=at))) == [1]
    assert list(spool.store(*posted("a", request=b"r", received_ms=at + 599_999))) == []
    assert list(spool.store(*posted("a", request=b"r", received_ms=at - 10))) == []
    assert list(spool.store(*posted("b", request=b"s", received_ms=at + 600_000))) == [2]
    assert list(spool.store(*posted("a", request=b"r", received_ms=at + 600_001))) == [3]
    assert spool.rooms["/"]["waiting"] == 3


def test_two_equal_requests_in_one_commit_are_stored_once(spool):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        with spool._lock:
            answers = [pool.submit(spool.store, *posted("a", request=b"r")) for _ in range(2)]
            while len(spool._posted) < 2:
                threading.Event().wait(0.001)
        assert sorted(len(answer.result(10)) for answer in answers) == [0, 1]


def test_a_duplicate_is_known_after_a_restart(tmp_path):
    now_ms = int(time.time() * 1000)
    spool = Spool(tmp_path)
    spool.store(*posted("old", request=b"old", received_ms=now_ms - 601_000))
    spool.store(*posted("a", request=b"r", received_ms=now_ms - 300_000))
    spool.store(*posted("b", "c", request=b"s", received_ms=now_ms))
    spool.close()
    again = Spool(tmp_path)
    assert list(again.store(*posted("a", request=b"r"))) == []
    assert list(again.store(*posted("b", "c", request=b"s"))) == []
    assert list(again.store(*posted("old", request=b"old"))) == [5]
    again.close()


def test_after_a_restart_the_oldest_are_forgotten_first(tmp_path):
    now_ms = int(time.time() * 1000)
    spool = Spool(tmp_path)
    spool.store(*posted("a", request=b"nine minutes", received_ms=now_ms - 540_000))
    spool.store(*posted("b", request=b"one minute", received_ms=now_ms - 60_000))
    spool.close()
    again = Spool(tmp_path)
    later_ms = now_ms + 120_000
    assert len(again.store(*posted("a", request=b"nine minutes", received_ms=later_ms))) == 1
    assert len(again.store(*posted("b", request=b"one minute", received_ms=later_ms))) == 0
    again.close()


def test_a_clock_that_jumps_back_keeps_no_duplicates_for_long(spool):
    at = 1_700_000_000_000
    spool.store(*posted("a", request=b"r", received_ms=at))
    assert len(spool.store(*posted("a", request=b"r", received_ms=at - 86_400_000))) == 1


def test_retention_deletes_in_steps_of_a_hundred_for_which_no_post_waits_long(spool):
    spool.store(*posted(*map(str, range(250))))
    while alarms := spool.oldest_waiting("/", [])[0]:
        spool.set_delivered("/", "m", 1000, *alarms)
    left = []
    for _ in range(4):
        spool.delete_delivered(2000)
        left += spool._db.execute("SELECT count(*) FROM alarm").fetchone()
    assert left == [150, 50, 0, 0]


def test_a_delivery_not_yet_recorded_is_not_told_as_waiting(spool, monkeypatch):
    monkeypatch.setattr(spool, "delete_delivered", lambda: None)  # as on a full disk
    for received_ms in (1000, 2000, 3000):
        spool.store(*posted("a", request=b"%d" % received_ms, received_ms=received_ms))
    delivered, aside, _ = spool.oldest_waiting("/", [])[0]
    spool.set_delivered("/", "m", 4000, delivered)
    found, _ = spool.oldest_waiting("/", [aside.spool_id])
    assert [alarm.received_ms for alarm in found] == [3000]
    assert spool.rooms["/"]["oldest_ms"] == 2000


def test_the_oldest_waiting_alarm_is_found_by_the_index(spool):
    statements = traced(spool)
    spool.oldest_waiting("/", [])
    selects = [text for text in statements if text.lstrip().startswith("SELECT")]
    spool._db.set_trace_callback(None)
    assert len(selects) == 2  # the next to be delivered, and the oldest of all
    for select in selects:
        plan = " ".join(row[3] for row in spool._db.execute(f"EXPLAIN QUERY PLAN {select}"))
        assert "USING INDEX waiting (room=?)" in plan
        assert "TEMP B-TREE" not in plan


def test_retention_deletes_delivered_alarms_alone_and_in_small_steps(spool, monkeypatch):
    monkeypatch.setattr(alarmrelay, "RETENTION_STEP", 3)
    spool.store(*posted(*(str(i) for i in range(10))))
    for at in range(8):
        spool.set_delivered("/", "m", at, spool.oldest_waiting("/", [])[0][0])
    statements = traced(spool)

    def left() -> list[int]:
        return [row[0] for row in spool._db.execute("SELECT id FROM alarm ORDER BY id")]

    for ids in ([4, 5, 6, 7, 8, 9, 10], [7, 8, 9, 10], [8, 9, 10], [8, 9, 10]):
        spool.delete_delivered(7)
        assert left() == ids
    delete = next(text for text in statements if text.startswith("DELETE"))
    plan = " ".join(row[3] for row in spool._db.execute(f"EXPLAIN QUERY PLAN {delete}"))
    assert "INDEX delivered" in plan


def test_a_backlog_of_a_hundred_thousand_is_refused_and_drained(spool, monkeypatch):
    assert alarmrelay.WAITING_ALARMS == 100_000
    monkeypatch.setattr(alarmrelay, "WAITING_ALARMS", 3)
    spool.store(*posted("1", "2", "3"))
    with pytest.raises(Refused) as caught:
        spool.store(*posted("4"))
    assert caught.value.status == 503
    assert "Retry-After" in caught.value.fields
    assert spool.refusal().status == 503
    spool.set_delivered("/", "m", 1, spool.oldest_waiting("/", [])[0][0])
    assert list(spool.store(*posted("4"))) == [4]


def test_a_full_disk_is_told_for_a_minute_or_until_an_alarm_can_be_stored(spool, monkeypatch):
    spool.store(*posted("kept"))
    ((pages,),) = spool._db.execute("PRAGMA page_count")
    spool._db.execute(f"PRAGMA max_page_count = {pages}")
    for _ in range(2):
        with pytest.raises(Refused, match="database or disk is full") as caught:
            spool.store("/", b"large", [Alarm({"message": "x" * 100_000}, 1)])
        assert "Retry-After" in caught.value.fields
        assert str(spool.refusal()).startswith("the disk is full, or under ")
        assert spool.refusal() is not spool.refusal()  # each keeps the frames it went through
    spool._db.execute("PRAGMA max_page_count = 100000")
    assert spool.store(*posted("new")) == [2]
    assert spool.refusal() is None
    monkeypatch.setattr(alarmrelay, "HOLD_S", 0)
    spool._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(Refused, match="database or disk is full"):
        spool.store("/", b"large", [Alarm({"message": "x" * 100_000}, 1)])
    assert spool.refusal() is None


def test_every_post_of_a_commit_hears_that_free_space_cannot_be_asked_for(spool, monkeypatch):
    def gone(path: object) -> None:
        monkeypatch.undo()  # the next one is told again
        raise OSError("the directory is gone")

    found = list[str]()

    def store(name: str) -> None:
        with pytest.raises(OSError, match="is gone") as caught:
            spool.store(*posted(name))
        found.append(str(caught.value))

    monkeypatch.setattr(alarmrelay.shutil, "disk_usage", gone)
    threads = [threading.Thread(target=store, args=[name]) for name in ("1", "2", "3")]
    with spool._lock:
        for thread in threads:
            thread.start()
        while len(spool._posted) < len(threads):
            threading.Event().wait(0.001)
    for thread in threads:
        thread.join()
    assert found == ["the directory is gone"] * 3
    assert spool.store(*posted("4")) == [1]


def test_what_is_told_of_a_room_does_not_grow_with_the_years(spool):
    hour_ms = 3_600_000
    for number, hour in enumerate((500_000, 500_001, 500_020, 500_040, 500_100), 1):
        spool.store("/", b"%d" % number, [Alarm({}, hour * hour_ms)])
        spool.set_delivered("/", "m", hour * hour_ms, *spool.oldest_waiting("/", [])[0])
        hours = [key for key, number in spool.rooms["/"].items() if number and "hour " in key]
        assert f"hour {hour}" in hours
        assert all(int(key[5:]) >= hour - 24 for key in hours)
    spool.count("/", {})
    assert len([key for key in spool.rooms["/"] if "hour " in key]) == 1


def test_the_oldest_stays_the_oldest_when_others_come_and_duplicates_are_counted_each(spool):
    for number, received_ms in enumerate((5_000, 7_000, 9_000)):
        spool.store("/", b"%d" % number, [Alarm({}, received_ms), Alarm({}, received_ms)])
        assert spool.rooms["/"]["oldest_ms"] == 5_000
    spool.store("/", b"2", [Alarm({}, 9_000), Alarm({}, 9_000)])
    told = spool.rooms["/"]
    assert (told["accepted"], told["duplicates"], told["waiting"]) == (6, 2, 6)


def test_after_an_io_error_nothing_is_acknowledged_any_more(tmp_path):
    spool = Spool(tmp_path)
    spool.store(*posted("kept"))
    spool._db.execute("DROP INDEX waiting")
    spool._db.execute("ALTER TABLE alarm RENAME TO away")  # any error of SQLite will do
    for _ in range(2):
        with pytest.raises(Refused, match="spool") as caught:
            spool.store(*posted("lost"))
        assert caught.value.status == 503
    assert "spool" in str(spool.refusal())
    with pytest.raises(Refused):
        spool.oldest_waiting("/", [])
    assert spool.error
    spool._db.close()


def test_who_is_on_disk_does_not_commit_for_those_that_come_later(spool):
    transaction, by = spool._transaction, []

    def slow():
        by.append(threading.current_thread().name)
        if len(by) == 1:  # while the first commit runs, a third comes
            threads["third"].start()
            while len(spool._posted) < 1:
                threading.Event().wait(0.001)
        return transaction()

    def thread(name: str) -> threading.Thread:
        return threading.Thread(target=spool.store, args=posted(name), name=name)

    threads = {name: thread(name) for name in ("first", "second", "third")}
    spool._transaction = slow
    with spool._lock:
        for count, name in enumerate(("first", "second")):
            threads[name].start()
            while len(spool._posted) < count + 1:
                threading.Event().wait(0.001)
    for one in threads.values():
        one.join(20)
    leader = by[0]  # who got the lock first, and committed for both
    assert leader in ("first", "second")
    assert by == [leader, "third"]


def test_every_request_of_a_failed_commit_hears_of_it(tmp_path):
    spool = Spool(tmp_path)
    spool._db.execute("ALTER TABLE alarm RENAME TO away")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        with spool._lock:
            answers = [pool.submit(spool.store, *posted(str(i))) for i in range(8)]
            while len(spool._posted) < 8:
                threading.Event().wait(0.001)
        for answer in answers:
            with pytest.raises(Refused):
                answer.result(10)
    spool._db.close()


def test_a_second_relay_on_the_same_directory_ends_with_75_and_says_so(tmp_path, relay):
    done = run(environment(tmp_path, relay.environ["webex_url"]))
    assert done.returncode == 75
    assert "another relay" in done.stderr
    assert "stop it first" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert relay.post({"message": "still served"})[0] == 200


def test_closing_refuses_what_comes_later(tmp_path):
    spool = Spool(tmp_path)
    spool.close()
    with pytest.raises(Refused):
        spool.store(*posted())


def test_the_file_can_be_read_with_sqlite_once_the_relay_is_stopped(tmp_path, webex):
    with Relay(tmp_path, webex.url) as relay:
        relay.post({"rule_name_display": "R", "uuid": "u-1"})
        webex.wait_for(lambda: webex.messages)
        relay.told("1 delivered")
    with sqlite3.connect(tmp_path / "state" / "alarmrelay.db") as db:
        ((spool_id, room, body, delivered_ms, message_id),) = db.execute(
            "SELECT id, room, body, delivered_ms, message_id FROM alarm"
        )
    db.close()
    assert (spool_id, room, message_id) == (1, "/", webex.messages[0]["id"])
    assert json.loads(body) == {"rule_name_display": "R", "uuid": "u-1"}
    assert abs(delivered_ms / 1000 - time.time()) < 3600


def test_a_body_that_is_no_object_any_more_does_not_hold_the_others(spool):
    spool.store(*posted("1"))
    spool.store(*posted("2"))
    spool._db.execute("UPDATE alarm SET body = '[1]' WHERE id = 1")
    assert drain(spool) == ["This alarm is damaged on disk: [1]", "2"]


def test_the_oldest_is_told_of_all_that_wait_also_of_those_set_aside(spool):
    at = 1_700_000_000_000
    for number in range(4):
        spool.store(*posted(f"{number}", received_ms=at + number))
    for aside in ([1, 2, 3], []):
        spool.oldest_waiting("/", aside)
        assert spool.rooms["/"]["oldest_ms"] == at
    alarms, _ = spool.oldest_waiting("/", [2, 3])
    spool.set_delivered("/", "m", at + 9, alarms[0])
    spool.oldest_waiting("/", [2, 3])
    assert spool.rooms["/"]["oldest_ms"] == at + 1
