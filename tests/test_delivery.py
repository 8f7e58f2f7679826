"""Delivery: the decisions as a table, the courier's step, and each row over real sockets."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import START_MS, START_S, courier_of, drain, put
from webex_standin import ROOM, TOKEN, Fault, WebexStandIn

import alarmrelay
from alarmrelay import Answer, Batch, Client, Courier, Delivery, Meaning, Spool, Unavailable, judge

PAYLOAD = json.dumps({"roomId": ROOM, "markdown": "x"}).encode()
NOW = START_S


def answer(status: int, headers: dict[str, str] | None = None, body: object = None) -> Answer:
    if not isinstance(body, bytes):
        body = json.dumps(body or {"message": "Words."}).encode()
    return Answer(status, f"{status} Reason", headers or {}, body)


HELD = [401, 403, 404, 405, 406, 409, 410, 411, 413, 415, 418, 422, 451, 499]
FAILED = [0, 100, 200, 201, 202, 204, 206, 300, 301, 302, 303, 304, 307, 308, 500, 501, 502, 503,
          504, 505, 599, 700]  # fmt: skip
TABLE = [(400, "refused", 60), (423, "paused", 15), (429, "paused", 15)]
TABLE += [(status, "held", 60) for status in HELD]
TABLE += [(status, "failed", 1) for status in FAILED]


@pytest.mark.parametrize(("status", "kind", "wait_s"), TABLE)
def test_the_status_decides(status, kind, wait_s):
    failed = judge(answer(status), 0, NOW)
    assert (failed.kind, failed.wait_s) == (kind, wait_s)
    assert failed.reason.startswith(f"{status} Reason: ")


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>Log in</html>", b"null", b"[]", b'"id"', b'{"id": ""}', b'{"id": 7}',
     b'{"ok": 1}', b'{"id": "\\ud800"}', b"\xff\xff", b'{"id": "x"', b"[" * 100_000],
)  # fmt: skip
def test_a_200_without_a_message_id_is_no_delivery(body):
    failed = judge(answer(200, {}, body), 0, NOW)
    assert (failed.kind, failed.wait_s) == ("failed", 1)
    assert failed.reason == "200 Reason: no id in it"


def test_failures_double_the_wait_up_to_five_minutes():
    waits = [judge(answer(503), failures, NOW).wait_s for failures in range(12)]
    assert waits == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300]
    assert judge(answer(503), 10**9, NOW).wait_s == 300


@pytest.mark.parametrize(
    ("field", "seconds"),
    [
        ("", 15), ("soon", 15), ("1.5", 15), ("1e3", 15), ("0x10", 15), ("٣", 15), ("nan", 15),
        ("30", 30), ("0", 1), ("-5", 1), ("3600", 3600), ("3601", 3600), ("9" * 5000, 3600),
        ("Fri, 08 Mar 2024 08:02:00 GMT", 120), ("Fri, 08 Mar 2024 07:59:00 GMT", 1),
        ("Fri, 08 Mar 2024 09:02:00 +0100", 120), ("Fri, 08 Mar 2024 08:02:00 -0000", 120),
        ("Sat, 08 Mar 2025 08:02:00 GMT", 3600), ("Fri, 99 Mar 2024 08:02:00 GMT", 15),
        ("Fri, 08 Mar 99999999999 08:02:00 GMT", 15), ("Friday", 15), ("1 1 1 1 1", 15),
    ],
)  # fmt: skip
@pytest.mark.parametrize("status", [423, 429])
def test_retry_after_is_honoured_within_bounds(status, field, seconds):
    assert judge(answer(status, {"Retry-After": f" {field} "}), 0, NOW).wait_s == seconds


@pytest.mark.parametrize(
    ("body", "reason", "tracking_id"),
    [
        ({"message": "Bad.", "trackingId": "ROUTER_1"}, "404 Reason: Bad.", "ROUTER_1"),
        ({"message": "Bad."}, "404 Reason: Bad.", "HEADER_1"),
        ({"message": ["odd"], "trackingId": 7}, '404 Reason: ["odd"]', "7"),
        (b"<html>", "404 Reason", "HEADER_1"),
        ({"error": {"key": "x"}}, "404 Reason", "HEADER_1"),
    ],
)
def test_a_failure_holds_webexs_words_what_to_do_and_the_tracking_id(body, reason, tracking_id):
    failed = judge(answer(404, {"trackingId": "HEADER_1"}, body), 0, NOW)
    assert (failed.kind, failed.wait_s) == ("held", 60)
    assert (failed.reason, failed.tracking_id) == (reason, tracking_id)
    remedy = "check room_id and webex_url, and that the bot is a member of the room"
    assert failed.meaning == Meaning("has no such room", remedy)


def test_what_webex_says_stays_one_line_that_can_be_sent_to_systemd():
    said = {"message": "no\n\ud800 way\nREADY=1" + "x" * 1000}
    reason = judge(answer(401, {}, said), 0, NOW).reason
    assert reason.startswith("401 Reason: no   way READY=1xxx")
    assert reason.isprintable()
    assert len(reason) == 300


@contextlib.contextmanager
def in_a_thread(courier: Courier) -> Iterator[None]:
    """Let it run, and wait until it has stopped."""
    running = threading.Thread(target=courier.run, daemon=True)
    running.start()
    yield
    running.join(20)
    assert not running.is_alive()


# --- The courier's step ---------------------------------------------------------------------------
def store(spool: Spool, *texts: str) -> None:
    put(spool, *({"message": text} for text in texts))


def names(webex: WebexStandIn) -> list[str]:
    return [re.search(r"Message(\*\*)? : (.*?),", text)[2] for text in webex.texts()]


def test_a_step_delivers_the_oldest_and_an_idle_one_waits_for_an_arrival(
    courier, spool, webex, totals
):
    store(spool, "one", "two")
    assert [courier.step(), courier.step(), courier.step()] == [0.0, 0.0, None]
    assert names(webex) == ["one", "two"]
    assert spool.waiting_total == 0
    assert spool.days(["/"], START_MS)["/"].delivered == 2
    assert totals.delivered() == 2
    request = webex.requests[0]
    assert request["headers"]["authorization"] == f"Bearer {TOKEN}"
    assert request["headers"]["content-type"].startswith("application/json")
    assert set(request["content"]) == {"roomId", "markdown"}


RESET_BEFORE = Fault(reset_before=True)
RESET_AFTER = Fault(take=True, reset_after=True)
HTML = Fault(status=200, body=b"<html><h1>Please log in</h1></html>")


@pytest.mark.parametrize(
    "fault",
    [*[Fault(status=status) for status in (500, 502, 503, 504, 201, 204, 302, 304, 599)],
     RESET_BEFORE, HTML, Fault(status=200, body=b'{"id": "cut off'),
     Fault(status=200, body=b"", headers={"Content-Length": "1000"}, drip_s=0)],
)  # fmt: skip
def test_what_is_broken_is_tried_again_after_one_second_doubling(
    courier, spool, webex, totals, fault
):
    store(spool, "one", "two")
    webex.faults.extend([fault] * 3)
    for expected in (1, 2, 4):
        assert expected * 0.8 <= courier.step() <= expected * 1.2
    assert courier.trouble.failure.kind == "failed"
    assert totals.rooms["/"].failures == {"failed": 3}
    assert spool.waiting_total == 2
    assert drain(courier) == [0.0, 0.0]
    assert names(webex) == ["one", "two"]
    assert courier.trouble is None
    webex.faults.append(fault)
    store(spool, "three")
    assert courier.step() <= 1.2  # the doubling began anew


def test_waits_differ_lest_many_relays_come_back_at_once(courier, spool, webex):
    store(spool, "one")
    webex.faults.extend([Fault(status=503), Fault(status=429)] * 40)  # which ends the doubling
    waits = [courier.step() for _ in range(80)][::2]
    assert len(set(waits)) == 40
    assert 0.8 <= min(waits) < 1 < max(waits) <= 1.2


def test_a_reset_after_the_message_is_taken_repeats_it_and_loses_nothing(courier, spool, webex):
    store(spool, "one", "two")
    webex.faults.append(RESET_AFTER)
    drain(courier)
    assert names(webex) == ["one", "one", "two"]


@pytest.mark.parametrize(
    ("field", "seconds"),
    [("7", 7), (None, 15), ("Fri, 08 Mar 2024 08:02:00 GMT", 120)],
)
@pytest.mark.parametrize("status", [423, 429])
def test_a_limit_pauses_the_room_for_as_long_as_webex_says(
    courier, spool, webex, caplog, status, field, seconds
):
    store(spool, "one")
    headers = {} if field is None else {"Retry-After": field}
    webex.faults.append(Fault(status=status, headers=headers))
    assert courier.step() == seconds
    assert courier.trouble.failure.kind == "paused"
    assert courier.trouble.again_s == START_S + seconds
    said = rf"paused: {status} .* \(trackingId ROUTER_\w+\); tried again in {seconds} s"
    assert re.fullmatch(f"room /, alarm 1: delivery {said}", caplog.messages[-1])
    assert courier.step() == 0.0
    assert names(webex) == ["one"]


def errors_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]


@pytest.mark.parametrize("status", [401, 403, 404, 405, 410, 418])
def test_a_hold_is_tried_again_every_minute_and_logged_when_its_reason_changes(
    courier, spool, webex, clock, status, caplog
):
    store(spool, "one", "two")
    webex.faults.extend([Fault(status=status)] * 4)  # each with a trackingId of its own
    for _ in range(4):
        assert courier.step() == 60.0
        clock.now_s += 60
    assert courier.trouble.failure.kind == "held"
    assert (courier.trouble.since_s, courier.trouble.again_s) == (START_S, clock.now_s)
    (error,) = errors_in(caplog)
    said = rf"held: {status} .* says the stand-in.*\(trackingId ROUTER_\w+\); tried again in 60 s"
    assert re.fullmatch(f"room /, alarm 1: delivery {said}", error)
    webex.faults.append(Fault(status=451))
    assert courier.step() == 60.0
    assert len(errors_in(caplog)) == 2
    drain(courier)
    assert names(webex) == ["one", "two"]


@pytest.mark.parametrize(
    ("attribute", "wrong", "said"),
    [
        ("token", "another", r"401 Unauthorized: The .*; replace bearer_token and restart \("),
        ("rooms", set(), r"404 Not Found: Could not find .*; check room_id .* of the room \("),
    ],
)
def test_what_somebody_has_to_mend_is_told_and_then_the_queue_drains(
    courier, spool, webex, caplog, attribute, wrong, said
):
    store(spool, "one", "two")
    right = getattr(webex, attribute)
    setattr(webex, attribute, wrong)
    assert courier.step() == 60.0
    assert re.search(said, errors_in(caplog)[0])
    setattr(webex, attribute, right)
    drain(courier)
    assert names(webex) == ["one", "two"]


def test_late_alarms_say_so(courier, spool, webex, clock):
    store(spool, "one", "two")
    courier.step()
    clock.now_s += 14.5 * 60
    courier.step()
    assert webex.texts()[1].endswith("<br>**Delayed:** relayed 14 min after it came in")
    assert "Delayed" not in webex.texts()[0]


# --- An alarm that Webex refuses ------------------------------------------------------------------
UUID = "226bd188-35e8-4c5a-9e6c-2f4a7d3b1c00"
REFUSED = Fault(status=400)


@pytest.mark.parametrize("uuid", [UUID, UUID.upper(), "", None, 7, UUID + " <@all>", "x" * 36])
def test_a_refused_alarm_goes_as_plain_text_then_without_its_text_and_the_next_follows(
    courier, spool, webex, caplog, totals, uuid
):
    poison = {"message": "poison", "uuid": uuid}
    put(spool, {"message": "ñandú **one**"}, poison, {"message": "two"})
    webex.fault_for = lambda request: (
        REFUSED if re.search("ñandú|poison", str(request["content"])) else None
    )
    assert drain(courier) == [0.0, 0.0, 0.0]
    plain, sentence, next_one = webex.messages
    assert set(plain) & {"markdown", "text"} == {"text"}
    assert "Message : ?and? **one**, is received" in plain["text"]
    known_as = f" ({uuid})" if uuid in (UUID, UUID.upper()) else ""
    words = f"Webex refuses the text of alarm 2{known_as}. It stands in the relay's log."
    assert sentence["text"] == words
    assert "two" in next_one["markdown"]
    assert len(webex.requests) == 2 + 3 + 1
    assert totals.rooms["/"].failures["refused"] == 1 + 2
    assert errors_in(caplog) == [f"alarm 2 is not in the room but here: {json.dumps(poison)}"]
    assert courier.trouble is None


def test_a_room_that_refuses_every_form_is_asked_once_a_minute_and_keeps_the_order(
    courier, spool, webex, clock, caplog, totals
):
    store(spool, "one", "two", "three")
    webex.fault_for = lambda _: REFUSED
    for _ in range(5):
        assert courier.step() == 60.0
        clock.now_s += 60
    assert courier.trouble.failure.kind == "refused"
    assert (courier.trouble.since_s, courier.trouble.again_s) == (START_S, clock.now_s)
    assert len(webex.requests) == 5 * 3
    assert totals.rooms["/"].failures["refused"] == 5 * 3
    assert len(errors_in(caplog)) == 1
    for words in ("goes again as plain text", "goes without its text"):
        assert caplog.text.count(words) == 1
    assert spool.waiting_total == 3
    webex.fault_for = lambda _: None
    assert drain(courier) == [0.0, 0.0, 0.0]
    assert names(webex) == ["one", "two", "three"]
    assert courier.trouble is None


@pytest.mark.parametrize("refusals", [1, 2])
@pytest.mark.parametrize("between", [Fault(status=503), RESET_BEFORE])
def test_a_plainer_form_is_tried_again_after_failures_in_between_and_ever_later(
    courier, spool, webex, refusals, between
):
    store(spool, "one")
    refused = [REFUSED] * refusals
    webex.faults.extend([*refused, between] * 3 + refused)
    for expected in (1, 2, 4):
        assert expected * 0.8 <= courier.step() <= expected * 1.2
    assert courier.step() == 0.0
    (message,) = webex.messages
    assert "text" in message


# --- A disk that is full --------------------------------------------------------------------------
class FullDisk(Spool):
    """A spool that records no delivery as long as its disk is full."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.is_full = True
        self.refusals = threading.Semaphore(0)  # one more for each

    def record(self, delivery: Delivery) -> None:
        if self.is_full:
            self.refusals.release()
            raise Unavailable("the disk is full")
        super().record(delivery)


