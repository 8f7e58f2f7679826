"""Faults that are put into the running program: threads that hang, kills, a clock that jumps."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import threading
from pathlib import Path

import pytest
from harness import Relay, basic
from webex_standin import Fault

# Each fault waits for a file to appear, so that the test chooses the moment.
HANG = """
import threading
from pathlib import Path
def hang(owner, name, lock=None):
    real = getattr(owner, name)
    def wrapped(self, *arguments, **options):
        if os.path.exists({flag!r}):
            with getattr(self, lock) if lock else threading.Lock():
                threading.Event().wait()
        return real(self, *arguments, **options)
    setattr(owner, name, wrapped)
"""
HANGS = {
    "courier": "hang(alarmrelay.Courier, 'step')",
    "courier while it sends": "hang(alarmrelay.Courier, '_send')",
    "spool": "hang(alarmrelay.Spool, 'store', '_lock')",
    "accept loop": "hang(alarmrelay.select, 'select')",
}
WATCHED = {"TICK_S": 0.1, "STALL_S": 0.2, "HEADER_S": 0.2}


def pings_end(relay: Relay) -> bool:
    """Wait as systemd does for the next WATCHDOG=1, as long as one comes."""
    with contextlib.suppress(AssertionError):
        for _ in range(200):
            relay.told("WATCHDOG=1", timeout_s=1.0)
        return False
    return relay.process.poll() is None


def test_the_watchdog_hears_nothing_once_a_part_hangs(tmp_path, webex):
    def run(part: str) -> None:
        folder = tmp_path / part.replace(" ", "-")
        folder.mkdir()
        flag = folder / "hang"
        code = HANG.format(flag=str(flag)) + HANGS[part]
        limits = {**WATCHED, "REQUEST_S": 0.2}
        relay = Relay(folder, webex.url, limits, code, WATCHDOG_USEC="1500000")
        with relay:
            relay.post({"message": f"{part} is well"})
            relay.told("1 delivered")
            for _ in range(3):
                relay.told("WATCHDOG=1")
            flag.touch()
            with contextlib.closing(relay.connect()) as client:
                client.request("POST", "/", b"{}", {"Authorization": basic()})
                assert pings_end(relay), part
            flag.unlink()
            relay.kill()  # as systemd does
            relay.start()
            relay.told("WATCHDOG=1")
            relay.post({"message": f"{part} is well again"})
            webex.wait_for(lambda: f"{part} is well again" in "".join(webex.texts()))

    with concurrent.futures.ThreadPoolExecutor(len(HANGS)) as pool:
        assert len(list(pool.map(run, HANGS))) == 4


def test_a_slow_webex_a_pause_and_a_hold_are_no_reason_for_the_watchdog(tmp_path, webex):
    hold = threading.Event()
    slow = Fault(take=True, status=200, hold=hold)
    webex.faults.extend([slow, Fault(status=429, headers={"Retry-After": "3600"})])
    with Relay(tmp_path, webex.url, WATCHED, WATCHDOG_USEC="1500000") as relay:
        relay.post({"message": "slow"})
        webex.wait_for(lambda: len(webex.requests) == 1)
        for _ in range(5):  # of 0.1 s, while 0.2 s are a stall
            relay.told("WATCHDOG=1")
        hold.set()
        relay.told("1 delivered")
        relay.post({"message": "paused"})
        relay.told(": Webex limits the bot")
        for _ in range(5):
            relay.told("WATCHDOG=1")


def test_a_slow_disk_is_no_reason_for_the_watchdog_nor_for_the_door(tmp_path, webex):
    """Whoever waits for the spool may be late as long as the spool is."""
    flag = tmp_path / "hang"
    slow = f"""
real = alarmrelay.Spool.delete_delivered
def slow(self, *arguments):
    if os.path.exists({str(flag)!r}):
        with self._lock:
            threading.Event().wait(0.4)
    real(self, *arguments)
