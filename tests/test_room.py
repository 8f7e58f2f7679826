"""One room for each path, and links to vManage."""

from __future__ import annotations

import contextlib
import re
import sqlite3
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from conftest import START_MS
from harness import Relay
from webex_standin import ROOM, Fault

from alarmrelay import Alarm

MADRID = ZoneInfo("Europe/Madrid")
OPS = "room-of-operations"
NOC = "room-of-the-noc"


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
    assert re.search(r"<br>… \(\d+ more lines\)<br>\[Open in vManage\]\(https://v/#/\S+/u\)$", text)
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
    path = Path(relay.environ["STATE_DIRECTORY"], "alarmrelay.db")
    with contextlib.closing(sqlite3.connect(path)) as db:
        (waiting,) = db.execute("SELECT count(*) FROM alarm WHERE delivered_ms IS NULL").fetchone()
    assert waiting == 0
