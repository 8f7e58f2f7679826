"""The program as a child process, from vManage's post to the Webex room, and what befalls it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import http.client
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest
from harness import (
    PASSWORD,
    PAYLOADS,
    PROGRAM,
    RECORDED,
    Client,
    Relay,
    alarm,
    basic,
    crowd,
    get,
    head,
    posted,
)
from webex_standin import TOKEN, Fault, WebexStandIn

from alarmrelay import Alarm, Delivery, Spool

SAMPLES = sorted(PAYLOADS.glob("*.json"))
needs_strace = pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
WORKSHOP_MESSAGE = (
    "Team, **Alarm Event** : System_Reboot_Issued, **Message** : The device rebooted, is received "
    "from vManage and here are the complete details<br>**Severity:** 🔴 Critical<br>"
    "**Receive Time:** Sat Jan 18 05:57:01 2020 CET<br> **host-name:** DC1-VEDGE1<br> "
    "**system-ip:** 10.1.0.1"
)


def numbers(webex: WebexStandIn) -> list[int]:
    """Return the numbers of the alarms in the room, in the order of their messages."""
    return [int(re.search(r"number (\d+)", text)[1]) for text in webex.alarms()]


def numbered(number: int) -> dict[str, str]:
    return {"message": f"number {number}", "uuid": f"uuid-{number}"}


def test_the_workshops_sample_stands_in_the_room_byte_for_byte(tmp_path, webex):
    environ = {"webhook_username": "cleur", "webhook_password": "cleur"}
    with Relay(tmp_path, webex.url, {}, **environ) as relay:
        sample = (PAYLOADS / "system_reboot_issued.json").read_bytes()
        answer = relay.post(sample, Authorization=basic("cleur", "cleur"))
        assert answer == (200, {"status": "accepted"})
        webex.wait_for(lambda: webex.messages)
    assert webex.texts() == [WORKSHOP_MESSAGE]


def test_it_listens_on_port_5001_of_every_address_by_default(tmp_path, webex):
    with (Path(tempfile.gettempdir()) / "alarmrelay-test-port-5001").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)  # another run of these tests may be at it
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", 5001)) == 0:
                pytest.skip("something else listens on port 5001 of this machine")
        with Relay(tmp_path, webex.url, {}, listen=None) as relay:
            assert relay.post(numbered(1)) == (200, {"status": "accepted"})
            assert " listening on 0.0.0.0 port 5001; " in relay.log()


def test_every_sample_and_every_recorded_alarm_gets_through_in_order(relay, webex):
    paths = list(dict.fromkeys([*SAMPLES, *RECORDED]))
    for path in paths:
        assert relay.post(path.read_bytes()) == (200, {"status": "accepted"})
    webex.wait_for(lambda: len(webex.alarms()) == len(paths))
    for path, text in zip(paths, webex.alarms()):
        golden = path.with_suffix(".md")
        if golden.exists() and text.startswith("Team"):
            assert text + "\n" == golden.read_text(encoding="utf-8")
        rule = json.loads(path.read_bytes())["rule_name_display"].split("*")[0]
        assert f"**Alarm Event** : {rule}" in text or f" **{rule}" in text


def test_every_alarm_leaves_two_lines_in_the_log_and_no_secret(relay, webex):
    relay.post({"rule_name_display": "BFD_TLOC_Down", "uuid": "u-1"})
    guess = basic(password="a-guess")
    relay.post(numbered(2), Authorization=guess)
    relay.told("1 delivered")
    log = relay.log()
    message_id = webex.messages[0]["id"]
    assert re.search(
        r"^\S+ \S+ INFO alarm 1 taken: room=/ rule='BFD_TLOC_Down' uuid='u-1' sender=127\.0\.0\.1$",
        log,
        re.MULTILINE,
    )
    assert re.search(
        rf"^\S+ \S+ INFO alarm 1 delivered: message={message_id} after \d+\.\d s$", log, re.M
    )
    assert re.search(r"WARNING 127\.0\.0\.1 refused: 401 wrong credentials$", log, re.MULTILINE)
    for secret in (TOKEN, PASSWORD, basic().split()[1], "a-guess", guess.split()[1]):
        assert secret not in log


def test_a_webex_that_echoes_the_token_puts_it_neither_in_the_log_nor_in_the_status(relay, webex):
    echo = json.dumps({"message": f"Bearer {TOKEN} is not valid"}).encode()
    webex.faults.append(Fault(status=401, body=echo))
    relay.post(numbered(1))
    assert "Bearer [hidden] is not valid" in relay.told("Webex refuses the ")
    assert TOKEN not in relay.log()


def test_under_the_journal_lines_carry_their_priority_and_no_time(tmp_path, webex):
    script = 'import os,sys; s=os.fstat(2); os.environ["JOURNAL_STREAM"]=f"{s.st_dev}:{s.st_ino}"'
    script += "; os.execv(sys.argv[1], sys.argv[1:])"
    relay = Relay(tmp_path, webex.url, {"RETRY_S": 0.1, "TICK_S": 0.1})
    relay.command[:0] = [relay.command[0], "-c", script]
    webex.faults.extend([Fault(status=503), Fault(status=403)])
    with relay:
        relay.post(numbered(1))
        relay.told("Webex refuses the ")
    lines = relay.log().splitlines()
    assert {line[:3] for line in lines} == {"<3>", "<4>", "<6>"}
    assert any(line.startswith("<6>alarm 1 taken: ") for line in lines)


def test_posts_are_answered_while_webex_hangs(relay, webex):
    release = threading.Event()
    webex.faults.append(Fault(take=True, status=200, hold=release))
    for number in range(100):
        assert relay.post(numbered(number))[0] == 200
    webex.wait_for(lambda: webex.requests)
    assert len(webex.requests) == 1  # all hundred were answered while this one is held
    release.set()
    webex.wait_for(lambda: len(webex.alarms()) == 100)
    assert numbers(webex) == list(range(100))


def test_status_tells_waiting_delivered_and_what_holds(relay, webex):
    where = f"listening on 127.0.0.1 port {relay.port}"
    status = f"STATUS=All alarms are in the room; {where}; 0 waiting, 0 delivered"
    assert f"READY=1\n{status}" in relay.said
    assert relay.told("STATUS=") == status
    relay.post(numbered(1))
    relay.told("0 waiting, 1 delivered")
    webex.token = "another"
    relay.post(numbered(2))
    said = relay.told("STATUS=1 alarm waits: Webex refuses the token (401 Unauthorized: ")
    assert "; replace bearer_token and restart; listening on " in said
    assert said.endswith("1 waiting, 1 delivered")
    assert "\n" not in said


def test_webex_down_is_no_reason_to_be_unhealthy(relay, webex):
    webex.fault_for = lambda _: Fault(status=503)
    relay.post(numbered(1))
    relay.told("Webex fails (503 ")
    assert get(relay, "/healthz")[0] == 200


def test_a_restart_tries_at_once_what_was_held(tmp_path, webex):
    webex.rooms.clear()
    with Relay(tmp_path, webex.url) as relay:
        relay.post(numbered(1))
        relay.told("Webex has no such room")
    webex.rooms.add(relay.environ["room_id"])
    with Relay(tmp_path, webex.url) as relay:
        webex.wait_for(lambda: webex.messages)
    assert numbers(webex) == [1]


class Systemd:
    """Keeps the listening socket that the relay hands over, and starts the relay with it."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(path)
        self.socket.settimeout(20)
        self.kept: list[int] = []
        self.told: list[str] = []

    def start(self, relay: Relay) -> subprocess.Popen[bytes]:
        """Start the relay and wait until it is ready."""
        words = 'export LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=listen; exec "$@" 3<&"$KEPT"'
        prefix = ["bash", "-c", words, "bash"] if self.kept else []
        environ = {**relay.environ, "NOTIFY_SOCKET": self.socket.getsockname()}
        environ["KEPT"] = str(self.kept[0]) if self.kept else ""
        with relay.log_path.open("ab") as log:
            process = subprocess.Popen(
                [*prefix, *relay.command], env=environ, stderr=log, pass_fds=self.kept
            )
        text = b""
        while not text.startswith(b"READY=1\n"):
            text, descriptors, _, _ = socket.recv_fds(self.socket, 1000, 4)
            self.told.append(text.decode())
            if text == b"FDSTOREREMOVE=1\nFDNAME=listen":
                os.close(self.kept.pop())
            if text == b"FDSTORE=1\nFDNAME=listen":
                self.kept += descriptors
            else:  # as of BARRIER=1, before which everything is done
                for descriptor in descriptors:
                    os.close(descriptor)
        return process

    def close(self) -> None:
        self.socket.close()
        for descriptor in self.kept:
            os.close(descriptor)


