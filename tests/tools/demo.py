"""Play the workshop's alarm and a small outage: posts, answers, the room and the relay's log."""

from __future__ import annotations

import json
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from harness import PAYLOADS, Relay, basic
from webex_standin import Fault, WebexStandIn

COLUMNS = 108
DIGEST_LINES = 4  # shown of the digest
NINE_MS = 1709884800000  # epoch; 9 o'clock in Madrid on 8 March 2024
STORM_MS = 1709885640000  # 14 minutes later
BRANCHES = range(1, 8)
COLORS = ("biz-internet", "mpls")
ACCEPTED = (200, {"status": "accepted"})
DUPLICATE = (200, {"status": "duplicate"})
REFUSED = (401, {"error": "wrong credentials"})


def say(text: str = "", indent: str = "", further: str = "") -> None:
    """Print a line, broken where it is too long; further: what its other lines have before them."""
    lines = textwrap.wrap(
        text,
        COLUMNS,
        initial_indent=indent,
        subsequent_indent=indent + further,
        break_long_words=False,
        break_on_hyphens=False,
    )
    print("\n".join(lines), flush=True)


def expect(is_so: bool, what: str) -> None:
    """End the demo with this complaint if something is not as it is told."""
    if not is_so:
        sys.exit(f"demo: not as told: {what}")


def sample(name: str, minutes: float) -> dict[str, Any]:
    """Return a sample that happens so many minutes after nine."""
    alarm = json.loads((PAYLOADS / f"{name}.json").read_bytes())
    alarm["receive_time"] = NINE_MS + int(60_000 * minutes)
    return alarm


def storm() -> list[dict[str, Any]]:
    """Return what vManage sends when a hub goes down: each branch loses two tunnels."""
    alarms: list[dict[str, Any]] = []
    for branch in BRANCHES:
        for color in COLORS:
            alarm = sample("bfd_tloc_down", 0)
            alarm["severity"] = "Critical"
            alarm["uuid"] = f"storm-{len(alarms)}"
            alarm["receive_time"] = STORM_MS + 150 * len(alarms)
            alarm["values_short_display"] = [
                {"system-ip": f"10.20.{branch}.1", "color": color, "host-name": f"BR{branch}"}
            ]
            alarms.append(alarm)
    return alarms


def post(relay: Relay, name: str, body: Any, expected: tuple[int, Any], **headers: str) -> None:
    """Post an alarm, and print the answer, which has to be this one."""
    answer = relay.post(body, **headers)
    say(f"POST / {name}  ->  {answer[0]} {json.dumps(answer[1])}", "  ")
    expect(answer == expected, f"the answer is not {expected[0]} {json.dumps(expected[1])}")


def play(relay: Relay, webex: WebexStandIn) -> None:
    """Post the alarms as vManage would, and wait until all stand in the room."""
    say("The workshop's alarm, as the README's curl posts it.")
    reboot = (PAYLOADS / "system_reboot_issued.json").read_bytes()
    post(relay, "system_reboot_issued.json", reboot, ACCEPTED)
    webex.wait_for(lambda: len(webex.messages) == 1)

    say("An interface goes down.")
    post(relay, "interface_down.json", sample("interface_down", 2.2), ACCEPTED)
    webex.wait_for(lambda: len(webex.messages) == 2)

    say("A hub goes down, and Webex limits the bot: the alarms wait, then go together.")
    webex.faults.append(Fault(status=429, headers={"Retry-After": "2"}))
    alarms = storm()
    answers = [relay.post(alarm) for alarm in alarms]
    say(f"POST / {len(alarms)} alarms  ->  {answers.count(ACCEPTED)} times 200", "  ")
    expect(answers.count(ACCEPTED) == len(alarms), "an alarm of the storm is not accepted")
    post(relay, "the last of them again", alarms[-1], DUPLICATE)

    say("Somebody guesses the password.")
    post(relay, "{}", b"{}", REFUSED, Authorization=basic(password="guess"))
    webex.wait_for(lambda: len(webex.messages) == 3)

    say("The interface comes back, and so does a tunnel.")
    post(relay, "interface_up_clear.json", sample("interface_up_clear", 21.5), ACCEPTED)
    tunnel = sample("bfd_tloc_up", 26)
    tunnel["values_short_display"] = alarms[0]["values_short_display"]
    post(relay, "bfd_tloc_up.json", tunnel, ACCEPTED)
    webex.wait_for(lambda: len(webex.messages) == 5)
    relay.told(f"0 waiting, {len(alarms) + 4} delivered")


def show_room(messages: list[dict[str, Any]]) -> None:
    """Print what stands in the room, which has to be what the posts have told."""
    say()
    say("In the Webex room now, oldest first (<br> shown as a new line):")
    for message in messages:
        say()
        place = ""
        if "parentId" in message:
            place = f", a reply to {message['parentId']}"
        say(message["id"] + place, "  ")
        lines = message["markdown"].replace("<br>", "\n").splitlines()
        shown = lines
        if message["markdown"].startswith("Team, **14 alarms**"):
            shown = lines[:DIGEST_LINES]
        for line in shown:
            say(line, "    ", "  ")
        if len(shown) < len(lines):
            say(f"… {len(lines) - len(shown)} more lines", "    ")
    _, interface, digest, interface_up, tunnel_up = messages
    expect(
        all(f"BR{branch}" in digest["markdown"] for branch in BRANCHES),
        "a branch is missing in the digest",
    )
    expect(interface_up.get("parentId") == interface["id"], "the interface's clear is no reply")
    expect(tunnel_up.get("parentId") == digest["id"], "the tunnel's clear is no reply")


def show_log(log: str, digest_id: str) -> None:
    """Print the lines of the log that tell the story, and how many others there are."""
    say()
    say("In the relay's log, which under systemd is in the journal:")
    say()
    lines = log.splitlines()
    story = (
        ("alarm 1 taken",),
        ("alarm 1 delivered",),
        ("delivery paused: 429",),
        ("refused: 401 wrong credentials",),
        ("delivered", digest_id),
    )
    for words in story:
        found = [line for line in lines if all(word in line for word in words)]
        expect(found != [], f"no line of the log has {words}")
        say(found[0], "  ", "  ")
    say(f"… {len(lines) - len(story)} more lines", "  ")


def main() -> int:
    """Play it all in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder, WebexStandIn() as webex:
        with Relay(Path(folder), webex.url, {}) as relay:
            say(f"The relay listens on 127.0.0.1 port {relay.port}; a stand-in plays Webex.")
            say()
            play(relay, webex)
        show_room(webex.messages)
        show_log(relay.log(), webex.messages[2]["id"])
    say()
    say("Each alarm was on disk before it was answered with 200.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
