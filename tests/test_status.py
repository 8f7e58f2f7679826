"""What systemd and whoever watches are told: STATUS=, /healthz and the page."""

from __future__ import annotations

import json
import re
import threading
import time
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from harness import FAST, PAYLOADS, Relay, get, later, status_of
from page import Page, sentence
from webex_standin import NOC, OPS, PAUSED, Fault, three_rooms

from alarmrelay import TICK_S, local_time

ZONE = ZoneInfo("Asia/Kathmandu")  # another than this host's
REASONS = {  # what Webex does, the words, what to do, the class on the page
    "401": (Fault(status=401), "refuses the token", "; replace bearer_token and restart", "bad"),
    "403": (Fault(status=403), "refuses the bot", "; the bot must be a member of .*", "bad"),
    "404": (Fault(status=404), "has no such room", "; check room_id .*", "bad"),
    "400": (Fault(status=400), "refuses the message", "; check room_id; .*", "bad"),
    "409": (Fault(status=409), "fails", "", "bad"),
    "429": (PAUSED, "limits the bot", "", "late"),
    "503": (Fault(status=503), "fails", "", "late"),
    "no answer": (Fault(reset_before=True), "does not answer", "; check network, .*", "late"),
}


@pytest.mark.parametrize("case", REASONS)
def test_status_and_page_say_why_alarms_wait_and_what_to_do(tmp_path, webex, case):
    fault, words, advice, kind = REASONS[case]
    webex.fault_for = lambda _: fault
    with Relay(tmp_path, webex.url, time_zone=ZONE.key) as relay:
        before = datetime.now(ZONE)
        relay.post([{"message": "x"}, {"message": "y"}])
        said = relay.told(" since ")
        minutes = "|".join(f"{before + timedelta(minutes=n):%H:%M}" for n in range(3))
        match = re.fullmatch(
            rf"STATUS=2 alarms wait: Webex {words} \({case}.+\) since ({minutes}), "
            rf"tried again in (\d+) s{advice}; listening on .*; 2 waiting, 0 delivered",
            said,
        )
        assert match, said
        assert (int(match[2]) > 60) == (case == "429")
        shown_kind, shown = Page(relay).h1
        assert shown_kind == kind
        assert sentence(shown) == sentence(said)


def test_status_and_page_turn_with_the_state(tmp_path, webex):
    release = threading.Event()
    again = threading.Event()
    good = "STATUS=All alarms are in the room; listening on "
    with Relay(tmp_path, webex.url, limits=FAST) as relay:
        assert relay.told("STATUS=").startswith(good)
        assert Page(relay).h1 == ["good", "All alarms are in the room"]
        webex.faults.append(Fault(hold=release, status=401))
        webex.faults.append(Fault(hold=again, take=True, status=200))
        relay.post({"message": "x"})
        assert relay.told("STATUS=1 alarm waits").startswith("STATUS=1 alarm waits; listening on ")
        assert Page(relay).h1 == ["late", "1 alarm waits"]
        release.set()
        assert relay.told("STATUS=1 alarm waits: Webex refuses the token (401 ")
        assert Page(relay).h1[0] == "bad"
        again.set()
        assert relay.told("0 waiting, 1 delivered").startswith(good)
        assert Page(relay).h1[0] == "good"


def test_since_is_of_this_trouble_and_not_of_one_before(tmp_path, webex):
    webex.fault_for = lambda _: Fault(status=503)
    limits = {**FAST, "RETRY_MAX_S": 0.05}
    with Relay(tmp_path, webex.url, limits=limits, **later(tmp_path, 0)) as relay:
        relay.post({"message": "x"})
        relay.told("fails (503 ")
        later(tmp_path, 2)
        seen = len(webex.requests)
        webex.wait_for(lambda: len(webex.requests) > seen + 5)
        webex.fault_for = lambda _: Fault(status=401)
        relay.told("refuses the token (401 ")
        since = [re.search(r"\((\d+) .* since (\d\d:\d\d)", said) for said in relay.said]
        times = {(match[1], match[2]) for match in since if match}
    assert sorted(status for status, _ in times) == ["401", "503"]
    assert len({time for _, time in times}) == 2


