"""Clients that are slow, many or broken, and a host that is short of something."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
from harness import Client, Relay, basic, head, status_of
from webex_standin import Fault

NEIGHBOUR, OTHER = "127.0.0.2", "127.0.0.3"


OPEN: list[socket.socket | Client] = []  # of this test


@pytest.fixture(autouse=True)
def _hang_up():
    yield
    hang_up()


def silent_clients(relay: Relay, count: int, host: str = NEIGHBOUR) -> list[socket.socket]:
    address = ("127.0.0.1", relay.port)
    clients = [socket.create_connection(address, 20, (host, 0)) for _ in range(count)]
    OPEN.extend(clients)
    return clients


def is_open(connection: socket.socket) -> bool:
    """Tell whether the relay has neither answered nor closed this connection."""
    connection.setblocking(False)
    try:
        connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    except OSError:
        pass
    finally:
        connection.settimeout(20)
    return False


def hang_up() -> None:
    """Close what a test has opened, before its relay stops or after it has failed."""
    while OPEN:
        OPEN.pop().close()


def numbered(number: int) -> bytes:
    return json.dumps({"message": f"number {number}"}).encode()


def post_from(relay: Relay, host: str, number: int = 0) -> int:
    """Post an alarm from this address on a connection of its own; return the status."""
    with Client(relay, host) as client:
        body = numbered(number)
        client.send(head(Content_Length=len(body)), body)
        return client.answer()[0]


@pytest.fixture
def hasty(tmp_path, webex):
    """A relay that waits for nobody for longer than 0.4 seconds."""
    limits = {"HEADER_S": 0.4, "BODY_S": 0.4, "IDLE_S": 0.4, "LINGER_S": 0.4, "TICK_S": 0.05}
    with Relay(tmp_path, webex.url, limits) as running:
        yield running


@pytest.mark.pitfall(2)
@pytest.mark.parametrize(
    ("at_once", "dripped"),
    [
        (b"", head(Content_Length=2) + b"{}"),
        (head()[:-2], b"X: y\r\n" * 90),
        (head(Content_Length=100), b"{" + b" " * 98 + b"}"),
        (head(Transfer_Encoding="chunked"), b"64\r\n{" + b" " * 98 + b"}\r\n0\r\n\r\n"),
    ],
    ids=["header", "lines", "body", "chunks"],
)
def test_a_request_that_drips_in_is_refused_as_too_slow(hasty, at_once, dripped):
    with Client(hasty) as client:
        client.send(at_once)
        for byte in re.findall(rb"(?s)X: y\r\n|.", dripped):
            if not is_open(client.socket):
                break
            client.send(byte)
            time.sleep(0.02)  # well within any time-out of a single read
        else:
            pytest.fail("the relay listens to its end")
        status, headers, body = client.answer()
        assert (status, headers["connection"]) == (408, "close")
        assert "slow" in json.loads(body)["error"]
        assert client.is_closed()
    assert "127.0.0.1 refused: 408 " in hasty.log()
    assert " taken: " not in hasty.log()


@pytest.mark.pitfall(2)
def test_a_refused_body_that_drips_in_is_not_read_to_its_end(hasty):
    with Client(hasty) as client:
        client.send(head(authorization=None, Content_Length=10**6))
        assert client.answer()[0] == 401
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
        idle.send(head("GET /healthz HTTP/1.1"))
        assert idle.answer()[0] == 200
        assert idle.is_closed()
    assert "WARNING" not in hasty.log()


def test_an_idle_connection_with_credentials_may_stay_for_longer(tmp_path, webex):
    with (
        Relay(tmp_path, webex.url, {"HEADER_S": 0.3, "TICK_S": 0.1}) as relay,
        Client(relay) as client,
    ):
        client.send(head("GET /healthz HTTP/1.1", None))
        assert client.answer()[0] == 200
        assert client.is_closed()  # without credentials
        with Client(relay) as trusted:
            body = numbered(1)
            trusted.send(head(Content_Length=len(body)), body)
            assert trusted.answer()[0] == 200
            for _ in range(2):
                with Client(relay) as witness:
                    assert witness.is_closed()  # the time has passed for one that came later
            trusted.send(head("GET /healthz HTTP/1.1"))
            assert trusted.answer()[0] == 200


@pytest.mark.pitfall(3)
@pytest.mark.parametrize("drip", [b"", b"POST / HTTP/1.1\r\nX: "], ids=["silent", "dripping"])
def test_500_idle_clients_of_one_address_do_not_reach_another(relay, drip):
    idle = silent_clients(relay, 500)
    for connection in idle:
        connection.sendall(drip)
    for number in range(5):
        assert post_from(relay, OTHER, number) == 200
        for connection in idle if drip else []:
            connection.sendall(b"x")
    assert all(map(is_open, idle))  # they were there all the time
    hang_up()


@pytest.mark.pitfall(3)
@pytest.mark.parametrize("start", [b"", b"P"], ids=["silent", "half"])
def test_silence_is_borne_for_a_moment_only_when_places_become_few(tmp_path, webex, start):
    limits = {"CONNECTIONS": 50, "TICK_S": 0.1, "HEADER_S": 3600, "LINGER_S": 0.1}
    with Relay(tmp_path, webex.url, limits) as relay:
        idle = silent_clients(relay, 200)
        for connection in idle:
            with contextlib.suppress(OSError):
                connection.sendall(start)
        assert post_from(relay, OTHER) == 200
        assert status_of(relay, "Threads") <= 50 + 4
        assert is_open(idle[0])  # of the first half, which may take its time
        hang_up()


def test_a_connection_without_credentials_has_two_answers(relay):
    wrong = head(authorization=basic(password="guess"), Content_Length=0)
    with Client(relay) as client:
        client.send(wrong * 3)
        answers = [client.answer() for _ in range(2)]
        assert [status for status, _, _ in answers] == [401] * 2
        assert [headers["connection"] for _, headers, _ in answers] == ["keep-alive", "close"]
        assert client.is_closed()
    body = numbered(2)
    with Client(relay) as asked:  # and who sends them when asked as many as it likes
        asked.send(head(authorization=None, Content_Length=0))
        assert asked.answer()[0] == 401
        for _ in range(3):
            asked.send(head(Content_Length=len(body)), body)
            assert asked.answer()[0] == 200


@contextlib.contextmanager
def flood(relay: Relay, count: int):
    """Let so many clients send requests all the time, and never wait for an answer."""
    hung_up = threading.Event()

    def read(client: Client) -> None:
        with contextlib.suppress(OSError):
            while not hung_up.is_set() and client.socket.recv(65536):
                pass

    def send(client: Client) -> None:
        with contextlib.suppress(OSError):
            while not hung_up.is_set():
                client.socket.sendall(head("GET /healthz HTTP/1.1", None) * 100)

    clients = [Client(relay, NEIGHBOUR) for _ in range(count)]
    with concurrent.futures.ThreadPoolExecutor(2 * count) as pool:
        try:
            for client in clients:
                pool.submit(send, client)
            assert clients[0].socket.recv(100)  # it is being served
            for client in clients:
                pool.submit(read, client)
            yield
        finally:
            hung_up.set()
            for client in clients:
                with contextlib.suppress(OSError):
                    client.socket.shutdown(socket.SHUT_RDWR)
    for client in clients:
        client.close()


def test_who_floods_without_credentials_does_not_reach_others(relay):
    with flood(relay, 50):
        assert [post_from(relay, OTHER, number) for number in range(3)] == [200] * 3
    assert post_from(relay, NEIGHBOUR, 3) == 200


def test_who_waits_for_a_place_is_served_and_never_closed(tmp_path, webex):
    with Relay(tmp_path, webex.url, {"CONNECTIONS": 8, "TICK_S": 0.1}) as relay:
        busy = busy_clients(relay, 8)
        waiting = [Client(relay, NEIGHBOUR) for _ in range(40)]
        OPEN.extend(waiting)
        for number, client in enumerate(waiting):
            body = numbered(number)
            client.send(head(Content_Length=len(body), Connection="close"), body)
        relay.wait_for_log("no connection can be accepted: all 8 places are taken", 2)
        assert status_of(relay, "Threads") <= 8 + 4
        assert all(is_open(client.socket) for client in busy + waiting)
        for client in busy:
            client.send(b"{}")
        assert [client.answer()[0] for client in busy + waiting] == [200] * 48


def test_a_burst_of_300_connections_from_one_address_is_answered_to_the_last(relay):
    clients = []
    with concurrent.futures.ThreadPoolExecutor(300) as pool:
        barrier = threading.Barrier(300)

        def post_at_once(number: int) -> int:
            barrier.wait(30)
            client = Client(relay)
            clients.append(client)  # and none hangs up before all are answered
            client.send(head(Content_Length=len(numbered(number))), numbered(number))
            return client.answer()[0]

        statuses = list(pool.map(post_at_once, range(300)))
    assert statuses == [200] * 300
    assert relay.log().count(" taken: ") == 300
    for client in clients:
        client.close()


@pytest.mark.pitfall(4)
def test_the_kernel_keeps_connections_while_the_accept_loop_is_busy(relay):
    relay.process.send_signal(signal.SIGSTOP)
    try:
        silent_clients(relay, 300)  # with a backlog of 5 the sixth would time out
    finally:
        relay.process.send_signal(signal.SIGCONT)
    assert post_from(relay, OTHER) == 200


def cpu_ticks(relay: Relay) -> int:
    fields = Path(f"/proc/{relay.process.pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def limit(relay: Relay, kind: int, value: int) -> None:
    _, most = resource.prlimit(relay.process.pid, kind)
    resource.prlimit(relay.process.pid, kind, (value, most))


def busy_clients(relay: Relay, count: int) -> list[Client]:
    """Return clients that have sent half of a request, whose other half is b"{}"."""
    clients = [Client(relay, NEIGHBOUR) for _ in range(count)]
    OPEN.extend(clients)
    for client in clients:
        client.send(head(Content_Length=2, Connection="close"))
    return clients


@pytest.mark.pitfall(5)
@pytest.mark.parametrize("descriptors", [60, None], ids=["from the start", "all of a sudden"])
def test_without_descriptors_it_neither_spins_nor_loses_an_alarm(tmp_path, webex, descriptors):
    relay = Relay(tmp_path, webex.url, {"TICK_S": 0.1})
    relay.limits = [(resource.RLIMIT_NOFILE, descriptors)] if descriptors else []
    with relay:
        assert post_from(relay, OTHER, 1) == 200
        webex.wait_for(lambda: len(webex.messages) == 1)
        if not descriptors:
            open_now = len(list(Path(f"/proc/{relay.process.pid}/fd").iterdir()))
            limit(relay, resource.RLIMIT_NOFILE, open_now + 10)
        silent_clients(relay, 100)
        hang_up()
        assert post_from(relay, OTHER, 2) == 200
        busy = busy_clients(relay, 20)
        answered = Client(relay, OTHER)
        answered.send(head(Content_Length=len(numbered(3))), numbered(3))  # waits in the kernel
        relay.wait_for_log("no connection can be accepted", 2)
        began_s, ticks, lines = time.monotonic(), cpu_ticks(relay), relay.log().count("\n")
        words = "no connection can be accepted"
        relay.wait_for_log(words, relay.log().count(words) + 5)
        spent_s = (cpu_ticks(relay) - ticks) / os.sysconf("SC_CLK_TCK")
        assert spent_s < (time.monotonic() - began_s) / 2  # a loop that spins takes all of it
        assert relay.log().count("\n") < lines + 20
        for client in busy:
            client.send(b"{}")
        assert answered.answer()[0] == 200
        assert {client.answer()[0] for client in busy} == {200}
        if not descriptors:
            limit(relay, resource.RLIMIT_NOFILE, 1000)
        assert post_from(relay, OTHER, 4) == 200
        webex.wait_for(lambda: len(webex.alarms()) == 5)
        for client in [answered, *busy]:
            client.close()


@pytest.mark.pitfall(3)
def test_without_threads_it_says_so_and_goes_on_once_there_are_some(tmp_path, webex):
    relay = Relay(tmp_path, webex.url)
    relay.command.remove("-X")  # dev warns of a connection that is closed without a thread
    relay.command.remove("dev")
    with relay:
        limit(relay, resource.RLIMIT_AS, (status_of(relay, "VmSize") + 40_000) * 1024)
        threads = status_of(relay, "Threads")
        busy = busy_clients(relay, 30)  # each thread takes 8 MB of address space
        relay.wait_for_log("no connection can be accepted: can't start new thread")
        answers = []
        for other in busy:
            with contextlib.suppress(ConnectionError, ValueError):  # some are closed unanswered
                other.send(b"{}")
                answers.append(other.answer()[0])
        assert answers
        assert set(answers) == {200}
        until_s = time.monotonic() + 30
        while status_of(relay, "Threads") > threads:  # those that closed last may not have ended
            assert time.monotonic() < until_s
        assert post_from(relay, OTHER, 1) == 200
        webex.wait_for(lambda: any("number 1," in text for text in webex.alarms()))


@pytest.mark.pitfall(14)
def test_a_stop_does_not_wait_for_clients_that_go_on_posting(tmp_path, webex):
    with Relay(tmp_path, webex.url, {"STOP_S": 3600}) as relay, flood(relay, 2):
        relay.terminate()
        assert relay.process.wait(20) == 0


@pytest.mark.pitfall(14)
def test_a_stop_answers_what_came_in_at_the_same_time(tmp_path, webex):
    with Relay(tmp_path, webex.url) as relay:
        clients = [Client(relay) for _ in range(40)]
        OPEN.extend(clients)
        for number in range(2):
            for place, client in enumerate(clients):
                body = numbered(100 * number + place)
                client.send(head(Content_Length=len(body)), body)
            if number == 1:
                relay.terminate()
                relay.process.send_signal(signal.SIGCONT)
            assert [client.answer()[0] for client in clients] == [200] * 40
            relay.process.send_signal(signal.SIGSTOP if number == 0 else signal.SIGCONT)
        assert relay.process.wait(20) == 0


@pytest.mark.pitfall(14)
def test_a_stop_answers_requests_that_are_on_their_way(tmp_path, webex):
    with Relay(tmp_path, webex.url, {"GRACE_S": 20}) as relay:
        silent = [Client(relay, NEIGHBOUR) for _ in range(20)]  # accepted, but still silent
        OPEN.extend(silent)
        assert post_from(relay, OTHER, 99) == 200  # accepted after them
        relay.terminate()
        relay.told("STOPPING=1")
        for _ in range(50):  # until the listening socket is closed, at the latest
            with contextlib.suppress(ConnectionRefusedError, ConnectionResetError):
                Client(relay, OTHER).close()
                continue
            break
        for number, client in enumerate(silent):
            client.send(head(Content_Length=len(numbered(number))), numbered(number))
        assert [client.answer()[0] for client in silent] == [200] * 20
        assert relay.process.wait(20) == 0


@pytest.mark.pitfall(14)
def test_a_stop_waits_for_a_request_in_flight_but_not_for_who_has_nothing_to_say(tmp_path, webex):
    limits = {"STOP_S": 3600, "GRACE_S": 0.05, "LINGER_S": 0.3, "TICK_S": 0.1}
    with Relay(tmp_path, webex.url, limits) as relay:
        busy = Client(relay, NEIGHBOUR)
        OPEN.append(busy)
        busy.send(head(Content_Length=2))  # half a request, and the connection is to be kept
        silent = silent_clients(relay, 3)
        refused, unread = Client(relay, NEIGHBOUR), Client(relay, NEIGHBOUR)
        OPEN.extend([refused, unread])
        refused.send(b"no HTTP\r\n")
        unread.send(head(authorization=None, Content_Length=1000))  # of which nothing comes
        assert [client.answer()[0] for client in (refused, unread)] == [400, 401]
        assert post_from(relay, OTHER, 99) == 200
        relay.terminate()
        assert not any(connection.recv(1) for connection in silent)
        assert unread.is_closed()
        busy.send(b"{}")
        status, headers, _ = busy.answer()
        assert (status, headers["connection"]) == (200, "close")
        assert relay.process.wait(9) == 0  # a second before HEADER_S


def test_a_refusal_by_the_spool_keeps_its_reason_however_late_it_is(tmp_path, webex):
    fault = """
