"""What people read in a room: threads, digests, one room for each path, links."""

from __future__ import annotations

import concurrent.futures
import hashlib
import itertools
import json
import re
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from conftest import START_S, courier_of
from harness import PAYLOADS, RECORDED, Relay
from webex_standin import ROOM, Fault, WebexStandIn

import alarmrelay
from alarmrelay import Alarm, Spool, format_digest

START_MS = int(START_S * 1000)
MADRID = ZoneInfo("Europe/Madrid")
OPS, NOC = "room-of-operations", "room-of-the-noc"


def put(spool: Spool, *alarms: dict, received_ms: int = START_MS) -> None:
    request = hashlib.sha256(json.dumps(alarms).encode()).digest()
    assert spool.store("/", request, [Alarm(alarm, received_ms) for alarm in alarms])


def drain(courier: alarmrelay.Courier) -> list[float]:
    """Deliver all, and return the waits."""
    waits = []
    while (wait_s := courier.step()) is not None:
        waits.append(wait_s)
        assert len(waits) < 2000
    return waits


def alarm(rule: str, uuid: str | None = None, clears: object = None, **values: object) -> dict:
    """Return an alarm; one that clears has a list of uuids, or one that is empty."""
    found = {"rule_name_display": rule, "message": rule, "active": clears is None}
    found["values_short_display"] = [
        {key.replace("_", "-"): value for key, value in values.items()}
    ]
    found.update({"uuid": uuid} if uuid else {})
    found.update({"cleared_events": clears} if clears else {})
    return found


def down(uuid: str | None = None, **values: object) -> dict:
    return alarm(
        "BFD_TLOC_Down", uuid, None, **(values or {"system_ip": "1.1.1.1", "color": "lte"})
    )


def up(uuid: str | None = None, clears: object = (), **values: object) -> dict:
    return alarm(
        "BFD_TLOC_Up", uuid, clears, **(values or {"system_ip": "1.1.1.1", "color": "lte"})
    )


REBOOT = alarm("System_Reboot_Issued", "r", ["o"], host_name="A")
# Alarms as they come, each with the place of the one to which it is a reply.
STORIES = {
    "by uuid": [(alarm("Interface", "a"), None), (alarm("Interface", "b", ["a"]), 0)],
    "of another rule": [(alarm("OMP_State_Change", "o"), None), (REBOOT, 0)],
    "the newest of two uuids": [
        *[(alarm("Memory", "a"), None), (alarm("OMP", "b"), None), (alarm("CPU", "c"), None)],
        (alarm("Reboot", "d", ["b", "a"]), 1),
    ],
    "one uuid of two was never seen": [(alarm("OMP", "b"), None), (alarm("X", "d", ["?", "b"]), 0)],
    "no uuid was ever seen": [
        (alarm("Interface", "a"), None),
        (alarm("Interface", "b", ["?"]), None),
    ],
    "without uuids": [(down("a"), None), (up("b"), 0)],
    "without uuids at all": [(down(), None), (up(), 0)],
    "unknown uuids, then by values": [(down("a"), None), (up("b", ["?"]), 0)],
    "a uuid before values": [(down("a"), None), (down("b"), None), (up("c", ["a"]), 0)],
    "a flap": [(down("a"), None), (up("b"), 0), (down("c"), None), (up("d"), 2)],
    "up twice": [(down("a"), None), (up("b"), 0), (up("c"), None)],
    "up twice, cleared by uuid first": [(down("a"), None), (up("b", ["a"]), 0), (up("c"), None)],
    "a uuid leaves the other down": [
        *[(down("a"), None), (down("b"), None), (up("c", ["a"]), 0), (up("d"), 1)],
    ],
    "down twice": [
        (down("a"), None),
        (down("b"), None),
        (up("c"), 1),
        (up("d"), 0),
        (up("e"), None),
    ],
    "two TLOCs of one node": [
        *[(down("a", node="1", color="lte"), None), (down("b", node="1", color="mpls"), None)],
        *[(up("c", node="1", color="lte"), 0), (up("d", node="1", color="mpls"), 1)],
    ],
    "two components": [
        *[(alarm("OMP_Site_Down", "a", site_id="1"), None), (down("b", site_id="1"), None)],
        *[(alarm("OMP_Site_Up", "c", [], site_id="1"), 0), (up("d", site_id="1"), 1)],
    ],
    "values in another order, a number": [
        (down("a", x=100, y="b"), None),
        (up("b", y="b", x="100"), 0),
    ],
    "fewer values": [(down("a", x="1", y="2"), None), (up("b", x="1"), None)],
    "a level change": [(alarm("CPU", "a", cpu="9"), None), (alarm("CPU", "b", cpu="7"), None)],
    "active again": [(down("a"), None), (dict(up("b"), active=True), None), (up("c"), 0)],
    "a clear is nothing to clear": [(dict(down("a"), active=False), None), (up("b"), None)],
    "itself": [(alarm("X", "a", ["a"]), None)],
    "no values": [
        *[({"rule_name_display": "A_Down", "active": True}, None)],
        *[({"rule_name_display": "A_Up", "active": False}, None)],
    ],
    "odd uuids": [
        *[
            (alarm("X", "\ud800\x00\U0001f600é"), None),
            (alarm("X", "b", ["\ud800\x00\U0001f600é"]), 0),
        ],
        *[
            ({"uuid": 7, "active": True}, None),
            ({"active": False, "cleared_events": [None, {}, 7]}, 2),
        ],
        *[
            ({"uuid": "", "active": True}, None),
            ({"active": False, "cleared_events": ["", None]}, None),
        ],
        *[
            ({"active": False, "cleared_events": "a"}, None),
            ({"active": True, "cleared_events": [7]}, None),
        ],
    ],
    "very many uuids": [
        (alarm("X", "a"), None),
        (alarm("X", "b", [*map(str, range(50_000)), "a"]), 0),
    ],
}


