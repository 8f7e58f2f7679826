"""What systemd and whoever watches are told: STATUS=, /healthz and who may see /metrics."""

from __future__ import annotations

import json
import re
import threading
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from harness import Relay, basic
from webex_standin import Fault, WebexStandIn

OPS, NOC = "room-of-operations", "room-of-the-noc"
FAST = dict.fromkeys(("TICK_S", "HOLD_S", "PAUSE_MIN_S", "RETRY_S"), 0.05)
PAUSED = Fault(status=429, headers={"Retry-After": "3600"})


def get(relay: Relay, path: str, method: str = "GET", **headers: str) -> tuple[int, Any, str]:
    """Return status, headers and body; the request has credentials unless it has other headers."""
    client = relay.connect()
    client.request(method, path, None, headers or {"Authorization": basic()})
    response = client.getresponse()
    text = response.read().decode()
    client.close()
    return response.status, response.headers, text


def three_rooms(webex: WebexStandIn) -> dict[str, str]:
    """Return the settings of two more rooms."""
    webex.rooms |= {OPS, NOC}
    return {"room_id_ops": OPS, "room_id_noc": NOC}


def later(folder: Path, hours: float) -> dict[str, str]:
    """Put the clock so many hours ahead of relays with this environment, also while they run."""
    clock = folder / "ahead"
    (folder / "ahead.new").write_text(str(hours * 3600))
    (folder / "ahead.new").replace(clock)
    lines = f"import time, pathlib; now, ahead = time.time, pathlib.Path({str(clock)!r})"
    lines += "\ntime.time = lambda: now() + float(ahead.read_text())\n"
    (folder / "sitecustomize.py").write_text(lines)
    return {"PYTHONPATH": str(folder)}


def test_metrics_need_credentials_and_health_does_not(relay):
    for wrong in ({"X": "none"}, {"Authorization": basic(password="wrong")}):
        status, headers, text = get(relay, "/metrics", **wrong)
        assert (status, headers["WWW-Authenticate"].split()[0]) == (401, "Basic")
        assert json.loads(text)["error"].endswith("credentials")
    assert get(relay, "/healthz", X="none")[::2] == (200, '{"status": "ok"}')


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "BREW"])
def test_another_method_is_told_which_is_allowed(relay, method):
    for path in ("/metrics", "/healthz"):
        status, headers, _ = get(relay, path, method)
        assert (status, headers["Allow"]) == (405, "GET")


REASONS = {  # what Webex does, the words, what to do
    "401": (Fault(status=401), "refuses the token", "replace bearer_token and restart"),
    "403": (Fault(status=403), "refuses the bot", "the bot must be a member of .*"),
    "404": (Fault(status=404), "has no such room", "check room_id .*"),
    "400": (Fault(status=400), "refuses the message", "check room_id; .*"),
    "409": (Fault(status=409), "fails", ""),
    "429": (PAUSED, "limits the bot", ""),
    "503": (Fault(status=503), "fails", ""),
    "no answer": (Fault(reset_before=True), "does not answer", "check network, .*"),
}


@pytest.mark.parametrize("case", REASONS)
def test_the_status_says_why_alarms_wait_and_what_to_do(tmp_path, webex, case):
    fault, words, advice = REASONS[case]
    webex.fault_for, zone = lambda _: fault, ZoneInfo("Asia/Kathmandu")
    with Relay(tmp_path, webex.url, time_zone=zone.key) as relay:
        before = datetime.now(zone)
        relay.post([{"message": "x"}, {"message": "y"}])
        said = relay.told(" since ")
        minutes = "|".join(f"{before + timedelta(minutes=n):%H:%M}" for n in range(3))
        form = (
            rf"STATUS=2 alarms wait: Webex {words} \({case}.+\) since ({minutes}), tried again in "
        )
        form += (
            rf"(\d+) s{f'; {advice}' if advice else ''}; listening on .*; 2 waiting, 0 delivered"
        )
        match = re.fullmatch(form, said)
        assert match, said
        assert (int(match[2]) > 60) == (case == "429")