@pytest.fixture
def full_disk(tmp_path):
    spool = FullDisk(tmp_path / "state")
    yield spool
    spool.close()


@pytest.mark.parametrize("count", [1, 11], ids=["a message", "a digest"])
def test_a_delivery_is_recorded_before_the_next_message_is_sent_and_nothing_is_sent_twice(
    full_disk, webex, clock, totals, monkeypatch, count
):
    monkeypatch.setattr(alarmrelay, "DISK_RETRY_S", 0.01)
    courier = courier_of(full_disk, webex, clock, totals)
    store(full_disk, *(f"number {number}" for number in range(count)))
    for number in (1, 2, 3):
        with pytest.raises(Unavailable):
            courier.step()
        store(full_disk, f"later {number}")
    with in_a_thread(courier):
        for _ in range(3 + 5):  # of which the courier's loop has made five
            assert full_disk.refusals.acquire(timeout=20)
        assert len(webex.requests) == 1
        full_disk.is_full = False
        webex.wait_for(lambda: len(webex.alarms()) == count + 3)
        courier.stop()
    said = [re.search("(number|later) [0-9]+", text)[0] for text in webex.alarms()]
    later = ["later 1", "later 2", "later 3"]
    assert said == [*(f"number {number}" for number in range(count)), *later]
    assert full_disk.waiting_total == 0
    assert totals.delivered() == count + 3