def test_connections_wait_in_the_kept_socket_while_the_relay_is_away(tmp_path, webex):
    systemd, relay = Systemd(str(tmp_path / "notify")), Relay(tmp_path, webex.url)
    process = systemd.start(relay)
    assert len(systemd.kept) == 1
    with socket.socket(fileno=os.dup(systemd.kept[0])) as kept:
        relay.port = kept.getsockname()[1]
    for number, end in enumerate([signal.SIGTERM, signal.SIGKILL] * 2):
        process.send_signal(end)
        assert process.wait(20) == (0 if end == signal.SIGTERM else -9)
        with Client(relay) as client:  # is not refused
            body = json.dumps(numbered(number)).encode()
            client.send(head(Content_Length=len(body)), body)
            process = systemd.start(relay)
            assert client.answer()[0] == 200
    assert len(systemd.kept) == 1  # and handed over once
    webex.wait_for(lambda: set(numbers(webex)) == {0, 1, 2, 3})
    process.terminate()
    assert process.wait(20) == 0
    systemd.close()
    assert "Traceback" not in relay.log()
    assert "Warning" not in relay.log()


def test_another_listen_setting_gets_another_socket(tmp_path, webex):
    systemd, relay = Systemd(str(tmp_path / "notify@1")), Relay(tmp_path, webex.url)
    process = systemd.start(relay)
    process.terminate()
    assert process.wait(20) == 0
    relay.environ["listen"] = "127.0.0.5:0"
    process = systemd.start(relay)
    assert "FDSTOREREMOVE=1\nFDNAME=listen" in systemd.told
    with socket.socket(fileno=os.dup(systemd.kept[0])) as kept:
        host, port = kept.getsockname()
        assert host == "127.0.0.5"
        with socket.create_connection((host, port), 20) as client:
            client.sendall(head("GET /healthz HTTP/1.1", None))
            assert client.recv(100).startswith(b"HTTP/1.1 200 ")
    process.terminate()
    assert process.wait(20) == 0
    systemd.close()


