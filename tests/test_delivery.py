"""Delivery: the decisions as a table, the courier's step, and each row over real sockets."""

from __future__ import annotations

import gc
import json
import logging
import re
import socket
import ssl
import threading
from datetime import timedelta

import pytest
from conftest import START_S
from webex_standin import ROOM, TOKEN, Fault, WebexStandIn

import alarmrelay
from alarmrelay import (
    Alarm,
    Answer,
    Client,
    Courier,
    Spool,
    Verdict,
    judge,
)

PAYLOAD = json.dumps({"roomId": ROOM, "markdown": "x"}).encode()
NOW = START_S


def answer(status: int, headers: dict[str, str] | None = None, body: object = None) -> Answer:
    content = (
        body if isinstance(body, bytes) else json.dumps(body or {"message": "Words."}).encode()
    )
    return status, f"{status} Reason", headers or {}, content


HELD = [401, 403, 404, 405, 406, 409, 410, 411, 413, 415, 418, 422, 451, 499]
FAILED = [0, 100, 200, 201, 202, 204, 206, 300, 301, 302, 303, 304, 307, 308, 500, 501, 502, 503,
          504, 505, 599, 700]  # fmt: skip
TABLE = [(400, "refused", 60), (423, "paused", 15), (429, "paused", 15)]
TABLE += [(status, "held", 60) for status in HELD] + [(status, "failed", 1) for status in FAILED]


@pytest.mark.parametrize(("status", "kind", "wait_s"), TABLE)
def test_the_status_decides(status, kind, wait_s):
    verdict = judge(answer(status), 0, NOW)
    assert (verdict.kind, verdict.wait_s) == (kind, wait_s)
    assert verdict.reason


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>Log in</html>", b"null", b"[]", b'"id"', b'{"id": ""}', b'{"id": 7}',
     b'{"ok": 1}', b'{"id": "\\ud800"}', b"\xff\xff", b'{"id": "x"', b"[" * 100_000],
)  # fmt: skip
def test_a_200_without_a_message_id_is_no_delivery(body):
    verdict = judge(answer(200, {}, body), 0, NOW)
    assert (verdict.kind, verdict.wait_s) == ("failed", 1)
    assert "no id" in verdict.reason


def test_a_200_with_an_id_is_a_delivery_and_keeps_it():
    assert judge(answer(200, {}, {"id": "Y2lz"}), 5, NOW) == Verdict("delivered", 0.0, "Y2lz")


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
        ({"message": ["odd"], "trackingId": 7}, "404 Reason: ['odd']", "7"),
        (b"<html>", "404 Reason", "HEADER_1"),
        ({"error": {"key": "x"}}, "404 Reason", "HEADER_1"),
    ],
)
def test_the_reason_holds_webexs_words_what_to_do_and_the_tracking_id(body, reason, tracking_id):
    verdict = judge(answer(404, {"trackingId": "HEADER_1"}, body), 0, NOW)
    assert verdict.reason == reason
    assert verdict.advice == (
        "; check room_id and webex_url, and that the bot is a member of the room"
    )
    assert verdict.tracking_id == tracking_id


def test_what_webex_says_stays_one_line_that_can_be_sent_to_systemd():
    said = {"message": "no\n\ud800 way\nREADY=1" + "x" * 1000}
    reason = judge(answer(401, {}, said), 0, NOW).reason
    assert reason.startswith("401 Reason: no   way READY=1xxx")
    assert reason.isprintable()
    assert len(reason) < 400


def store(spool: Spool, *texts: str) -> None:
    alarms = [Alarm({"message": text}, int(START_S * 1000)) for text in texts]
    spool.store("/", "".join(texts).encode(), alarms)


def names(webex: WebexStandIn) -> list[str]:
    return [text.split("**Message** : ")[1].split(",")[0] for text in webex.texts()]


def test_a_step_delivers_the_oldest_and_an_idle_one_waits_for_an_arrival(courier, spool, webex):
    store(spool, "one", "two")
    assert [courier.step(), courier.step(), courier.step()] == [0.0, 0.0, None]
    assert names(webex) == ["one", "two"]
    assert (spool.rooms["/"]["waiting"], spool.rooms["/"]["delivered"]) == (0, 2)
    request = webex.requests[0]
    assert request["headers"]["authorization"] == f"Bearer {TOKEN}"
    assert request["headers"]["content-type"].startswith("application/json")
    assert set(request["content"]) == {"roomId", "markdown"}