alarmrelay.Spool.delete_delivered = slow
"""
    relay = Relay(tmp_path, webex.url, WATCHED, "import threading" + slow, WATCHDOG_USEC="1500000")
    with relay:
        relay.post({"message": "well"})
        relay.told("1 delivered")
        flag.touch()
        for number in range(5):  # of 0.4 s, while 0.2 s are a stall
            relay.told("WATCHDOG=1")
            assert relay.post({"message": f"late {number}"})[0] == 200
        client = relay.connect()
        client.request("GET", "/healthz")
        assert client.getresponse().read() == b'{"status": "ok"}'
        client.close()
        flag.unlink()
        webex.wait_for(lambda: "late 4" in "".join(webex.texts()))


def test_without_a_watchdog_there_are_no_pings(relay):
    relay.post({})
    relay.told("1 delivered")
    assert not any("WATCHDOG" in words for words in relay.said)


def test_pings_come_three_times_in_the_time_that_systemd_waits(tmp_path, webex):
    with Relay(tmp_path, webex.url, {"TICK_S": 3600}, WATCHDOG_USEC="300000") as relay:
        for _ in range(3):
            relay.told("WATCHDOG=1")
        relay.kill()  # with such a tick it would not hear of a stop


# The points of an alarm's way at which a kill could lose or double it.
KILL = """
import signal, sqlite3
def die():
    if os.path.exists({flag!r}):
        os.unlink({flag!r})
        os.kill(os.getpid(), signal.SIGKILL)
def around(owner, name, before=lambda *_: None, after=lambda *_: None):
    real = getattr(owner, name)
    def wrapped(self, *arguments, **options):
        before(*arguments)
        result = real(self, *arguments, **options)
        after(result)
        return result
    setattr(owner, name, wrapped)
class Traced(sqlite3.Connection):
    is_insert, before, after = False, staticmethod(lambda: None), staticmethod(lambda: None)
    def execute(self, sql, *arguments):
        self.is_insert = sql.startswith("INSERT") or self.is_insert and sql == "COMMIT"
        if self.is_insert and sql == "COMMIT":
            self.before()
        result = super().execute(sql, *arguments)
        if self.is_insert and sql == "COMMIT":
            self.after()
        return result
connect = sqlite3.connect
alarmrelay.sqlite3.connect = lambda *arguments, **options: connect(
    *arguments, **options, factory=Traced)
"""
KILLS = {
    "taken": "around(alarmrelay.Spool, 'store', before=lambda *_: die())",
    "stored": "Traced.before = staticmethod(die)",
    "committed": "Traced.after = staticmethod(die)",
    "answered": "around(alarmrelay.Handler, '_answer', after=lambda _: die())",
    "picked": "around(alarmrelay.Spool, 'oldest_waiting', after=lambda found: found and die())",
    "sent": "around(alarmrelay.Client, 'ask', after=lambda _: die())",
    "recorded": "around(alarmrelay.Spool, 'set_delivered', after=lambda _: die())",
}


@pytest.mark.parametrize(("point", "fault"), KILLS.items(), ids=KILLS.keys())
def test_a_kill_at_this_point_loses_no_answered_alarm(tmp_path, webex, point, fault):
    flag = tmp_path / "kill"
    relay = Relay(tmp_path, webex.url, None, KILL.format(flag=str(flag)) + fault)
    alarms = [{"message": f"alarm {number}", "uuid": str(number)} for number in range(10)]
    answers = []
    with relay:
        for number, alarm in enumerate(alarms):
            if number == 4:
                webex.wait_for(lambda: len(webex.messages) == 4)
                relay.told("0 waiting, 4 delivered")
                flag.touch()
            try:
                answers.append(relay.post(alarm))
            except (OSError, http.client.HTTPException):
                answers.append(None)
            if relay.process.poll() is not None or (number == 4 and died(relay)):
                relay.start()
                if answers[-1] is None:  # what a sender would do that repeats
                    answers[-1] = relay.post(alarm)
        relay.told(" 0 waiting")
        webex.wait_for(lambda: "alarm 9," in "".join(webex.texts()))
    assert not flag.exists()  # it was killed there
    arrived = [text.split("**Message** : ")[1].split(",")[0] for text in webex.texts()]
    first = list(dict.fromkeys(arrived))
    assert first == [alarm["message"] for alarm in alarms]  # in order, none missing
    # Only where Webex has taken a message and that is not recorded, it comes twice.
    repeats = {"sent": {1}, "answered": {0, 1}}.get(point, {0})
    assert len(arrived) - len(first) in repeats
    # The courier may be faster than the answer, which the kill then cuts off.
    may_be = {
        "committed": {"duplicate"},
        **{key: {"accepted", "duplicate"} for key in ("picked", "sent", "recorded")},
    }
    assert {status for status, _ in answers} == {200}
    words = [answer["status"] for _, answer in answers]
    assert words.pop(4) in may_be.get(point, {"accepted"})
    assert words == ["accepted"] * 9


def died(relay: Relay) -> bool:
    """Wait for the kill, which may come after the answer."""
    relay.process.wait(20)
    return True


CLOCK = """
import time
real = time.time
def jumped():
    with open({path!r}) as file:
        return real() + float(file.read())
