"""The HTTP table, over real sockets to the real program."""

from __future__ import annotations

import base64
import json
import socket
import time

import pytest
from harness import PASSWORD, USERNAME, Client, Relay, basic, head
from webex_standin import WebexStandIn

ALARM = b'{"message": "posted by hand"}'
MEGABYTE = 2**20


@pytest.fixture(scope="module")
def webex():
    with WebexStandIn() as standin:
        yield standin


@pytest.fixture(scope="module")
def relay(tmp_path_factory, webex):
    with Relay(tmp_path_factory.mktemp("http"), webex.url) as running:
        yield running


@pytest.fixture
def client(relay):
    with Client(relay) as connected:
        yield connected


def alarm() -> bytes:
    """Return an alarm like no other, since a second one with the same bytes is a duplicate."""
    return json.dumps({"message": "posted by hand", "at": time.monotonic_ns()}).encode()


def post(body: bytes | None = None, **fields: object) -> bytes:
    body = alarm() if body is None else body
    return head(**{"Content_Length": len(body), **fields}) + body


def assert_usable(client: Client) -> None:
    client.send(post())
    assert client.answer()[0] == 200


@pytest.mark.pitfall(18)
def test_an_alarm_is_accepted_and_the_answer_is_json(client):
    client.send(post())
    status, headers, body = client.answer()
    assert (status, body) == (200, b'{"status": "accepted"}')
    assert headers["content-type"] == "application/json"
    assert headers["connection"] == "keep-alive"
    assert "server" not in headers
    assert "python" not in str(headers).lower()


def test_an_array_is_accepted_as_so_many_alarms(relay, webex):
    texts = [f"array {number} {time.monotonic_ns()}" for number in range(3)]
    assert relay.post([{"message": text} for text in texts]) == (200, {"status": "accepted"})
    webex.wait_for(lambda: all(any(text in m for m in webex.texts()) for text in texts))


def test_an_array_is_no_way_around_the_limits(client):
    client.send(post(b"[" + b"{}," * 1000 + b"{}]"))
    status, _, answer = client.answer()
    assert status == 400
    assert "up to 1000" in json.loads(answer)["error"]
    assert_usable(client)


def test_the_same_bytes_again_are_a_duplicate_and_stand_in_the_room_once(relay, webex):
    marker = f"again {time.monotonic_ns()}"
    body = json.dumps({"message": marker}).encode()
    assert relay.post(body) == (200, {"status": "accepted"})
    assert relay.post(body) == (200, {"status": "duplicate"})
    assert relay.post(body + b" ") == (200, {"status": "accepted"})
    assert relay.post(body) == (200, {"status": "duplicate"})
    relay.post({"message": f"last {marker}"})
    webex.wait_for(lambda: any(f"last {marker}" in text for text in webex.texts()))
    assert sum(f": {marker}" in text for text in webex.texts()) == 2


def test_many_requests_on_one_connection(client):
    for _ in range(20):
        assert_usable(client)


def test_pipelined_requests_are_answered_in_order(client):
    client.send(post(), head("GET /healthz HTTP/1.1"), post(b"{"), post())
    assert [client.answer()[0] for _ in range(4)] == [200, 200, 400, 200]


@pytest.mark.parametrize("connection", ["close", "Close", "keep-alive, close"])
def test_a_client_that_wants_the_connection_closed_gets_that(client, connection):
    client.send(post(Connection=connection))
    status, headers, _ = client.answer()
    assert (status, headers["connection"]) == (200, "close")
    assert client.is_closed()


def test_two_connection_fields_are_both_looked_at(client):
    client.send(post(Connection="keep-alive\r\nConnection: close"))
    assert client.answer()[1]["connection"] == "close"
    assert client.is_closed()


def test_an_empty_line_before_a_request_is_passed_over(client):
    client.send(post(), b"\r\n", post())
    assert [client.answer()[0] for _ in range(2)] == [200, 200]