RESET_BEFORE, RESET_AFTER = Fault(reset_before=True), Fault(take=True, reset_after=True)
HTML = Fault(status=200, body=b"<html><h1>Please log in</h1></html>")


@pytest.mark.parametrize(
    "fault",
    [*[Fault(status=status) for status in (500, 502, 503, 504, 201, 204, 302, 304, 599)],
     RESET_BEFORE, HTML, Fault(status=200, body=b'{"id": "cut off'),
     Fault(status=200, body=b"", headers={"Content-Length": "1000"}, drip_s=0)],
)  # fmt: skip
def test_what_is_broken_is_tried_again_after_one_second_doubling(courier, spool, webex, fault):
    store(spool, "one", "two")
    webex.faults.extend([fault] * 3)
    waits = [courier.step() for _ in range(3)]
    for wait_s, expected in zip(waits, (1, 2, 4)):
        assert expected * 0.8 <= wait_s <= expected * 1.2
    assert courier.trouble.kind == "failed"
    assert spool.rooms["/"]["waiting"] == 2
    assert [courier.step(), courier.step(), courier.step()] == [0.0, 0.0, None]
    assert names(webex) == ["one", "two"]
    assert courier.trouble is None
    webex.faults.append(fault)
    store(spool, "three")
    assert courier.step() <= 1.2  # the doubling began anew


def test_waits_differ_lest_many_relays_come_back_at_once(courier, spool, webex):
    store(spool, "one")
    webex.fault_for = lambda _: Fault(status=503)
    waits = []
    for _ in range(40):
        courier.failures = 0
        waits.append(courier.step())
    assert len(set(waits)) == 40
    assert 0.8 <= min(waits) < 1 < max(waits) <= 1.2


def test_the_plain_form_waits_longer_after_each_failure_too(courier, spool, webex):
    store(spool, "one")
    webex.faults.extend([Fault(status=400), Fault(status=503)] * 3)
    for expected in (1, 2, 4):
        assert expected * 0.8 <= courier.step() <= expected * 1.2


def test_a_reset_after_the_message_is_taken_repeats_it_and_loses_nothing(courier, spool, webex):
    store(spool, "one", "two")
    webex.faults.append(RESET_AFTER)
    assert 0.8 <= courier.step() <= 1.2
    while courier.step() is not None:
        pass
    assert names(webex) == ["one", "one", "two"]


@pytest.mark.parametrize(
    ("field", "seconds"),
    [("7", 7), (None, 15), ("junk", 15), ("-3", 1), ("99999999", 3600),
     ("Fri, 08 Mar 2024 08:02:00 GMT", 120)],
)  # fmt: skip
@pytest.mark.parametrize("status", [423, 429])
def test_a_limit_pauses_the_room_for_as_long_as_webex_says(
    courier, spool, webex, status, field, seconds
):
    store(spool, "one")
    headers = {} if field is None else {"Retry-After": field}
    webex.faults.append(Fault(status=status, headers=headers))
    assert courier.step() == seconds
    assert courier.trouble.kind == "paused"
    assert courier.trouble.reason.startswith(f"{status} ")
    assert courier.step() == 0.0
    assert names(webex) == ["one"]


@pytest.mark.parametrize("status", [401, 403, 404, 405, 410, 418])
def test_a_hold_is_tried_again_every_minute_and_logged_when_its_reason_changes(
    courier, spool, webex, status, caplog
):
    store(spool, "one", "two")
    webex.faults.extend([Fault(status=status)] * 4)  # each with a trackingId of its own
    assert [courier.step() for _ in range(4)] == [60.0] * 4
    assert courier.trouble.kind == "held"
    assert courier.trouble.reason.startswith(f"{status} ")
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    assert "says the stand-in" in errors[0].getMessage()
    assert "trackingId ROUTER_" in errors[0].getMessage()
    webex.faults.append(Fault(status=451))
    assert courier.step() == 60.0
    assert [record.levelno for record in caplog.records].count(logging.ERROR) == 2
    while courier.step() is not None:
        pass
    assert names(webex) == ["one", "two"]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (
            Fault(status=401, headers={"Retry-After": "7"}),
            "held: 401 Unauthorized.*; replace bearer_token and restart "
            "(trackingId ROUTER_X); tried again in 60 s",
        ),
        (
            Fault(status=429, headers={"Retry-After": "7"}),
            "paused: 429 Too Many Requests.* (trackingId ROUTER_X); tried again in 7 s",
        ),
    ],
)
def test_the_log_says_what_holds_an_alarm_what_to_do_and_when_it_goes_again(
    courier, spool, webex, caplog, fault, said
):
    store(spool, "one")
    webex.faults.append(fault)
    courier.step()
    form = re.escape(f"room /, alarm 1: delivery {said}").replace(r"\.\*", ".*")
    assert re.fullmatch(form.replace("ROUTER_X", r"ROUTER_\S+"), caplog.messages[-1])