@pytest.mark.parametrize("story", STORIES.values(), ids=STORIES.keys())
def test_a_clear_is_a_reply_to_the_alarm_that_it_clears(courier, spool, webex, story):
    for number, (one, _) in enumerate(story):
        put(spool, {**one, "number": number})
        assert courier.step() == 0.0
    ids = [message["id"] for message in webex.messages]
    parents = [message.get("parentId") for message in webex.messages]
    assert parents == [None if place is None else ids[place] for _, place in story]


@pytest.mark.parametrize("place", ["tloc", "node", "site"])
@pytest.mark.parametrize("component", ["bfd", "control", "omp"])
def test_the_samples_make_threads(courier, spool, webex, component, place):
    for direction in ("down", "up"):
        put(spool, json.loads((PAYLOADS / f"{component}_{place}_{direction}.json").read_bytes()))
        courier.step()
    assert [message.get("parentId") for message in webex.messages] == [None, "message-1"]


def test_recorded_clears_are_replies_where_their_alarm_is_recorded(courier, spool, webex):
    alarms = sorted(
        (json.loads(path.read_bytes()) for path in RECORDED),
        key=lambda one: (one["active"] is False, one["entry_time"]),
    )
    for one in alarms:
        put(spool, one)
        courier.step()
    uuids = {one["uuid"]: place for place, one in enumerate(alarms)}
    for place, one in enumerate(alarms):
        wanted = [uuids[uuid] for uuid in one.get("cleared_events") or [] if uuid in uuids]
        if wanted and one["active"] is False and max(wanted) < place:
            assert webex.messages[place].get("parentId") == webex.messages[max(wanted)]["id"]
        if one["active"]:
            assert "parentId" not in webex.messages[place]


def test_threads_survive_a_restart_and_end_with_retention(tmp_path, webex, clock):
    for one in (down("a"), up("b"), up("c", ["a"])):
        spool = Spool(tmp_path / "state")
        put(spool, one)
        drain(courier_of(spool, webex, clock))
        if one["uuid"] == "b":
            spool.delete_delivered(int(clock() * 1000) + 1)
        spool.close()
    assert [message.get("parentId") for message in webex.messages] == [None, "message-1", None]


def test_a_clear_of_an_alarm_in_a_digest_is_a_reply_to_the_digest(courier, spool, webex):
    put(spool, down("a"), *[alarm("X", f"x{number}") for number in range(10)])
    drain(courier)
    put(spool, up("b"))
    drain(courier)
    assert [message.get("parentId") for message in webex.messages] == [None, "message-1"]


