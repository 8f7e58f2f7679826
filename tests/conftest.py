"""What the tests share: a Webex to post to, the program as a child process, and its parts."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime, timezone
from pathlib import Path

import pytest
from harness import Client as Connection
from harness import Relay, environment
from webex_standin import TOKEN, WebexStandIn

from alarmrelay import Alarm, Client, Courier, Spool, Totals, read_settings

START_S = datetime(2024, 3, 8, 8, 0, 0, tzinfo=timezone.utc).timestamp()
START_MS = int(START_S * 1000)


@pytest.fixture
def webex():
    with WebexStandIn() as standin:
        yield standin


@pytest.fixture(scope="module")
def lasting_webex():
    """One for all tests of a file."""
    with WebexStandIn() as standin:
        standin.rooms.add("room-of-operations")
        yield standin


@pytest.fixture(scope="module")
def lasting_relay(tmp_path_factory, lasting_webex: WebexStandIn):
    """A relay for all tests of a file, with one more room."""
    directory = tmp_path_factory.mktemp("lasting")
    with Relay(directory, lasting_webex.url, room_id_ops="room-of-operations") as running:
        yield running


@pytest.fixture
def client(lasting_relay: Relay):
    """A connection to the lasting relay, to write bytes into."""
    with Connection(lasting_relay) as connected:
        yield connected


@pytest.fixture
def relay(tmp_path: Path, webex: WebexStandIn):
    with Relay(tmp_path, webex.url) as running:
        yield running


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now_s = START_S

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def spool(tmp_path):
    spool = Spool(tmp_path / "state")
    yield spool
    spool.close()


@pytest.fixture
def totals():
    return Totals(["/"])


@pytest.fixture
def courier(spool, webex, clock, totals):
    return courier_of(spool, webex, clock, totals)


def courier_of(
    spool: Spool, webex: WebexStandIn, clock: Clock, totals: Totals | None = None, **changes: str
) -> Courier:
    """Return the courier of the room at /, with these settings changed."""
    settings = read_settings(environment(spool.directory.parent, webex.url, **changes))
    client = Client(webex.url, f"Bearer {TOKEN}")
    return Courier("/", settings, spool, client, totals or Totals(["/"]), clock)


def put(spool: Spool, *alarms: dict, received_ms: int = START_MS) -> None:
    """Store alarms for the room at /, as of one request."""
    request = hashlib.sha256(json.dumps([received_ms, *alarms]).encode()).digest()
    assert spool.store("/", request, [Alarm(fields, received_ms) for fields in alarms], "127.0.0.1")


def drain(courier: Courier) -> list[float]:
    """Deliver until nothing waits, and return the waits in between."""
    waits: list[float] = []
    wait_s = courier.step()
    while wait_s is not None:
        waits.append(wait_s)
        assert len(waits) < 2000
        wait_s = courier.step()
    return waits
