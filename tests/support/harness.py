"""Runs the real program as a child process, and posts to it as vManage would."""

from __future__ import annotations

import base64
import contextlib
import http.client
import itertools
import json
import os
import queue
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import webex_standin

TESTS = Path(__file__).resolve().parents[1]
PROGRAM = TESTS.parent / "alarmrelay.py"
README = (TESTS.parent / "README.md").read_text(encoding="utf-8")
PAYLOADS = TESTS / "payloads"  # alarms, each with the message it must become
RECORDED = sorted(Path(os.environ.get("ALARMRELAY_PAYLOADS", PAYLOADS)).glob("*.json"))
FAST = dict.fromkeys(("TICK_S", "HOLD_S", "PAUSE_MIN_S", "RETRY_S"), 0.05)  # limits that hurry
NUMBERS = itertools.count()
USERNAME, PASSWORD = "vmanage", "correct horse: battery"


def basic(username: str = USERNAME, password: str = PASSWORD) -> str:
    return "Basic " + base64.b64encode(f"{username}:{password}".encode()).decode()


def alarm(size: int = 0) -> bytes:
    """Return an alarm like no other, since the same bytes again are a duplicate."""
    return json.dumps({"message": marker(), "consumed_events": ["x" * size]}).encode()


def marker() -> str:
    return f"marker {next(NUMBERS):09}"


def environment(directory: Path, webex_url: str, **changes: str | None) -> dict[str, str]:
    """Return an environment with all settings; None in the changes takes a variable out."""
    settings: dict[str, str | None] = {
        "PATH": os.environ.get("PATH", ""),
        # -X dev is for its warnings; its checks of memory are for modules in C, and slow.
        "PYTHONMALLOC": "default",
        "bearer_token": webex_standin.TOKEN,
        "room_id": webex_standin.ROOM,
        "webhook_username": USERNAME,
        "webhook_password": PASSWORD,
        "listen": "127.0.0.1:0",
        "webex_url": webex_url,
        "STATE_DIRECTORY": str(directory / "state"),
        **changes,
    }
    return {name: value for name, value in settings.items() if value is not None}


def program(limits: dict[str, Any], fault: str = "") -> list[str]:
    """Return Python's arguments for the program, with these of its constants and this changed."""
    if not limits:
        return [str(PROGRAM)]
    lines = ["import os, sys", f"sys.path.insert(0, {str(PROGRAM.parent)!r})", "import alarmrelay"]
    lines += [f"alarmrelay.{name} = {value!r}" for name, value in limits.items()]
    return ["-c", "\n".join([*lines, fault, "os._exit(alarmrelay.main())"])]


