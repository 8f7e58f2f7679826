"""The program as a child process, from vManage's post to the Webex room, and what befalls it."""

from __future__ import annotations

import json

from harness import PAYLOADS


def test_the_workshops_sample_stands_in_the_room_byte_for_byte(relay, webex):
    assert relay.post((PAYLOADS / "system_reboot_issued.json").read_bytes()) == (
        200,
        {"status": "accepted"},
    )
    webex.wait_for(lambda: webex.messages)
    assert webex.texts() == [
        "Team, **Alarm Event** : System_Reboot_Issued, **Message** : The device rebooted, is "
        "received from vManage and here are the complete details<br>**Severity:** 🔴 Critical<br>"
        "**Receive Time:** Sat Jan 18 05:57:01 2020 CET<br> **host-name:** DC1-VEDGE1<br> "
        "**system-ip:** 10.1.0.1"
    ]
