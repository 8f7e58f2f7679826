"""A request and its answer: routes, credentials, framing and bounds, over a real socket."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import socket
import struct

import faults
import pytest
from harness import (
    PASSWORD,
    README,
    USERNAME,
    Client,
    Relay,
    alarm,
    basic,
    chunked,
    get,
    head,
    marker,
    posted,
    status_of,
    wait_until,
)

MEGABYTE = 2**20
# Addresses that only one test comes from, by which it finds its lines in the log.
GUESSER, DOUBTFUL, LEAVING = "127.0.0.3", "127.0.0.4", "127.0.0.5"


def assert_usable(client: Client) -> None:
    assert client.ask(posted()).json == {"status": "accepted"}


@pytest.mark.pitfall(18)
def test_an_alarm_is_accepted_and_the_answer_names_no_version(client):
    answer = client.ask(posted())
    assert (answer.status, answer.body) == (200, b'{"status": "accepted"}')
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["connection"] == "keep-alive"
    assert "server" not in answer.headers
    assert "python" not in str(answer.headers).lower()


def test_an_array_is_accepted_as_so_many_alarms(lasting_relay, lasting_webex):
    texts = [marker() for _ in range(3)]
    answer = lasting_relay.post([{"message": text} for text in texts])
    assert answer == (200, {"status": "accepted"})
    lasting_webex.wait_for_texts(*texts)


def test_an_array_is_no_way_around_the_limits(client):
    answer = client.ask(posted(b"[" + b"{}," * 1000 + b"{}]"))
    assert answer.status == 400
    assert "up to 1000" in answer.json["error"]
    assert_usable(client)


def test_the_same_bytes_again_are_a_duplicate_and_stand_in_the_room_once(
    lasting_relay, lasting_webex
):
    text, last = marker(), marker()
    body = json.dumps({"message": text}).encode()
    assert lasting_relay.post(body) == (200, {"status": "accepted"})
    assert lasting_relay.post(body) == (200, {"status": "duplicate"})
    assert lasting_relay.post(body + b" ") == (200, {"status": "accepted"})
    assert lasting_relay.post(body) == (200, {"status": "duplicate"})
    lasting_relay.post({"message": last})
    lasting_webex.wait_for_texts(last)
    assert "".join(lasting_webex.alarms()).count(text) == 2


@pytest.mark.parametrize("body", [b"", b"null", b"[{}, 1]", b"a=b", b"\xff\xfe\x00"])
def test_what_is_no_alarm_gets_a_400_that_says_so(client, body):
    answer = client.ask(posted(body))
    assert answer.status == 400
    assert answer.json["error"]
    assert_usable(client)


@pytest.mark.parametrize("content_type", ["multipart/form-data", "multipart/mixed; boundary=x"])
def test_the_content_type_is_not_looked_at(client, content_type):
    assert client.ask(posted(Content_Type=content_type)).status == 200


def test_pipelined_requests_are_answered_in_order(client):
    client.send(posted(), head("GET /healthz HTTP/1.1"), posted(b"{"), posted())
    assert [client.answer().status for _ in range(4)] == [200, 200, 400, 200]


@pytest.mark.parametrize(
    "fields",
    [
        {"Connection": "close"},
        {"Connection": "Close"},
        {"Connection": "keep-alive, close"},
        {"Connection": "keep-alive\r\nConnection: close"},
        {"start": "POST / HTTP/1.0"},
        {"start": "POST / HTTP/1.0", "Expect": "100-continue"},  # it is not asked for its body
    ],
)
def test_a_client_that_wants_the_connection_closed_gets_that(client, fields):
    answer = client.ask(posted(**fields))
    assert (answer.status, answer.headers["connection"]) == (200, "close")
    assert client.is_closed()


def test_an_empty_line_before_a_request_is_passed_over(client):
    assert_usable(client)
    client.send(b"\r\n")
    assert_usable(client)


@pytest.mark.parametrize("empty_line", [b"", b"\r\n"])
def test_a_first_line_of_over_64_kib_is_refused_also_after_an_empty_line(client, empty_line):
    answer = client.ask(empty_line, b"POST /", b"x" * 66_000, b" HTTP/1.1\r\n\r\n")
    assert (answer.status, answer.headers["connection"]) == (414, "close")
    assert answer.json["error"]
    assert client.is_closed()


@pytest.mark.parametrize("first", [b"", posted()], ids=["at once", "after a request"])
def test_an_empty_line_and_then_silence_gets_no_answer_and_no_line(tmp_path, webex, first):
    limits = {"HEADER_S": 0.4, "IDLE_S": 0.4, "TICK_S": 0.05}
    with Relay(tmp_path, webex.url, limits) as relay, Client(relay) as client:
        if first:
            assert client.ask(first).status == 200
        client.send(b"\r\n")
        assert client.is_closed()
        assert "WARNING" not in relay.log()


def test_white_space_at_the_end_of_a_field_is_no_part_of_it(client):
    body = alarm()
    assert client.ask(posted(body, Content_Length=f"{len(body)} \t")).status == 200
    fields = head(Transfer_Encoding="chunked \t")
    assert client.ask(fields, chunked(alarm(), 9)).status == 200


@pytest.mark.pitfall(12)
@pytest.mark.parametrize(
    ("authorization", "length", "status"),
    [(None, 100, 401), ("Basic eDp5", 100, 401), ("", 5 * MEGABYTE, 413)],
)
def test_a_body_that_will_be_refused_is_not_asked_for(client, authorization, length, status):
    fields = {"Content_Length": length, "Expect": "100-continue"}
    answer = client.ask(head(authorization=authorization, **fields))
    # Whether such a client now sends its body nobody can know.
    assert (answer.status, answer.headers["connection"]) == (status, "close")
    assert client.is_closed()


@pytest.mark.pitfall(12)
def test_a_body_is_asked_for_once_all_else_is_right(client):
    for _ in range(2):
        body = alarm()
        client.send(head(Content_Length=len(body), Expect="100-Continue"))
        assert client.stream.readline() == b"HTTP/1.1 100 Continue\r\n"
        assert client.stream.readline() == b"\r\n"
        assert client.ask(body).status == 200


def test_ipv6(tmp_path, lasting_webex):
    with Relay(tmp_path, lasting_webex.url, listen="[::1]:0") as relay:
        with socket.create_connection(("::1", relay.port), timeout=20) as client:
            client.sendall(posted())
            assert client.recv(13, socket.MSG_WAITALL) == b"HTTP/1.1 200 "
        relay.wait_for_log("sender=::1")


def encoded(text: str) -> bytes:
    return base64.b64encode(text.encode())


RIGHT = encoded(f"{USERNAME}:{PASSWORD}")
WRONG = {
    "wrong password": basic(password="guess").encode(),
    "wrong user": basic(username="admin").encode(),
    "another scheme": b"Bearer " + RIGHT,
    "no scheme": RIGHT,
    "no token": b"Basic",
    "no base64": b"Basic !!!!",
    "no padding": b"Basic YQ",
    "no UTF-8 inside": b"Basic " + base64.b64encode(b"\xff\xfe:\xff"),
    "no UTF-8": b"Basic \xff\xfe",
    "not ASCII": "Basic ñ".encode(),
    "no colon": b"Basic " + encoded(USERNAME),
    "a colon too many": basic("vmanage:").encode(),
    "a shorter password": basic(password=PASSWORD[:-1]).encode(),
    "a longer password": basic(password=f"{PASSWORD}x").encode(),
    "too much padding": b"Basic " + RIGHT + b"==",
    "padding in between": b"Basic =" + RIGHT,
    "a space of another kind": b"Basic " + RIGHT + b"\xa0",
    "100 KB": b"Basic " + b"QUFB" * 25_000,
    "100 KB of no base64": b"Basic " + b"=" * 100_000,
}


def banned(relay: Relay) -> list[str]:
    """Return the address in each line of the log that the README's filter for fail2ban finds."""
    expression = re.search(r"^ *failregex = (.+)$", README, re.MULTILINE)[1]
    found = re.compile(expression.replace("<HOST>", r"(?P<host>\S+)"))
    lines = [line.split(" ", 2)[2] for line in relay.log().splitlines()]  # without the time
    return [match["host"] for match in map(found.search, lines) if match]


