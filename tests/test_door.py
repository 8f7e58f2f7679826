"""Clients that are slow, many or broken, and a host that is short of something: none holds others.

The relay answers whoever behaves, whatever its other clients do, and comes back by itself once
what it was short of is there again.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faults
import pytest
from harness import (
    Client,
    Relay,
    basic,
    crowd,
    descriptors_of,
    flood,
    head,
    post_from,
    posted,
    status_of,
    wait_until,
)
from webex_standin import Fault

NEIGHBOUR, OTHER = "127.0.0.2", "127.0.0.3"
HALF, REST = head(Content_Length=2, Connection="close"), b"{}"  # of a request


@pytest.fixture
def hasty(tmp_path, webex):
    """A relay that waits for nobody for longer than 0.4 seconds."""
    limits = dict.fromkeys(("HEADER_S", "BODY_S", "IDLE_S", "LINGER_S"), 0.4)
    with Relay(tmp_path, webex.url, {**limits, "TICK_S": 0.05}) as running:
        yield running


def one_by_one(data: bytes) -> list[bytes]:
    return [bytes([byte]) for byte in data]


@pytest.mark.pitfall(2)
@pytest.mark.parametrize(
    ("at_once", "dripped"),
    [
        (b"", one_by_one(posted())),
        (head()[:-2], [b"X: y\r\n"] * 90),
        (head(Content_Length=100), one_by_one(b"{" + b" " * 98 + b"}")),
        (head(Transfer_Encoding="chunked") + b"64\r\n", one_by_one(b"{" + b" " * 98 + b"}")),
    ],
    ids=["header", "lines", "body", "chunks"],
)
def test_a_request_that_drips_in_is_refused_as_too_slow(hasty, at_once, dripped):
    with Client(hasty) as client:
        client.send(at_once)
        for part in dripped:
            # 0.02 s is well within any time-out of a single read.
            if select.select([client.socket], [], [], 0.02)[0]:
                break
            client.send(part)
        else:
            pytest.fail("the relay listens to its end")
        answer = client.answer()
        assert (answer.status, answer.headers["connection"]) == (408, "close")
        assert "slow" in answer.json["error"]
        assert client.is_closed()
    hasty.wait_for_log("127.0.0.1 refused: 408 ")
    assert " taken: " not in hasty.log()


@pytest.mark.pitfall(2)
def test_a_refused_body_that_drips_in_is_not_read_to_its_end(hasty):
    with Client(hasty) as client:
        assert client.ask(head(authorization=None, Content_Length=10**6)).status == 401
        with contextlib.suppress(OSError):
            for _ in range(10_000):  # minutes
                client.send(b"x")
                time.sleep(0.01)
            pytest.fail("the relay listens to it for ever")


@pytest.mark.pitfall(2)
def test_a_client_that_says_nothing_is_closed_without_an_answer_or_a_line(hasty):
    with Client(hasty) as silent:
        assert silent.is_closed()
    with Client(hasty) as idle:
        assert idle.ask(head("GET /healthz HTTP/1.1")).status == 200
        assert idle.is_closed()
    assert "WARNING" not in hasty.log()


def test_an_idle_connection_with_credentials_may_stay_for_longer(tmp_path, webex):
    with Relay(tmp_path, webex.url, {"HEADER_S": 0.3, "TICK_S": 0.1}) as relay:
        with Client(relay) as stranger:
            assert stranger.ask(head("GET /healthz HTTP/1.1", None)).status == 200
            assert stranger.is_closed()
        with Client(relay) as trusted:
            assert trusted.ask(posted()).status == 200
            for _ in range(2):
                with Client(relay) as witness:
                    assert witness.is_closed()  # the time has passed for one that came later
            assert trusted.ask(posted()).status == 200


def test_a_refusal_by_the_spool_keeps_its_reason_however_late_it_is(tmp_path, webex):
    limits = {"TICK_S": 0.1, "BODY_S": 0.1}
    with Relay(tmp_path, webex.url, limits, faults.LATE_REFUSAL) as relay:
        assert relay.post({}) == (503, {"error": "the disk"})


@pytest.mark.pitfall(3)
@pytest.mark.parametrize("start", [b"", b"POST / HTTP/1.1\r\nX: "], ids=["silent", "dripping"])
def test_500_idle_clients_of_one_address_do_not_reach_another(relay, start):
    with crowd(relay, 500, start) as idle:
        for _ in range(5):
            assert post_from(relay, OTHER) == 200
            for client in idle:
                client.send(b"x" if start else b"")
        assert all(client.is_left_alone() for client in idle)  # they were there all the time


@pytest.mark.pitfall(3)
@pytest.mark.parametrize("start", [b"", b"P"], ids=["silent", "half"])
def test_silence_is_borne_for_a_moment_only_when_places_become_few(tmp_path, webex, start):
    limits = {"CONNECTIONS": 50, "TICK_S": 0.1, "HEADER_S": 3600, "LINGER_S": 0.1}
    with Relay(tmp_path, webex.url, limits) as relay, crowd(relay, 200, start) as idle:
        assert post_from(relay, OTHER) == 200
        # One that has just given its place to another may not have ended.
        wait_until(lambda: status_of(relay, "Threads") <= 50 + 4)
        assert idle[0].is_left_alone()  # of the first half, which may take its time


def test_a_connection_without_credentials_has_two_answers(relay):
    wrong = head(authorization=basic(password="guess"), Content_Length=0)
    with Client(relay) as client:
        client.send(wrong * 3)
        for connection in ("keep-alive", "close"):
            answer = client.answer()
            assert (answer.status, answer.headers["connection"]) == (401, connection)
        assert client.is_closed()
    with Client(relay) as asked:  # and who shows them when asked as many as it likes
        assert asked.ask(head(authorization=None, Content_Length=0)).status == 401
        for _ in range(3):
            assert asked.ask(posted()).status == 200


def test_who_floods_without_credentials_does_not_reach_others(relay):
    with flood(relay, 50):
        for _ in range(3):
            assert post_from(relay, OTHER) == 200
    assert post_from(relay, NEIGHBOUR) == 200


def test_who_waits_for_a_place_is_served_and_never_closed(tmp_path, webex):
    with (
        Relay(tmp_path, webex.url, {"CONNECTIONS": 8, "TICK_S": 0.1}) as relay,
        crowd(relay, 8, HALF) as busy,
        crowd(relay, 40) as waiting,
    ):
        for client in waiting:
            client.send(posted(Connection="close"))
        relay.wait_for_log("no connection can be accepted: all 8 places are taken", 2)
        assert status_of(relay, "Threads") <= 8 + 4
        assert all(client.is_left_alone() for client in busy + waiting)
        for client in busy:
            client.send(REST)
        assert [client.answer().status for client in busy + waiting] == [200] * 48


def test_a_burst_of_300_connections_from_one_address_is_answered_to_the_last(relay):
    barrier = threading.Barrier(300)

    def post_at_once(client_of: contextlib.ExitStack) -> int:
        barrier.wait(30)
        client = client_of.enter_context(Client(relay))
        return client.ask(posted()).status

    # None hangs up before all are answered.
    with contextlib.ExitStack() as clients, ThreadPoolExecutor(300) as pool:
        assert list(pool.map(post_at_once, [clients] * 300)) == [200] * 300
    relay.wait_for_log(" taken: ", 300)


@pytest.mark.pitfall(4)
def test_the_kernel_keeps_connections_while_the_accept_loop_is_busy(relay):
    relay.process.send_signal(signal.SIGSTOP)
    try:
        with crowd(relay, 300):  # with a backlog of 5 the sixth would time out
            relay.process.send_signal(signal.SIGCONT)
            assert post_from(relay, OTHER) == 200
    finally:
        relay.process.send_signal(signal.SIGCONT)


def cpu_s(relay: Relay) -> float:
    """Return how long it has computed."""
    fields = Path(f"/proc/{relay.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def limit(relay: Relay, kind: int, value: int) -> None:
    _, most = resource.prlimit(relay.process.pid, kind)
    resource.prlimit(relay.process.pid, kind, (value, most))


@pytest.mark.pitfall(5)
@pytest.mark.parametrize("at_start", [True, False], ids=["from the start", "all of a sudden"])
def test_without_descriptors_it_neither_spins_nor_loses_an_alarm(tmp_path, webex, at_start):
    words = "no connection can be accepted"
    relay = Relay(tmp_path, webex.url, {"TICK_S": 0.1})
    if at_start:
        relay.limits = [(resource.RLIMIT_NOFILE, 60)]
    with relay:
        assert post_from(relay, OTHER) == 200
        webex.wait_for(lambda: len(webex.messages) == 1)
        if not at_start:
            limit(relay, resource.RLIMIT_NOFILE, descriptors_of(relay) + 10)
        with crowd(relay, 100):
            pass
        assert post_from(relay, OTHER) == 200
        with crowd(relay, 20, HALF) as busy, Client(relay, OTHER) as waiting:
            waiting.send(posted())  # waits in the kernel
            relay.wait_for_log(words, 2)
            began_s, began_cpu_s = time.monotonic(), cpu_s(relay)
            lines = relay.log().count("\n")
            relay.wait_for_log(words, relay.log().count(words) + 5)
            spent_s, passed_s = cpu_s(relay) - began_cpu_s, time.monotonic() - began_s
            assert spent_s < passed_s / 2  # a loop that spins takes all of it
            assert relay.log().count("\n") < lines + 20
            for client in busy:
                client.send(REST)
            assert waiting.answer().status == 200
            assert {client.answer().status for client in busy} == {200}
        if not at_start:
            limit(relay, resource.RLIMIT_NOFILE, 1000)
        assert post_from(relay, OTHER) == 200
        webex.wait_for(lambda: len(webex.alarms()) == 5)  # all that were busy are one


@pytest.mark.pitfall(3)
def test_without_threads_it_says_so_and_goes_on_once_there_are_some(tmp_path, webex):
    relay = Relay(tmp_path, webex.url)
    relay.command.remove("-X")  # dev warns of a connection that is closed without a thread
    relay.command.remove("dev")
    with relay:
        limit(relay, resource.RLIMIT_AS, (status_of(relay, "VmSize") + 40_000) * 1024)
        threads = status_of(relay, "Threads")
        statuses = set()
        with crowd(relay, 30, HALF) as busy:  # each thread takes 8 MB of address space
            relay.wait_for_log("no connection can be accepted: can't start new thread")
            for client in busy:
                with contextlib.suppress(ConnectionError, ValueError):  # some are closed unanswered
                    statuses.add(client.ask(REST).status)
        assert statuses == {200}
        wait_until(lambda: status_of(relay, "Threads") <= threads)
        assert post_from(relay, OTHER) == 200
        webex.wait_for(lambda: len(webex.alarms()) == 2)


SILENT_NAME_SERVER = """
for file in resolv.conf nsswitch.conf hosts; do mount --bind "$1/$file" /etc/$file || exit 99; done
shift; exec "$@"
"""


@pytest.fixture
def hung_names(tmp_path, webex):
    """A relay on a host whose name server answers nothing; and what that was asked."""
    address = f"127.53.{os.getpid() // 250 % 250}.{os.getpid() % 250 + 1}"  # of this run alone
    (tmp_path / "resolv.conf").write_text(f"nameserver {address}\noptions timeout:30\n")
    (tmp_path / "nsswitch.conf").write_text("hosts: files dns\n")
    (tmp_path / "hosts").touch()
    prefix = ["unshare", "--mount", "sh", "-c", SILENT_NAME_SERVER, "sh", str(tmp_path)]
    if not shutil.which("unshare") or subprocess.run([*prefix, "true"], check=False).returncode:
        pytest.skip("this user may not give a process a name server of its own")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((address, 53))
        server.settimeout(20)
        relay = Relay(tmp_path, "https://webex.example/v1", {"STOP_S": 0.5}, listen="0.0.0.0:0")
        relay.command[:0] = prefix
        yield relay, server


@pytest.mark.pitfall(17)
def test_names_that_cannot_be_looked_up_hold_neither_start_nor_posts_nor_stop(hung_names):
    relay, server = hung_names
    with relay:
        assert not select.select([server], [], [], 0)[0]  # it was ready without asking for a name
        assert post_from(relay, OTHER) == 200
        assert b"\x05webex\x07example" in server.recv(512)  # from now on the courier hangs
        for _ in range(3):
            assert post_from(relay, OTHER) == 200
        relay.told("4 waiting, 0 delivered")
        with Client(relay) as client:
            assert client.ask(head("GET /healthz HTTP/1.1", None)).status == 200


@pytest.mark.pitfall(23)
def test_a_refused_delivery_leaves_no_descriptor_behind(tmp_path, webex):
    webex.fault_for = lambda _: Fault(status=404)
    with Relay(tmp_path, webex.url, {"HOLD_S": 0.01}) as relay:
        relay.post({})
        webex.wait_for(lambda: len(webex.requests) > 5)
        before = descriptors_of(relay)
        webex.wait_for(lambda: len(webex.requests) > 50)
        assert descriptors_of(relay) < before + 10
