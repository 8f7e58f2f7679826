"""A stand-in for Webex: messages, people/me and rooms as developer.webex.com has them, with faults.

It listens on a loopback port and answers like Webex does; `faults` makes it misbehave, one fault
for each request, oldest first, or `fault_for` decides for each request anew.
"""

from __future__ import annotations

import collections
import contextlib
import http.client
import http.server
import itertools
import json
import re
import socket
import ssl
import struct
import threading
import urllib.parse
from dataclasses import dataclass, field
from typing import Any, Callable

TOKEN = "bot-token-of-the-stand-in"
ROOM = "Y2lzY29zcGFyazovL3VzL1JPT00vc3RhbmQtaW4"
OPS = "room-of-operations"
NOC = "room-of-the-noc"
MESSAGE_BYTES = 7439


@dataclass
class Fault:
    """What the stand-in does instead of taking a message; the parts are done in this order."""

    reset_before: bool = False  # the connection, before the message is taken
    take: bool = False  # the message, as if all were well, whatever is answered then
    hold: threading.Event | None = None  # answer only once this is set
    reset_after: bool = False  # the connection, instead of an answer
    drip_s: float | None = None  # answer byte by byte, this many seconds apart, for as long as read
    drip_body: bool = False  # the header at once
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None  # None: an error as Webex words it


PAUSED = Fault(status=429, headers={"Retry-After": "3600"})


class WebexStandIn:
    """Use as a context manager; `url` is the API root for webex_url."""

    def __init__(
        self,
        token: str = TOKEN,
        rooms: tuple[str, ...] = (ROOM,),
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.token = token
        self.rooms = set(rooms)
        self.person = "bot"  # whose token it is, else "person"
        self.deleted: dict[str, int] = {}  # ids of messages, and the status for a reply to them
        self.faults: collections.deque[Fault] = collections.deque()
        self.fault_for: Callable[[dict[str, Any]], Fault | None] = lambda _: None
        self.messages: list[dict[str, Any]] = []  # those that stand in a room, in order
        self.requests: list[dict[str, Any]] = []  # all, with method, path, headers and content
        self._changed = threading.Condition()
        self._numbers = itertools.count(1)
        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.standin = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        if tls:
            self.url = f"https://localhost:{self._server.server_address[1]}/v1"
            self._server.socket = tls.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )

    def __enter__(self) -> WebexStandIn:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def texts(self) -> list[str]:
        """Return what stands in the room, oldest first."""
        return [message.get("markdown", message.get("text")) for message in list(self.messages)]

    def alarms(self) -> list[str]:
        """Return what is said of each alarm, in a message of its own or a digest's line."""
        said: list[str] = []
        for text in self.texts():
            is_digest = re.match(r"Team, \*\*\d+ alarms\*\* ", text)
            said += text.split("\n- ")[1:] if is_digest else [text]
        return said

    def wait_for(self, condition: Callable[[], Any], timeout_s: float = 30) -> None:
        """Wait until the condition, which is looked at after each request, holds."""
        with self._changed:
            if not self._changed.wait_for(condition, timeout_s):
                raise AssertionError(
                    f"not so after {timeout_s} s: {len(self.requests)} requests,"
                    f" {len(self.messages)} messages, the last {self.texts()[-1:]}"
                )

    def wait_for_texts(self, *texts: str) -> None:
        """Wait until each of these stands in a room."""
        self.wait_for(lambda: all(text in "".join(self.texts()) for text in texts))

    def next_fault(self, request: dict[str, Any]) -> Fault | None:
        """Note a request and return what is to go wrong with it."""
        with self._changed:
            self.requests.append(request)
            self._changed.notify_all()
            return self.faults.popleft() if self.faults else self.fault_for(request)

    def take(self, content: dict[str, Any]) -> dict[str, Any]:
        """Put a message into its room and return it as Webex would."""
        with self._changed:
            message = {**content, "id": f"message-{next(self._numbers)}", "roomType": "group"}
            self.messages.append(message)
            self._changed.notify_all()
            return message

    def refusal(self, headers: dict[str, str], content: Any) -> tuple[int, str] | None:
        """Return the status and the words for a request that Webex would refuse."""
        if headers.get("authorization") != f"Bearer {self.token}":
            return 401, "The request requires a valid access token set in the Authorization header."
        if not isinstance(content, dict) or not content.get("roomId"):
            return (
                400,
                "One of the following must be non-empty: roomId, toPersonId or toPersonEmail",
            )
        if content["roomId"] not in self.rooms:
            return 404, "Could not find a room with provided ID."
        parent = content.get("parentId")
        there = [
            message["id"] for message in self.messages if message["roomId"] == content["roomId"]
        ]
        if parent is not None and (parent in self.deleted or parent not in there):
            return self.deleted.get(parent, 404), "Could not find the parent message."
        texts = [content[key] for key in ("markdown", "text") if content.get(key)]
        if not texts:
            return 400, "One of the following must be non-empty: text, file, or meetingId"
        if any(len(text.encode()) > MESSAGE_BYTES for text in texts):
            return 400, "Message length is limited to 7439 bytes."
        return None


