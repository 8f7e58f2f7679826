"""https towards vManage, and TLS, proxies and authorities towards Webex."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shutil
import signal
import socket
import socketserver
import ssl
import struct
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import README, Relay, alarm, basic, crowd, environment, posted, run, run_as_nobody
from webex_standin import WebexStandIn

pytestmark = pytest.mark.skipif(not shutil.which("openssl"), reason="openssl is not installed")
HANDSHAKE, ALERT = 22, 21  # a TLS record's first byte


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A certificate for localhost with its key, made as the README says."""
    return make_pair(tmp_path_factory.mktemp("certificate"), "localhost")


def make_pair(folder: Path, name: str) -> tuple[Path, Path]:
    folder.mkdir(exist_ok=True)
    command = re.search(r"^    (openssl req (?:.*\\\n)*.*)$", README, re.MULTILINE)[1]
    assert "jumphost.example" in command
    assert "192.0.2.5" in command
    command = command.replace("jumphost.example", name).replace("192.0.2.5", "127.0.0.1")
    subprocess.run(command, shell=True, cwd=folder, capture_output=True, check=True)
    return folder / "tls_certificate.pem", folder / "tls_key.pem"


def secured(pair: tuple[Path, Path]) -> dict[str, str]:
    return {"tls_certificate": str(pair[0]), "tls_key": str(pair[1])}


def serving(pair: tuple[Path, Path]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*pair)
    return context


def trusting(pair: tuple[Path, Path]) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(pair[0]))


@pytest.fixture(scope="module")
def secure_relay(tmp_path_factory, lasting_webex, pair):
    with Relay(tmp_path_factory.mktemp("tls"), lasting_webex.url, **secured(pair)) as running:
        yield running


def post(relay: Relay, context: ssl.SSLContext, host: str = "127.0.0.1") -> int:
    """Post three alarms on one connection, and return the status of all."""
    connection = http.client.HTTPSConnection(
        "localhost", relay.port, timeout=20, context=context, source_address=(host, 0)
    )
    statuses = set()
    with contextlib.closing(connection):
        for _ in range(3):
            connection.request("POST", "/", alarm(), {"Authorization": basic()})
            response = connection.getresponse()
            response.read()
            statuses.add(response.status)
    (status,) = statuses
    return status


def read_all(client: socket.socket) -> bytes:
    """Read to the end; a reset raises, and over TLS an end without a goodbye."""
    received = b""
    while block := client.recv(1000):
        received += block
    return received


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_alarms_are_taken_over_tls(secure_relay, pair, lasting_webex, version):
    context = trusting(pair)
    context.minimum_version = context.maximum_version = version
    before = len(lasting_webex.alarms())
    assert post(secure_relay, context) == 200
    lasting_webex.wait_for(lambda: len(lasting_webex.alarms()) >= before + 3)


@pytest.mark.filterwarnings("ignore:.*TLSv1.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
def test_older_tls_is_refused(secure_relay, pair, version):
    context = trusting(pair)
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = version
    before = secure_relay.log().count("UNSUPPORTED_PROTOCOL")
    with pytest.raises(ssl.SSLError):
        post(secure_relay, context)
    secure_relay.wait_for_log("127.0.0.1 is gone unanswered: [SSL: UNSUPPORTED_PROT", before + 1)


LENIENT = """
openssl_conf = all
[all]
ssl_conf = ssl
[ssl]
system_default = default
[default]
Options = ClientRenegotiation
"""


def test_a_client_may_not_ask_for_handshake_after_handshake(tmp_path, webex, pair):
    lenient = tmp_path / "openssl.cnf"  # of a host that leaves it to the program, as older ones do
    lenient.write_text(LENIENT)
    with Relay(tmp_path, webex.url, OPENSSL_CONF=str(lenient), **secured(pair)) as relay:
        command = ["openssl", "s_client", "-tls1_2", "-connect", f"127.0.0.1:{relay.port}"]
        done = subprocess.run(command, input=b"R\n", capture_output=True, timeout=30, check=False)
    assert b"RENEGOTIATING" in done.stderr
    assert b"no renegotiation" in done.stderr


@pytest.mark.pitfall(1)
def test_handshakes_that_are_held_open_hold_nobody_else(secure_relay, pair):
    hello = ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), hello)
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    begun = hello.read()
    with (
        crowd(secure_relay, 22) as silent,
        crowd(secure_relay, 22, begun[:7]) as amid,
        crowd(secure_relay, 22, begun) as answered,
    ):
        assert post(secure_relay, trusting(pair), "127.0.0.3") == 200
        assert all(client.is_left_alone() for client in silent + amid)
        for client in answered:  # which now wait for the client's part
            assert client.stream.read(1)[0] == HANDSHAKE