def test_a_clear_in_a_digest_clears_in_the_order_of_arrival(courier, spool, webex):
    put(spool, down("a"), up("b"), down("c"), *[alarm("X", f"x{number}") for number in range(10)])
    drain(courier)
    put(spool, up("d"))  # of c
    put(spool, up("e"))  # of none: b was that of a
    drain(courier)
    assert [message.get("parentId") for message in webex.messages] == [None, "message-1", None]


@pytest.mark.parametrize("status", [400, 404])
def test_a_clear_of_a_deleted_message_is_posted_at_the_top_level_at_once(
    tmp_path, webex, clock, status
):
    spool = Spool(tmp_path / "state")
    courier = courier_of(spool, webex, clock)
    put(spool, down("a"), down("b", x="y"), *[alarm("X", f"x{number}") for number in range(10)])
    drain(courier)
    webex.deleted["message-1"] = status
    put(spool, up("c", ["a"]))
    assert drain(courier) == [0.0]  # at once
    assert ["parentId" in request["content"] for request in webex.requests] == [False, True, False]
    spool.close()
    spool = Spool(tmp_path / "state")
    courier = courier_of(spool, webex, clock)
    put(spool, up("d", ["a"]), up("e", x="y"))  # likewise for others in the same message
    drain(courier)
    spool.close()
    asked = ["parentId" in request["content"] for request in webex.requests]
    assert asked == [False, True, False, True, False, True, False]
    assert len(webex.messages) == 4


def test_a_clear_of_a_deleted_message_waits_for_its_pause_alone(courier, spool, webex):
    put(spool, down("a"))
    drain(courier)
    webex.deleted["message-1"] = 404
    put(spool, up("b"))
    webex.faults.extend([Fault(status=404), Fault(status=429, headers={"Retry-After": "9"})])
    assert drain(courier) == [9.0, 0.0]
    asked = ["parentId" in request["content"] for request in webex.requests]
    assert asked == [False, True, False, True, False]


def test_a_trouble_that_is_over_is_not_told_any_more_while_an_alarm_is_set_aside(
    courier, spool, webex, clock
):
    webex.fault_for = lambda request: (
        Fault(status=400) if "poison" in json.dumps(request["content"]) else None
    )
    put(spool, alarm("poison", "x"), alarm("X", "y"), alarm("X", "z"), alarm("X", "0"))
    assert courier.step() is not None
    assert courier.trouble.kind == "refused"
    assert courier.step() == 0.0  # and y
    assert courier.trouble.kind == "refused"  # it still waits
    webex.faults.append(Fault(status=401))
    courier.step()
    assert courier.trouble.kind == "held"
    clock.now_s += 60
    assert courier.step() == 0.0
    assert (courier.trouble.kind, len(courier.aside)) == ("refused", 1)
    webex.fault_for = lambda _: None
    assert drain(courier) == [0.0, 0.0]
    assert (courier.trouble, courier.aside) == (None, [])


def test_a_clear_in_plain_text_stays_in_its_thread(courier, spool, webex):
    put(spool, down("a"))
    drain(courier)
    put(spool, up("b"))
    webex.fault_for = lambda request: (
        Fault(status=400) if "markdown" in request["content"] else None
    )
    drain(courier)
    assert webex.messages[1]["parentId"] == "message-1"
    assert "BFD_TLOC_Up" in webex.messages[1]["text"]


def test_a_room_that_was_gone_loses_no_thread(courier, spool, webex):
    put(spool, down("a"))
    drain(courier)
    put(spool, up("b"))
    webex.rooms.clear()
    assert [courier.step(), courier.step()] == [60.0, 60.0]
    webex.rooms.add(ROOM)
    drain(courier)
    assert webex.messages[1]["parentId"] == "message-1"