@pytest.mark.pitfall(13)
@pytest.mark.parametrize("path", [b"/", b"/nowhere"])
@pytest.mark.parametrize("value", WRONG.values(), ids=WRONG.keys())
def test_wrong_credentials_are_refused_before_the_body_and_found_by_fail2ban(
    lasting_relay, path, value
):
    before = banned(lasting_relay)
    with Client(lasting_relay, GUESSER) as client:
        client.send(b"POST ", path, b" HTTP/1.1\r\nHost: relay\r\nAuthorization: ", value)
        answer = client.ask(b"\r\nContent-Length: 9\r\n\r\n")
        assert answer.status == 401
        assert answer.headers["www-authenticate"] == 'Basic realm="alarmrelay", charset="UTF-8"'
        assert answer.json["error"]
        client.send(b"x" * 9)
        assert_usable(client)
    assert banned(lasting_relay) == [*before, GUESSER]


def test_a_client_that_shows_credentials_only_when_asked_is_no_guesser(lasting_relay, client):
    before = banned(lasting_relay)
    answer = client.ask(head(authorization=None, Content_Length=9))
    assert answer.status == 401
    assert answer.headers["www-authenticate"].startswith("Basic ")
    client.send(b"x" * 9)
    assert_usable(client)
    assert banned(lasting_relay) == before