def test_since_has_a_date_when_it_was_not_today_and_the_wait_is_never_negative(tmp_path, webex):
    webex.fault_for = lambda _: Fault(status=401)
    settings = later(tmp_path, 0)
    with Relay(tmp_path, webex.url, limits=FAST, time_zone=ZONE.key, **settings) as relay:
        relay.post({"message": "x"})
        relay.told("refuses the token (401 ")
        days = [f"{datetime.now(ZONE) - timedelta(minutes=n):%b %d}" for n in range(2)]
        later(tmp_path, 30)
        _, words = Page(relay).h1
    match = re.search(r"\) since (\w+ \d\d), \d\d:\d\d, tried again in 0 s; ", words)
    assert match, words
    assert match[1] in days


def test_the_time_to_the_next_attempt_counts_down(tmp_path, webex):
    assert TICK_S < 1
    webex.fault_for = lambda _: Fault(status=401)
    with Relay(tmp_path, webex.url, limits={**FAST, "HOLD_S": 3600}) as relay:
        relay.post({"message": "x"})
        first = re.search(r"tried again in (\d+) s", relay.told(" since "))
        assert 3590 <= int(first[1]) <= 3600
        assert relay.told(f"tried again in {int(first[1]) - 1} s")


@pytest.mark.parametrize(
    ("limit", "number", "words"),
    [
        ("WAITING_ALARMS", 2, "too many alarms wait for Webex"),
        ("FREE_BYTES", 2**62, f"the disk is full, or under {2**42} MiB free in "),
    ],
)
def test_status_and_health_say_that_new_alarms_are_refused(tmp_path, webex, limit, number, words):
    webex.fault_for = lambda _: Fault(status=429, headers={"Retry-After": "0"})
    with Relay(tmp_path, webex.url, limits={**FAST, limit: number}) as relay:
        statuses = [relay.post({"message": f"number {number}"})[0] for number in range(3)]
        waiting = statuses.count(200)
        said = relay.told(f"STATUS=New alarms are refused: {words}")
        if waiting:
            said = relay.told("; 2 alarms wait: Webex limits the bot (429 ")
        assert said.startswith(f"STATUS=New alarms are refused: {words}")
        assert statuses[2] == 503
        kind, shown = Page(relay).h1
        assert kind == "bad"
        assert shown.startswith(f"New alarms are refused: {words}")
        status, headers, text = get(relay, "/healthz", X="none")
        assert (status, headers["Retry-After"]) == (503, "30")
        assert words in json.loads(text)["error"]
        webex.fault_for = lambda _: None
        if waiting:
            assert relay.told("0 waiting, 2 delivered").startswith("STATUS=All alarms are in ")
            assert get(relay, "/healthz", X="none")[0] == 200


def test_alarms_of_a_room_without_a_setting_are_missed(tmp_path, webex):
    webex.fault_for = lambda _: PAUSED
    with Relay(tmp_path, webex.url, **three_rooms(webex)) as relay:
        relay.post({"message": "kept"}, "/ops")
    with Relay(tmp_path, webex.url, **later(tmp_path, 13)) as relay:
        said = relay.told("STATUS=")
        assert said.startswith("STATUS=1 alarm waits for room /ops: set room_id_ops; listening on ")
        assert Page(relay).h1 == ["bad", sentence(said)]
        text = get(relay, "/metrics")[2]
        assert 'alarms_waiting{room="/ops"} 1\n' in text
        (waited_s,) = re.findall(r'oldest_waiting_seconds{room="/ops"} (\S+)', text)
        assert 13 <= float(waited_s) / 3600 < 14


