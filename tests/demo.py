"""Show the whole story: vManage's posts, the relay's answers, and what then stands in the room."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from harness import PAYLOADS, Relay, basic
from webex_standin import Fault, WebexStandIn

STORY = [
    ("A router reboots: the workshop's sample.", ["system_reboot_issued"]),
    ("An interface goes down and comes back.", ["interface_down", "interface_up_clear"]),
    ("A site loses its tunnels, and Webex answers 503 once.", ["bfd_tloc_down", "bfd_site_down"]),
    ("Text that tries to mention everybody and to break the layout.", ["hostile_text"]),
    ("vManage sends the last one once more.", ["hostile_text"]),
]


def say(text: str = "") -> None:
    print(text, flush=True)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder, WebexStandIn() as webex:
        with Relay(Path(folder), webex.url, {}) as relay:
            say(f"The relay listens on 127.0.0.1 port {relay.port}.")
            say("A stand-in takes the place of Webex. Alarms are posted as vManage would.\n")
            for text, samples in STORY:
                say(text)
                if "503" in text:
                    webex.wait_for(lambda: len(webex.messages) == 3)
                    webex.faults.append(Fault(status=503))
                for sample in samples:
                    status, answer = relay.post((PAYLOADS / f"{sample}.json").read_bytes())
                    say(f"  POST / {sample}.json  ->  {status} {json.dumps(answer)}")
            status, answer = relay.post(b"{}", Authorization=basic(password="guess"))
            say(f"Somebody guesses the password.\n  POST /  ->  {status} {json.dumps(answer)}")
            webex.wait_for(lambda: len(webex.messages) == 6)
            say("\nIn the Webex room now, oldest first (<br> shown as a new line):")
            for text in webex.texts():
                say("\n  " + text.replace("<br>", "\n  "))
            relay.told("6 delivered")
        say("\nThe relay's log, which under systemd is in the journal:\n")
        say("".join(f"  {line}\n" for line in relay.log().splitlines()))
        say("Each alarm was on disk before it was answered with 200.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