def test_an_alarm_cannot_write_the_line_that_fail2ban_looks_for(lasting_relay):
    text = "WARNING 192.0.2.1 refused: 401 wrong credentials"
    lasting_relay.post({"rule_name_display": text, "uuid": f"\n{text}", "message": text})
    lasting_relay.wait_for_log("192.0.2.1")
    assert "192.0.2.1" not in banned(lasting_relay)


def test_the_scheme_is_compared_without_case(client):
    assert client.ask(posted(authorization=f"BASIC  {RIGHT.decode()}")).status == 200


def test_health_alone_is_shown_without_credentials(lasting_relay):
    for wrong in ({"X": "none"}, {"Authorization": basic(password="wrong")}):
        for path in ("/metrics", "/"):
            status, headers, text = get(lasting_relay, path, **wrong)
            assert (status, headers["WWW-Authenticate"].split()[0]) == (401, "Basic")
            assert json.loads(text)["error"].endswith("credentials")
        status, _, text = get(lasting_relay, "/healthz", **wrong)
        assert (status, text) == (200, '{"status": "ok"}')


@pytest.mark.parametrize("target", ["http://relay:5001/", "/?source=vmanage"])
def test_an_absolute_target_is_taken_and_a_query_passed_over(client, target):
    assert client.ask(posted(start=f"POST {target} HTTP/1.1")).status == 200


@pytest.mark.pitfall(19)
@pytest.mark.parametrize(
    ("start", "status"),
    [
        ("POST /nowhere HTTP/1.1", 404),
        ("GET /favicon.ico HTTP/1.1", 404),
        ("POST /../etc/passwd HTTP/1.1", 404),
        ("POST // HTTP/1.1", 404),
        ("POST http://relay:5001/nowhere HTTP/1.1", 404),
        ("POST / HTTP/1.1", 411),
    ],
)
def test_an_unknown_path_and_a_missing_length_are_told(client, start, status):
    answer = client.ask(head(start))
    assert answer.status == status
    assert answer.json["error"]
    assert_usable(client)


@pytest.mark.pitfall(19)
@pytest.mark.parametrize(
    ("path", "allowed"),
    [("/", "GET, POST"), ("/ops", "POST"), ("/metrics", "GET"), ("/healthz", "GET")],
)
def test_another_method_is_told_which_is_allowed(client, path, allowed):
    for method in ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "BREW"):
        if method not in allowed.split(", "):
            client.send(head(f"{method} {path} HTTP/1.1"))
            answer = client.answer(has_body=method != "HEAD")
            assert (answer.status, answer.headers["allow"]) == (405, allowed)
    assert_usable(client)