def test_retention_counts_days_and_a_full_spool_is_unhealthy(tmp_path, webex):
    now_ms = int(time.time() * 1000)
    spool = Spool(tmp_path / "state")
    for days in (29, 31):
        at_ms = now_ms - days * 86_400_000
        spool.store("/", b"%d" % days, [Alarm({}, at_ms)], "127.0.0.1")
        spool.record(Delivery("m", at_ms, spool.next_batch("/").alarms))
    spool.store("/", b"many", [Alarm({}, now_ms)] * 100_000, "127.0.0.1")
    spool.close()
    webex.fault_for = lambda _: Fault(status=401)
    with Relay(tmp_path, webex.url) as relay:
        relay.told("100000 waiting")
        assert get(relay, "/healthz")[0] == 503
        with Client(relay) as client:
            refusal = client.ask(posted())
        assert (refusal.status, refusal.headers["retry-after"]) == (503, "30")
    with contextlib.closing(sqlite3.connect(tmp_path / "state" / "alarmrelay.db")) as db:
        ids = [row[0] for row in db.execute("SELECT id FROM alarm ORDER BY id LIMIT 2")]
    assert ids == [1, 3]


@pytest.mark.pitfall(16)
def test_webex_cannot_forge_a_line_of_the_log(tmp_path, webex):
    words = "x\n<0>forged\x1b\u2028"
    webex.faults.append(Fault(status=200, body=json.dumps({"id": words}).encode()))
    webex.faults.append(Fault(status=404, body=json.dumps({"message": words}).encode()))
    webex.faults.append(Fault(status=404, headers={"trackingId": "forged\x0b\x85"}, body=b""))
    with Relay(tmp_path, webex.url, {"RETRY_S": 0.05, "HOLD_S": 0.05}) as relay:
        relay.post(numbered(1))
        webex.wait_for(lambda: webex.messages)
    assert relay.log().count("forged") == 2
    for line in relay.log().split("\n"):  # and not at what else splitlines() takes for an end
        assert line.isprintable()
        assert not line.startswith("<0>")


