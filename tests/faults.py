"""What the tests break inside the program where nothing from outside could break it.

Each is code for `Relay(..., fault=...)`, run in the child process after `import alarmrelay`.
"""

BUG = """
def with_a_bug(body, received_ms, parse=alarmrelay.parse_alarms):
    if b"bug" in body:
        raise KeyError("a bug")
    return parse(body, received_ms)

alarmrelay.parse_alarms = with_a_bug
"""
"""Breaks the reading of an alarm that holds the word "bug", by an error that nobody expects."""

LATE_REFUSAL = """
import time

def refuse(*_):
    time.sleep(0.6)
    raise alarmrelay.Refused(503, "the disk", **{"Retry-After": "30"})

alarmrelay.Spool.store = refuse
"""
"""Lets the spool refuse each alarm, "the disk", and only after 0.6 seconds."""
