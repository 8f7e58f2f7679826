"""Mutated requests by the thousand, and what a second, independent reading of RFC 9112 says.

ALARMRELAY_FUZZ=SEED:COUNT sets another seed and another number of requests.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import re
import socket
import sqlite3
import string

import pytest
from harness import PASSWORD, USERNAME, Relay, basic
from webex_standin import Fault

from alarmrelay import Refused, parse_alarms

SEED, COUNT = map(int, os.environ.get("ALARMRELAY_FUZZ", "9112:5000").split(":"))
CREDENTIALS = f"{USERNAME}:{PASSWORD}".encode()
TOKEN = set(b"!#$%&'*+-.^_`|~" + (string.digits + string.ascii_letters).encode())
VISIBLE = set(range(0x21, 0x7F))
BAIT = f"POST / HTTP/1.1\r\nAuthorization: {basic()}\r\nContent-Length: 20\r\n\r\n"
SPICE = [
    *(b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b",", b";", b"\x0b", b"\x85", b"\xff", b"0"),
    *(b"\r\n\r\n", b"\n\n", b"+5", b"-1", b"0x5", b"5_0", b"1e3", "٥".encode(), b"4294967296"),
    *(b"Content-Length: 5\r\n", b"Content-Length : 5\r\n", b"content-length:7\r\n"),
    *(b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip, chunked\r\n"),
    *(b"Transfer-Encoding:\tchunked\r\n", b"Transfer-Encoding: x\r\n chunked\r\n", b"chunked"),
    *(b"Connection: close\r\n", b"Expect: 100-continue\r\n", b"Authorization: Basic eDp5\r\n"),
    *(b"HTTP/1.0", b"HTTP/2.0", b"//", b"/..", b"http://x", b"\x16\x03\x01", b"\n<0>forged "),
    *(b"2\r\n{}\r\n0\r\n\r\n", b"0\r\n\r\n", b"0\r\nX: y\r\n\r\n", BAIT.encode()),
]


def one_request(dice: random.Random, number: int) -> bytes:
    """Return a request as a client may send it."""
    marker = f"fuzz {number} {dice.randrange(10**6)}"
    content = {"message": marker, "bait": dice.choice(["", f"\r\n{BAIT}", f"0\r\n\r\n{BAIT}"])}
    # Control characters stand as they are, as the relay takes them.
    body = json.dumps(content).replace("\\r\\n", "\r\n").encode()
    method, path = dice.choice([("POST", "/")] * 20 + [("GET", "/healthz"), ("HEAD", "/")])
    authorization = dice.choice([basic()] * 20 + [basic(password="guess"), ""])
    lines = [f"{method} {path} HTTP/1.{dice.choice('1111110')}", "Host: relay"]
    lines += [f"Authorization: {authorization}"] if authorization else []
    lines += dice.sample(["X-Forged: \t<0>forged", "Connection: close", "Expect: 100-continue"], 1)
    if dice.random() < 0.4:
        size = dice.randrange(1, len(body) + 9)
        parts = [body[at : at + size] for at in range(0, len(body), size)]
        body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
        lines.append("Transfer-Encoding: chunked")
    else:
        lines.append(f"Content-Length: {len(body)}")
    dice.shuffle(fields := lines[1:])
    return "\r\n".join([lines[0], *fields, "", ""]).encode() + body


def mutate(dice: random.Random, data: bytes) -> bytes:
    """Return the bytes with something wrong, more often near their beginning."""
    for _ in range(dice.choice([0, 1, 1, 1, 2, 3])):
        start = int(len(data) * dice.random() ** 2)
        end = start + dice.choice([0, 0, 1, 1, 2, 8, 40])
        lines = data.split(b"\r\n")
        kind = dice.randrange(8)
        if kind == 0:  # overwrite with noise
            data = data[:start] + dice.randbytes(end - start) + data[end:]
        elif kind == 1:  # delete
            data = data[:start] + data[end:]
        elif kind == 2:  # say twice
            data = data[:end] + data[start:]
        elif kind == 3:  # leave early
            data = data[:start]
        elif kind == 4:  # say a line twice, or in another place
            lines.insert(dice.randrange(min(9, len(lines) + 1)), dice.choice(lines[:9]))
            data = b"\r\n".join(lines)
        elif kind == 5:  # another number
            numbers = list(re.finditer(rb"\d+", data[:400]))
            if numbers:
                found = dice.choice(numbers)
                value = b"%d" % max(0, int(found[0]) + dice.choice([-7, -1, 1, 2, 100]))
                data = data[: found.start()] + value + data[found.end() :]
        else:
            data = data[:start] + dice.choice(SPICE) + data[end:]
    return data


def reference(data: bytes) -> tuple[list[bool], list[bytes]]:
    """Return whether each answer is one to HEAD, and the bodies of what is to be accepted.

    Written apart from the relay, in other words: split and sets instead of expressions.
    """
    answers: list[bool] = []
    accepted: list[bytes] = []
    is_trusted = False
    while data:
        if data[0] == 0x16:  # TLS
            return [*answers, False], accepted
        if data[0] == 0x0D and data[:2] != b"\r\n":
            return answers, accepted
        data = data.removeprefix(b"\r\n")
        lines: list[bytes] = []
        while True:
            line, newline, data = data.partition(b"\n")
            if not newline:
                return answers, accepted  # left
            if line == b"\r" and lines:
                break
            lines.append(line)
            if not (is_request(line) if len(lines) == 1 else is_field(line)):
                is_head = len(lines) > 1 and lines[0].startswith(b"HEAD ")
                return [*answers, is_head], accepted
        method, target, version = lines[0][:-1].split(b" ")
        fields: dict[bytes, list[bytes]] = {}
        for line in lines[1:]:
            name, _, value = line[:-1].partition(b":")
            fields.setdefault(name.lower(), []).append(value.strip(b" \t"))
        lengths, codings = fields.get(b"content-length", []), fields.get(b"transfer-encoding", [])
        is_bad = len(lengths + codings) > 1 or len(lines) > 101
        is_bad |= any(len(fields.get(name, [])) > 1 for name in (b"authorization", b"host"))
        is_bad |= codings not in ([], [b"chunked"]) and [codings[0].lower()] != [b"chunked"]
        is_bad |= bool(codings) and version == b"HTTP/1.0"
        is_bad |= any(not 0 < len(n) < 19 or set(n) - set(b"0123456789") for n in lengths)
        is_head = method == b"HEAD"
        if is_bad:
            return [*answers, is_head], accepted
        is_trusted |= is_authorised(fields)
        path = b"/" + target.partition(b"://")[2].partition(b"/")[2] if target[0] != 47 else target
        path = path.partition(b"?")[0]
        is_early = path == b"/healthz" or not is_authorised(fields) or path != b"/"
        is_early |= method != b"POST" or not (lengths or codings)
        is_early |= bool(lengths) and int(lengths[0]) > 4 * 2**20
        is_waiting = fields.get(b"expect", [b""])[0].lower() == b"100-continue"
        if is_early and is_waiting and version != b"HTTP/1.0":
            return [*answers, is_head], accepted
        body, data, is_refused = read(data, int(lengths[0]) if lengths else 0, bool(codings))
        if is_early or is_refused or body is not None:
            answers.append(is_head)
        if body is None:
            return answers, accepted
        if not is_early:
            with contextlib.suppress(Refused):
                parse_alarms(body, 0)
                accepted.append(body)
        words = b",".join(fields.get(b"connection", [])).lower().split(b",")
        is_last = version == b"HTTP/1.0" or b"close" in [word.strip() for word in words]
        if is_last or (len(answers) > 1 and not is_trusted):
            return answers, accepted
    return answers, accepted


def is_request(line: bytes) -> bool:
    parts = line.removesuffix(b"\r").split(b" ")
    if len(parts) != 3 or not line.endswith(b"\r"):
        return False
    method, target, version = parts
    if target.startswith((b"http://", b"https://")):
        host, slash, path = target.partition(b"://")[2].partition(b"/")
        if set(host) & set(b"?#") or set(host) & set(b"\t\n\x0b\x0c\r"):
            return False
        target = slash + path
    is_version = len(version) == 8 and version[:7] == b"HTTP/1." and version[7:].isdigit()
    is_path = target.startswith(b"/") and not set(target) - VISIBLE
    return bool(method) and not set(method) - TOKEN and is_path and is_version


def is_field(line: bytes) -> bool:
    name, colon, value = line.removesuffix(b"\r").partition(b":")
    controls = set(range(0x20)) - {9} | {0x7F}
    is_name = bool(name and colon) and not set(name) - TOKEN
    return line.endswith(b"\r") and is_name and not set(value) & controls


def is_authorised(fields: dict[bytes, list[bytes]]) -> bool:
    scheme, _, token = fields.get(b"authorization", [b""])[0].partition(b" ")
    return scheme.lower() == b"basic" and token.strip(b" ") == base64.b64encode(CREDENTIALS)


def read(data: bytes, length: int, is_chunked: bool) -> tuple[bytes | None, bytes, bool]:
    """Return a body or None, what follows it, and whether it is wrong rather than cut off."""
    if not is_chunked:
        return (data[:length], data[length:], False) if len(data) >= length else (None, b"", False)
    body = b""
    while True:
        line, newline, data = data.partition(b"\n")
        size, _, extension = line.removesuffix(b"\r").partition(b";")
        digits = size.rstrip(b" \t")
        if set(extension) & (set(range(0x20)) - {9} | {0x7F}) or not line.endswith(b"\r"):
            return None, b"", True
        if not newline or not 0 < len(digits) < 9 or set(digits) - set(string.hexdigits.encode()):
            return None, b"", True
        if len(data) < (count := int(digits, 16)):
            return None, b"", False
        body, end, data = body + data[:count], data[count : count + 2], data[count + 2 :]
        if end != b"\r\n":
            return None, b"", True
        if count == 0:
            return body, data, False


def exchange(relay: Relay, number: int, data: bytes) -> bytes:
    """Send the bytes and half a goodbye, and return all that comes back."""
    host = f"127.1.{number % 200}.2"  # from many addresses, lest one runs out of ports
    with socket.create_connection(("127.0.0.1", relay.port), 20, (host, 0)) as client:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
        received = b""
        while block := client.recv(65536):  # raises if the answer is overtaken by a reset
            received += block
        return received


def split_answers(received: bytes, are_heads: list[bool]) -> list[int]:
    """Return the statuses of the answers; fail if they are anything but whole answers."""
    statuses: list[int] = []
    while received:
        head, separator, received = received.partition(b"\r\n\r\n")
        assert separator
        assert re.match(rb"HTTP/1\.1 [1-5]\d\d [A-Z][A-Za-z -]+(\r\n|$)", head), head
        if head.startswith(b"HTTP/1.1 100 "):
            continue
        length = int(re.search(rb"\r\nContent-Length: (\d+)", head)[1])
        is_head = are_heads[len(statuses)] if len(statuses) < len(are_heads) else False
        if not is_head:
            body, received = received[:length], received[length:]
            assert json.loads(body).keys() in ({"status"}, {"error"})
        statuses.append(int(head.split(b" ")[1]))
    return statuses


LINE = re.compile(
    r"\S+ \S+ (INFO alarmrelay |INFO alarm \d+ taken: room=/ rule='unknown alarm' uuid=|"
    r"INFO 127\.1\.\d+\.2 sent again |"
    r"WARNING 127\.1\.\d+\.2 (refused: \d\d\d |is gone unanswered: )|"
    r"ERROR room /, alarm 1: delivery held: 401 )[^<]*(<html>|$)"
)


def test_mutated_requests_are_read_as_the_rfc_says_and_nothing_gets_through(tmp_path, webex):
    dice = random.Random(SEED)
    webex.fault_for = lambda _: Fault(status=401)
    relay = Relay(tmp_path, webex.url)
    expected = []
    with relay:
        good = relay.connect()
        for number in range(COUNT):
            pipeline = [one_request(dice, number) for _ in range(dice.choice([1, 1, 1, 2, 3]))]
            data = mutate(dice, b"".join(pipeline))
            are_heads, accepted = reference(data)
            statuses = split_answers(exchange(relay, number, data), are_heads)
            told = f"request {number} of seed {SEED}: {data!r} got {statuses}"
            assert len(statuses) == len(are_heads), told
            assert statuses.count(200) >= len(accepted), told
            expected += [json.dumps(alarm) for body in accepted for _, alarm in [*parse(body)]]
            body = {"message": f"good {number}"}
            assert relay.post(body, connection=good) == (200, {"status": "accepted"}), told
            expected.append(json.dumps(body))
        good.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "state" / "alarmrelay.db")) as db:
        stored = [row[0] for row in db.execute("SELECT body FROM alarm ORDER BY id")]
    # The same bytes twice are stored once.
    assert stored == list(dict.fromkeys(expected))
    for line in relay.log().splitlines():
        assert LINE.match(line), line
        assert line.isprintable()


def parse(body: bytes):
    return [(json.dumps(alarm.fields), alarm.fields) for alarm in parse_alarms(body, 0)]


@pytest.mark.parametrize(
    ("data", "answers", "bodies"),
    [
        (b"", 0, 0),
        (b"\r\n", 0, 0),
        (b"\r\n\r\n", 1, 0),
        (b"\rGET", 0, 0),
        (BAIT.encode() + b'{"message": "12345"}', 1, 1),
        (BAIT.encode() + b'{"message": "1234"}', 0, 0),
        (BAIT.encode() * 2 + b'{"message": "12345"}', 2, 0),
        ((BAIT.encode() + b'{"message": "12345"}') * 2, 2, 2),
        (b"POST / HTTP/1.1\r\n\r\nPOST / HTTP/1.1\r\n\r\n", 2, 0),
        (b"POST / HTTP/1.1\r\nA\r\n\r\nPOST / HTTP/1.1\r\n\r\n", 1, 0),
        (b"\x16\x03\x01", 1, 0),
    ],
)
def test_the_reference_itself(data, answers, bodies):
    assert tuple(map(len, reference(data))) == (answers, bodies)