@needs_strace
def test_the_certificates_take_their_memory_once_for_all_rooms(tmp_path, webex):
    trace, trusted = tmp_path / "trace", tmp_path / "trusted.pem"
    trusted.touch()
    rooms = {f"room_id_room{number}": "id" for number in range(3)}
    relay = Relay(tmp_path, webex.url, SSL_CERT_FILE=str(trusted), **rooms)
    relay.start("strace", "-D", "-f", "-qq", "-e", "trace=openat", "-o", str(trace))
    relay.terminate()
    assert relay.process.wait(60) == 0
    assert trace.read_text().count(trusted.name) == 1


@pytest.mark.pitfall(11)
@needs_strace
def test_an_fsync_stands_before_every_answer_and_each_is_one_write(tmp_path, webex):
    trace = tmp_path / "trace"
    calls = "trace=fsync,fdatasync,sendto,write"
    relay = Relay(tmp_path, webex.url)
    webex.fault_for = lambda _: Fault(status=401)  # so that only posts are written
    relay.start("strace", "-D", "-f", "-qq", "-s", "40", "-e", calls, "-o", str(trace))
    for number in range(20):
        assert relay.post(numbered(number))[0] == 200
    relay.told("20 waiting")
    relay.terminate()
    assert relay.process.wait(60) == 0
    events = re.findall(
        # "resumed": strace takes two lines for a call that another thread's came into.
        r'(f(?:data)?sync(?:\(\d+| resumed>)\)\s+= 0)|(sendto\(\d+, "HTTP/1\.1 200)|"\{\\"status',
        trace.read_text(),
    )
    order = "".join("S" if synced else "A" if answer else "B" for synced, answer in events)
    assert order.count("A") == 20
    assert order.count("B") == 0  # a body that goes by itself would wait for an acknowledgement
    for gap in order.split("A")[:20]:
        assert "S" in gap, order


@needs_strace
def test_posts_that_come_while_the_disk_is_slow_share_its_next_fsync(tmp_path, webex):
    trace = tmp_path / "trace"
    webex.fault_for = lambda _: Fault(status=401)  # so that only posts are written
    slow = ["-e", "trace=fdatasync", "-e", "inject=fdatasync:delay_exit=100000"]  # microseconds
    relay = Relay(tmp_path, webex.url)
    relay.start("strace", "-D", "-f", "-qq", *slow, "-o", str(trace))
    before = trace.read_text().count("fdatasync(")
    with crowd(relay, 60) as clients:
        for client in clients:
            client.send(posted())
        assert [client.answer().status for client in clients] == [200] * 60
    assert trace.read_text().count("fdatasync(") - before < 30
    relay.terminate()
    assert relay.process.wait(60) == 0