# --- The client -----------------------------------------------------------------------------------
@pytest.mark.pitfall(22)
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_and_its_target_never_sees_the_token(
    courier, spool, webex, status
):
    store(spool, "one")
    with WebexStandIn() as other:
        webex.faults.append(Fault(status=status, headers={"Location": f"{other.url}/messages"}))
        assert 0.8 <= courier.step() <= 1.2
        assert f"{status} " in courier.trouble.failure.reason
        assert courier.step() == 0.0
        assert other.requests == []
    assert names(webex) == ["one"]


@pytest.fixture
def webex_client(webex):
    return Client(webex.url, f"Bearer {TOKEN}")


@pytest.mark.parametrize(
    "fault",
    [Fault(drip_s=60), Fault(status=200, take=True, drip_s=60, drip_body=True)],
    ids=["before its answer", "in the middle of its answer"],
)
def test_a_webex_that_hangs_is_hung_up_on(webex_client, webex, monkeypatch, fault):
    monkeypatch.setattr(alarmrelay, "READ_S", 0.3)
    webex.faults.append(fault)
    hung_up = webex_client.ask("/messages", PAYLOAD)
    assert hung_up == Answer(0, "no answer within 0.3 s", {}, b"")
    assert judge(hung_up, 0, NOW).meaning.does == "does not answer"