def test_parents_and_duplicates_are_found_by_an_index(courier, spool):
    statements: list[str] = []
    spool._db.set_trace_callback(statements.append)
    put(spool, down("a"))
    put(spool, up("b", ["a", "?"]))
    drain(courier)
    spool._db.set_trace_callback(None)
    selects = [text for text in statements if text.startswith("SELECT")]
    plans = {
        text: " | ".join(row[3] for row in spool._db.execute(f"EXPLAIN QUERY PLAN {text}"))
        for text in selects
    }
    assert not any("SCAN alarm" in plan or "SCAN TABLE alarm" in plan for plan in plans.values())
    (cleared, *_) = [plan for text, plan in plans.items() if 'json_each(\'["a"' in text]
    assert "USING INDEX uuid (uuid=? AND room=?)" in cleared
    assert "USING INDEX down (down=? AND room=?)" in cleared
    (known, *_) = [plan for text, plan in plans.items() if "received_ms BETWEEN" in text]
    assert "USING INDEX request (request=?)" in known


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


def chained(parts: Iterable[list]) -> list:
    return list(itertools.chain.from_iterable(parts))


def messages_of(webex: WebexStandIn) -> list[list[int]]:
    """Return the numbers of the alarms in each message, after a look at its form."""
    found = []
    for text in webex.texts():
        assert len(text.encode()) <= 7439
        numbers = [int(number) for number in re.findall(r"number (\d+)", text)]
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
    assert chained(messages) == list(range(1000))
    assert len(messages) < 50
    # As many as fit: one line more would have been too long.
    for one, following in zip(messages[:-2], messages[1:]):
        if len(one) > 1 and following:
            batch = [Alarm(alarms[number], START_MS) for number in [*one, following[0]]]
            assert format_digest(batch, START_MS, MADRID)[1] == len(one)


@pytest.mark.parametrize("filler", ["x", "é", "💥"])
def test_a_digest_takes_what_fits_to_the_byte(filler):
    sizes = set()
    for pad in range(90):
        alarms = [Alarm({"message": "x" * pad}, START_MS)] + [
            Alarm({"message": filler}, START_MS)
        ] * 150
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

        def post(client: int) -> list[tuple[int, int]]:
            connection = relay.connect()
            answers = []
            for number in range(100 * client, 100 * client + 100):
                body = {**TLOC, "message": f"number {number}"}
                answers.append((number, relay.post(body, connection=connection)[0]))
            connection.close()
            return answers

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            answers = chained(pool.map(post, range(10)))
        assert {status for _, status in answers} == {200}
        webex.fault_for = lambda _: None
        relay.told("0 waiting, 1000 delivered")
        taken = re.findall(r"alarm (\d+) taken", relay.log())
        assert len(taken) == 1000
    messages = messages_of(webex)
    arrived = chained(messages)
    assert sorted(arrived) == list(range(1000))
    for client in range(10):  # each client's in its order
        assert [n for n in arrived if n // 100 == client] == [
            *range(100 * client, 100 * client + 100)
        ]
    assert len(messages) < 50


def refuse(word: str, forms: tuple[str, ...]):
    def fault_for(request: dict) -> Fault | None:
        content = request["content"]
        return Fault(status=400) if any(word in content.get(form, "") for form in forms) else None

    return fault_for


@pytest.mark.parametrize("places", [[0], [7], [99], [3, 4], [0, 50, 98]])
@pytest.mark.parametrize("forms", [("markdown",), ("markdown", "text")], ids=["markdown", "all"])
def test_a_poisonous_alarm_holds_no_other_and_is_not_lost(
    courier, spool, webex, clock, places, forms
):
    alarms = [{**TLOC, "message": f"number {number}"} for number in range(100)]
    for place in places:
        alarms[place]["message"] += " poison"
    put(spool, *alarms)
    webex.fault_for = refuse("poison", forms)
    drain(courier)
    arrived = chained(messages_of(webex))
    others = [number for number in range(100) if number not in places]
    assert [number for number in arrived if number not in places] == others
    assert len(webex.requests) < 100
    if "text" not in forms:
        assert arrived == list(range(100))
        return
    assert arrived == others
    assert spool.rooms["/"]["waiting"] == len(places)
    assert courier.trouble.kind == "refused"
    put(spool, {"message": "number 100"})
    drain(courier)
    assert messages_of(webex)[-1] == [100]
    clock.now_s += 61
    webex.fault_for = lambda _: None
    drain(courier)
    assert sorted(chained(messages_of(webex))[-len(places) :]) == places
    assert (spool.rooms["/"]["waiting"], courier.trouble) == (0, None)