@pytest.mark.parametrize(("path", "status"), [("/healthz", 200), ("/", 200), ("/nowhere", 404)])
def test_the_body_of_a_get_is_not_taken_for_the_next_request(client, path, status):
    inner = head("GET /healthz HTTP/1.1")
    answer = client.ask(head(f"GET {path} HTTP/1.1", Content_Length=len(inner)), inner)
    assert answer.status == status
    assert_usable(client)


@pytest.mark.pitfall(6)
@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("extension", [b"", b";name=value", b" ; a"])
def test_chunks_are_decoded(client, lasting_webex, size, extension):
    text = marker()
    body = json.dumps({"message": text}).encode()
    first = client.ask(head(Transfer_Encoding="chunked"), chunked(body, size, extension))
    assert first.json == {"status": "accepted"}
    again = client.ask(head(Transfer_Encoding="Chunked"), chunked(body, size, extension))
    assert again.json == {"status": "duplicate"}
    assert client.ask(posted(body)).json == {"status": "duplicate"}
    lasting_webex.wait_for_texts(text)


def assert_refused(relay: Relay, status: int, *parts: bytes) -> None:
    """Fail unless this is refused, and the request behind it is not read as one."""
    with Client(relay, DOUBTFUL) as client:
        answer = client.ask(*parts, posted())
        assert (answer.status, answer.headers["connection"]) == (status, "close")
        assert answer.json["error"]
        assert client.is_closed()
    assert f"sender={DOUBTFUL}" not in relay.log()


LENGTHS = ["", "+5", "-1", "5_0", "0x5", "\u0665", "9" * 5000]
LENGTHS += ["5, 5", "5\r\nContent-Length: 5", "5\r\ncontent-length: 50"]
BAD_FIELDS = {
    **{f"length {value[:30]!r}": (400, {"Content_Length": value}) for value in LENGTHS},
    "length and chunked": (400, {"Content_Length": 12, "Transfer_Encoding": "chunked"}),
    "chunked in HTTP/1.0": (400, {"start": "POST / HTTP/1.0", "Transfer_Encoding": "chunked"}),
    "gzip": (501, {"Transfer_Encoding": "gzip"}),
    "gzip, chunked": (501, {"Transfer_Encoding": "gzip, chunked"}),
    "chunked twice": (501, {"Transfer_Encoding": "chunked, chunked"}),
    "identity": (501, {"Transfer_Encoding": "identity"}),
    "empty coding": (501, {"Transfer_Encoding": ""}),
    "two credentials": (400, {"Authorization": basic()}),
    "two hosts": (400, {"Host": "relay"}),
    "no colon": (400, {"no colon\r\nX": 1}),
    "a space before the colon": (400, {"Content-Length ": 5}),
    "a bare CR": (400, {"X": "y\rContent-Length: 5"}),
    "a NUL": (400, {"X": "y\0"}),
    "a fold": (400, {"X": "y\r\n Content-Length: 5"}),
}


@pytest.mark.pitfall(6)
@pytest.mark.pitfall(7)
@pytest.mark.pitfall(8)
@pytest.mark.pitfall(9)
@pytest.mark.parametrize(("status", "fields"), BAD_FIELDS.values(), ids=BAD_FIELDS.keys())
def test_fields_that_could_be_read_in_two_ways_are_refused(lasting_relay, status, fields):
    assert_refused(lasting_relay, status, head(**fields), chunked(b"{}", 2))


BAD_CHUNKS = {
    "no size": b"\r\n\r\n",
    "a sign": b"+2\r\n{}\r\n0\r\n\r\n",
    "0x": b"0x2\r\n{}\r\n0\r\n\r\n",
    "too short": b"3\r\n{}\r\n0\r\n\r\n",
    "too long": b"1\r\n{}\r\n0\r\n\r\n",
    "an exabyte": b"fffffffff\r\n",
    "a trailer": b"2\r\n{}\r\n0\r\nX: y\r\n\r\n",
}


