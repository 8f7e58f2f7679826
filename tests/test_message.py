"""The message in the room: pure functions, so tables."""

from __future__ import annotations

import html
import json
import random
import re
import subprocess
import sys
from zoneinfo import ZoneInfo

import pytest
from harness import PAYLOADS, PROGRAM, RECORDED

import alarmrelay
from alarmrelay import Alarm, Refused, format_digest, parse_alarms, plain_text, show

MADRID = ZoneInfo("Europe/Madrid")
NOON_MS = 1_700_000_000_000  # Tue Nov 14 23:13:20 2023 CET
SAMPLES = sorted(PAYLOADS.glob("*.json"))


def message(alarm: dict, delay_ms: int = 0) -> str:
    return Alarm(alarm, NOON_MS).message(NOON_MS + delay_ms, MADRID)


def lines(alarm: dict) -> list[str]:
    return message(alarm).split("<br>")


def shown_values(alarm: dict) -> list[tuple[str, str]]:
    """What a reader sees of an alarm's values, taken from the message's text alone."""
    pairs = [re.fullmatch(r" \*\*(.*?):\*\* (.*)", line) for line in lines(alarm)[3:]]
    return [(unescape(pair[1]), unescape(pair[2])) for pair in pairs]


def unescape(text: str) -> str:
    return html.unescape(re.sub(r"\\(.)", r"\1", text))


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda path: path.stem)
def test_each_sample_gives_its_golden_message(sample):
    alarm = parse_alarms(sample.read_bytes(), 0)[0].fields
    golden = sample.with_suffix(".md").read_text(encoding="utf-8")
    assert message(alarm) + "\n" == golden


def test_the_samples_cover_what_vmanage_sends():
    names = {path.stem for path in SAMPLES}
    correlated = {
        f"{component}_{place}_{direction}"
        for component in ("bfd", "control", "omp")
        for place in ("tloc", "node", "site")
        for direction in ("down", "up")
    }
    events = {"system_reboot_issued", "interface_down", "interface_up_clear", "cpu_usage"}
    texts = {
        "certificate_expiring",
        "non_ascii",
        "hostile_text",
        "bfd_site_down_14_consumed_events",
    }
    assert correlated | events | texts <= names
    many = json.loads((PAYLOADS / "bfd_site_down_14_consumed_events.json").read_text())
    assert len(many["consumed_events"]) == 14


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_every_key_and_value_of_a_recorded_alarm_is_shown(path):
    alarm = parse_alarms(path.read_bytes(), 0)[0].fields
    expected = [
        (" ".join(key.split("\n")), re.sub(r"[\n\r]", " ", value))
        for entry in alarm["values_short_display"]
        for key, value in entry.items()
    ]
    assert shown_values(alarm) == expected
    assert lines(alarm)[0].startswith(f"Team, **Alarm Event** : {alarm['rule_name_display'][:7]}")


@pytest.mark.parametrize(
    ("receive_time", "expected"),
    [
        (1579323421121, "Sat Jan 18 05:57:01 2020 CET"),
        (1721900000111, "Thu Jul 25 11:33:20 2024 CEST"),
        (1711846799999, "Sun Mar 31 01:59:59 2024 CET"),  # the last moment of winter time
        (1711846800000, "Sun Mar 31 03:00:00 2024 CEST"),
        (1729990799999, "Sun Oct 27 02:59:59 2024 CEST"),  # the last moment of summer time
        (1729990800000, "Sun Oct 27 02:00:00 2024 CET"),
        (1709885642565, "Fri Mar  8 09:14:02 2024 CET"),  # the day is padded with a space
        (0, "Thu Jan  1 01:00:00 1970 CET"),
        (-1, "Thu Jan  1 00:59:59 1970 CET"),
        (999, "Thu Jan  1 01:00:00 1970 CET"),
        (1579323421121.9, "Sat Jan 18 05:57:01 2020 CET"),
        (4102444800000, "Fri Jan  1 01:00:00 2100 CET"),
        (32503680000000, "Wed Jan  1 01:00:00 3000 CET"),
        (253402296000000, "Fri Dec 31 23:40:00 9999 CET"),
        (-62135000000000, "Sun Jan  7 21:31:56 0001 LMT"),
    ],
)
def test_the_receive_time_is_local_in_winter_and_summer(receive_time, expected):
    assert lines({"receive_time": receive_time})[2] == f"**Receive Time:** {expected}"