def test_a_wrong_token_holds_and_the_queue_drains_once_it_is_right(courier, spool, webex):
    store(spool, "one", "two")
    webex.token = "another"
    assert courier.step() == 60.0
    assert "401 Unauthorized: The request requires a valid access token" in courier.trouble.reason
    assert courier.trouble.advice == "; replace bearer_token and restart"
    webex.token = TOKEN
    while courier.step() is not None:
        pass
    assert names(webex) == ["one", "two"]


def test_a_room_that_is_gone_holds_and_the_queue_drains_once_it_is_back(courier, spool, webex):
    store(spool, "one", "two")
    webex.rooms.clear()
    assert courier.step() == 60.0
    assert "404 Not Found: Could not find a room with provided ID." in courier.trouble.reason
    webex.rooms.add(ROOM)
    while courier.step() is not None:
        pass
    assert names(webex) == ["one", "two"]


def test_a_refused_message_goes_once_more_as_plain_text(courier, spool, webex):
    store(spool, "ñandú **one**", "two")
    webex.faults.append(Fault(status=400))
    assert [courier.step(), courier.step(), courier.step()] == [0.0, 0.0, None]
    plain = webex.messages[0]
    assert "markdown" not in plain
    assert "Message : ?and? **one**, is received" in plain["text"]
    assert plain["text"].isascii()
    assert "markdown" in webex.messages[1]


def test_an_alarm_refused_in_both_forms_waits_a_minute_and_holds_no_other(
    courier, spool, webex, clock
):
    def fault_for(request: dict) -> Fault | None:
        return Fault(status=400) if "one" in json.dumps(request["content"]) else None

    webex.fault_for = fault_for
    store(spool, "one", "two")
    assert [courier.step(), courier.step()] == [1.0, 0.0]
    assert [courier.step(), courier.step()] == [1.0, None]  # a delivery says that the room is well
    forms = [set(request["content"]) - {"roomId"} for request in webex.requests]
    assert forms == [{"markdown"}, {"text"}, {"markdown"}, {"markdown"}, {"text"}]
    assert names(webex) == ["two"]
    assert spool.rooms["/"]["waiting"] == 1
    assert courier.trouble.kind == "refused"
    webex.fault_for = lambda _: None
    clock.now_s += 59
    assert courier.step() is None
    clock.now_s += 1
    assert [courier.step(), courier.step()] == [0.0, None]
    assert names(webex) == ["two", "one"]
    assert courier.trouble is None
    clock.now_s -= 3600
    store(spool, "three")
    webex.faults.extend([Fault(status=400)] * 2)
    courier.step()
    clock.now_s -= 86_400  # a clock set back sets nothing aside for a day
    assert courier.step() == 0.0
    assert names(webex) == ["two", "one", "three"]


def test_after_a_spell_of_refusals_all_is_delivered_at_once(courier, spool, webex, clock):
    webex.fault_for = lambda _: Fault(status=400)
    store(spool, "one", "two", "three")
    while (wait_s := courier.step()) is not None:
        clock.now_s += wait_s
    webex.fault_for = lambda _: None
    store(spool, "four")
    assert [courier.step() for _ in range(5)] == [0.0, 0.0, 0.0, 0.0, None]
    assert names(webex) == ["four", "one", "two", "three"]