def test_while_a_message_is_sent_the_watchdog_waits_as_long_as_a_send_may_take(
    courier, spool, webex
):
    seen = []
    webex.fault_for = lambda _: seen.append(courier.deadline.left_s())
    store(spool, "one")
    courier.step()
    assert alarmrelay.STALL_S < seen[0] <= alarmrelay.SEND_S


def test_an_address_that_does_not_answer_gives_way_to_the_next(webex_client, webex, monkeypatch):
    monkeypatch.setattr(alarmrelay, "READ_S", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        with socket.create_connection(silent.getsockname()):  # fills its queue
            port = int(webex.url.split(":")[2].partition("/")[0])
            here = [
                (socket.AF_INET, socket.SOCK_STREAM, 6, "", address)
                for address in (silent.getsockname(), ("127.0.0.1", port))
            ]
            monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: here)
            assert webex_client.ask("/messages", PAYLOAD).status == 200
    assert len(webex.messages) == 1


def test_a_slash_at_the_end_of_the_url_is_not_doubled(webex):
    Client(webex.url + "/", f"Bearer {TOKEN}").ask("/messages", PAYLOAD)
    assert webex.requests[0]["path"] == "/v1/messages"


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9/v1", "http://localhost:9", "https://127.0.0.1:9/v1"]
)
def test_a_webex_that_cannot_be_reached_is_a_failure(url):
    unreached = Client(url, f"Bearer {TOKEN}").ask("/messages", PAYLOAD)
    assert unreached.status == 0
    assert "refused" in unreached.reason
    assert judge(unreached, 0, NOW).kind == "failed"