class Relay:
    """The program, running; use as a context manager, which stops it and looks at its log."""

    def __init__(
        self,
        directory: Path,
        webex_url: str,
        limits: dict[str, float] | None = None,
        fault: str = "",
        **changes: str | None,
    ) -> None:
        self.environ = environment(directory, webex_url, **changes)
        self.log_path = directory / "relay.log"
        self.words: queue.Queue[str] = queue.Queue()  # that systemd was told, not looked at yet
        self.said: list[str] = []  # those looked at
        # It looks at its status more often, lest the tests wait for it; {}: the file as it is.
        limits = {"TICK_S": 0.05} if limits is None else limits
        self.command = [sys.executable, "-X", "dev", *program(limits, fault)]
        self.limits: list[tuple[int, int]] = []  # of the kernel's: resource.RLIMIT_…, number
        self.process: subprocess.Popen[bytes] | None = None
        self.port = 0

    def __enter__(self) -> Relay:
        try:
            return self.start()
        except BaseException:
            self.kill()
            raise

    def __exit__(self, *exception: object) -> None:
        if self.process and self.process.poll() is None:
            if exception[0]:
                self.kill()
                print(self.log())
            else:
                assert self.stop() == 0, self.log()
        if not exception[0]:
            assert "Traceback" not in self.log()
            assert "Warning" not in self.log()

    def start(self, *prefix: str) -> Relay:
        """Start it, behind a command such as strace if one is given, and wait until it is ready."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        listener.bind(f"\0alarmrelay-test-{os.getpid()}-{next(NUMBERS)}")
        listener.settimeout(30)
        address = "@" + listener.getsockname()[1:].decode()
        command = [*prefix, *self.command]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                command, env={**self.environ, "NOTIFY_SOCKET": address}, stderr=log
            )
            for kind, number in self.limits:
                resource.prlimit(self.process.pid, kind, (number, number))
        threading.Thread(target=self._listen, args=(listener,), daemon=True).start()
        self.told("READY=1")
        self.port = int(re.findall(r" listening on \S+ port (\d+);", self.log())[-1])
        return self

    def _listen(self, listener: socket.socket) -> None:
        with listener:
            while self.process.poll() is None:
                with contextlib.suppress(TimeoutError, socket.timeout):
                    listener.settimeout(0.2)
                    self.words.put(listener.recv(65536).decode())

    def told(self, part: str, timeout_s: float = 30) -> str:
        """Wait until systemd is told something that holds this part, and return it."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(queue.Empty):
                words = self.words.get(timeout=0.2)
                self.said.append(words)
                if part in words:
                    return words
        raise AssertionError(f"systemd was not told {part!r} but {self.said}; log:\n{self.log()}")

    def log(self) -> str:
        """Return what it wrote to stderr, in all its lives."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def wait_for_log(self, words: str, count: int = 1, timeout_s: float = 30) -> str:
        """Wait until so many lines of the log hold these words, and return the last."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and self.process.poll() is None:
            lines = [line for line in self.log().splitlines() if words in line]
            if len(lines) >= count:
                return lines[-1]
            time.sleep(0.02)
        raise AssertionError(f"{words!r} is not in the log:\n{self.log()}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def stop(self, timeout_s: float = 30) -> int:
        """Stop it as systemd does, and return its exit status."""
        self.terminate()
        return self.process.wait(timeout_s)

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def post(
        self,
        body: Any,
        path: str = "/",
        connection: http.client.HTTPConnection | None = None,
        **headers: str,
    ) -> tuple[int, Any]:
        """Post an alarm, or bytes as they are; return the status and the answer's JSON."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        client = connection or self.connect()
        try:
            client.request("POST", path, content, {"Authorization": basic(), **headers})
            response = client.getresponse()
            return response.status, json.loads(response.read())
        finally:
            if connection is None:
                client.close()


def run(environ: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the program with a command or an option to its end, in this environment alone."""
    command = [sys.executable, "-X", "dev", str(PROGRAM), *arguments]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=30)


def run_as_nobody(
    folder: Path, environ: dict[str, str], *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Run a copy of the program in this folder of pytest's as a user without rights."""
    for path in (folder, *list(folder.parents)[:2]):
        path.chmod(0o755)
    program = folder / PROGRAM.name
    program.write_bytes(PROGRAM.read_bytes())
    command = ["/usr/bin/python3", str(program), *arguments]
    return subprocess.run(
        command, env=environ, user=65534, capture_output=True, text=True, timeout=30
    )


def status_of(relay: Relay, field: str) -> int:
    """Return a number from /proc/PID/status: Threads, or VmRSS in KiB."""
    text = Path(f"/proc/{relay.process.pid}/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+)", text, re.MULTILINE)[1])


def later(folder: Path, hours: float) -> dict[str, str]:
    """Put the clock so many hours ahead of relays with this environment, also while they run."""
    clock = folder / "ahead"
    (folder / "ahead.new").write_text(str(hours * 3600))
    (folder / "ahead.new").replace(clock)
    lines = f"import time, pathlib; now, ahead = time.time, pathlib.Path({str(clock)!r})"
    lines += "\ntime.time = lambda: now() + float(ahead.read_text())\n"
    (folder / "sitecustomize.py").write_text(lines)
    return {"PYTHONPATH": str(folder)}