@pytest.mark.pitfall(2)
def test_a_handshake_has_a_deadline(tmp_path, webex, pair):
    with Relay(tmp_path, webex.url, {"HEADER_S": 0.5, "TICK_S": 0.1}, **secured(pair)) as relay:
        with socket.create_connection(("127.0.0.1", relay.port), 20) as slow:
            slow.sendall(b"\x16\x03\x01")
            assert read_all(slow)[:1] in (b"", bytes([ALERT]))
        relay.wait_for_log("127.0.0.1 is gone unanswered: ")
        assert post(relay, trusting(pair)) == 200


def test_clients_that_reset_the_connection_before_a_handshake_hold_nobody_else(secure_relay, pair):
    secure_relay.process.send_signal(signal.SIGSTOP)  # so that it finds all of them reset
    for part in [b"\x16\x03\x01", b"POST / HTTP/1.1\r\n"] * 13:
        with socket.create_connection(("127.0.0.1", secure_relay.port), 20) as client:
            client.sendall(part)
            linger = struct.pack("ii", 1, 0)  # close with a reset
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    secure_relay.process.send_signal(signal.SIGCONT)
    assert post(secure_relay, trusting(pair)) == 200
    assert "no connection can be accepted" not in secure_relay.log()


def test_a_stop_waits_for_a_handshake_and_for_the_alarm_that_comes_with_its_end(
    tmp_path, webex, pair
):
    forever = dict.fromkeys(("STOP_S", "HEADER_S"), 3600)
    limits = {**forever, "GRACE_S": 0.05, "TICK_S": 0.05}
    received, to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = trusting(pair).wrap_bio(received, to_send, server_hostname="localhost")
    with (
        Relay(tmp_path, webex.url, limits, **secured(pair)) as relay,
        socket.create_connection(("127.0.0.1", relay.port), 20) as connection,
    ):

        def fed(work: Callable[[], Any]) -> Any:
            """Return what a part of the client returns once it has read what it needs."""
            while True:
                with contextlib.suppress(ssl.SSLWantReadError):
                    return work()
                connection.sendall(to_send.read())
                block = connection.recv(65536)
                assert block, "it is cut off"
                received.write(block)

        with contextlib.suppress(ssl.SSLWantReadError):
            client.do_handshake()
        connection.sendall(to_send.read())
        received.write(connection.recv(65536))  # the relay is amid its part
        relay.terminate()
        relay.told("STOPPING=1")
        with pytest.raises(subprocess.TimeoutExpired):
            relay.process.wait(0.5)  # it waits for us, for many times GRACE_S
        fed(client.do_handshake)
        client.write(posted())
        connection.sendall(to_send.read())
        assert fed(lambda: client.read(13)) == b"HTTP/1.1 200 "
        assert relay.process.wait(20) == 0


@pytest.mark.parametrize("size", [0, 100_000])
def test_plain_http_on_the_tls_port_gets_a_clean_close(secure_relay, pair, size):
    before = secure_relay.log().count("HTTP_REQUEST")
    with socket.create_connection(("127.0.0.1", secure_relay.port), 20) as client:
        with contextlib.suppress(BrokenPipeError):
            client.sendall(posted(b"x" * size))
        assert read_all(client)[:1] in (b"", bytes([ALERT]))
    assert post(secure_relay, trusting(pair)) == 200
    secure_relay.wait_for_log("127.0.0.1 is gone unanswered: [SSL: HTTP_REQUEST]", before + 1)