def test_each_room_that_waits_is_told(tmp_path, webex):
    faults = {OPS: Fault(status=404), NOC: PAUSED}
    webex.fault_for = lambda request: faults.get(request["content"]["roomId"])
    with Relay(tmp_path, webex.url, **three_rooms(webex)) as relay:
        relay.told("STATUS=All alarms are in their rooms; listening on ")
        relay.post([{"message": "x"}, {"message": "y"}], "/noc")
        relay.told("limits the bot (429 ")
        for path in ("/", "/ops"):
            relay.post({"message": "x"}, path)
        relay.told("room (404")
        said = relay.told("; 3 waiting, 1 delivered")
    words = "2 alarms wait for room /noc: Webex .*; 1 alarm waits for room /ops: Webex has .*"
    assert re.fullmatch(f"STATUS={words}", said)


def test_systemd_takes_a_status_of_many_rooms(tmp_path, webex):
    """Of more than 4096 bytes it takes none; sd_notify(3), NOTIFY_BUFFER_MAX in its source."""
    rooms = {f"room_id_room_{number:02}": f"room-{number}" for number in range(30)}
    webex.rooms |= {*rooms.values()}
    text = json.dumps({"message": "\u00e9" * 300}).encode()
    webex.fault_for = lambda _: Fault(status=401, body=text)
    with Relay(tmp_path, webex.url, limits=FAST, **rooms) as relay:
        for number in range(30):
            relay.post({"message": "x"}, f"/room_{number:02}")
        relay.told("; 30 waiting, 0 delivered")
        relay.told("refuses the token (401 ")
        assert max(len(said.encode()) for said in relay.said) <= 4096


def test_page_metrics_and_status_are_there_while_webex_hangs_and_100000_alarms_wait(
    tmp_path, webex
):
    release = threading.Event()
    webex.faults.append(Fault(hold=release, status=503))
    with Relay(tmp_path, webex.url, limits={**FAST, "READ_S": 300.0}) as relay:
        for number in range(100):
            body = [{"message": f"number {number} {place}"} for place in range(1000)]
            assert relay.post(body)[0] == 200
        webex.wait_for(lambda: webex.requests)
        relay.told("STATUS=New alarms are refused: too many alarms wait for Webex; 100000 ")
        page = Page(relay)
        assert page.h1[1].endswith("; 100000 alarms wait")
        assert page.rows["alarms"][0][4] == "number 99 999"
        assert 'alarms_waiting{room="/"} 100000\n' in get(relay, "/metrics")[2]
        assert get(relay, "/healthz", X="none")[0] == 503
        assert len(webex.requests) == 1  # which still hangs
        release.set()


def test_the_page_is_one_document_that_nobody_keeps(relay):
    page = Page(relay)
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    assert page.headers["Content-Security-Policy"] == policy
    assert page.headers["Cache-Control"] == "no-store"
    assert page.headers["X-Content-Type-Options"] == "nosniff"
    assert page.text.lower().startswith("<!doctype html>")
    metas = [attributes for tag, attributes in page.tags if tag == "meta"]
    assert {"http-equiv": "refresh", "content": "10"} in metas
    assert "viewport" in [meta.get("name") for meta in metas]
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    names = {name for _, attributes in page.tags for name in attributes}
    assert [name for name in names if name in ("src", "href") or name.startswith("on")] == []
    assert not re.search(r"url\(|@import", page.text)


def test_the_page_tells_of_each_room_also_after_a_restart(tmp_path, webex):
    webex.fault_for = lambda request: PAUSED if request["content"]["roomId"] == OPS else None
    settings = {**three_rooms(webex), **later(tmp_path, 0), "time_zone": ZONE.key}
    with Relay(tmp_path, webex.url, **settings) as relay:
        before_ms = int(time.time() * 1000)
        relay.post([{"message": "x"}, {"message": "y"}, {"message": "z"}])
        relay.wait_for_log(" delivered: ", 3)
        after_ms = int(time.time() * 1000)
        relay.post([{"message": "x"}, {"message": "y"}], "/ops")
        relay.told("limits the bot (429 ")
        assert Page(relay).rows["rooms"][2][1:3] == ["/ops", "2 waiting"]
        for hours, number, unit in ((0.01, 36, "s"), (0.25, 15, "min"), (3, 3, "h")):
            later(tmp_path, hours)
            shown = Page(relay).rows["rooms"]
            _, age, shown_unit = shown[2][3].split()
            assert shown_unit == unit
            assert 0 <= int(age) - number < 60
    moments = [local_time(ms, ZONE) for ms in (*range(before_ms, after_ms, 1000), after_ms)]
    assert shown[0][4] in [f"last delivered: {moment}" for moment in moments]
    none = ["last delivered: none in 24 h", "0 delivered in 24 h"]
    assert [row[1:] for row in shown] == [
        ["/", "0 waiting", "", shown[0][4], "3 delivered in 24 h"],
        ["/noc", "0 waiting", "", *none],
        ["/ops", "2 waiting", "oldest 3 h", *none],
    ]
    with Relay(tmp_path, webex.url, **settings) as relay:
        assert Page(relay).rows["rooms"] == shown
        later(tmp_path, 25)
        assert Page(relay).rows["rooms"][0][4:] == none