def test_white_space_at_the_end_of_a_field_is_no_part_of_it(client):
    body = alarm()
    client.send(head(Content_Length=f"{len(body)} \t"), body)
    assert client.answer()[0] == 200
    client.send(head(Transfer_Encoding="chunked \t"), chunked(alarm(), 9))
    assert client.answer()[0] == 200


def test_http_1_0_is_answered_and_closed(client):
    body = alarm()
    client.send(head("POST / HTTP/1.0", Content_Length=len(body)), body)
    assert client.answer()[0] == 200
    assert client.is_closed()


@pytest.mark.parametrize(
    "content_type", [None, "text/plain", "multipart/form-data", "multipart/mixed; boundary=x"]
)
def test_the_content_type_is_not_looked_at(client, content_type):
    client.send(post(**({"Content_Type": content_type} if content_type else {})))
    assert client.answer()[0] == 200


def test_http_1_0_is_not_asked_for_its_body(client):
    body = alarm()
    client.send(head("POST / HTTP/1.0", Content_Length=len(body), Expect="100-continue"), body)
    assert client.answer()[0] == 200


def test_an_absolute_target_is_taken(client):
    client.send(post(start="POST http://relay:5001/ HTTP/1.1"))
    assert client.answer()[0] == 200


def test_a_query_is_passed_over(client):
    client.send(post(start="POST /?source=vmanage HTTP/1.1"))
    assert client.answer()[0] == 200


WRONG = {
    "missing": None,
    "wrong password": basic(password="guess"),
    "wrong user": basic(username="admin"),
    "other scheme": "Bearer " + base64.b64encode(f"{USERNAME}:{PASSWORD}".encode()).decode(),
    "no token": "Basic",
    "not base64": "Basic !!!!",
    "no padding": "Basic YQ",
    "not UTF-8": "Basic " + base64.b64encode(b"\xff\xfe:\xff").decode(),
    "no colon": "Basic " + base64.b64encode(USERNAME.encode()).decode(),
    "prefix": "Basic " + base64.b64encode(f"{USERNAME}:{PASSWORD[:-1]}".encode()).decode(),
    "longer": "Basic " + base64.b64encode(f"{USERNAME}:{PASSWORD}x".encode()).decode(),
    "not ASCII": "Basic ñ",
}


