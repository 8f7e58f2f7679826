"""Digests: more than ten alarms that wait for a room go together."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import re
from itertools import chain
from zoneinfo import ZoneInfo

import pytest
from conftest import START_MS, drain, put
from harness import PAYLOADS, Relay
from webex_standin import Fault, WebexStandIn

import alarmrelay
from alarmrelay import Alarm, format_digest

MADRID = ZoneInfo("Europe/Madrid")

TLOC = json.loads((PAYLOADS / "bfd_tloc_down.json").read_bytes())


def test_a_digest_is_what_the_design_shows(courier, spool, webex):
    first = {
        "severity": "Critical",
        "rule_name_display": "BFD_TLOC_Down",
        "message": "All BFD sessions for the tloc are down",
        "receive_time": 1709885642000,
        "values_short_display": [
            {"system-ip": "1.1.10.1", "color": "biz-internet", "host-name": "BR10"}
        ],
    }
    second = {**first, "active": False, "rule_name_display": " _BFD*Up ", "severity": "Medium"}
    others = [{**first, "severity": text} for text in ("Major", "Medium", "Minor", "Odd", 7)]
    put(spool, first, second, *others, *[first] * 4)
    assert drain(courier) == [0.0]
    tail = "system-ip 1.1.10.1, color biz-internet, host-name BR10"
    text = f"All BFD sessions for the tloc are down, Fri Mar  8 09:14:02 2024 CET, {tail}"
    marks = ["🟡", "🔵", "🟢", "⚪", "⚪", *"🔴🔴🔴🔴"]
    lines = [f"- 🔴 **BFD_TLOC_Down** : {text}", rf"- ✅ **\_BFD\*Up** : {text}"]
    lines += [f"- {mark} **BFD_TLOC_Down** : {text}" for mark in marks]
    assert webex.texts() == ["\n".join(["Team, **11 alarms** are received from vManage:", *lines])]
    assert set(webex.requests[0]["content"]) == {"roomId", "markdown"}


def test_ten_waiting_alarms_are_sent_singly_and_eleven_together(courier, spool, webex):
    put(spool, *[{"message": f"number {number}"} for number in range(10)])
    drain(courier)
    assert len(webex.messages) == 10
    put(spool, *[{"message": f"number {number}"} for number in range(11)])
    drain(courier)
    assert len(webex.messages) == 11


def test_late_alarms_say_so_in_a_digest(courier, spool, webex, clock):
    put(spool, {"message": "x"}, received_ms=START_MS)
    put(spool, *[{"message": "y"}] * 10, received_ms=START_MS + 600_000)
    clock.now_s += 14 * 60 + 5
    drain(courier)
    assert webex.texts()[0].startswith(
        "Team, **11 alarms** are received from vManage, the oldest 14 min ago:\n- "
    )


def messages_of(webex: WebexStandIn) -> list[list[int]]:
    """Return the numbers of the alarms in each message, after a look at its form."""
    found = []
    for text in webex.texts():
        assert len(text.encode()) <= 7439
        numbers = [int(number) for number in re.findall(r"number (\d+)", text)]
        unnamed = re.match(r"Webex refuses the text of alarm (\d+)", text)
        if unnamed:
            numbers = [int(unnamed[1]) - 1]
        if count := re.match(r"Team, \*\*(\d+) alarms\*\* are received", text):
            assert len(numbers) == int(count[1]) == text.count("\n- ") > 1
        else:
            assert len(numbers) == 1
        found.append(numbers)
    return found


@pytest.mark.parametrize("alphabet", ["a", "é", "💥", "*_", "<&>", "\\", "\n"])
def test_a_thousand_alarms_become_a_few_dozen_messages(courier, spool, webex, alphabet):
    alarms = [
        {**TLOC, "message": f"number {number} " + alphabet * (number % 7)} for number in range(1000)
    ]
    put(spool, *alarms)
    webex.faults.append(Fault(status=429, headers={"Retry-After": "7"}))
    waits = drain(courier)
    assert waits[0] == 7.0
    messages = messages_of(webex)
    assert list(chain(*messages)) == list(range(1000))
    assert len(messages) < 50
    # As many as fit: one line more would have been too long.
    for one, following in zip(messages[:-2], messages[1:]):
        if len(one) > 1:
            batch = [Alarm(alarms[number], START_MS) for number in [*one, following[0]]]
            assert format_digest(batch, START_MS, MADRID)[1] == len(one)


@pytest.mark.parametrize("filler", ["x", "é", "💥"])
def test_a_digest_takes_what_fits_to_the_byte(filler):
    sizes = set()
    for pad in range(90):
        alarms = [Alarm({"message": "x" * pad}, START_MS)]
        alarms += [Alarm({"message": filler}, START_MS)] * 150
        text, count = format_digest(alarms, START_MS, MADRID)
        assert count > 99  # a third digit in the first line
        assert text.startswith(f"Team, **{count} alarms** ")
        size = len(text.encode())
        assert size <= 7439 < size + len(text.rpartition("\n")[2].encode()) + 1
        sizes.add(size)
    assert 7439 in sizes


def test_a_storm_during_a_limit_is_in_the_room_once_and_in_order(tmp_path, webex):
    webex.fault_for = lambda _: Fault(status=429, headers={"Retry-After": "1"})
    with Relay(tmp_path, webex.url) as relay:

        def post(client: int) -> None:
            with contextlib.closing(relay.connect()) as connection:
                for number in range(100 * client, 100 * client + 100):
                    body = {**TLOC, "message": f"number {number}"}
                    assert relay.post(body, connection=connection)[0] == 200

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(post, range(10)))
        webex.fault_for = lambda _: None
        relay.told("0 waiting, 1000 delivered")
        assert relay.log().count(" taken: ") == 1000
    messages = messages_of(webex)
    # By client, each one's in its order.
    arrived = sorted(chain(*messages), key=lambda number: number // 100)
    assert arrived == list(range(1000))
    assert len(messages) < 50


@pytest.mark.parametrize("places", [[0], [7], [99], [3, 4], [0, 50, 98]])
@pytest.mark.parametrize("forms", [["markdown"], ["markdown", "text"]], ids=["markdown", "all"])
def test_a_digest_that_is_refused_goes_one_by_one_and_in_order(
    courier, spool, webex, places, forms
):
    def fault_for(request: dict) -> Fault | None:
        content = request["content"]
        is_refused = any("poison" in content.get(form, "") for form in forms)
        return Fault(status=400) if is_refused else None

    alarms = [{**TLOC, "message": f"number {number}"} for number in range(100)]
    for place in places:
        alarms[place]["message"] += " poison"
    put(spool, *alarms)
    webex.fault_for = fault_for
    drain(courier)
    messages = messages_of(webex)
    assert list(chain(*messages)) == list(range(100))
    _, size = format_digest([Alarm(fields, START_MS) for fields in alarms], START_MS, MADRID)
    assert messages[0] == (list(range(size)) if places[0] >= size else [0])
    assert all([place] in messages for place in places)
    unnamed = [text for text in webex.texts() if text.startswith("Webex refuses the text")]
    assert len(unnamed) == (len(places) if "text" in forms else 0)
    assert (spool.waiting_total, courier.trouble) == (0, None)


def test_a_refused_digest_loses_none_when_a_part_fails_for_another_reason(courier, spool, webex):
    put(spool, *[{"message": f"number {number}"} for number in range(20)])
    webex.faults.extend(
        [Fault(status=400), Fault(status=503), Fault(status=404), Fault(status=400)]
    )
    waits = drain(courier)
    assert waits[0] == 0.0
    assert 0.8 <= waits[1] <= 1.2
    assert waits[2] == 60.0
    assert messages_of(webex) == [[number] for number in range(20)]


def test_a_room_that_refuses_a_digest_and_each_alarm_is_held_and_then_gets_all_in_order(
    courier, spool, webex, totals
):
    put(spool, *[{"message": f"number {number}"} for number in range(20)])
    webex.fault_for = lambda _: Fault(status=400)
    assert [courier.step(), courier.step(), courier.step()] == [0.0, 60.0, 60.0]
    assert courier.trouble.failure.kind == "refused"
    assert len(webex.requests) == totals.rooms["/"].failures["refused"] == 1 + 3 + 3
    webex.fault_for = lambda _: None
    drain(courier)
    assert messages_of(webex) == [[number] for number in range(20)]
    put(spool, *[{"message": f"number {number}"} for number in range(20, 40)])
    drain(courier)
    assert messages_of(webex)[20:] == [[*range(20, 40)]]


def test_an_alarm_too_long_for_a_digest_is_sent_alone(courier, spool, webex):
    long = {"message": "number 3 " + "x" * 7000, "values_short_display": [{"k": "y" * 400}]}
    put(spool, *[long if n == 3 else {"message": f"number {n}"} for n in range(20)])
    drain(courier)
    assert messages_of(webex)[:2] == [[0, 1, 2], [3]]
    assert list(chain(*messages_of(webex))) == list(range(20))


def test_large_alarms_are_read_a_few_at_a_time(spool, monkeypatch):
    monkeypatch.setattr(alarmrelay, "LARGE_BATCH_CHARACTERS", 100_000)
    put(spool, *[{"message": str(number), "x": "y" * 50_000} for number in range(30)])
    assert len(spool.next_batch("/").alarms) == 11
