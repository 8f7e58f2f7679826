"""Play a small outage: vManage's posts, the relay's answers, and what then stands in the room."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from harness import PAYLOADS, Relay, basic
from webex_standin import Fault, WebexStandIn

TLOC = json.loads((PAYLOADS / "bfd_tloc_down.json").read_bytes())
COLORS = ("biz-internet", "mpls")


def say(text: str = "") -> None:
    print(text, flush=True)


def sample(name: str, minutes: float) -> dict:
    """Return a sample that happens so many minutes after nine."""
    alarm = json.loads((PAYLOADS / f"{name}.json").read_bytes())
    return {**alarm, "receive_time": 1709884800000 + int(60_000 * minutes)}


def storm() -> list[dict]:
    """Return what vManage sends when a hub goes down: each branch loses two tunnels."""
    alarms = []
    for branch in range(1, 8):
        for color in COLORS:
            values = {"system-ip": f"10.20.{branch}.1", "color": color, "host-name": f"BR{branch}"}
            number = len(alarms)
            alarms.append(
                {
                    **{**TLOC, "severity": "Critical", "uuid": f"storm-{number}"},
                    **{"receive_time": 1709885640000 + 150 * number},
                    **{"values_short_display": [values]},
                }
            )
    return alarms


def main() -> int:
    with tempfile.TemporaryDirectory() as folder, WebexStandIn() as webex:
        with Relay(Path(folder), webex.url, {}, vmanage_url="https://vmanage.example") as relay:

            def post(alarm: dict, name: str) -> None:
                status, answer = relay.post(alarm)
                say(f"  POST / {name}  ->  {status} {json.dumps(answer)}")

            say(f"The relay listens on 127.0.0.1 port {relay.port}.")
            say("A stand-in takes the place of Webex. Alarms are posted as vManage would.\n")
            say("An interface goes down.")
            post(sample("interface_down", 2.2), "interface_down.json")
            webex.wait_for(lambda: len(webex.messages) == 1)
            say("A hub goes down, and Webex limits the bot: 14 alarms wait.")
            webex.faults.append(Fault(status=429, headers={"Retry-After": "2"}))
            for number, alarm in enumerate(storm()):
                post(alarm, f"storm alarm {number + 1}")
            post(storm()[-1], "storm alarm 14 again")
            status, answer = relay.post(b"{}", Authorization=basic(password="guess"))
            say(f"Somebody guesses the password.\n  POST /  ->  {status} {json.dumps(answer)}")
            webex.wait_for(lambda: len(webex.messages) == 2)
            say("The interface comes back, and so does a tunnel.")
            post(sample("interface_up_clear", 21.5), "interface_up_clear.json")
            values = {"values_short_display": storm()[0]["values_short_display"]}
            post({**sample("bfd_tloc_up", 26), **values}, "bfd_tloc_up.json")
            webex.wait_for(lambda: len(webex.messages) == 4)
            say("\nIn the Webex room now, oldest first (<br> shown as a new line):")
            for message in webex.messages:
                parent = message.get("parentId")
                say(f"\n  {message['id']}" + (f", a reply to {parent}" if parent else ""))
                say("    " + message["markdown"].replace("<br>", "\n").replace("\n", "\n    "))
            relay.told("0 waiting, 17 delivered")
        say("\nThe relay's log, which under systemd is in the journal:\n")
        say("".join(f"  {line}\n" for line in relay.log().splitlines()))
        say("Each alarm was on disk before it was answered with 200.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