time.time = jumped
"""


def set_clock(path: Path, seconds: int) -> None:
    """Let the program's clock differ by so much from now on."""
    path.with_suffix(".new").write_text(str(seconds))
    path.with_suffix(".new").rename(path)


def test_a_clock_that_jumps_loses_and_repeats_nothing(tmp_path, webex):
    clock, day_s = tmp_path / "clock", 86_400
    set_clock(clock, 0)
    code = CLOCK.format(path=str(clock))
    limits = {"TICK_S": 0.1, "PAUSE_MAX_S": 0.1, "PAUSE_MIN_S": 0.1, "RETRY_S": 0.1}
    with Relay(tmp_path, webex.url, limits, code) as relay:
        webex.faults.append(Fault(status=503))
        relay.post({"message": "before"})
        for number, jump_s in enumerate([-day_s, 365 * day_s, 0, -day_s, 0]):
            set_clock(clock, jump_s)
            webex.faults.append(Fault(status=429))
            body = json.dumps({"message": f"jump {number}"}).encode()
            assert relay.post(body) == (200, {"status": "accepted"})
            assert relay.post(body) == (200, {"status": "duplicate"})
        webex.wait_for(lambda: len(webex.messages) == 6)
        relay.told("0 waiting, 6 delivered")
        relay.kill()  # with the clock at its right time and the spool's times in the future
        relay.start()
        set_clock(clock, -day_s)
        assert relay.post({"message": "after"})[0] == 200
        webex.wait_for(lambda: len(webex.messages) == 7)
    arrived = [text.split("**Message** : ")[1].split(",")[0] for text in webex.texts()]
    assert arrived == ["before", *(f"jump {number}" for number in range(5)), "after"]
    assert not any(
        "-" in text.split("**Delayed:**")[-1] for text in webex.texts() if "Delayed" in text
    )


def test_waiting_alarms_outlive_a_clock_that_is_a_year_ahead(tmp_path, webex):
    clock = tmp_path / "clock"
    set_clock(clock, 365 * 86_400)
    webex.fault_for = lambda _: Fault(status=401)
    code = CLOCK.format(path=str(clock))
    with Relay(tmp_path, webex.url, {"TICK_S": 0.02, "HOLD_S": 0.05}, code) as relay:
        relay.post({"message": "waiting"})
        relay.told("1 waiting")
        set_clock(clock, 2 * 365 * 86_400)  # retention has passed by far
        webex.wait_for(lambda: len(webex.requests) > 10)
        webex.fault_for = lambda _: None
        webex.wait_for(lambda: len(webex.messages) == 1)