def test_a_room_in_which_all_is_refused_is_asked_once_a_minute(courier, spool, webex, clock):
    store(spool, *(f"number {number}" for number in range(100)))
    webex.fault_for = lambda _: Fault(status=400)
    while (wait_s := courier.step()) is not None:  # each once
        clock.now_s += wait_s
    count = len(webex.requests)
    assert count < 2 * 100 + 10
    for _ in range(300):
        clock.now_s += 1
        courier.step()
    assert 2 * 4 <= len(webex.requests) - count <= 2 * 6
    webex.fault_for = lambda _: None
    clock.now_s += 60
    while courier.step() is not None:
        pass
    numbers = [int(re.search(r"number (\d+)", text)[1]) for text in webex.alarms()]
    assert sorted(numbers) == [*range(100)]


@pytest.mark.parametrize("between", [Fault(status=503), Fault(status=429), RESET_BEFORE])
def test_the_plain_form_is_tried_again_after_a_failure_in_between(courier, spool, webex, between):
    store(spool, "one")
    webex.faults.extend([Fault(status=400), between, Fault(status=400)])
    assert courier.step() > 0
    assert courier.step() == 0.0
    assert set(webex.messages[0]) >= {"text"}


@pytest.mark.pitfall(22)
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_and_its_target_never_sees_the_token(
    courier, spool, webex, status
):
    with WebexStandIn() as other:
        store(spool, "one")
        location = other.url + "/messages"
        webex.faults.append(Fault(status=status, headers={"Location": location}))
        assert 0.8 <= courier.step() <= 1.2
        assert f"{status} " in courier.trouble.reason
        assert other.requests == []
        assert courier.step() == 0.0
        assert other.requests == []
    assert names(webex) == ["one"]


def test_a_server_that_hangs_is_cut_off_at_the_deadline(spool, webex, monkeypatch):
    monkeypatch.setattr(alarmrelay, "REQUEST_S", 0.5)
    release = threading.Event()
    webex.faults.append(Fault(hold=release))
    answer = Client(webex.url, f"Bearer {TOKEN}").ask("/messages", PAYLOAD)
    release.set()
    assert answer[0] == 0
    assert answer[1] == "no answer within 0.5 s"


@pytest.mark.parametrize("drip_body", [False, True])
def test_a_server_that_drips_is_cut_off_at_the_deadline(webex, drip_body, monkeypatch):
    monkeypatch.setattr(alarmrelay, "REQUEST_S", 0.5)
    webex.faults.append(Fault(status=200, take=True, drip_s=0.05, drip_body=drip_body))
    client = Client(webex.url, f"Bearer {TOKEN}")
    assert judge(client.ask("/messages", PAYLOAD), 0, NOW).kind == "failed"