@pytest.mark.parametrize(
    "receive_time",
    ["1e400", "-1e400", "1e308", "9" * 30, "-" + "9" * 5000, "253402300800000", "null", '"x"',
     "true", "[]", "{}", "NaN", '"1579323421121"', "-62135596800001", "1" + "0" * 400],
)  # fmt: skip
def test_a_receive_time_that_is_no_moment_falls_back(receive_time):
    text = f'{{"receive_time": {receive_time}, "entry_time": 1579323421121}}'
    alarm = parse_alarms(text.encode(), 0)[0].fields
    assert lines(alarm)[2] == "**Receive Time:** Sat Jan 18 05:57:01 2020 CET"
    del alarm["entry_time"]
    assert lines(alarm)[2] == "**Receive Time:** Tue Nov 14 23:13:20 2023 CET"


@pytest.mark.parametrize("language", ["C", "C.UTF-8", "POSIX", "de_DE.ISO-8859-1", "xx_XX"])
def test_the_message_is_the_same_under_any_locale_and_zone_of_the_host(language):
    sample = PAYLOADS / "non_ascii.json"
    environ = {"LC_ALL": language, "LANG": language, "TZ": "Asia/Tokyo"}
    command = [sys.executable, "-X", "dev", str(PROGRAM), "preview", str(sample)]
    done = subprocess.run(command, env=environ, capture_output=True, check=True)
    assert done.stdout == sample.with_suffix(".md").read_bytes()
    assert done.stderr == b""


@pytest.mark.parametrize(
    ("severity", "shown"),
    [
        ("Critical", "🔴 Critical"),
        ("Major", "🟡 Major"),
        ("Medium", "🔵 Medium"),
        ("Minor", "🟢 Minor"),
        ("Odd", "⚪ Odd"),
        (None, "⚪ null"),
        (3, "⚪ 3"),
        (["Major"], '⚪ \\["Major"\\]'),
    ],
)
def test_marks_are_vmanages_colours_and_a_clear_says_so(severity, shown):
    assert lines({"severity": severity})[1] == f"**Severity:** {shown}"
    cleared = lines({"severity": severity, "active": False})[1]
    assert cleared == f"**Severity:** ✅ cleared ({shown.split(' ', 1)[1]})"
    assert lines({"severity": severity, "active": "false"})[1] == f"**Severity:** {shown}"


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"rule_name_display": "Certificate expiring", "type": "x"}, "Certificate expiring"),
        ({"rule_name_display": "", "rulename": "tloc_down"}, "tloc_down"),
        ({"rule_name_display": None, "rulename": 7, "type": "node_up"}, "node_up"),
        ({"rule_name_display": "  ", "eventname": "cpu-usage"}, "cpu-usage"),
        ({"eventname": "rulename"}, "unknown alarm"),
        ({}, "unknown alarm"),
    ],
)
def test_the_name_falls_back(fields, name):
    assert f"**Alarm Event** : {name}, **Message**" in message(fields)


def test_what_comes_first_wins():
    alarm = {"rule_name_display": "a", "rulename": "b", "type": "c", "eventname": "d"}
    for key in list(alarm):
        assert f"**Alarm Event** : {alarm[key]}, " in message(alarm)
        del alarm[key]
    alarm = {"values_short_display": [{"a": 1}], "values": [{"b": 1}], "devices": [{"c": 1}]}
    for name in "abc":
        assert shown_values(alarm) == [(name, "1")]
        del alarm[next(iter(alarm))]


@pytest.mark.parametrize(
    ("alarm", "shown"),
    [
        ({"values_short_display": [{"a": "1"}, {"b": "2"}]}, [("a", "1"), ("b", "2")]),
        ({"values_short_display": [], "values": [{"a": 1}]}, [("a", "1")]),
        ({"values_short_display": [{}], "values": {"a": None}}, [("a", "null")]),
        ({"values": "x", "devices": [{"a": {"b": [1, "ñ"]}}]}, [("a", '{"b": [1, "ñ"]}')]),
        ({"values_short_display": [3, {"a": True}], "values": [{"b": 1}]}, [("a", "true")]),
        ({"devices": [{"a": 1.5}]}, [("a", "1.5")]),
        ({"values": [["a"]]}, []),
    ],
)
def test_values_fall_back_and_anything_is_shown_as_text(alarm, shown):
    assert shown_values(alarm) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("System_Reboot_Issued", "System_Reboot_Issued"),
        ("_edge_ a_b c__d __init__ _", "\\_edge\\_ a_b c__d \\_\\_init\\_\\_ \\_"),
        ("ñ_ñ 接_口 1_2", "ñ_ñ 接_口 1_2"),
        ("<@all>", "&lt;@all&gt;"),
        ("&amp; &", "&amp;amp; &amp;"),
        (
            "[a](http://b) *c* `d` ~~e~~ f\\g",
            "\\[a\\](http://b) \\*c\\* \\`d\\` \\~\\~e\\~\\~ f\\\\g",
        ),
        ("a\nb\r\nc\td\x00e\x7ff\x85g\u2028h\u2029i", "a b  c d e f g h i"),
        ("a\u202eb\u2066c", "a b c"),
        ("lone \ud800 surrogate", "lone   surrogate"),
        ("# - 1. | !", "# - 1. | !"),
    ],
)
def test_alarm_text_is_shown_literally(text, shown):
    assert show(text) == shown
    assert plain_text(show(text)).isascii()