def test_an_answer_of_endless_length_is_not_read_to_its_end(webex_client, webex):
    webex.faults.append(Fault(status=200, body=b'{"id": "' + b"x" * 5_000_000 + b'"}'))
    endless = webex_client.ask("/messages", PAYLOAD)
    assert len(endless.body) == 2**20
    assert judge(endless, 0, NOW).kind == "failed"


def test_no_proxy_is_asked_for_a_loopback_address(webex, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert Client(webex.url, f"Bearer {TOKEN}").ask("/messages", PAYLOAD).status == 200


# --- The courier's loop ---------------------------------------------------------------------------
def test_an_arrival_during_the_look_into_the_spool_is_not_missed(courier, spool, monkeypatch):
    looks = []

    def look(room: str) -> Batch:
        looks.append(courier.arrived.is_set())
        if len(looks) == 1:
            courier.arrived.set()
        else:
            courier.stop()
        return Batch([], "")

    monkeypatch.setattr(spool, "next_batch", look)
    with in_a_thread(courier):
        pass
    assert looks == [False, False]  # nor told twice


def test_an_alarm_that_breaks_the_program_itself_waits_and_is_logged(
    courier, spool, monkeypatch, caplog
):
    store(spool, "one")

    def broken() -> float:
        courier.stop()
        raise ZeroDivisionError

    monkeypatch.setattr(courier, "step", broken)
    courier.run()
    assert "room /: an error in alarmrelay itself" in caplog.text
    assert "ZeroDivisionError" in caplog.text
    assert spool.waiting_total == 1


def test_the_courier_stops_when_it_is_told_and_never_misses_it(spool, webex, clock):
    for _ in range(20):
        courier = courier_of(spool, webex, clock)
        with in_a_thread(courier):
            courier.stop()
