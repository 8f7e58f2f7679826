"""Faults that are put into the running program: threads that hang, kills, a clock that jumps."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import faults
import pytest
from harness import FAST, Client, Relay, get, later, posted
from webex_standin import Fault

WATCHED = {"TICK_S": 0.1, "STALL_S": 0.2, "SEND_S": 0.2, "HEADER_S": 0.2}
WATCHDOG = {"WATCHDOG_USEC": "1500000"}
YEAR_HOURS = 365 * 24


def is_silent(relay: Relay) -> bool:
    """Wait as systemd does for the next WATCHDOG=1, as long as one comes."""
    with contextlib.suppress(AssertionError):
        for _ in range(200):
            relay.told("WATCHDOG=1", timeout_s=1.0)
        return False
    return relay.process.poll() is None


def arrived(webex) -> list[str]:
    """Return what the messages in the room say, in their order."""
    return [re.search(r"\*\*Message\*\* : ([^,]*)", text)[1] for text in webex.texts()]


def test_the_watchdog_hears_nothing_once_a_part_hangs(tmp_path, webex):
    def run(part: str) -> None:
        folder = tmp_path / part.replace(" ", "-")
        folder.mkdir()
        flag = folder / "hang"
        fault = faults.let(faults.hang, part, flag)
        with Relay(folder, webex.url, WATCHED, fault, **WATCHDOG) as relay:
            relay.post({"message": f"{part} is well"})
            relay.told("1 delivered")
            for _ in range(3):
                relay.told("WATCHDOG=1")
            flag.touch()
            with Client(relay) as client:
                client.send(posted())
                assert is_silent(relay), part
            flag.unlink()
            relay.kill()  # as systemd does
            relay.start()
            relay.told("WATCHDOG=1")
            relay.post({"message": f"{part} is well again"})
            webex.wait_for_texts(f"{part} is well again")

    with ThreadPoolExecutor(len(faults.HANGS)) as pool:
        assert len(list(pool.map(run, faults.HANGS))) == 4


def test_a_webex_that_drips_for_too_long_silences_the_watchdog(tmp_path, webex):
    webex.faults.append(Fault(status=200, take=True, drip_s=0.05))  # each read brings something
    with Relay(tmp_path, webex.url, WATCHED, **WATCHDOG) as relay:
        relay.told("WATCHDOG=1")
        relay.post({"message": "dripped"})
        webex.wait_for(lambda: webex.requests)
        assert is_silent(relay)
        relay.kill()  # as systemd does
        relay.start()
        relay.told("WATCHDOG=1")
        relay.told("0 waiting, 1 delivered")
    assert arrived(webex) == ["dripped", "dripped"]


def test_a_slow_webex_a_pause_and_a_hold_are_no_reason_for_the_watchdog(tmp_path, webex):
    release = threading.Event()
    slow = Fault(take=True, status=200, hold=release)
    paused = Fault(status=429, headers={"Retry-After": "3600"})
    webex.faults.extend([slow, paused])
    limits = {**WATCHED, "SEND_S": 300}
    with Relay(tmp_path, webex.url, limits, **WATCHDOG) as relay:
        relay.post({"message": "slow"})
        webex.wait_for(lambda: len(webex.requests) == 1)
        for _ in range(5):  # of 0.1 s, while 0.2 s are a stall
            relay.told("WATCHDOG=1")
        release.set()
        relay.told("1 delivered")
        relay.post({"message": "paused"})
        relay.told(": Webex limits the bot")
        for _ in range(5):
            relay.told("WATCHDOG=1")
        relay.kill()
        webex.faults.append(Fault(status=401))
        relay.start()
        relay.told(": Webex refuses the token")
        for _ in range(5):
            relay.told("WATCHDOG=1")


def test_a_slow_disk_is_no_reason_for_the_watchdog_nor_for_the_door(tmp_path, webex):
    """Whoever waits for the spool may be late as long as the spool is."""
    flag = tmp_path / "slow"
    fault = faults.let(faults.slow_disk, 0.4, flag)
    with Relay(tmp_path, webex.url, WATCHED, fault, **WATCHDOG) as relay:
        relay.post({"message": "well"})
        relay.told("1 delivered")
        flag.touch()
        for number in range(5):  # of 0.4 s, while 0.2 s are a stall
            relay.told("WATCHDOG=1")
            assert relay.post({"message": f"late {number}"})[0] == 200
        assert get(relay, "/healthz")[2] == '{"status": "ok"}'
        flag.unlink()
        webex.wait_for_texts("late 4")


def test_without_a_watchdog_there_are_no_pings(relay):
    relay.post({})
    relay.told("1 delivered")
    assert not any("WATCHDOG" in words for words in relay.said)


def test_pings_come_three_times_in_the_time_that_systemd_waits(tmp_path, webex):
    with Relay(tmp_path, webex.url, {"TICK_S": 3600}, WATCHDOG_USEC="300000") as relay:
        for _ in range(3):
            relay.told("WATCHDOG=1")
        relay.kill()  # with such a tick it would not hear of a stop


# What a sender hears that repeats an alarm for which the kill has left it without an answer. The
# courier may be faster than the answer.
HEARD = {
    "committed": {"duplicate"},
    "picked": {"accepted", "duplicate"},
    "sent": {"accepted", "duplicate"},
    "recorded": {"accepted", "duplicate"},
}
# Only what Webex has taken and the spool has not recorded comes twice.
REPEATS = {"sent": {1}, "answered": {0, 1}}


@pytest.mark.parametrize("point", faults.KILLS)
def test_a_kill_at_this_point_loses_no_answered_alarm(tmp_path, webex, point):
    flag = tmp_path / "kill"
    messages = [f"alarm {number}" for number in range(10)]
    accepted = (200, {"status": "accepted"})
    killed = {"message": messages[4]}
    with Relay(tmp_path, webex.url, None, faults.let(faults.kill, point, flag)) as relay:
        for message in messages[:4]:
            assert relay.post({"message": message}) == accepted
        relay.told("0 waiting, 4 delivered")
        flag.touch()
        answer = None
        with contextlib.suppress(OSError, http.client.HTTPException):
            answer = relay.post(killed)
        relay.process.wait(20)
        assert not flag.exists()  # it was killed there
        relay.start()
        status, words = answer or relay.post(killed)
        assert status == 200
        assert words["status"] in HEARD.get(point, {"accepted"})
        for message in messages[5:]:
            assert relay.post({"message": message}) == accepted
        webex.wait_for_texts("alarm 9")
    found = arrived(webex)
    assert list(dict.fromkeys(found)) == messages  # in order, none missing
    assert len(found) - len(messages) in REPEATS.get(point, {0})


def test_a_clock_that_jumps_loses_and_repeats_nothing(tmp_path, webex):
    limits = {**FAST, "PAUSE_MAX_S": 0.1}
    with Relay(tmp_path, webex.url, limits, **later(tmp_path, 0)) as relay:
        webex.faults.append(Fault(status=503))
        relay.post({"message": "before"})
        for number, hours in enumerate([-24, YEAR_HOURS, 0, -24, 0]):
            later(tmp_path, hours)
            webex.faults.append(Fault(status=429))
            body = json.dumps({"message": f"jump {number}"}).encode()
            assert relay.post(body) == (200, {"status": "accepted"})
            assert relay.post(body) == (200, {"status": "duplicate"})
        webex.wait_for(lambda: len(webex.messages) == 6)
        relay.told("0 waiting, 6 delivered")
        relay.kill()  # with the clock at its right time and the spool's times in the future
        relay.start()
        later(tmp_path, -24)
        assert relay.post({"message": "after"})[0] == 200
        webex.wait_for(lambda: len(webex.messages) == 7)
    assert arrived(webex) == ["before", *(f"jump {number}" for number in range(5)), "after"]
    ages = [text.partition("**Delayed:**")[2] for text in webex.texts()]
    assert not any("-" in age for age in ages)


def test_waiting_alarms_outlive_a_clock_that_is_a_year_ahead(tmp_path, webex):
    webex.fault_for = lambda _: Fault(status=401)
    with Relay(tmp_path, webex.url, FAST, **later(tmp_path, YEAR_HOURS)) as relay:
        relay.post({"message": "waiting"})
        relay.told("1 waiting")
        later(tmp_path, 2 * YEAR_HOURS)  # retention has passed by far
        webex.wait_for(lambda: len(webex.requests) > 10)
        webex.fault_for = lambda _: None
        webex.wait_for(lambda: len(webex.messages) == 1)