def test_the_status_turns_with_the_state(tmp_path, webex):
    release, again = threading.Event(), threading.Event()
    good = "STATUS=All alarms are in the room; listening on "
    with Relay(tmp_path, webex.url, limits=FAST) as relay:
        assert relay.told("STATUS=").startswith(good)
        webex.faults.append(Fault(hold=release, status=401))
        webex.faults.append(Fault(hold=again, take=True, status=200))
        relay.post({"message": "x"})
        assert relay.told("STATUS=1 alarm waits").startswith("STATUS=1 alarm waits; listening on ")
        release.set()
        assert relay.told("STATUS=1 alarm waits: Webex refuses the token (401 ")
        again.set()
        assert relay.told("0 waiting, 1 delivered").startswith(good)


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


def test_since_and_the_wait_are_of_the_outage_and_of_the_last_attempt(tmp_path, webex):
    webex.fault_for = lambda _: Fault(status=401)
    with Relay(tmp_path, webex.url, limits={**FAST, "HOLD_S": 3600}) as relay:
        relay.post({"message": "x"})
        first = re.search(r"tried again in (\d+) s", relay.told(" since "))
        assert 3590 <= int(first[1]) <= 3600
        assert relay.told(f"tried again in {int(first[1]) - 1} s")  # it counts down


REFUSED = {"WAITING_ALARMS": (2, "too many alarms wait for Webex")}
REFUSED["FREE_BYTES"] = (2**62, f"under {2**42} MiB free in ")


@pytest.mark.parametrize("limit", REFUSED)
def test_status_and_health_say_that_new_alarms_are_refused(tmp_path, webex, limit):
    number, words = REFUSED[limit]
    webex.fault_for = lambda _: Fault(status=429, headers={"Retry-After": "0"})
    with Relay(tmp_path, webex.url, limits={**FAST, limit: number}) as relay:
        statuses = [relay.post({"message": f"number {number}"})[0] for number in range(3)]
        waiting = "; 2 alarms wait: Webex limits the bot (429 " if 200 in statuses else ""
        said = relay.told(f"STATUS=New alarms are refused: {words}")
        while waiting not in said:
            said = relay.told("STATUS=")
        assert statuses[2] == 503
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
        said = relay.told("room (404")
        while "; 3 waiting, 1 delivered" not in said:
            said = relay.told("STATUS=")
    words = (
        "STATUS=2 alarms wait for room /noc: Webex .*; 1 alarm waits for room /ops: Webex has .*"
    )
    assert re.fullmatch(words, said)


NOTES = """
import threading
def note(*words): alarmrelay.log.info("%s for %s", words, threading.current_thread().name)
class Noting:
    def __init__(self, lock): self.lock = lock
    def __getattr__(self, name): note("lock"); return getattr(self.lock, name)
    def __enter__(self): note("lock"); return self.lock.__enter__()
    def __exit__(self, *error): return self.lock.__exit__(*error)
def begin(spool, directory, begin=alarmrelay.Spool.__init__):
    begin(spool, directory)
    spool._lock = Noting(spool._lock)
    spool._db.set_trace_callback(lambda sql: note("SQL"))
def respond(handler, respond=alarmrelay.Handler.respond):
    threading.current_thread().name = f"{handler.command} {handler.path}"
    return respond(handler)
alarmrelay.Spool.__init__, alarmrelay.Handler.respond = begin, respond
"""


def test_metrics_need_neither_the_database_nor_a_lock(tmp_path, webex):
    with Relay(tmp_path, webex.url, limits={"TICK_S": 60}, fault=NOTES) as relay:
        relay.post([{"message": f"number {number}"} for number in range(200)])
        webex.wait_for(lambda: len(webex.alarms()) == 200)
        assert {get(relay, path)[0] for path in ("/metrics", "/healthz")} == {200}
        log = relay.log()
    for kind in ("lock", "SQL"):
        assert f"('{kind}',) for POST /" in log
        assert f"('{kind}',) for GET " not in log