def load(relay: Relay, first: int, stop_after: int, answered: list[int]) -> None:
    """Post from four connections until so many were answered, then kill the relay in the middle."""
    lock = threading.Lock()
    counter = iter(range(first, first + 1000))
    done = threading.Event()

    def post_until_killed() -> None:
        connection = relay.connect()
        while not done.is_set():
            with lock:
                number = next(counter)
            try:
                status, _ = relay.post(numbered(number), connection=connection)
            except (OSError, http.client.HTTPException):
                break  # only the kill may end it: see below
            assert status == 200
            with lock:
                answered.append(number)
                if len(answered) >= stop_after and not done.is_set():
                    done.set()
                    relay.process.kill()
        connection.close()

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for result in [pool.submit(post_until_killed) for _ in range(4)]:
            result.result(60)
    assert done.is_set()
    relay.process.wait(20)


def test_an_answered_alarm_survives_kill_9(tmp_path, webex):
    dice = random.Random(5001)
    taken_and_reset = Fault(take=True, reset_after=True)
    kinds = [
        Fault(status=503),
        Fault(status=429, headers={"Retry-After": "0"}),
        Fault(reset_before=True),
        taken_and_reset,
        Fault(status=200, body=b"<html>"),
    ]
    used: list[Fault] = []

    def fault_for(_: object) -> Fault | None:
        if dice.random() >= 0.1:
            return None
        used.append(dice.choice(kinds))
        return used[-1]

    webex.fault_for = fault_for
    answered: list[int] = []
    rounds = 20
    for number in range(rounds):
        relay = Relay(tmp_path, webex.url, {}).start()
        load(relay, 1000 * number, len(answered) + dice.randint(1, 150), answered)
    webex.fault_for = lambda _: None
    with Relay(tmp_path, webex.url) as relay:
        relay.told(" 0 waiting", timeout_s=60)
    assert len(used) > 5
    arrived = numbers(webex)
    assert set(answered) <= set(arrived)
    # First arrivals are in the order of the spool ids, as far as the log has come to name them.
    taken = re.findall(r"alarm (\d+) taken: .* uuid='uuid-(\d+)'", relay.log())
    order = [int(number) for _, number in sorted(taken, key=lambda pair: int(pair[0]))]
    first_arrivals = [number for number in dict.fromkeys(arrived) if number in set(order)]
    assert first_arrivals == order
    # Beside what was taken and then reset, only the one message in flight at each kill comes twice.
    repeated = 0
    seen: set[str] = set()
    for text in webex.texts():
        said = set(re.findall(r"number (\d+)", text))
        repeated += bool(said & seen)
        seen |= said
    assert repeated <= 2 * (rounds + used.count(taken_and_reset))  # a digest may come in two parts
    assert "Traceback" not in relay.log()


def test_a_relay_whose_spool_fails_ends_with_74_and_says_why(tmp_path, webex):
    relay = Relay(tmp_path, webex.url).start()
    # A file that cannot grow any more, as on a full or broken disk.
    resource.prlimit(relay.process.pid, resource.RLIMIT_FSIZE, (500_000, 500_000))
    webex.fault_for = lambda _: Fault(status=401)
    status = 200
    while status == 200:
        status, answer = relay.post(alarm(100_000))
    assert status == 503
    assert "spool" in answer["error"]
    assert relay.process.wait(20) == 74
    assert "the spool cannot be read or written: " in relay.log()
    assert "Traceback" not in relay.log()


def test_the_program_is_one_file_and_runs_from_anywhere(tmp_path, webex):
    copied = tmp_path / "copied.py"
    copied.write_bytes(PROGRAM.read_bytes())
    relay = Relay(tmp_path, webex.url, {})
    relay.command[-1] = str(copied)
    relay.command[1:1] = ["-I", "-S"]  # nothing but the standard library can be imported
    with relay:
        relay.post(numbered(1))
        webex.wait_for(lambda: webex.messages)