@pytest.mark.pitfall(6)
@pytest.mark.parametrize("chunks", BAD_CHUNKS.values(), ids=BAD_CHUNKS.keys())
def test_a_chunk_that_is_not_as_it_should_be_is_refused(lasting_relay, chunks):
    assert_refused(lasting_relay, 400, head(Transfer_Encoding="chunked"), chunks)


BAD_STARTS = {
    "HTTP/0.9": b"GET /\r\n\r\n",
    "no version": b"POST /\r\n\r\n",
    "no target": head("POST  HTTP/1.1"),
    "a space in the target": head("POST / HTTP/1.1 HTTP/1.1"),
    "a target without a slash": head("OPTIONS * HTTP/1.1"),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "another protocol": b"SSH-2.0-OpenSSH_9.6\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n",
}


@pytest.mark.pitfall(19)
@pytest.mark.parametrize("start", BAD_STARTS.values(), ids=BAD_STARTS.keys())
def test_what_is_no_request_line_of_http_1_is_refused(lasting_relay, start):
    assert_refused(lasting_relay, 400, start)


def test_a_bare_line_feed_hides_no_request(lasting_relay):
    """It may be refused or end a line (RFC 9112, 2.2), but is no part of a value."""
    with Client(lasting_relay, DOUBTFUL) as client:
        answer = client.ask(head(X="y\nContent-Length: 5"), posted())
        while answer.headers["connection"] != "close":
            assert answer.status == 400
            answer = client.answer()
        assert answer.status == 400
        assert client.is_closed()
    assert f"sender={DOUBTFUL}" not in lasting_relay.log()


def test_an_answer_is_not_overtaken_by_a_reset(client):
    assert client.ask(head(**{"no colon\r\nX": 1}), b"x" * 500_000).status == 400
    client.socket.shutdown(socket.SHUT_WR)
    assert client.is_closed()


@pytest.mark.parametrize("size", [4 * MEGABYTE - 40, 4 * MEGABYTE])
def test_a_body_of_four_megabytes_is_taken(client, size):
    assert client.ask(posted(alarm().ljust(size))).status == 200


@pytest.mark.pitfall(21)
@pytest.mark.parametrize(("authorization", "status"), [("", 413), (None, 401)])
@pytest.mark.parametrize("size", [4 * MEGABYTE + 1, 8 * MEGABYTE])
def test_who_sends_a_larger_body_to_its_end_reads_that_it_is_refused(
    lasting_relay, size, authorization, status
):
    for _ in range(5):
        with Client(lasting_relay) as client:
            answer = client.ask(posted(b"x" * size, authorization=authorization))
            assert answer.status == status
            assert_usable(client)


def test_a_larger_body_is_refused_before_it_is_there(client):
    answer = client.ask(head(Content_Length=4 * MEGABYTE + 1))
    assert answer.status == 413
    assert str(4 * MEGABYTE) in answer.json["error"]


@pytest.mark.parametrize(
    ("authorization", "status", "length", "size"),
    [("", 413, 8 * MEGABYTE, 0x200), ("", 413, 8 * MEGABYTE, 0x10000), (None, 401, 8000, 1)],
)
def test_a_refused_body_in_chunks_leaves_the_connection_usable(
    client, authorization, status, length, size
):
    fields = head(authorization=authorization, Transfer_Encoding="chunked")
    assert client.ask(fields, chunked(b"x" * length, size)).status == status
    assert_usable(client)


def test_only_a_bounded_part_of_a_body_without_credentials_is_taken_apart(client):
    fields = head(authorization=None, Transfer_Encoding="chunked")
    assert client.ask(fields, chunked(b"x" * 100_000, 1), posted()).status == 401
    assert client.is_closed()


