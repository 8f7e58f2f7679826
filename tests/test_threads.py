"""Threads: a clear is a reply to the alarm that it clears."""

from __future__ import annotations

import json

import pytest
from conftest import courier_of, drain, put
from harness import PAYLOADS, RECORDED, Relay
from webex_standin import ROOM, Fault, WebexStandIn

from alarmrelay import Spool

TLOC = {"system-ip": "1.1.1.1", "color": "lte"}


def alarm(rule: str, uuid: str | None = None, clears: object = None, **values: object) -> dict:
    """Return an alarm; one that clears has a list of uuids, which may be empty."""
    fields = {"rule_name_display": rule, "message": rule, "active": clears is None}
    fields["values_short_display"] = [values]
    if uuid is not None:
        fields["uuid"] = uuid
    if clears:
        fields["cleared_events"] = clears
    return fields


def down(uuid: str | None = None, **values: object) -> dict:
    return alarm("BFD_TLOC_Down", uuid, **(values or TLOC))


def up(uuid: str | None = None, clears: object = (), **values: object) -> dict:
    return alarm("BFD_TLOC_Up", uuid, clears, **(values or TLOC))


def parents(webex: WebexStandIn) -> list[str | None]:
    """Return to which message each message is a reply."""
    return [message.get("parentId") for message in webex.messages]


def were_replies(webex: WebexStandIn) -> list[bool]:
    """Return of each message, taken or refused, whether it was sent as a reply."""
    return ["parentId" in request["content"] for request in webex.requests]


REBOOT = alarm("System_Reboot_Issued", "r", ["o"], host_name="A")
ODD = "\ud800\x00\U0001f600é"
# Alarms as they come, and for each the place of the one to which it is a reply.
STORIES = {
    "by uuid, of another rule": ([alarm("OMP_State_Change", "o"), REBOOT], [None, 0]),
    "the newest of two uuids": (
        [alarm("Memory", "a"), alarm("OMP", "b"), alarm("CPU", "c"), alarm("X", "d", ["b", "a"])],
        [None, None, None, 1],
    ),
    "one uuid of two was never seen": ([alarm("OMP", "b"), alarm("X", "d", ["?", "b"])], [None, 0]),
    "no uuid was ever seen": ([alarm("Port", "a"), alarm("Port", "b", ["?"])], [None, None]),
    "without uuids at all": ([down(), up()], [None, 0]),
    "unknown uuids, then by values": ([down("a"), up("b", ["?"])], [None, 0]),
    "a flap": ([down("a"), up("b"), down("c"), up("d")], [None, 0, None, 2]),
    "up twice, cleared by uuid first": ([down("a"), up("b", ["a"]), up("c")], [None, 0, None]),
    "a uuid before values leaves the other down": (
        [down("a"), down("b"), up("c", ["a"]), up("d")],
        [None, None, 0, 1],
    ),
    "down twice": ([down("a"), down("b"), up("c"), up("d"), up("e")], [None, None, 1, 0, None]),
    "two TLOCs of one node": (
        [down("a", color="lte"), down("b", color="3g"), up("c", color="lte"), up("d", color="3g")],
        [None, None, 0, 1],
    ),
    "two components": (
        [alarm("OMP_Down", "a", x=1), down("b", x=1), alarm("OMP_Up", "c", [], x=1), up("d", x=1)],
        [None, None, 0, 1],
    ),
    "values in another order, a number": (
        [down("a", x=1, y="b"), up("b", y="b", x="1")],
        [None, 0],
    ),
    "fewer values": ([down("a", x="1", y="2"), up("b", x="1")], [None, None]),
    "a level change": ([alarm("CPU", "a", cpu="9"), alarm("CPU", "b", cpu="7")], [None, None]),
    "active again": ([down("a"), {**up("b"), "active": True}, up("c")], [None, None, 0]),
    "a clear is nothing to clear": ([{**down("a"), "active": False}, up("b")], [None, None]),
    "itself": ([alarm("X", "a", ["a"])], [None]),
    "no values": ([alarm("A_Down"), alarm("A_Up", None, [])], [None, None]),
    "odd uuids": ([alarm("X", ODD), alarm("X", "b", [ODD])], [None, 0]),
    "a uuid that is a number": ([alarm("X", 7), alarm("X", "b", [None, {}, 7])], [None, 0]),
    "an empty uuid": ([alarm("X", ""), alarm("X", "b", ["", None])], [None, None]),
    "uuids that are no list": ([alarm("X", "a"), alarm("X", "b", "a")], [None, None]),
    "uuids of what is no clear": (
        [alarm("X", "a"), {**alarm("X", "b", ["a"]), "active": True}],
        [None, None],
    ),
    "very many uuids": (
        [alarm("X", "a"), alarm("X", "b", [*map(str, range(50_000)), "a"])],
        [None, 0],
    ),
}