def test_many_poisonous_alarms_do_not_keep_others_from_their_turn(courier, spool, webex, clock):
    put(spool, *[{**TLOC, "message": f"number {number} poison"} for number in range(70)])
    webex.fault_for = refuse("poison", ("markdown", "text"))
    for _ in range(150):
        clock.now_s += courier.step() or 0.0
    put(spool, *[{**TLOC, "message": f"number {number}"} for number in range(70, 90)])
    while len(chained(messages_of(webex))) < 20:
        wait_s = courier.step()
        clock.now_s += wait_s or 0.0
        assert len(webex.requests) < 1000
    assert chained(messages_of(webex)) == list(range(70, 90))
    webex.fault_for = lambda _: None
    clock.now_s += 61
    while (wait_s := courier.step()) is not None:
        clock.now_s += wait_s
    assert sorted(chained(messages_of(webex))) == list(range(90))


def test_a_refused_digest_loses_none_when_a_part_fails_for_another_reason(courier, spool, webex):
    put(spool, *[{"message": f"number {number}"} for number in range(60)])
    webex.faults.extend(
        [Fault(status=400), Fault(status=503), Fault(status=404), Fault(status=400)]
    )
    waits = drain(courier)
    assert waits[0] == 0.0
    assert 0.8 <= waits[1] <= 1.2
    assert waits[2] == 60.0
    assert chained(messages_of(webex)) == list(range(60))


def test_an_alarm_too_long_for_a_digest_is_sent_alone_in_full(courier, spool, webex):
    long = {"message": "number 3 " + "x" * 7000, "values_short_display": [{"k": "y" * 400}]}
    put(spool, *[long if n == 3 else {"message": f"number {n}"} for n in range(20)])
    drain(courier)
    assert messages_of(webex)[:2] == [[0, 1, 2], [3]]
    assert chained(messages_of(webex)) == list(range(20))


def test_large_alarms_are_read_a_few_at_a_time(spool, monkeypatch):
    monkeypatch.setattr(alarmrelay, "BODY_BYTES", 100_000)
    put(spool, *[{"message": str(number), "x": "y" * 50_000} for number in range(30)])
    assert len(spool.oldest_waiting("/", [])[0]) == 11


@pytest.fixture
def rooms(webex):
    webex.rooms |= {OPS, NOC}
    return {"room_id_ops": OPS, "room_id_noc_2": NOC}


def test_each_path_has_its_room(tmp_path, webex, rooms):
    body = b'{"message": "the same bytes"}'
    with Relay(tmp_path, webex.url, **rooms) as relay:
        for path in ("/", "/ops", "/noc_2", "/ops?x=1"):
            expected = "duplicate" if "?" in path else "accepted"
            assert relay.post(body, path) == (200, {"status": expected})
        for path in ("/noc", "/OPS", "/ops/", "/room_id_ops"):
            assert relay.post(body, path)[0] == 404
        relay.told("0 waiting, 3 delivered")
        assert "taken: room=/ops rule=" in relay.log()
    assert sorted(message["roomId"] for message in webex.messages) == sorted([ROOM, OPS, NOC])


def test_a_room_that_is_gone_or_limited_delays_no_other(tmp_path, webex, rooms):
    def fault_for(request: dict) -> Fault | None:
        limited = Fault(status=429, headers={"Retry-After": "3600"})
        return {OPS: Fault(status=404), NOC: limited}.get(request["content"]["roomId"])

    webex.fault_for = fault_for
    with Relay(tmp_path, webex.url, **rooms) as relay:
        for number in range(12):
            for path in ("/ops", "/noc_2", "/"):
                assert relay.post({"message": f"number {number}"}, path)[0] == 200
        said = relay.told("24 waiting, 12 delivered")
        assert " for room /ops: Webex has no such room (404 Not Found" in said
        assert " for room /noc_2: Webex limits the bot (429 Too Many Requests" in said
        assert {message["roomId"] for message in webex.messages} == {ROOM}
        assert relay.log().count("ERROR room /ops, alarm 1: delivery held: 404 ") == 1