SAMPLE = json.loads((PAYLOADS / "system_reboot_issued.json").read_bytes())
NONE = {"values_short_display": None}
SHOWN = {  # an alarm's fields besides the sample's, and the cells that differ from its
    "as it is": ({}, {}),
    "cleared": ({"active": False, "severity": "Medium"}, {"severity": "✅ cleared (Medium)"}),
    "markdown": ({"message": "**a** [b](c) _d_ `e` \\"}, {"message": "**a** [b](c) _d_ `e` \\"}),
    "markup": ({"message": "<b>&lt;\"'</b>&"}, {"message": "<b>&lt;\"'</b>&"}),
    "lines": ({"message": "a\nb\x1b[c\u202ed\x00e"}, {"message": "a b [c d e"}),
    "no text": ({"message": {"a": [None, 1]}}, {"message": '{"a": [null, 1]}'}),
    "an address": ({"values_short_display": [{"system-ip": "10.1.0.1"}]}, {"device": "10.1.0.1"}),
    "a site": ({"values_short_display": {"site-id": 100, "x": "y"}}, {"device": "100"}),
    "devices": ({"values": [{"host-name": "A"}, {"host-name": "B"}], **NONE}, {"device": "A, B"}),
    "long": ({"message": "é&" * 30}, {"message": "é&" * 22 + "…"}),
    "as long as can be": ({"message": "é" * 80}, {"message": "é" * 80}),
    "no device": ({"values_short_display": [{"x": "y"}]}, {"device": ""}),
}


def test_the_page_shows_alarms_as_people_read_them(relay):
    sample = {
        "class": "delivered",
        "time": "Sat Jan 18 05:57:01 2020 CET",
        "severity": "🔴 Critical",
        "rule": "System_Reboot_Issued",
        "message": "The device rebooted",
        "device": "DC1-VEDGE1",
    }
    relay.post([{**SAMPLE, **changes} for changes, _ in SHOWN.values()])
    relay.wait_for_log(" delivered: ", len(SHOWN))
    rows = Page(relay).rows["alarms"][::-1]
    assert len(rows) == len(SHOWN)
    for row, (_, cells) in zip(rows, SHOWN.values()):
        assert row[:-1] == list({**sample, **cells}.values())
        assert re.fullmatch(r"delivered after \d+\.\d s", row[-1])


def test_the_page_tells_waiting_and_delivered_alarms_apart(tmp_path, webex):
    webex.fault_for = lambda request: PAUSED if request["content"]["roomId"] == OPS else None
    settings = three_rooms(webex)

    def states() -> list[tuple[str, str, str]]:  # newest first: class, message, state
        rows = Page(relay).rows["alarms"]
        return [(row[0], row[4], row[-1].partition(" after ")[0]) for row in rows]

    with Relay(tmp_path, webex.url, **settings) as relay:
        relay.post({"message": "a"})
        relay.wait_for_log(" delivered: ")
        relay.post({"message": "b"}, "/ops")
        relay.post({"message": "a"})
        expected = [("waiting", "b", "waiting"), ("delivered", "a", "delivered")]
        assert states() == expected  # what was posted again is not there twice
    with Relay(tmp_path, webex.url, **settings) as relay:
        assert states() == expected
    webex.fault_for = lambda _: None
    with Relay(tmp_path, webex.url, **settings) as relay:
        relay.wait_for_log(" delivered: ", 2)
        assert states() == [("delivered", "b", "delivered"), ("delivered", "a", "delivered")]