@pytest.mark.parametrize(("alarms", "places"), STORIES.values(), ids=STORIES.keys())
def test_a_clear_is_a_reply_to_the_alarm_that_it_clears(courier, spool, webex, alarms, places):
    for number, fields in enumerate(alarms):
        put(spool, {**fields, "number": number})
        assert courier.step() == 0.0
    ids = [message["id"] for message in webex.messages]
    assert parents(webex) == [None if place is None else ids[place] for place in places]


@pytest.mark.parametrize("place", ["tloc", "node", "site"])
@pytest.mark.parametrize("component", ["bfd", "control", "omp"])
def test_the_samples_make_threads(courier, spool, webex, component, place):
    for direction in ("down", "up"):
        put(spool, json.loads((PAYLOADS / f"{component}_{place}_{direction}.json").read_bytes()))
        courier.step()
    assert parents(webex) == [None, "message-1"]


def test_recorded_clears_are_replies_where_their_alarm_is_recorded(courier, spool, webex):
    alarms = [json.loads(path.read_bytes()) for path in RECORDED]
    alarms.sort(key=lambda fields: (fields["active"] is False, fields["entry_time"]))
    places: dict[str, int] = {}
    for place, fields in enumerate(alarms):
        put(spool, fields)
        courier.step()
        cleared = [places[uuid] for uuid in fields.get("cleared_events") or [] if uuid in places]
        parent_id = webex.messages[place].get("parentId")
        if fields["active"]:
            assert parent_id is None
        elif cleared:
            assert parent_id == webex.messages[max(cleared)]["id"]
        places[fields["uuid"]] = place


def test_threads_survive_a_restart_and_end_with_retention(tmp_path, webex, clock):
    for one in (down("a"), up("b"), up("c", ["a"])):
        spool = Spool(tmp_path / "state")
        put(spool, one)
        drain(courier_of(spool, webex, clock))
        if one["uuid"] == "b":
            spool.delete_delivered(int(clock() * 1000) + 1)
        spool.close()
    assert parents(webex) == [None, "message-1", None]


def test_a_clear_in_a_digest_clears_in_the_order_of_arrival(courier, spool, webex):
    put(spool, down("a"), up("b"), down("c"), *[alarm("X", f"x{number}") for number in range(10)])
    drain(courier)
    put(spool, up("d"))  # of c
    put(spool, up("e"))  # of none: b was that of a
    drain(courier)
    assert parents(webex) == [None, "message-1", None]


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
    assert were_replies(webex) == [False, True, False]
    spool.close()
    spool = Spool(tmp_path / "state")
    courier = courier_of(spool, webex, clock)
    put(spool, up("d", ["a"]), up("e", x="y"))  # likewise for others in the same message
    drain(courier)
    spool.close()
    assert were_replies(webex) == [False, True, False, True, False, True, False]
    assert len(webex.messages) == 4


def test_a_clear_of_a_deleted_message_waits_for_its_pause_alone(courier, spool, webex):
    put(spool, down("a"))
    drain(courier)
    webex.deleted["message-1"] = 404
    put(spool, up("b"))
    webex.faults.extend([Fault(status=404), Fault(status=429, headers={"Retry-After": "9"})])
    assert drain(courier) == [9.0, 0.0]
    assert were_replies(webex) == [False, True, False, True, False]


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


def test_threads_stay_in_their_room(tmp_path, webex):
    webex.rooms |= {"ops", "noc"}
    with Relay(tmp_path, webex.url, room_id_ops="ops", room_id_noc="noc") as relay:
        relay.post(down("a"), "/ops")
        relay.told("1 delivered")
        relay.post(up("b", ["a"]), "/noc")
        relay.post(up("b", ["a"]), "/ops")
        relay.told("3 delivered")
    assert {message["roomId"]: message.get("parentId") for message in webex.messages} == {
        "ops": "message-1",
        "noc": None,
    }
