"""https towards vManage, and TLS, proxies and authorities towards Webex."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from harness import PROGRAM, Relay, basic, environment, head, run_as_nobody
from webex_standin import WebexStandIn

from alarmrelay import read_settings

README = (PROGRAM.parent / "README.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.skipif(not shutil.which("openssl"), reason="openssl is not installed")
ALARM = json.dumps({"message": "over TLS"}).encode()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A certificate for localhost with its key, made as the README says."""
    return make_pair(tmp_path_factory.mktemp("certificate"), "localhost")


def make_pair(folder: Path, name: str) -> tuple[Path, Path]:
    command = re.search(r"^    (openssl req (?:.*\\\n)*.*)$", README, re.MULTILINE)[1]
    assert "jumphost.example" in command
    assert "192.0.2.5" in command
    command = command.replace("jumphost.example", name).replace("192.0.2.5", "127.0.0.1")
    subprocess.run(command, shell=True, cwd=folder, capture_output=True, check=True)
    return folder / "tls_certificate.pem", folder / "tls_key.pem"


def secured(pair: tuple[Path, Path]) -> dict[str, str]:
    return {"tls_certificate": str(pair[0]), "tls_key": str(pair[1])}


@pytest.fixture(scope="module")
def webex():
    with WebexStandIn() as standin:
        yield standin


@pytest.fixture(scope="module")
def relay(tmp_path_factory, webex, pair):
    with Relay(tmp_path_factory.mktemp("tls"), webex.url, **secured(pair)) as running:
        yield running


def serving(pair: tuple[Path, Path]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*pair)
    return context


def trusting(pair: tuple[Path, Path]) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(pair[0]))


def post(relay: Relay, context: ssl.SSLContext, host: str = "127.0.0.1") -> int:
    connection = http.client.HTTPSConnection(
        "localhost", relay.port, timeout=20, context=context, source_address=(host, 0)
    )
    with contextlib.closing(connection):
        statuses = []
        for _ in range(3):  # on one connection
            connection.request("POST", "/", ALARM, {"Authorization": basic()})
            response = connection.getresponse()
            response.read()
            statuses.append(response.status)
        assert len(set(statuses)) == 1
        return statuses[0]


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_alarms_are_taken_over_tls(relay, pair, webex, version):
    context = trusting(pair)
    context.minimum_version = context.maximum_version = version
    assert post(relay, context) == 200
    webex.wait_for(lambda: webex.messages)


@pytest.mark.filterwarnings("ignore:.*TLSv1.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
def test_older_tls_is_refused(relay, pair, version):
    context = trusting(pair)
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = version
    with pytest.raises(ssl.SSLError):
        post(relay, context)
    relay.wait_for_log("is gone unanswered: [SSL: UNSUPPORTED_PROTOCOL]")


def test_a_client_may_not_ask_for_handshake_after_handshake(pair):
    settings = read_settings({**environment(Path(), "http://127.0.0.1"), **secured(pair)})
    assert settings["tls"].options & ssl.OP_NO_RENEGOTIATION


@pytest.mark.pitfall(1)
def test_handshakes_that_are_held_open_hold_nobody_else(relay, pair):
    hello = ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), hello)
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    begun = hello.read()
    held = []
    for part in [b"", begun[:7], begun] * 22:
        held.append(socket.create_connection(("127.0.0.1", relay.port), 20, ("127.0.0.2", 0)))
        held[-1].sendall(part)
    assert post(relay, trusting(pair), "127.0.0.3") == 200
    for connection, part in zip(held, [b"", begun[:7], begun] * 22):
        connection.setblocking(False)
        if part == begun:  # has its answer, and waits for the client's part
            connection.settimeout(20)
            assert connection.recv(100)[0] == 22
        else:
            with pytest.raises(BlockingIOError):
                connection.recv(1)
        connection.close()


@pytest.mark.pitfall(2)
def test_a_handshake_has_a_deadline(tmp_path, webex, pair):
    with Relay(tmp_path, webex.url, {"HEADER_S": 0.5, "TICK_S": 0.1}, **secured(pair)) as relay:
        with socket.create_connection(("127.0.0.1", relay.port), 20) as slow:
            slow.sendall(b"\x16\x03\x01")
            while block := slow.recv(1000):  # an alert at most
                assert block[0] == 21
        relay.wait_for_log("127.0.0.1 is gone unanswered: ")
        assert post(relay, trusting(pair)) == 200


def test_plain_http_on_the_tls_port_gets_a_clean_close(relay, pair):
    for size in (0, 100_000):
        with socket.create_connection(("127.0.0.1", relay.port), 20) as client:
            with contextlib.suppress(BrokenPipeError):
                client.sendall(head(Content_Length=size) + b"x" * size)
            while block := client.recv(1000):  # an alert at most, and no reset
                assert block[0] == 21
    assert post(relay, trusting(pair)) == 200
    relay.wait_for_log("127.0.0.1 is gone unanswered: [SSL: HTTP_REQUEST]")