def test_seven_bit_plain_text_has_no_markup_and_stays_small():
    alarm = json.loads((PAYLOADS / "hostile_text.json").read_text())
    text = plain_text(message(alarm))
    assert text.startswith(
        "Team, Alarm Event : System_Reboot_Issued**, **Message** : all is well, Message : <@all> "
        "see [this](https://example.com/), `rm` ~~no~~ **yes** _maybe_ a\\b &lt; # Heading"
    )
    assert "\nSeverity: ? Minor\nReceive Time: Thu Jul 25" in text
    assert "\nkey **bold**: line 1 line 2\n__init__: snake_case _x_ 2*3\n" in text
    assert len(plain_text(message({"message": "ñ" * 5000}))) == 1000


@pytest.mark.parametrize(
    ("delay_s", "words"),
    [
        (300, None),
        (300.001, "5 min"),
        (14 * 60 + 59, "14 min"),
        (119 * 60, "119 min"),
        (2 * 3600, "2 h"),
        (50 * 3600, "50 h"),
        (-86400, None),
    ],
)
def test_old_news_says_so_in_a_last_line(delay_s, words):
    last = message({"values": [{"a": "b"}]}, int(delay_s * 1000)).split("<br>")[-1]
    assert last == (f"**Delayed:** relayed {words} after it came in" if words else " **a:** b")


ALPHABETS = ["a", "ñ", "接", "🚨", "*", "<", "&", "_", "\n", "\\", "a_*ñ🚨<"]


@pytest.mark.parametrize("alphabet", ALPHABETS)
@pytest.mark.parametrize("delay_ms", [0, 3_600_000])
@pytest.mark.parametrize("where", ["message", "rule_name_display", "value", "values", "keys"])
def test_no_message_is_longer_than_webex_takes(alphabet, delay_ms, where):
    for length in (7000, 7200, 7300, 7331, 7336, 7338, 7400, 40_000):
        text = (alphabet * length)[:length]
        alarm: dict = {"receive_time": NOON_MS, "values": [{"first": "kept"}]}
        if where in ("message", "rule_name_display"):
            alarm[where] = text
        elif where == "value":
            alarm["values"].append({"long": text})
        elif where == "values":
            alarm["values"] += [{f"k{i}": text[i : i + 50]} for i in range(0, length, 50)]
        else:
            alarm["values"] += [{text[i : i + 50] + str(i): i} for i in range(0, length, 50)]
        result = message(alarm, delay_ms)
        assert len(result.encode()) <= 7439
        assert not re.search(r"(?<!\\)(\\\\)*\\(<br>|$)", result)  # no escape is cut in half
        assert not re.search(r"&\w*(<br>|$)", result)
        assert result.replace("\\*", "").count("**") % 2 == 0  # nor is a bold word
        assert "***" not in re.sub(r"\\.", "", result)
        assert re.sub(r"\\.", "", result).replace("**", "").count("*") == 0
        if re.search(r"… \(\d+ more lines\)$", result):
            assert ("**Delayed:** relayed 60 min" in result) == bool(delay_ms)
            if where.startswith("value") or where == "keys":
                assert "<br> **first:** kept<br>" in result
            if "complete details" not in result:  # cut in the first line: as much as fits
                assert len(result.encode()) > 7439 - 20
        else:
            assert len(result.split("<br>")) == 3 + len(alarm["values"]) + bool(delay_ms)


def test_what_is_cut_off_is_counted():
    kept = message({"values": [{f"{i}": "x" * 1000} for i in range(20)]})
    shown = kept.count("<br>")
    assert kept.endswith(f"<br>… ({23 - shown} more lines)")
    assert len(kept.encode()) <= 7439 < len(kept.encode()) + 1010


JUNK = [
    *(None, True, False, 0, -1, 1.5, 10**30, -(10**18), float("nan"), float("inf")),
    *("", " ", "x" * 20_000, "\x00\n\u2028", "<@all>", "\ud800", "NaN"),
    *([], {}, [[]], [{}], [None], [{"a": None}], [[[[[[]]]]]], [{"k": "v" * 9000}] * 3),
    {"a": {"b": {"c": [1, 2, {"d": "e"}]}}},
]