@pytest.mark.pitfall(13)
@pytest.mark.parametrize("authorization", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("path", ["/", "/nowhere"])
def test_wrong_credentials_are_refused_and_the_connection_stays_usable(client, authorization, path):
    body = alarm()
    fields = {"Content_Length": len(body)}
    client.send(head(f"POST {path} HTTP/1.1", authorization, **fields), body)
    status, headers, answer = client.answer()
    assert status == 401
    assert headers["www-authenticate"] == 'Basic realm="alarmrelay", charset="UTF-8"'
    assert "error" in json.loads(answer)
    assert_usable(client)


def test_credentials_are_judged_before_the_body_is_there(client):
    client.send(head(authorization=None, Content_Length=1000))
    assert client.answer()[0] == 401
    client.send(b"x" * 1000)
    assert_usable(client)


def test_the_scheme_is_compared_without_case_and_the_password_may_hold_colons(client):
    token = basic().split(" ")[1]
    client.send(post(authorization=f"BASIC  {token}"))
    assert client.answer()[0] == 200


BAD_BODIES = [
    b"",
    b"  ",
    b"null",
    b"7",
    b'"text"',
    b"[]",
    b"[{}, 1]",
    b"{",
    b"a=b",
    b"\xff\xfe\x00",
]


@pytest.mark.parametrize("body", BAD_BODIES)
def test_what_is_no_alarm_gets_a_400_that_says_so(client, body):
    client.send(post(body))
    status, _, answer = client.answer()
    assert status == 400
    assert json.loads(answer)["error"]
    assert_usable(client)


@pytest.mark.pitfall(19)
@pytest.mark.parametrize(
    ("start", "status", "allow"),
    [
        ("POST /nowhere HTTP/1.1", 404, None),
        ("GET /favicon.ico HTTP/1.1", 404, None),
        ("POST /../etc/passwd HTTP/1.1", 404, None),
        ("PUT / HTTP/1.1", 405, "GET, POST"),
        ("DELETE / HTTP/1.1", 405, "GET, POST"),
        ("BREW / HTTP/1.1", 405, "GET, POST"),
        ("POST // HTTP/1.1", 404, None),
        ("POST http://relay:5001/nowhere HTTP/1.1", 404, None),
        ("POST /healthz HTTP/1.1", 405, "GET"),
        ("POST / HTTP/1.1", 411, None),
    ],
)
def test_unknown_paths_wrong_methods_and_missing_lengths(client, start, status, allow):
    client.send(head(start))
    found, headers, body = client.answer()
    assert (found, headers.get("allow")) == (status, allow)
    assert json.loads(body)["error"]
    assert_usable(client)


def test_an_answer_to_head_has_no_body(client):
    client.send(head("HEAD / HTTP/1.1"))
    assert client.answer(has_body=False)[0] == 405
    assert_usable(client)


@pytest.mark.parametrize("path", ["/healthz", "/", "/nowhere"])
def test_the_body_of_a_get_is_not_taken_for_the_next_request(client, path):
    inner = head("GET /healthz HTTP/1.1")
    client.send(head(f"GET {path} HTTP/1.1", Content_Length=len(inner)), inner, post())
    assert client.answer()[0] == {"/healthz": 200, "/": 200, "/nowhere": 404}[path]
    assert client.answer()[2] == b'{"status": "accepted"}'


def test_health_needs_no_credentials(client):
    client.send(head("GET /healthz HTTP/1.1", None))
    status, _, body = client.answer()
    assert (status, body) == (200, b'{"status": "ok"}')


@pytest.mark.parametrize("size", [4 * MEGABYTE - 40, 4 * MEGABYTE])
def test_a_body_of_four_megabytes_is_taken(client, size):
    body = alarm()
    client.send(post(body[:-1] + b" " * (size - len(body)) + b"}"))
    assert client.answer()[0] == 200


@pytest.mark.pitfall(21)
@pytest.mark.parametrize("size", [4 * MEGABYTE + 1, 8 * MEGABYTE])
def test_a_larger_body_is_refused_and_its_sender_reads_that(relay, size):
    for _ in range(5):
        with Client(relay) as client:
            client.send(head(Content_Length=size))
            client.send(b"x" * size)  # all of it, before anything is read
            status, _, body = client.answer()
            assert status == 413
            assert "4194304" in json.loads(body)["error"]
            assert_usable(client)


@pytest.mark.parametrize("size", [0x200, 0x10000])
def test_a_larger_body_in_chunks_is_refused_and_its_sender_reads_that(client, size):
    client.send(head(Transfer_Encoding="chunked"), chunked(b"x" * 8 * MEGABYTE, size))
    assert client.answer()[0] == 413
    assert_usable(client)


def test_a_larger_body_is_refused_before_it_is_there(client):
    client.send(head(Content_Length=4 * MEGABYTE + 1))
    assert client.answer()[0] == 413


def test_small_chunks_without_credentials_leave_the_connection_usable(client):
    client.send(head(authorization=None, Transfer_Encoding="chunked"), chunked(b"x" * 8000, 1))
    assert client.answer()[0] == 401
    assert_usable(client)


def chunked(body: bytes, size: int, extension: bytes = b"") -> bytes:
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    chunks = [b"%x%s\r\n%s\r\n" % (len(part), extension, part) for part in parts]
    return b"".join(chunks) + b"0\r\n\r\n"


@pytest.mark.pitfall(6)
@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("extension", [b"", b";name=value", b" ; a"])
def test_chunks_are_decoded(client, webex, size, extension):
    marker = f"chunked {time.monotonic_ns()}"
    body = json.dumps({"message": marker}).encode()
    for coding in ("chunked", "Chunked"):
        client.send(head(Transfer_Encoding=coding), chunked(body, size, extension))
    assert [json.loads(client.answer()[2])["status"] for _ in range(2)] == ["accepted", "duplicate"]
    webex.wait_for(lambda: any(marker in text for text in webex.texts()))
    assert_usable(client)


BAD_FRAMING = {
    "two lengths": (head(Content_Length="5\r\nContent-Length: 5"), 400),
    "two different lengths": (head(Content_Length="5\r\ncontent-length: 50"), 400),
    "length and chunked": (
        head(Content_Length=12, Transfer_Encoding="chunked") + b"2\r\n{}\r\n0\r\n\r\n",
        400,
    ),
    "two credentials": (head(Authorization=basic(), Content_Length=5), 400),
    "two hosts": (head(Host="relay", Content_Length=5), 400),
    "length with a sign": (head(Content_Length="+5"), 400),
    "length with an underscore": (head(Content_Length="5_0"), 400),
    "negative length": (head(Content_Length="-1"), 400),
    "length list": (head(Content_Length="5, 5"), 400),
    "length in other digits": (head(Content_Length="٥"), 400),
    "empty length": (head(Content_Length=""), 400),
    "hex length": (head(Content_Length="0x5"), 400),
    "endless length": (head(Content_Length="9" * 5000), 400),
    "chunked in HTTP/1.0": (head("POST / HTTP/1.0", Transfer_Encoding="chunked"), 400),
    "gzip": (head(Transfer_Encoding="gzip"), 501),
    "gzip, chunked": (head(Transfer_Encoding="gzip, chunked"), 501),
    "chunked twice": (head(Transfer_Encoding="chunked, chunked"), 501),
    "identity": (head(Transfer_Encoding="identity"), 501),
    "empty coding": (head(Transfer_Encoding=""), 501),
    "no colon": (head(**{"no colon\r\nX": 1}), 400),
    "space before the colon": (head(**{"Content-Length ": 5}), 400),
    "HTTP/0.9": (b"GET /\r\n\r\n", 400),
    "a bare CR": (head(X="y\rContent-Length: 5"), 400),
    "a bare LF": (head(X="y\nContent-Length: 5"), 400),
    "a NUL": (head(X="y\0"), 400),
    "a folded field": (head(X="y\r\n Content-Length: 5"), 400),
    "a space in the target": (head("POST / HTTP/1.1 HTTP/1.1"), 400),
    "no target": (head("POST  HTTP/1.1"), 400),
    "a target without a slash": (head("OPTIONS * HTTP/1.1"), 400),
    "no version": (b"POST /\r\n\r\n", 400),
    "two words too many": (b"POST / x HTTP/1.1\r\n\r\n", 400),
    "another protocol": (b"SSH-2.0-OpenSSH_9.6\r\n", 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n", 400),
    "chunk without size": (head(Transfer_Encoding="chunked") + b"\r\n\r\n", 400),
    "chunk with a sign": (head(Transfer_Encoding="chunked") + b"+2\r\n{}\r\n0\r\n\r\n", 400),
    "chunk with 0x": (head(Transfer_Encoding="chunked") + b"0x2\r\n{}\r\n0\r\n\r\n", 400),
    "chunk too short": (head(Transfer_Encoding="chunked") + b"3\r\n{}\r\n0\r\n\r\n", 400),
    "chunk too long": (head(Transfer_Encoding="chunked") + b"1\r\n{}\r\n0\r\n\r\n", 400),
    "chunk of an exabyte": (head(Transfer_Encoding="chunked") + b"fffffffff\r\n", 400),
    "trailer": (head(Transfer_Encoding="chunked") + b"2\r\n{}\r\n0\r\nX: y\r\n\r\n", 400),
}


def test_an_answer_is_not_overtaken_by_a_reset(client):
    client.send(head(**{"no colon\r\nX": 1}), b"x" * 500_000)
    assert client.answer()[0] == 400
    client.socket.shutdown(socket.SHUT_WR)
    assert client.is_closed()  # a reset would raise


@pytest.mark.pitfall(6)
@pytest.mark.pitfall(7)
@pytest.mark.pitfall(8)
@pytest.mark.pitfall(9)
@pytest.mark.pitfall(19)
@pytest.mark.parametrize(("request_bytes", "status"), BAD_FRAMING.values(), ids=BAD_FRAMING.keys())
def test_doubtful_framing_is_refused_and_nothing_after_it_is_a_request(
    client, relay, request_bytes, status
):
    taken = relay.log().count(" taken: ")
    client.send(request_bytes, post())
    found, headers, body = client.answer()
    assert (found, headers["connection"]) == (status, "close")
    assert json.loads(body)["error"]
    assert client.is_closed()
    assert relay.log().count(" taken: ") == taken


@pytest.mark.pitfall(18)
def test_a_bug_in_the_program_closes_the_connection_and_is_logged(tmp_path, webex):
    fault = """
real = alarmrelay.parse_alarms
alarmrelay.parse_alarms = lambda body, ms: {}[0] if b"bug" in body else real(body, ms)
"""
    relay = Relay(tmp_path, webex.url, None, fault)
    relay.start()
    with Client(relay) as client:
        client.send(head(Content_Length=7), b'["bug"]')
        assert client.is_closed()
    assert relay.post({"message": "after"})[0] == 200
    assert "127.0.0.1: an error in alarmrelay itself\\nTraceback" in relay.log()
    assert relay.stop() == 0


def test_no_answer_and_no_log_line_echoes_what_was_sent(client, relay):
    client.send(head("POST /forged HTTP/1.1"))
    assert (
        client.answer()[2]
        == b'{"error": "no room has this path: post to /, or to /NAME of a room_id_NAME"}'
    )
    client.send(b"GET /<script>forged</script>\x1b[31m HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b"forged" not in client.answer()[2]
    with Client(relay) as other:
        other.send(b"<script>forged</script>\r\n\r\n")
        assert b"forged" not in other.answer()[2]
    assert "forged" not in relay.log()


@pytest.mark.pitfall(16)
def test_an_alarm_cannot_forge_a_line_of_the_log(relay):
    text = f"x\n<0>forged\r\x1b[31m\u2028forged' sender=1.2.3.4 {time.monotonic_ns()}"
    relay.post({"rule_name_display": text, "uuid": text})
    (line,) = [line for line in relay.log().splitlines() if "forged" in line]
    assert "\\n<0>forged" in line
    assert line.isprintable()


@pytest.mark.pitfall(20)
def test_a_client_that_leaves_is_one_line_and_nothing_is_taken(relay):
    taken = relay.log().count(" taken: ")
    gone = relay.log().count("is gone")
    for part in (b"", b"POST / HT", head(Content_Length=100), head(Content_Length=100) + ALARM):
        with Client(relay) as client:
            client.send(part)
    with Client(relay) as client:
        client.send(head(Transfer_Encoding="chunked"), b"5\r\n{")
    deadline = time.monotonic() + 20
    while relay.log().count("is gone") < gone + 4 and time.monotonic() < deadline:
        relay.post(alarm())
        taken += 1
    assert relay.log().count("is gone") == gone + 4
    assert relay.log().count(" taken: ") == taken


def test_ipv6(tmp_path, webex):
    with Relay(tmp_path, webex.url, listen="[::1]:0") as relay:
        connection = socket.create_connection(("::1", relay.port), timeout=20)
        with connection, connection.makefile("rb") as stream:
            connection.sendall(post())
            assert stream.readline().startswith(b"HTTP/1.1 200 ")
        assert "sender=::1" in relay.log()