def test_tls_on_the_plain_port_is_told_apart(tmp_path, webex):
    with Relay(tmp_path, webex.url) as relay:
        with pytest.raises(ssl.SSLError):
            post(relay, ssl.create_default_context())
        assert (
            "refused: 400 the header cannot be read: https would need tls_certificate"
            in relay.log()
        )


def test_who_is_late_over_tls_is_told_and_who_is_idle_gets_a_goodbye(tmp_path, webex, pair):
    limits = {"HEADER_S": 0.3, "IDLE_S": 0.3, "TICK_S": 0.1}
    with Relay(tmp_path, webex.url, limits, **secured(pair)) as relay:
        for part, answer in ((b"POST / HT", b"HTTP/1.1 408 "), (b"", b"")):
            with socket.create_connection(("127.0.0.1", relay.port), 20) as plain:
                client = trusting(pair).wrap_socket(
                    plain, server_hostname="localhost", suppress_ragged_eofs=False
                )
                with client:
                    client.sendall(part)
                    received = b""
                    while block := client.recv(1000):  # raises without a close_notify
                        received += block
                    assert received[:13] == answer


def test_an_answer_ends_with_a_goodbye(relay, pair):
    with socket.create_connection(("127.0.0.1", relay.port), 20) as plain:
        client = trusting(pair).wrap_socket(
            plain, server_hostname="localhost", suppress_ragged_eofs=False
        )
        with client:
            client.sendall(head(Content_Length=len(ALARM), Connection="close") + ALARM)
            answer = b""
            while block := client.recv(1000):  # raises without a close_notify
                answer += block
    assert answer.startswith(b"HTTP/1.1 200 ")


def problems(directory: Path, **changes: str | None) -> list[str]:
    """Start the relay with bad settings and return what it says."""
    done = subprocess.run(
        [sys.executable, "-X", "dev", str(PROGRAM)],
        env=environment(directory, "http://127.0.0.1:9/v1", **changes),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 78, done.stderr
    return [line.split(" ERROR ")[1] for line in done.stderr.splitlines()]


def test_a_certificate_that_cannot_be_served_is_a_settings_error(tmp_path, pair):
    certificate, key = map(str, pair)
    (tmp_path / "other").mkdir()
    other_key = str(make_pair(tmp_path / "other", "localhost")[1])
    command = ["openssl", "rsa", "-aes256", "-passout", "pass:x", "-in", key, "-out"]
    locked, empty = tmp_path / "locked.pem", tmp_path / "empty.pem"
    subprocess.run([*command, str(locked)], capture_output=True, check=True)
    empty.touch()
    for certificate_given, key_given, reason in [
        (certificate, None, "No such file or directory"),
        (certificate, "/nowhere/key.pem", "No such file or directory"),
        (certificate, other_key, "KEY_VALUES_MISMATCH"),
        (certificate, str(tmp_path), "Is a directory"),
        (certificate, str(empty), ""),
        (certificate, str(locked), ""),
        (key, key, ""),
        (str(empty), key, ""),
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


def warnings_at_start(directory: Path, webex: WebexStandIn, **settings: str) -> list[str]:
    with Relay(directory, webex.url, **settings) as relay:
        pass
    return [line for line in relay.log().splitlines() if " WARNING " in line]


def test_plain_text_over_the_network_is_warned_of_once(tmp_path, webex, pair):
    for number, (listen, settings, count) in enumerate(
        [("0.0.0.0:0", {}, 1), ("127.0.0.1:0", {}, 0), ("0.0.0.0:0", secured(pair), 0)]
    ):
        directory = tmp_path / str(number)
        directory.mkdir()
        lines = warnings_at_start(directory, webex, listen=listen, **settings)
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
    (tmp_path / "other").mkdir()
    other = make_pair(tmp_path / "other", "other.example")
    with WebexStandIn(tls=serving(other)) as standin:
        with Relay(tmp_path, standin.url, SSL_CERT_FILE=str(other[0])) as relay:
            relay.post({"message": "hello"})
            relay.told(": Webex does not answer")
        assert "Hostname mismatch" in relay.log()
        assert standin.requests == []


class Proxy:
    """An HTTP proxy that knows CONNECT alone; `asked` are the requests' first lines."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.asked: list[str] = []
        self.seen = b""

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._run, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, client.makefile("rb") as stream:
            self.asked.append(stream.readline().decode().strip())
            while stream.readline() not in (b"\r\n", b""):
                pass
            host, port = self.asked[-1].split()[1].split(":")
            with socket.create_connection((host, int(port))) as server:
                client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                pair = [(stream.read1, server), (server.recv, client)]
                threads = [threading.Thread(target=self._pump, args=one) for one in pair]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()

    def _pump(self, read, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while block := read(65536):
                self.seen += block
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
