"""What the tests share: a Webex to post to, the program as a child process, and its parts."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from harness import Client as Connection
from harness import Relay
from webex_standin import ROOM, TOKEN, WebexStandIn

from alarmrelay import Client, Courier, Spool

START_S = datetime(2024, 3, 8, 8, 0, 0, tzinfo=timezone.utc).timestamp()


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
def spool(tmp_path):
    spool = Spool(tmp_path / "state")
    yield spool
    spool.close()


@pytest.fixture
def clock():
    return Clock()


def courier_of(spool: Spool, webex: WebexStandIn, clock: Clock) -> Courier:
    settings = {"vmanage_url": "", "time_zone": ZoneInfo("Europe/Madrid")}
    client = Client(webex.url, f"Bearer {TOKEN}")
    courier = Courier("/", ROOM, settings, spool, client)
    courier.clock = clock
    return courier


@pytest.fixture
def courier(spool, webex, clock):
    return courier_of(spool, webex, clock)