@pytest.fixture
def two_addresses(webex, monkeypatch):
    """Let Webex's name have two addresses, of which the first takes no connection."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        with socket.create_connection(silent.getsockname()):  # fills its queue
            here = [
                (socket.AF_INET, socket.SOCK_STREAM, 6, "", address)
                for address in (
                    silent.getsockname(),
                    ("127.0.0.1", int(webex.url.split(":")[2][:-3])),
                )
            ]
            monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: here)
            yield


def test_an_address_that_does_not_answer_gives_way_to_the_next(two_addresses, webex, monkeypatch):
    monkeypatch.setattr(alarmrelay, "CONNECT_S", 0.3)
    answer = Client(webex.url, f"Bearer {TOKEN}").ask("/messages", PAYLOAD)
    assert answer[0] == 200
    assert len(webex.messages) == 1


def test_the_deadline_counts_once_the_message_is_sent(two_addresses, webex, monkeypatch):
    """Lest a message that was sent late is taken for failed, and stands in the room twice."""
    monkeypatch.setattr(alarmrelay, "CONNECT_S", 1.5)
    monkeypatch.setattr(alarmrelay, "REQUEST_S", 1.0)
    assert Client(webex.url, f"Bearer {TOKEN}").ask("/messages", PAYLOAD)[0] == 200
    assert len(webex.messages) == 1


def test_certificates_are_verified():
    tls = Client("https://webexapis.com/v1", f"Bearer {TOKEN}").tls
    assert tls.check_hostname
    assert tls.verify_mode == ssl.CERT_REQUIRED


def first_bytes_of_a_request_to(url: str, listener: socket.socket) -> bytes:
    thread = threading.Thread(
        target=Client(url, f"Bearer {TOKEN}").ask,
        args=("/messages", PAYLOAD),
    )
    thread.start()
    connection, _ = listener.accept()
    with connection:
        data = connection.recv(1000)
    thread.join(10)
    return data


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_https_is_spoken_with_tls_and_through_the_proxy(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        here = f"127.0.0.1:{listener.getsockname()[1]}"
        assert first_bytes_of_a_request_to(f"https://{here}/v1", listener)[0] == 0x16  # handshake
        monkeypatch.setenv("https_proxy", f"http://{here}")
        asked = first_bytes_of_a_request_to("https://webex.example/v1", listener)
        assert asked.startswith(b"CONNECT webex.example:443 HTTP/1.")
        assert TOKEN.encode() not in asked
    # Older http.client, as in Python 3.11.2, leaves a refused CONNECT to the garbage collector.
    gc.collect()


def test_a_slash_at_the_end_of_the_url_is_not_doubled(webex):
    Client(webex.url + "/", f"Bearer {TOKEN}").ask("/messages", PAYLOAD)
    assert webex.requests[0]["path"] == "/v1/messages"


def test_an_arrival_during_the_look_into_the_spool_is_not_missed(courier, spool, monkeypatch):
    def arrives(*_):
        courier.arrived.set()
        return [], ""

    monkeypatch.setattr(spool, "oldest_waiting", arrives)
    assert courier.step() is None
    assert courier.arrived.is_set()


def test_sixty_seconds_are_the_deadline():
    assert alarmrelay.REQUEST_S == 60


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9/v1", "http://localhost:9", "https://127.0.0.1:9/v1"]
)
def test_a_webex_that_cannot_be_reached_is_a_failure(url):
    answer = Client(url, f"Bearer {TOKEN}").ask("/messages", PAYLOAD)
    assert answer[0] == 0
    assert "refused" in answer[1]
    assert judge(answer, 0, NOW).kind == "failed"


def test_an_answer_of_endless_length_is_not_read_to_its_end(webex):
    webex.faults.append(Fault(status=200, body=b'{"id": "' + b"x" * 5_000_000 + b'"}'))
    answer = Client(webex.url, f"Bearer {TOKEN}").ask("/messages", PAYLOAD)
    assert len(answer[3]) == 2**20
    assert judge(answer, 0, NOW).kind == "failed"


def test_no_proxy_is_asked_for_a_loopback_address(webex, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    answer = Client(webex.url, f"Bearer {TOKEN}").ask("/messages", PAYLOAD)
    assert answer[0] == 200


def test_the_plain_form_keeps_its_last_lines(courier, spool, webex, clock):
    courier.settings["vmanage_url"] = "https://v"
    values = [{f"key {number}": "ñ" * 40 for number in range(50)}]
    fields = {"message": "m", "uuid": "u-1", "values": values}
    spool.store("/", b"r", [Alarm(fields, int(START_S * 1000))])
    webex.faults.append(Fault(status=400))
    clock.now_s += 14 * 60
    courier.step()
    text = webex.messages[0]["text"]
    assert len(text) <= 1000
    assert "\nDelayed: relayed 14 min after it came in\n[Open in vManage](https://v/#/" in text
    assert re.search(r"\n\? \(\d+ more lines\)$", text)


def test_late_alarms_say_so(courier, spool, webex, clock):
    store(spool, "one", "two")
    courier.step()
    clock.now_s += timedelta(minutes=14, seconds=30).total_seconds()
    courier.step()
    assert webex.texts()[1].endswith("<br>**Delayed:** relayed 14 min after it came in")
    assert "Delayed" not in webex.texts()[0]


def test_an_alarm_that_breaks_the_program_itself_waits_and_is_logged(
    courier, spool, webex, monkeypatch, caplog
):
    store(spool, "one")

    def broken(*_: object) -> float:
        courier.stopping.set()
        raise ZeroDivisionError

    monkeypatch.setattr(Courier, "step", broken)
    courier.run()
    assert "an error in alarmrelay itself" in caplog.text
    assert "ZeroDivisionError" in caplog.text
    assert spool.rooms["/"]["waiting"] == 1


def test_the_courier_stops_when_it_is_told_and_never_misses_it(courier, spool, webex):
    for _ in range(50):
        courier.stopping.clear()
        thread = threading.Thread(target=courier.run)
        thread.start()
        courier.stopping.set()
        courier.arrived.set()
        thread.join(10)
        assert not thread.is_alive()