class Client:
    """A connection to write bytes into as they are, and to read answers from."""

    def __init__(self, relay: Relay, host: str = "127.0.0.1") -> None:
        """Connect from this loopback address."""
        self.socket = socket.create_connection(("127.0.0.1", relay.port), 20, (host, 0))
        self.stream = self.socket.makefile("rb")

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.stream.close()
        self.socket.close()

    def send(self, *parts: bytes) -> None:
        self.socket.sendall(b"".join(parts))

    def answer(self, has_body: bool = True) -> Answer:
        return read_answer(self.stream, has_body)

    def ask(self, *parts: bytes) -> Answer:
        """Send a request and read its answer."""
        self.send(*parts)
        return self.answer()

    def is_closed(self) -> bool:
        """Tell whether nothing but an orderly end follows; a reset raises."""
        return self.stream.read(1) == b""

    def is_left_alone(self) -> bool:
        """Tell whether the relay has neither answered nor closed the connection."""
        return not select.select([self.socket], [], [], 0)[0]


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def read_answer(stream: BinaryIO, has_body: bool = True) -> Answer:
    version, status, _ = stream.readline().decode().split(" ", 2)
    assert version == "HTTP/1.1"
    headers = {}
    while (line := stream.readline().decode().strip()) != "":
        name, _, value = line.partition(": ")
        headers[name.lower()] = value
    length = int(headers["content-length"]) if has_body else 0
    return Answer(int(status), headers, stream.read(length))


def head(start: str = "POST / HTTP/1.1", authorization: str | None = "", **fields: object) -> bytes:
    lines = [start, "Host: relay"]
    if authorization is not None:
        lines.append(f"Authorization: {authorization or basic()}")
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
    return "\r\n".join([*lines, "", ""]).encode()


def posted(body: bytes | None = None, **fields: object) -> bytes:
    """Return a whole request, with this body or an alarm of its own."""
    body = alarm() if body is None else body
    return head(**{"Content_Length": len(body), **fields}) + body


def chunked(body: bytes, size: int, extension: bytes = b"") -> bytes:
    """Return a body in chunks of so many bytes."""
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    chunks = [b"%x%s\r\n%s\r\n" % (len(part), extension, part) for part in parts]
    return b"".join(chunks) + b"0\r\n\r\n"


@contextlib.contextmanager
def crowd(
    relay: Relay, count: int, start: bytes = b"", host: str = "127.0.0.2"
) -> Iterator[list[Client]]:
    """So many clients that have sent this start of a request, if they were let."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(relay, host)) for _ in range(count)]
        for client in clients:
            with contextlib.suppress(OSError):
                client.send(start)
        yield clients


@contextlib.contextmanager
def flood(relay: Relay, count: int) -> Iterator[None]:
    """Let so many clients send requests all the time, and never wait for an answer."""
    hung_up = threading.Event()

    def send(client: Client) -> None:
        with contextlib.suppress(OSError):
            while not hung_up.is_set():
                client.send(head("GET /healthz HTTP/1.1", None) * 100)

    def read(client: Client) -> None:
        with contextlib.suppress(OSError):
            while client.socket.recv(65536):
                pass

    with crowd(relay, count) as clients, ThreadPoolExecutor(2 * count) as pool:
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


def post_from(relay: Relay, host: str) -> int:
    """Post an alarm from this loopback address on a connection of its own; return the status."""
    with Client(relay, host) as client:
        return client.ask(posted()).status


def wait_until(condition: Callable[[], Any], timeout_s: float = 30) -> None:
    """Wait for what sends no sign when it comes."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def get(relay: Relay, path: str, method: str = "GET", **headers: str) -> tuple[int, Any, str]:
    """Return status, headers and body; the request has credentials unless it has other headers."""
    client = relay.connect()
    client.request(method, path, None, headers or {"Authorization": basic()})
    response = client.getresponse()
    text = response.read().decode()
    client.close()
    return response.status, response.headers, text


def descriptors_of(relay: Relay) -> int:
    """Return how many files and sockets it has open."""
    return len(list(Path(f"/proc/{relay.process.pid}/fd").iterdir()))