import time
def refuse(*_):
    time.sleep(0.6)
    raise alarmrelay.Refused(503, "the disk", **{"Retry-After": "30"})
alarmrelay.Spool.store = refuse
"""
    limits = {"TICK_S": 0.1, "BODY_S": 0.1}
    with Relay(tmp_path, webex.url, limits, fault) as relay:
        assert relay.post({}) == (503, {"error": "the disk"})


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
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.recv(512)  # it was ready without asking for a name
        server.settimeout(20)
        assert post_from(relay, OTHER, 1) == 200
        assert b"\x05webex\x07example" in server.recv(512)  # from now on the courier hangs
        for number in range(2, 5):
            assert post_from(relay, OTHER, number) == 200
        relay.told("4 waiting, 0 delivered")
        with Client(relay) as client:
            client.send(head("GET /healthz HTTP/1.1", None))
            assert client.answer()[0] == 200


@pytest.mark.pitfall(23)
def test_a_refused_delivery_leaves_no_descriptor_behind(tmp_path, webex):
    webex.fault_for = lambda _: Fault(status=404)
    limits = {"HOLD_S": 0.01}
    with Relay(tmp_path, webex.url, limits) as relay:
        relay.post({})
        folder = Path(f"/proc/{relay.process.pid}/fd")
        webex.wait_for(lambda: len(webex.requests) > 5)
        before = len(list(folder.iterdir()))
        webex.wait_for(lambda: len(webex.requests) > 50)
        assert len(list(folder.iterdir())) < before + 10
