"""Mutated requests by the thousand, judged by a second, independent reading of RFC 9112.

Where the RFC leaves a choice, each is allowed: what is in doubt may be refused, or read as the RFC
says. That an inner request is answered, or a body taken differently, is always found.

ALARMRELAY_FUZZ=SEED:COUNT sets another seed and another number of requests.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import socket
import string
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from harness import Client, Relay, basic, chunked, head, posted, read_answer
from webex_standin import Fault

SEED, COUNT = map(int, os.environ.get("ALARMRELAY_FUZZ", "9112:5000").split(":"))
BAIT = head(Content_Length=20)

ENDS = [b"\r\n", b"\n", b"\r", b"\r\n\r\n", b"\n\n", b"2\r\n{}\r\n0\r\n\r\n", b"0\r\n\r\n", BAIT]
CHARACTERS = [b"\0", b" ", b"\t", b":", b",", b";", b"\x0b", b"\x85", b"\xff", b"0", b"//", b"/.."]
NUMBERS = [b"+5", b"-1", b"0x5", b"5_0", b"1e3", "\u0665".encode(), b"4294967296"]
LENGTHS = [b"Content-Length: 5\r\n", b"Content-Length : 5\r\n", b"content-length:7\r\n"]
CODINGS = [b"chunked", b"gzip, chunked", b"\tchunked", b"x\r\n chunked"]
FIELDS = [b"Connection: close\r\n", b"Expect: 100-continue\r\n", b"Authorization: Basic eDp5\r\n"]
OTHERS = [b"HTTP/1.0", b"HTTP/2.0", b"http://x", b"\x16\x03\x01", b"\n<0>forged ", b"X: y\r\n"]
SPICE = ENDS + CHARACTERS + NUMBERS + LENGTHS + FIELDS + OTHERS
SPICE += [b"Transfer-Encoding: %b\r\n" % coding for coding in CODINGS]
SPICE += [b"0\r\nX: y\r\n\r\n", b"chunked"]


def one_request(dice: random.Random, number: int) -> bytes:
    """Return a request as a client may send it."""
    bait = BAIT.decode()
    content = {
        "message": f"fuzz {number} {dice.randrange(10**6)}",
        "bait": dice.choice(["", f"\r\n{bait}", f"0\r\n\r\n{bait}"]),
    }
    # Control characters stand as they are, as the relay takes them.
    body = json.dumps(content).replace("\\r\\n", "\r\n").encode()
    method, path = dice.choice([("POST", "/")] * 20 + [("GET", "/healthz"), ("HEAD", "/")])
    authorization = dice.choice([basic()] * 20 + [basic(password="guess"), ""])
    fields = ["Host: relay"]
    if authorization:
        fields.append(f"Authorization: {authorization}")
    odd = ["X-Forged: \t<0>forged", "Connection: close", "Expect: 100-continue"]
    fields.append(dice.choice(odd))
    if dice.random() < 0.4:
        body = chunked(body, dice.randrange(1, len(body) + 9))
        fields.append("Transfer-Encoding: chunked")
    else:
        fields.append(f"Content-Length: {len(body)}")
    dice.shuffle(fields)
    start = f"{method} {path} HTTP/1.{dice.choice('1111110')}"
    return "\r\n".join([start, *fields, "", ""]).encode() + body


def mutate(dice: random.Random, data: bytes) -> bytes:
    """Return the bytes with something wrong, more often near their beginning."""
    for _ in range(dice.choice([0, 1, 1, 1, 2, 3])):
        start = int(len(data) * dice.random() ** 2)
        end = start + dice.choice([0, 0, 1, 1, 2, 8, 40])
        kind = dice.choice(["noise", "less", "twice", "left", "line", "number", "spice", "spice"])
        if kind == "noise":
            data = data[:start] + dice.randbytes(end - start) + data[end:]
        elif kind == "less":
            data = data[:start] + data[end:]
        elif kind == "twice":
            data = data[:end] + data[start:]
        elif kind == "left":
            data = data[:start]
        elif kind == "line":  # twice, or in another place
            lines = data.split(b"\r\n")
            lines.insert(dice.randrange(min(9, len(lines) + 1)), dice.choice(lines[:9]))
            data = b"\r\n".join(lines)
        elif kind == "number":
            found = re.search(rb"\d+", data[start:])
            if found:
                value = max(0, int(found[0]) + dice.choice([-7, -1, 1, 2, 100]))
                data = data[:start] + data[start:].replace(found[0], b"%d" % value, 1)
        else:
            data = data[:start] + dice.choice(SPICE) + data[start:]
    return data


TOKEN = set(b"!#$%&'*+-.^_`|~" + (string.digits + string.ascii_letters).encode())
DIGITS, HEX_DIGITS = set(string.digits.encode()), set(string.hexdigits.encode())
CONTROLS = set(range(0x20)) - {0x09} | {0x7F}
VERSION = re.compile(rb"HTTP/1\.[0-9]")


class UnreadableError(Exception):
    """Must be refused, or is cut off."""


@dataclass
class Request:
    is_head: bool = False
    may_succeed: bool = False  # a GET
    is_wanted: bool = False  # an alarm with credentials
    is_doubtful: bool = False  # may be refused
    is_last: bool = False
    body: bytes | None = None  # of one that is whole


class Reader:
    """Reads requests; leniently wherever the RFC allows that, which it notes as a doubt."""

    def __init__(self, data: bytes) -> None:
        self.rest = data
        self.is_doubtful = False

    def requests(self) -> list[Request]:
        found: list[Request] = []
        while self.rest and not (found and found[-1].is_last):
            self.is_doubtful = False
            found.append(Request(is_head=self.rest.lstrip(b"\r\n").startswith(b"HEAD ")))
            try:
                self.read(found[-1])
            except UnreadableError:
                found[-1].is_last = True
            found[-1].is_doubtful = self.is_doubtful
        return found

    def line(self) -> bytes:
        """Return a line of a header, in which a bare CR and a NUL are spaces; RFC 9112, 2.2."""
        line, newline, self.rest = self.rest.partition(b"\n")
        if not newline:
            raise UnreadableError
        self.doubt(not line.endswith(b"\r"))
        line = line.removesuffix(b"\r")
        self.doubt(bool(set(line) & CONTROLS))
        return line.replace(b"\r", b" ").replace(b"\0", b" ")

    def doubt(self, is_so: bool) -> None:
        self.is_doubtful = self.is_doubtful or is_so

    def read(self, request: Request) -> None:
        method, target, version = self.start()
        fields = self.fields()
        hosts = fields.get(b"host", [])
        if len(hosts) > 1:  # 3.2
            raise UnreadableError
        self.doubt(not hosts)
        self.doubt(fields.get(b"expect", [b""])[-1].lower() not in (b"", b"100-continue"))
        words = b",".join(fields.get(b"connection", [])).lower().split(b",")
        request.is_last = version == b"HTTP/1.0" or b"close" in [word.strip() for word in words]
        request.may_succeed = method == b"GET"
        is_alarm = method == b"POST" and self.path(target) == b"/" and self.is_authorised(fields)
        if b"transfer-encoding" in fields:  # 6.1
            if b",".join(fields[b"transfer-encoding"]).lower() != b"chunked":
                raise UnreadableError
            if b"content-length" in fields or version == b"HTTP/1.0":
                self.doubt(True)
                request.is_last = True
            request.is_wanted = is_alarm
            request.body = self.chunks()
        else:
            length = self.length(fields.get(b"content-length", [b"0"]))
            request.is_wanted = is_alarm and b"content-length" in fields and length <= 4 * 2**20
            request.body = self.take(length)

    def start(self) -> list[bytes]:
        """Return method, target and version."""
        is_after_one = self.rest.startswith(b"\r\n")
        while (line := self.line()) == b"":  # 2.2
            self.doubt(not is_after_one)
            is_after_one = False
        words = line.split()  # at any white space; 3
        self.doubt(line != b" ".join(words))
        if len(words) != 3 or set(words[0]) - TOKEN or not VERSION.fullmatch(words[2]):
            raise UnreadableError
        return words

    def fields(self) -> dict[bytes, list[bytes]]:
        fields: dict[bytes, list[bytes]] = {}
        values = [b""]  # of nothing: what is folded before the first field is passed over
        count = 0
        while line := self.line():
            count += 1
            if line.startswith((b" ", b"\t")):  # 5.2
                self.doubt(True)
                values[-1] = (values[-1] + b" " + line.strip(b" \t")).strip(b" \t")
                continue
            name, colon, value = line.partition(b":")
            if not colon or not name or set(name) - TOKEN:
                raise UnreadableError
            values = fields.setdefault(name.lower(), [])
            values.append(value.strip(b" \t"))
        self.doubt(count > 98)
        return fields

    def length(self, fields: list[bytes]) -> int:
        values = [value.strip(b" \t") for value in b",".join(fields).split(b",")]
        self.doubt(len(values) > 1)  # 6.3
        if len(set(values)) > 1 or not 0 < len(values[0]) < 19 or set(values[0]) - DIGITS:
            raise UnreadableError
        return int(values[0])

    def path(self, target: bytes) -> bytes:
        self.doubt(not target.isascii() or not target.startswith(b"/"))
        host = re.match(rb"(?i)https?://[^/?#]*", target)
        if host:
            target = target[host.end() :]
        return target.partition(b"?")[0] or b"/"

    def is_authorised(self, fields: dict[bytes, list[bytes]]) -> bool:
        values = fields.get(b"authorization", [])
        right = basic().encode()
        self.doubt(len(values) > 1)
        for value in values:
            scheme, _, token = value.partition(b" ")
            if b"%b %b" % (scheme.lower(), token.strip(b" \t")) == b"basic" + right[5:]:
                self.doubt(value != right)
                return True
        return False

    def take(self, count: int) -> bytes:
        if len(self.rest) < count:
            raise UnreadableError
        found, self.rest = self.rest[:count], self.rest[count:]
        return found

    def chunks(self) -> bytes:
        body = b""
        while True:
            line, newline, self.rest = self.rest.partition(b"\n")
            size, semicolon, extension = line.removesuffix(b"\r").partition(b";")
            digits = size.rstrip(b" \t")
            if not newline or not line.endswith(b"\r") or not digits or set(digits) - HEX_DIGITS:
                raise UnreadableError
            self.doubt(bool(set(extension) & CONTROLS) or len(digits) > 8)
            self.doubt(digits != size and not semicolon)
            count = int(digits, 16)
            if count == 0:
                self.doubt(bool(self.fields()))  # trailers
                return body
            body += self.take(count)
            if self.take(2) != b"\r\n":
                raise UnreadableError


def judge(data: bytes, received: bytes, post: Callable[[bytes], tuple[int, str]]) -> int:
    """Fail if the RFC does not allow these answers; return how many alarms were newly accepted.

    To post a body again tells whether just that body was taken: then it is a duplicate.
    """
    accepted = 0
    stream = io.BytesIO(received.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b""))
    for request in Reader(data).requests():
        is_whole = request.body is not None
        if not peek(stream):
            assert request.is_doubtful or not is_whole, "closed without an answer"
            break
        answer = read_answer(stream, has_body=not request.is_head)
        if request.is_head and peek(stream) == b"{":  # refused before its method was known
            stream.read(int(answer.headers["content-length"]))
        is_refused = answer.status >= 400
        if is_whole and request.is_wanted and not (request.is_doubtful and is_refused):
            again, word = post(request.body)
            assert answer.status == again, "not answered as the same body by itself"
            assert word == "duplicate" or is_refused, "the body was taken differently"
            accepted += answer.body == b'{"status": "accepted"}'
        else:
            assert is_refused or request.may_succeed, "it must be refused"
        if is_refused and answer.body:
            assert answer.json.keys() == {"error"}
        if answer.headers["connection"] == "close":
            is_allowed = is_refused or request.is_last or not request.is_wanted
            assert is_allowed, "closed after a good request"
            break
    assert not peek(stream), "an answer too many"
    return accepted


def peek(stream: io.BytesIO) -> bytes:
    return stream.getbuffer()[stream.tell() :][:1].tobytes()


def exchange(relay: Relay, number: int, data: bytes) -> bytes:
    """Send the bytes and half a goodbye, and return all that comes back."""
    # From many addresses, lest one runs out of ports.
    with Client(relay, f"127.1.{number % 200}.2") as client:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            client.send(data)
            client.socket.shutdown(socket.SHUT_WR)
        return client.stream.read()  # raises if the answer is overtaken by a reset


def test_mutated_requests_are_read_as_the_rfc_says_and_nothing_gets_through(tmp_path, webex):
    dice = random.Random(SEED)
    webex.fault_for = lambda _: Fault(status=401)
    accepted = 0
    with Relay(tmp_path, webex.url) as relay, contextlib.closing(relay.connect()) as good:

        def post(body: bytes) -> tuple[int, str]:
            status, answer = relay.post(body, connection=good)
            return status, answer.get("status")

        for number in range(COUNT):
            count = dice.choice([1, 1, 1, 2, 3])
            data = mutate(dice, b"".join(one_request(dice, number) for _ in range(count)))
            received = exchange(relay, number, data)
            try:
                accepted += judge(data, received, post)
            except AssertionError as error:
                told = f"request {number} of seed {SEED}: {data!r} got {received!r}"
                raise AssertionError(f"{error}: {told}") from error
        relay.wait_for_log(" taken: ", accepted)
    assert accepted > COUNT / 4
    assert relay.log().count(" taken: ") == accepted
    assert "forged" not in relay.log()
    for line in relay.log().splitlines():
        assert re.match(
            r"\S+ \S+ (INFO|WARNING|ERROR) (alarmrelay|alarm|127[.0-9]+|room) ", line
        ), line
        assert line.isprintable()


def answers(*statuses: int) -> bytes:
    """Return these answers; a refusal is the last on its connection."""
    said = b""
    for status in statuses:
        content = b'{"error": "x"}' if status >= 400 else b'{"status": "accepted"}'
        connection = b"close" if status >= 400 else b"keep-alive"
        said += b"HTTP/1.1 %d Words\r\nConnection: %b\r\n" % (status, connection)
        said += b"Content-Length: %d\r\n\r\n%b" % (len(content), content)
    return said


WHOLE = posted(b'{"a": 1}')
INNER = posted(b'{"a": "' + BAIT + b'{"message": "12345"}"}')
CHUNKS = b"8\r\n" + b'{"a": 1}' + b"\r\n0\r\n"
BOTH = head(Content_Length=5, Transfer_Encoding="chunked") + CHUNKS + b"\r\n"
ALLOWED = {
    "an empty line": (b"\r\n", b""),
    "a request": (WHOLE, answers(200)),
    "one that is cut off": (WHOLE[:-1], b""),
    "one that is cut off and told so": (WHOLE[:-1], answers(400)),
    "bytes of another kind": (b"\x16\x03\x01", answers(400)),
    "a bare LF that ends a line": (WHOLE.replace(b"\r\n", b"\n"), answers(200)),
    "a bare LF that is refused": (WHOLE.replace(b"\r\n", b"\n"), answers(400)),
    "chunks despite a length": (BOTH, answers(200)),
    "chunks with a length, refused": (BOTH, answers(501)),
}
FORBIDDEN = {
    "no answer": (WHOLE, b""),
    "a refusal": (WHOLE, answers(400)),
    "two answers": (WHOLE, answers(200, 200)),
    "an inner request": (INNER, answers(200, 200)),
    "an inner request alone": (INNER, answers(400, 200)),
    "no credentials": (posted(b"{}", authorization=None), answers(200)),
    "a space before the colon": (WHOLE.replace(b"Length:", b"Length :"), answers(200)),
    "two lengths": (WHOLE.replace(b"Host", b"Content-Length: 7\r\nHost"), answers(200)),
    "chunks read by their length": (BOTH, answers(200, 200)),
    "no chunks": (head(Transfer_Encoding="x") + CHUNKS + b"\r\n", answers(200)),
    "a body that is cut off": (WHOLE[:-1], answers(200)),
    "what follows a close": (posted(b"{}", Connection="close") * 2, answers(200, 200)),
}


def is_duplicate(_: bytes) -> tuple[int, str]:
    return 200, "duplicate"


@pytest.mark.parametrize(("data", "received"), ALLOWED.values(), ids=ALLOWED.keys())
def test_the_judge_allows(data, received):
    judge(data, received, is_duplicate)


@pytest.mark.parametrize(("data", "received"), FORBIDDEN.values(), ids=FORBIDDEN.keys())
def test_the_judge_finds(data, received):
    with pytest.raises(AssertionError):
        judge(data, received, is_duplicate)


def test_the_judge_finds_a_body_that_was_taken_differently():
    with pytest.raises(AssertionError, match="taken differently"):
        judge(WHOLE, answers(200), lambda _: (200, "accepted"))