def test_tls_on_the_plain_port_is_told_apart(relay):
    with pytest.raises(ssl.SSLError):
        post(relay, ssl.create_default_context())
    assert "https would need tls_certificate" in relay.wait_for_log("127.0.0.1 refused: 400 ")


@pytest.mark.parametrize(
    ("part", "answer"),
    [(b"", b""), (b"POST / HT", b"HTTP/1.1 408 "), (posted(Connection="close"), b"HTTP/1.1 200 ")],
    ids=["idle", "late", "answered"],
)
def test_each_connection_ends_with_a_goodbye(tmp_path, webex, pair, part, answer):
    limits = {"HEADER_S": 1.0, "IDLE_S": 1.0, "TICK_S": 0.1}
    context = trusting(pair)
    with (
        Relay(tmp_path, webex.url, limits, **secured(pair)) as relay,
        socket.create_connection(("127.0.0.1", relay.port), 20) as plain,
        context.wrap_socket(
            plain, server_hostname="localhost", suppress_ragged_eofs=False
        ) as client,
    ):
        client.sendall(part)
        assert read_all(client)[:13] == answer


def problems(directory: Path, **changes: str | None) -> list[str]:
    """Start the relay with bad settings and return what it says."""
    done = run(environment(directory, "http://127.0.0.1:9/v1", **changes))
    assert done.returncode == 78, done.stderr
    return [line.split(" ERROR ")[1] for line in done.stderr.splitlines()]


def test_a_certificate_that_cannot_be_served_is_a_settings_error(tmp_path, pair):
    certificate, key = map(str, pair)
    other_key = str(make_pair(tmp_path / "other", "localhost")[1])
    locked, empty = str(tmp_path / "locked.pem"), str(tmp_path / "empty.pem")
    command = ["openssl", "rsa", "-aes256", "-passout", "pass:x", "-in", key, "-out", locked]
    subprocess.run(command, capture_output=True, check=True)
    Path(empty).touch()
    for certificate_given, key_given, reason in [
        (certificate, None, "No such file or directory"),
        (certificate, "/nowhere/key.pem", "No such file or directory"),
        (certificate, other_key, "KEY_VALUES_MISMATCH"),
        (certificate, str(tmp_path), "Is a directory"),
        (certificate, empty, ""),
        (certificate, locked, ""),
        (key, key, ""),
        (empty, key, ""),
        (None, key, "No such file or directory"),
        ("/nowhere/c.pem", key, "No such file or directory"),
    ]:
        (line,) = problems(tmp_path, tls_certificate=certificate_given, tls_key=key_given)
        found = f"{certificate_given or 'nothing'} and {key_given or 'nothing'}: "
        assert line.startswith(f"tls_certificate, tls_key: expected a pair as PEM, found {found}")
        assert reason in line