def test_the_page_shows_the_newest_50_alarms_also_after_a_restart(tmp_path, webex):
    webex.fault_for = lambda _: PAUSED
    settings = three_rooms(webex)
    with Relay(tmp_path, webex.url, **settings) as relay:
        for start in range(0, 60, 5):
            body = [{"message": f"number {number}"} for number in range(start, start + 5)]
            relay.post(body, "/ops" if start % 2 else "/")
        rows = Page(relay).rows["alarms"]
    assert [row[4] for row in rows] == [f"number {number}" for number in range(59, 9, -1)]
    with Relay(tmp_path, webex.url, **settings) as relay:
        assert Page(relay).rows["alarms"] == rows


@pytest.mark.parametrize("text", ["&<>\"'", "🔴"])
@pytest.mark.parametrize(("size", "posted", "shown"), [(4_000, 50, 50), (600_000, 5, 0)])
def test_the_page_stays_small_whatever_the_alarms_and_webex_say(
    tmp_path, webex, text, size, posted, shown
):
    long = text * (size // len(text.encode()))
    alarm = dict.fromkeys(("rule_name_display", "message", "severity", "receive_time"), long)
    alarm["values_short_display"] = {"host-name": long}
    answer = json.dumps({"message": long, "trackingId": long}).encode()
    webex.fault_for = lambda _: Fault(status=401, body=answer)
    with Relay(tmp_path, webex.url) as relay:
        for number in range(posted):
            body = json.dumps({"uuid": number, **alarm}, ensure_ascii=False).encode()
            assert relay.post(body)[0] == 200
        said = relay.told("refuses the token (401 ")
        page = Page(relay)
    assert len(page.text.encode()) < 50_000
    assert sentence(page.h1[1]).partition(": ")[2] == sentence(said).partition(": ")[2]
    assert page.h1[1].endswith("; replace bearer_token and restart")
    assert [len(row) for row in page.rows["alarms"]] == [7] * shown


def test_the_page_stays_small_with_many_rooms(tmp_path, webex):
    names = [f"{number:03}{'x' * 150}" for number in range(60)]
    webex.rooms |= set(names)
    with Relay(tmp_path, webex.url, **{f"room_id_{name}": name for name in names}) as relay:
        text = "&" * 4000
        relay.post([{"message": text, "rulename": text, "severity": text}] * 10)
        relay.post([{**SAMPLE, "severity": text, "message": text, "rule_name_display": text}] * 50)
        relay.wait_for_log(" taken: ", 60)
        page = Page(relay)
    assert len(page.text.encode()) < 50_000
    assert [row[1] for row in page.rows["rooms"]] == ["/", *[f"/{name}" for name in names[:29]]]
    assert len(page.rows["alarms"]) == 50


def test_the_page_says_of_when_it_is(tmp_path, webex):
    with Relay(tmp_path, webex.url, time_zone=ZONE.key) as relay:
        before_s = int(time.time())
        (said,) = re.findall("<p>As of (.*?)<", Page(relay).text)
        seconds = range(before_s, int(time.time()) + 1)
    assert said in [local_time(second * 1000, ZONE) for second in seconds]


def test_large_alarms_do_not_stay_in_memory(relay):
    def post(number: int) -> None:
        body = {"message": f"number {number}", "values": {"x": "y" * 3_000_000}}
        assert relay.post(body)[0] == 200
        relay.wait_for_log(" delivered: ", number + 1)

    post(0)
    before_kib = status_of(relay, "VmRSS")
    for number in range(1, 26):
        post(number)
    relay.post({"message": "small"})
    relay.wait_for_log(" delivered: ", 27)
    assert [row[4] for row in Page(relay).rows["alarms"]] == ["small"]
    assert status_of(relay, "VmRSS") < before_kib + 40_000