@pytest.mark.pitfall(10)
def test_a_header_has_a_bound_as_a_whole(relay):
    before_kib = status_of(relay, "VmRSS")
    large = "".join(f"X-{number}: {'x' * 65_000}\r\n" for number in range(100))
    for fields in (large.encode(), b"x:\r\n" * 101):
        with Client(relay) as client:
            with contextlib.suppress(OSError):  # the relay stops reading
                client.send(b"POST / HTTP/1.1\r\n", fields)
            answer = client.answer()
            assert (answer.status, answer.headers["connection"]) == (431, "close")
            assert answer.json["error"]
    assert status_of(relay, "VmRSS") < before_kib + 3000
    assert relay.post(alarm())[0] == 200


@pytest.mark.pitfall(18)
def test_a_bug_in_the_program_closes_the_connection_and_is_one_line(tmp_path, lasting_webex):
    relay = Relay(tmp_path, lasting_webex.url, None, faults.BUG)
    relay.start()
    with Client(relay) as client:
        client.send(posted(b'["bug"]'))
        assert client.is_closed()
    line = relay.wait_for_log("Traceback")
    assert "127.0.0.1" in line
    assert "KeyError" in line
    assert relay.post(alarm())[0] == 200
    assert relay.stop() == 0


def test_no_answer_and_no_log_line_echoes_what_was_sent(lasting_relay, client):
    for start in ("POST /forged HTTP/1.1", "GET /<script>forged</script>\x1b[31m HTTP/1.1"):
        assert b"forged" not in client.ask(head(start)).body
    with Client(lasting_relay) as other:
        assert b"forged" not in other.ask(b"<script>forged</script>\r\n\r\n").body
    assert "forged" not in lasting_relay.log()


@pytest.mark.pitfall(16)
def test_an_alarm_cannot_forge_a_line_of_the_log(lasting_relay):
    text = f"x\n<0>forged\r\x1b[31m\u2028forged' sender=1.2.3.4 {marker()}"
    lasting_relay.post({"rule_name_display": text, "uuid": text})
    lasting_relay.wait_for_log("forged")
    (line,) = [line for line in lasting_relay.log().splitlines() if "forged" in line]
    assert "\\n<0>forged" in line
    assert line.isprintable()


@pytest.mark.pitfall(20)
def test_a_client_that_leaves_is_one_line_and_nothing_is_taken(lasting_relay):
    parts = [
        b"POST / HT",
        head(Content_Length=100),
        head(Content_Length=100) + alarm(),
        head(Transfer_Encoding="chunked") + b"5\r\n{",
    ]
    for part in [b"", *parts]:
        with Client(lasting_relay, LEAVING) as client:
            client.send(part)
    lasting_relay.wait_for_log(f" WARNING {LEAVING} ", len(parts))
    assert lasting_relay.log().count(f" WARNING {LEAVING} ") == len(parts)
    assert f"sender={LEAVING}" not in lasting_relay.log()


@pytest.mark.pitfall(20)
def test_a_client_that_resets_the_connection_leaves_lines_and_no_traceback(relay):
    large = posted(b"x" * MEGABYTE, authorization=None)
    for part in [b"", b"POST /", head(Content_Length=50), posted(), large] * 5:
        with Client(relay) as client:
            client.send(part)
            linger = struct.pack("ii", 1, 0)  # close with a reset
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    assert relay.post(alarm())[0] == 200
    for line in relay.log().splitlines():
        assert re.match(r"\S+ \S+ (INFO|WARNING) (alarmrelay|alarm|127\.0\.0\.1) ", line), line


@pytest.mark.parametrize(
    ("status", "request_of_it"),
    [
        (200, head("GET /healthz HTTP/1.1")),
        (200, head("GET /healthz HTTP/1.1", Connection="close")),
        (401, head(authorization=None, Content_Length=1000)),
        (413, head(Content_Length=5 * MEGABYTE)),
    ],
    ids=["kept", "closed", "stranger", "too large"],
)
def test_a_client_that_resets_the_connection_after_its_answer_is_not_said_to_be_unanswered(
    relay, status, request_of_it
):
    before = status_of(relay, "Threads")
    with Client(relay) as client:
        assert client.ask(request_of_it).status == status
        linger = struct.pack("ii", 1, 0)  # close with a reset
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    wait_until(lambda: status_of(relay, "Threads") == before)
    assert "gone unanswered" not in relay.log()