def mangle(alarm: object, dice: random.Random) -> object:
    """Return the alarm with some fields missing, of another type, nested, huge or empty."""
    if isinstance(alarm, dict) and alarm:
        mangled = dict(alarm)
        for _ in range(dice.randint(1, 5)):
            key = dice.choice(sorted(alarm))
            action = dice.randrange(4)
            if action == 0:
                mangled.pop(key, None)
            elif action == 1:
                mangled[key] = dice.choice(JUNK)
            elif action == 2:
                mangled[key] = mangle(alarm[key], dice)
            else:
                mangled[str(dice.choice(JUNK))] = dice.choice(JUNK)
        return mangled
    if isinstance(alarm, list) and alarm:
        return [mangle(item, dice) for item in alarm] * dice.randint(0, 3)
    return dice.choice(JUNK)


def test_mangled_alarms_are_relayed_with_what_is_there():
    dice = random.Random(20200118)
    originals = [json.loads(path.read_bytes()) for path in [*SAMPLES, *RECORDED]]
    for number in range(3000):
        mangled = mangle(dice.choice(originals), dice)
        if number % 100 == 0:
            mangled = {}
        # As it comes over the wire, and as it comes out of the spool again.
        (alarm,) = parse_alarms(json.dumps(mangled).encode(), 0)
        alarm = alarmrelay.DECODER.decode(json.dumps(alarm.fields))
        result = message(alarm, dice.choice([0, 10**7]))
        encoded = result.encode()
        assert len(encoded) <= 7439
        assert result.startswith("Team, **Alarm Event** : ")
        assert not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", result)
        assert not re.search(r"<(?!br>)", result)
        assert len(plain_text(result)) <= 1000
        if "more lines)" not in result:
            entries = alarm.get("values_short_display")
            for entry in entries if isinstance(entries, list) else []:
                for key in entry if isinstance(entry, dict) else []:
                    assert f"**{show(key).strip()}:** {show(entry[key])}" in result


def read(body: bytes) -> list[str] | None:
    """Return what the spool would keep, None if the body is refused with a 400."""
    try:
        return [json.dumps(alarm.fields) for alarm in parse_alarms(body, 0)]
    except Refused as refusal:
        return {400: None}[refusal.status]


@pytest.mark.parametrize(
    "shape",
    [
        '{"values": [{"k": %s}], "rulename": "X_Down"}',
        '{"message": %s, "uuid": %s}',
        '{"active": false, "cleared_events": [%s]}',
    ],
)
@pytest.mark.parametrize(("opening", "closing"), ["[]", ('{"a":', "}")], ids=["list", "object"])
def test_the_deepest_alarm_that_is_taken_can_be_shown(shape, opening, closing):
    def text(depth: int) -> bytes:
        return shape.replace("%s", opening * depth + "7" + closing * depth).encode()

    low, high = 1, 20_000
    while low + 1 < high:
        depth = (low + high) // 2
        low, high = (depth, high) if read(text(depth)) else (low, depth)
    for depth in range(max(1, low - 3), low + 1):
        (alarm,) = parse_alarms(text(depth), 0)
        assert alarm.message(0, MADRID)
        assert format_digest([alarm], 0, MADRID)[1] <= 1  # its line was made, long or not
        assert alarm.threads()
    assert low > 100


@pytest.mark.parametrize("depth", [10, 100, 400, 900, 1000, 3000, 10_000, 100_000])
def test_deep_nesting_is_relayed_or_refused_but_never_taken_and_stuck(depth):
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        text = '{"values": [{"deep": ' + opening * depth + "1" + closing * depth + "}]}"
        for kept in (read(text.encode()), read(f"[{text}]".encode())):
            assert kept or depth >= 400
            for body in kept or []:
                assert "**Receive Time:**" in message(alarmrelay.DECODER.decode(body))


@pytest.mark.parametrize(
    ("body", "count"),
    [
        (b"{}", 1),
        (b'[{}, {"a": 1}]', 2),
        (b'\xef\xbb\xbf{"a": 1}', 1),
        ('{"message": "ñ"}'.encode("utf-16"), 1),
        (b'{"message": "broken \xff byte"}', 1),
        (b'{"message": "tab\tand\nline"}', 1),
        (b'{"n": ' + b"7" * 10_000 + b"}", 1),
    ],
)
def test_what_can_be_read_as_an_alarm_is_one(body, count):
    taken = parse_alarms(body, 0)
    assert len(taken) == count
    for alarm in taken:
        text = json.dumps(alarm.fields)
        text.encode()  # it can be stored
        assert alarmrelay.DECODER.decode(text) == alarm.fields


@pytest.mark.parametrize(
    "body",
    [b"", b"  \r\n", b"null", b"7", b'"x"', b"[]", b"[1]", b'[{}, "x"]', b"{", b"{}{}", b"x=1",
     b"\xff\xfe\x00", b"\x00"],
)  # fmt: skip
def test_what_is_no_alarm_is_refused_with_a_reason(body):
    with pytest.raises(Refused) as caught:
        parse_alarms(body, 0)
    assert caught.value.status == 400
    assert "expected" in str(caught.value).lower() or "json" in str(caught.value).lower()