def test_threads_stay_in_their_room(tmp_path, webex, rooms):
    with Relay(tmp_path, webex.url, **rooms) as relay:
        relay.post(down("a"), "/ops")
        relay.told("1 delivered")
        relay.post(up("b", ["a"]), "/noc_2")
        relay.post(up("b", ["a"]), "/ops")
        relay.told("3 delivered")
    parents = {message["roomId"]: message.get("parentId") for message in webex.messages}
    assert parents == {OPS: "message-1", NOC: None}


def link(url: str, uuid: object, delay_ms: int = 0) -> str:
    return Alarm({"uuid": uuid, "message": "m"}, START_MS).message(START_MS + delay_ms, MADRID, url)


@pytest.mark.parametrize("url", ["https://vmanage.example", "http://10.0.0.1:8443/x/"])
def test_a_message_ends_with_a_link_to_its_alarm(url):
    page = f"{url.rstrip('/')}/#/app/monitor/alarms/details/226bd188-35e8"
    assert link(url, "226bd188-35e8").endswith(f" CET<br>[Open in vManage]({page})")
    late = link(url, "226bd188-35e8", 840_000)
    assert late.endswith(
        f"<br>**Delayed:** relayed 14 min after it came in<br>[Open in vManage]({page})"
    )


def test_a_message_that_is_cut_keeps_its_link():
    many = {"uuid": "u", "values": [{f"key {n}": "x" * 90 for n in range(300)}]}
    text = Alarm(many, START_MS).message(START_MS, MADRID, "https://v")
    assert re.search(r"<br>\[Open in vManage\]\(https://v/#/\S+/u\)<br>… \(\d+ more lines\)$", text)
    assert len(text.encode()) <= 7439


@pytest.mark.parametrize(
    "uuid", ["a) <@all> [x](y", "é\ud800\n*_`", "x" * 9000, 7, ["a"], {"a": 1}]
)
def test_no_uuid_can_break_out_of_its_link(uuid):
    last = link("https://v", uuid).rpartition("<br>")[2]
    assert re.fullmatch(
        r"\[Open in vManage\]\(https://v/#/app/monitor/alarms/details/[A-Za-z0-9_.~%-]{1,900}\)",
        last,
    )


@pytest.mark.parametrize(("url", "uuid"), [("", "u"), ("https://v", ""), ("https://v", None)])
def test_without_an_address_or_a_uuid_there_is_no_link(url, uuid):
    assert "Open in vManage" not in link(url, uuid)


def test_the_relay_links_when_it_is_told_vmanages_address(tmp_path, webex):
    with Relay(tmp_path, webex.url, vmanage_url="https://vmanage.example:8443/") as relay:
        relay.post({"uuid": "u-1"})
        webex.wait_for(lambda: webex.messages)
    page = "https://vmanage.example:8443/#/app/monitor/alarms/details/u-1"
    assert webex.texts()[0].endswith(f"<br>[Open in vManage]({page})")


def test_a_room_of_a_file_of_the_spool_that_no_path_has_any_more_waits(tmp_path, webex, rooms):
    webex.fault_for = lambda request: (
        Fault(status=503) if request["content"]["roomId"] == OPS else None
    )
    with Relay(tmp_path, webex.url, **rooms) as relay:
        relay.post({"message": "kept"}, "/ops")
        relay.wait_for_log("delivery failed: 503")
    with Relay(tmp_path, webex.url) as relay:
        assert relay.post({"message": "other"})[0] == 200
        said = relay.told("1 waiting, 1 delivered")
        assert said.startswith("STATUS=1 alarm waits for room /ops: set room_id_ops; listening")
        assert re.search(r" WARNING alarmrelay .*: 1 alarm waits for room /ops: set r", relay.log())
    webex.fault_for = lambda _: None
    with Relay(tmp_path, webex.url, **rooms) as relay:
        relay.told("0 waiting, 1 delivered")
    with sqlite3.connect(Path(relay.environ["STATE_DIRECTORY"], "alarmrelay.db")) as db:
        assert db.execute("SELECT count(*) FROM alarm WHERE delivered_ms IS NULL").fetchone() == (
            0,
        )
    db.close()