def test_a_bad_certificate_is_named_beside_the_other_problems(tmp_path, pair):
    key = "/nowhere/key.pem"
    lines = problems(tmp_path, tls_certificate=str(pair[0]), tls_key=key, room_id=None)
    assert [line.split(":")[0] for line in lines] == ["room_id", "tls_certificate, tls_key"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_key_that_the_relay_may_not_read_is_a_settings_error(tmp_path, pair):
    certificate, key = (shutil.copy(path, tmp_path) for path in pair)
    Path(key).chmod(0o600)
    Path(certificate).chmod(0o644)
    files = {"tls_certificate": certificate, "tls_key": key}
    done = run_as_nobody(tmp_path, environment(tmp_path, "http://127.0.0.1:9/v1", **files))
    assert done.returncode == 78
    assert f"found {certificate} and {key}: [Errno 13] Permission denied" in done.stderr


def test_pem_files_may_come_as_credentials(tmp_path, webex, pair):
    folder = tmp_path / "credentials"
    folder.mkdir()
    for path in pair:
        text = f"Bag Attributes\n    friendlyName: ñ\n{path.read_text()}"  # as openssl writes it
        (folder / path.stem).write_text(text, encoding="utf-8")
    with Relay(tmp_path, webex.url, CREDENTIALS_DIRECTORY=str(folder)) as relay:
        assert post(relay, trusting(pair)) == 200


@pytest.mark.parametrize(
    ("listen", "is_secured", "count"),
    [("0.0.0.0:0", False, 1), ("127.0.0.1:0", False, 0), ("0.0.0.0:0", True, 0)],
)
def test_plain_text_over_the_network_is_warned_of_once(
    tmp_path, webex, pair, listen, is_secured, count
):
    settings = secured(pair) if is_secured else {}
    with Relay(tmp_path, webex.url, listen=listen, **settings) as relay:
        pass
    lines = [line for line in relay.log().splitlines() if " WARNING " in line]
    assert len(lines) == count
    assert all("tls_certificate" in line for line in lines)


@pytest.fixture
def tls_webex(pair):
    with WebexStandIn(tls=serving(pair)) as standin:
        yield standin


def test_an_own_authority_is_trusted_by_ssl_cert_file(tmp_path, tls_webex, pair):
    with Relay(tmp_path, tls_webex.url, SSL_CERT_FILE=str(pair[0])) as relay:
        relay.post({"message": "hello"})
        tls_webex.wait_for(lambda: tls_webex.messages)


def test_a_certificate_that_is_not_trusted_is_named_with_what_to_do(tmp_path, tls_webex):
    with Relay(tmp_path, tls_webex.url) as relay:
        relay.post({"message": "hello"})
        relay.told(": Webex does not answer")
    (line,) = [line for line in relay.log().splitlines() if "delivery failed" in line][:1]
    assert "CERTIFICATE_VERIFY_FAILED" in line
    assert "if a proxy opens TLS, SSL_CERT_FILE" in line
    assert tls_webex.requests == []


def test_a_certificate_for_another_name_is_named_with_what_to_do(tmp_path, pair):
    other = make_pair(tmp_path / "other", "other.example")
    with WebexStandIn(tls=serving(other)) as standin:
        with Relay(tmp_path, standin.url, SSL_CERT_FILE=str(other[0])) as relay:
            relay.post({"message": "hello"})
            relay.told(": Webex does not answer")
        assert "Hostname mismatch" in relay.log()
        assert standin.requests == []


class Proxy(socketserver.ThreadingTCPServer):
    """An HTTP proxy that knows CONNECT alone; `asked` are the requests' first lines."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Tunnel)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.asked: list[str] = []
        self.seen = b""
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        super().__exit__(*exception)


class Tunnel(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        self.server.asked.append(self.rfile.readline().decode().strip())
        while self.rfile.readline() not in (b"\r\n", b""):
            pass
        host, port = self.server.asked[-1].split()[1].split(":")
        with socket.create_connection((host, int(port))) as webex:
            self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=self.pump, args=(webex.recv, self.connection))
            back.start()
            self.pump(self.rfile.read1, webex)
            back.join()

    def pump(self, read: Callable[[int], bytes], target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while block := read(65536):
                self.server.seen += block
                target.sendall(block)
            target.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("no_proxy", [None, "localhost", "example.com"])
def test_webex_is_reached_through_the_proxy_unless_no_proxy_names_it(
    tmp_path, tls_webex, pair, no_proxy
):
    with Proxy() as proxy:
        environ = {"https_proxy": proxy.url, "no_proxy": no_proxy, "SSL_CERT_FILE": str(pair[0])}
        with Relay(tmp_path, tls_webex.url, **environ) as relay:
            relay.post({"message": "hello"})
            tls_webex.wait_for(lambda: tls_webex.messages)
        port = tls_webex.url.split(":")[2].split("/")[0]
        asked = [] if no_proxy == "localhost" else [f"CONNECT localhost:{port} HTTP/1.1"]
        assert [line.replace("HTTP/1.0", "HTTP/1.1") for line in proxy.asked] == asked
        assert b"Bearer" not in proxy.seen
