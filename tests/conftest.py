"""What the tests share: a Webex to post to, and the program as a child process."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Relay
from webex_standin import WebexStandIn


@pytest.fixture
def webex():
    with WebexStandIn() as standin:
        yield standin


@pytest.fixture
def relay(tmp_path: Path, webex: WebexStandIn):
    with Relay(tmp_path, webex.url) as running:
        yield running
