"""Measure what the README says of speed: a storm of alarms against a Webex that limits the bot."""

from __future__ import annotations

import concurrent.futures
import json
import re
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from harness import PAYLOADS, Relay
from webex_standin import Fault, WebexStandIn

ALARMS, CLIENTS, RATE = 10_000, 16, 5
TLOC = json.loads((PAYLOADS / "bfd_tloc_down.json").read_bytes())


class Limit:
    """A Webex that takes so many messages a second, and answers 429 to more."""

    def __init__(self, rate: int) -> None:
        self.rate, self.left, self.second = rate, rate, 0
        self.lock = threading.Lock()

    def __call__(self, _: dict[str, Any]) -> Fault | None:
        with self.lock:
            now = int(time.monotonic())
            if now != self.second:
                self.second, self.left = now, self.rate
            self.left -= 1
            return Fault(status=429, headers={"Retry-After": "1"}) if self.left < 0 else None


def alarm(number: int) -> dict[str, Any]:
    values = {"system-ip": f"10.{number >> 8}.{number & 255}.1", "color": "biz-internet"}
    values["host-name"] = f"BR{number}"
    return {**TLOC, "uuid": f"storm-{number}", "values_short_display": [values]}


def storm() -> int:
    """Post the alarms from several connections; print how they came through; return 1 if not."""
    with tempfile.TemporaryDirectory() as folder, WebexStandIn() as webex:
        webex.fault_for = Limit(RATE)
        with Relay(Path(folder), webex.url, {}) as relay:

            def post(client: int) -> set[int]:
                connection = relay.connect()
                numbers = range(client, ALARMS, CLIENTS)
                found = {relay.post(alarm(n), connection=connection)[0] for n in numbers}
                connection.close()
                return found

            began_s = time.monotonic()
            with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
                statuses = set().union(*pool.map(post, range(CLIENTS)))
            posted_s = time.monotonic() - began_s
            relay.told(f"0 waiting, {ALARMS} delivered", timeout_s=150)
            took_s = time.monotonic() - began_s
        sent = sum(len(text.encode()) for text in webex.texts())
        least = -(-sent // 7439)
        missing = ALARMS - len(set(re.findall(r"\bBR\d+\b", "\n".join(webex.texts()))))
        limited = sum(request["method"] == "POST" for request in webex.requests) - len(
            webex.messages
        )
    print(f"a storm of {ALARMS:,} alarms, a Webex that takes {RATE} messages a second:")
    print(f"  answered with {statuses} after  {posted_s:6.1f} s")
    print(f"  all in the room after     {took_s:6.1f} s")
    print(f"  messages                  {len(webex.messages):6} (the least possible: {least})")
    print(f"  requests answered 429     {limited:6}")
    print(f"  alarms missing            {missing:6}")
    return int(missing > 0 or statuses != {200})


if __name__ == "__main__":
    sys.exit(storm())