def three_rooms(webex: WebexStandIn) -> dict[str, str]:
    """Return the settings of two more rooms."""
    webex.rooms |= {OPS, NOC}
    return {"room_id_ops": OPS, "room_id_noc": NOC}


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    standin: WebexStandIn

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a relay that is killed in the middle of a request


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def finish(self) -> None:
        for stream in (self.wfile, self.rfile):
            with contextlib.suppress(OSError):  # the relay was killed, or the connection reset
                stream.close()

    def do_GET(self) -> None:
        standin = self.server.standin
        request = self.noted(None)
        fault = standin.next_fault(request)
        _, kind, name = f"{self.path[3:]}/".split("/", 2)
        content = {"roomId": urllib.parse.unquote(name[:-1])} if kind == "rooms" else None
        refusal = standin.refusal(request["headers"], content)
        if fault:
            self.misbehave(fault, None)
        elif refusal and refusal[0] in (401, 404):
            self.reply(refusal[0], {}, self.error(*refusal))
        elif self.path == "/v1/people/me":
            person = {"id": "person-1", "displayName": "vManage alarms", "type": standin.person}
            self.reply(200, {}, json.dumps(person).encode())
        elif kind == "rooms" and content["roomId"] in standin.rooms:
            room = {"id": content["roomId"], "title": "Network \u2028 Operations", "type": "group"}
            self.reply(200, {}, json.dumps(room).encode())
        else:
            self.reply(404, {}, self.error(404, "The requested resource could not be found."))

    def do_POST(self) -> None:
        standin = self.server.standin
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            content = json.loads(body)
        except ValueError:
            content = None
        request = self.noted(content)
        fault = standin.next_fault(request)
        refusal = standin.refusal(request["headers"], content)
        if fault is None and (refusal or self.path != "/v1/messages"):
            status, words = refusal or (404, "The requested resource could not be found.")
            self.reply(status, {}, self.error(status, words))
        elif fault is None:
            self.reply(200, {}, json.dumps(standin.take(content)).encode())
        else:
            self.misbehave(fault, content)

    def noted(self, content: Any) -> dict[str, Any]:
        headers = {name.lower(): value for name, value in self.headers.items()}
        return {"method": self.command, "path": self.path, "headers": headers, "content": content}

    def misbehave(self, fault: Fault, content: Any) -> None:
        if fault.reset_before:
            self.reset()
            return
        taken = self.server.standin.take(content) if fault.take else {}
        if fault.hold:
            fault.hold.wait(120)
        if fault.reset_after:
            self.reset()
            return
        body = fault.body
        if body is None:
            body = (
                json.dumps(taken).encode() if fault.status == 200 else self.error(fault.status, "")
            )
        self.reply(fault.status, fault.headers, body, fault.drip_s, fault.drip_body)

    def error(self, status: int, words: str) -> bytes:
        words = words or f"{http.client.responses.get(status, 'odd')}, says the stand-in."
        tracking_id = f"ROUTER_{next(self.server.standin._numbers):08X}"
        errors = [{"description": words}]
        return json.dumps({"message": words, "errors": errors, "trackingId": tracking_id}).encode()

    def reply(
        self,
        status: int,
        headers: dict[str, str],
        body: bytes,
        drip_s: float | None = None,
        drip_body: bool = False,
    ) -> None:
        length = str(len(body) if drip_s is None else 10**6)
        fields = {"Content-Type": "application/json", "Content-Length": length, **headers}
        head = f"HTTP/1.1 {status} {http.client.responses.get(status, 'Odd')}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        answer = f"{head}\r\n".encode() + body
        at_once = (
            len(answer) if drip_s is None else answer.index(b"\r\n\r\n") + 4 if drip_body else 0
        )
        self.wfile.write(answer[:at_once])
        self.wfile.flush()
        if drip_s is None:
            return
        self.close_connection = True
        with contextlib.suppress(OSError):
            for byte in answer[at_once:] + b" " * 10**6:
                self.connection.sendall(bytes([byte]))
                threading.Event().wait(drip_s)

    def reset(self) -> None:
        self.close_connection = True
        linger = struct.pack("ii", 1, 0)  # close with a reset
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()
