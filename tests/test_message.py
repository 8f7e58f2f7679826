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

from alarmrelay import Alarm, BadRequest, Spool, StoredAlarm, cap, format_digest, parse_alarms, show

MADRID = ZoneInfo("Europe/Madrid")
NOON_MS = 1_700_000_000_000  # Tue Nov 14 23:13:20 2023 CET
SAMPLES = sorted(PAYLOADS.glob("*.json"))


def message(fields: dict, delay_ms: int = 0) -> str:
    return Alarm(fields, NOON_MS).message(NOON_MS + delay_ms, MADRID)


def plain_text(fields: dict) -> str:
    return Alarm(fields, NOON_MS).plain_text(MADRID)


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
    names = {"interface_down", "interface_up_clear", "cpu_usage", "certificate_expiring"}
    assert names <= {path.stem for path in SAMPLES}  # beside those of test_threads and test_relay
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
        (1711846799999, "Sun Mar 31 01:59:59 2024 CET"),  # the last moment of winter time
        (1711846800000, "Sun Mar 31 03:00:00 2024 CEST"),
        (1729990799999, "Sun Oct 27 02:59:59 2024 CEST"),  # the last moment of summer time
        (1729990800000, "Sun Oct 27 02:00:00 2024 CET"),
        (1709885642565, "Fri Mar  8 09:14:02 2024 CET"),  # the day is padded with a space
        (0, "Thu Jan  1 01:00:00 1970 CET"),
        (-1, "Thu Jan  1 00:59:59 1970 CET"),
        (999, "Thu Jan  1 01:00:00 1970 CET"),
        (1579323421121.9, "Sat Jan 18 05:57:01 2020 CET"),
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
        (["Major"], '⚪ \\["Major"\\]'),
    ],
)
def test_marks_are_vmanages_colours_and_a_clear_says_so(severity, shown):
    words = shown.split(" ", 1)[1]
    fields = {"severity": severity}
    assert lines(fields)[1] == f"**Severity:** {shown}"
    assert lines({**fields, "active": "false"})[1] == f"**Severity:** {shown}"
    assert lines({**fields, "active": False})[1] == f"**Severity:** ✅ cleared ({words})"
    assert plain_text({**fields, "active": False}).splitlines()[1].endswith(" (cleared)")


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"rule_name_display": "Certificate expiring", "type": "x"}, "Certificate expiring"),
        ({"rule_name_display": "", "rulename": "tloc_down", "type": "x"}, "tloc_down"),
        ({"type": "x", "eventname": "y"}, "x"),
        ({"rule_name_display": None, "rulename": 7, "type": "node_up"}, "node_up"),
        ({"rule_name_display": "  ", "eventname": "cpu-usage"}, "cpu-usage"),
        ({"eventname": "rulename"}, "unknown alarm"),
        ({}, "unknown alarm"),
    ],
)
def test_the_name_falls_back(fields, name):
    assert f"**Alarm Event** : {name}, **Message**" in message(fields)


@pytest.mark.parametrize(
    ("alarm", "shown"),
    [
        ({"values_short_display": [{"a": "1"}, {"b": "2"}]}, [("a", "1"), ("b", "2")]),
        ({"values_short_display": [], "values": [{"a": 1}]}, [("a", "1")]),
        ({"values_short_display": [{}], "values": {"a": None}}, [("a", "null")]),
        ({"values": "x", "devices": [{"a": {"b": [1, "ñ"]}}]}, [("a", '{"b": [1, "ñ"]}')]),
        ({"values_short_display": [3, {"a": True}], "values": [{"b": 1}]}, [("a", "true")]),
        ({"values": [{"a": 1}], "devices": [{"b": 1}]}, [("a", "1")]),
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


def test_what_is_nested_too_deeply_for_python_is_shown_as_that():
    nested: list = []
    for _ in range(10_000):
        nested = [nested]
    assert show(nested) == "nested too deeply to be shown"


def test_the_plain_text_is_in_ascii_without_markup_and_small():
    text = plain_text(json.loads((PAYLOADS / "hostile_text.json").read_text()))
    assert text.splitlines() == [
        "Team, Alarm Event : System_Reboot_Issued**, **Message** : all is well, Message : <@all> "
        "see [this](https://example.com/), `rm` ~~no~~ **yes** _maybe_ a\\b &lt; # Heading  -  "
        "gnp.exe , is received from vManage and here are the complete details",
        "Severity: Minor",
        "Receive Time: Thu Jul 25 11:48:20 2024 CEST",
        "host-name: <@all> _edge_",
        "key **bold**: line 1 line 2",
        "__init__: snake_case _x_ 2*3",
        "<br>: <@personEmail:a@example.com|A>",
    ]
    assert len(plain_text({"message": "ñ" * 5000})) == 1000


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


@pytest.mark.parametrize(
    ("text", "most_bytes", "shown"),
    [
        ("abcd", 4, "abcd"),
        ("abcde", 4, "a…"),
        ("ññ", 4, "ññ"),
        ("ñññ", 5, "ñ…"),
        ("🚨🚨🚨", 11, "🚨…"),
        ("a*b", 4, "a\\*b"),
        ("a***", 6, "a\\*…"),
        ("<<", 8, "&lt;&lt;"),
        ("<<<", 8, "&lt;…"),
        ("a_bc", 4, "a_bc"),
        ("a_bcdef", 6, "a\\_…"),
    ],
)
def test_a_text_is_cut_between_characters_and_their_escapes(text, most_bytes, shown):
    assert cap(text, most_bytes, show) == shown


def test_of_a_message_that_is_too_long_the_long_values_are_cut_and_the_others_stay():
    kept = lines({"message": "x" * 9000, "values": [{"a": "y" * 1000}, {"b": "ñ" * 4000}]})
    assert re.fullmatch(r"Team, .* : x{2900,2997}…, is received from vManage .*", kept[0])
    assert kept[3] == f" **a:** {'y' * 1000}"
    assert re.fullmatch(r" \*\*b:\*\* ñ{1450,1498}…", kept[4])


ALPHABETS = ["a", "ñ", "接", "🚨", "*", "<", "&", "_", "\n", "\\", "a_*ñ🚨<"]


@pytest.mark.parametrize("alphabet", ALPHABETS)
@pytest.mark.parametrize("delay_ms", [0, 3_600_000])
@pytest.mark.parametrize("where", ["message", "rule_name_display", "value", "values", "keys"])
def test_no_message_is_longer_than_webex_takes(alphabet, delay_ms, where):
    for length in (2900, 3000, 7000, 7200, 7300, 7331, 7336, 7338, 7400, 40_000):
        text = (alphabet * length)[:length]
        parts = [text[i : i + 50] for i in range(0, length, 50)]
        alarm: dict = {"receive_time": NOON_MS, "values": [{"first": "kept"}]}
        if where in ("message", "rule_name_display"):
            alarm[where] = text
        elif where == "value":
            alarm["values"].append({"long": text})
        elif where == "values":
            alarm["values"] += [{f"k{i}": part} for i, part in enumerate(parts)]
        else:
            alarm["values"] += [{f"{part}{i}": i} for i, part in enumerate(parts)]
        result = message(alarm, delay_ms)
        assert len(result.encode()) <= 7439
        assert not re.search(r"(?<!\\)(\\\\)*\\(<br>|…|$)", result)  # no escape is cut in half
        assert not re.search(r"&\w*(<br>|…|$)", result)
        without_escapes = re.sub(r"\\.", "", result)
        assert "***" not in without_escapes
        assert without_escapes.count("**") % 2 == 0  # nor is a bold word
        assert "*" not in without_escapes.replace("**", "")
        kept = result.split("<br>")
        assert "complete details" in kept[0]
        assert kept[3] == " **first:** kept"
        if delay_ms:
            assert kept.pop() == "**Delayed:** relayed 60 min after it came in"
        more = re.fullmatch(r"… \((\d+) more lines\)", kept[-1])
        if more:
            assert len(result.encode()) > 7439 - 400  # another line would be too long
            assert len(kept) - 1 + int(more[1]) == 3 + len(alarm["values"])
        else:
            assert len(kept) == 3 + len(alarm["values"])


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


def from_the_spool(alarm: Alarm) -> Alarm:
    """Return an alarm as it is once it was stored."""
    return StoredAlarm.from_row((1, "/", json.dumps(alarm.fields), NOON_MS, None)).alarm


def test_mangled_alarms_are_relayed_with_what_is_there():
    dice = random.Random(20200118)
    originals = [json.loads(path.read_bytes()) for path in [*SAMPLES, *RECORDED]]
    for number in range(3000):
        mangled = mangle(dice.choice(originals), dice)
        if number % 100 == 0:
            mangled = {}
        # As it comes over the wire, and as it comes out of the spool again.
        (alarm,) = parse_alarms(json.dumps(mangled).encode(), 0)
        fields = from_the_spool(alarm).fields
        result = message(fields, dice.choice([0, 10**7]))
        encoded = result.encode()
        assert len(encoded) <= 7439
        assert result.startswith("Team, **Alarm Event** : ")
        assert not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", result)
        assert not re.search(r"<(?!br>)", result)
        assert re.fullmatch(r"[\n -~]{1,1000}", plain_text(fields))
        if "…" not in result:
            entries = fields.get("values_short_display")
            for entry in entries if isinstance(entries, list) else []:
                for key in entry if isinstance(entry, dict) else []:
                    assert f"**{show(key).strip()}:** {show(entry[key])}" in result


def stored(spool: Spool, body: bytes) -> Alarm | None:
    """Return an alarm as it comes out of the spool, None if it is refused."""
    room = str(len(body))  # one for each
    try:
        spool.store(room, body, parse_alarms(body, NOON_MS), "127.0.0.1")
    except BadRequest:
        return None
    return spool.next_batch(room).alarms[0].alarm


@pytest.mark.parametrize(
    "shape",
    [
        '{"values": [{"k": %s}], "rulename": "X_Down"}',
        '[{"message": %s, "uuid": %s}]',
        '{"active": false, "cleared_events": [%s]}',
    ],
)
@pytest.mark.parametrize(("opening", "closing"), ["[]", ('{"a":', "}")], ids=["list", "object"])
def test_deep_nesting_is_relayed_or_refused_but_never_taken_and_stuck(
    spool, shape, opening, closing
):
    def body(depth: int) -> bytes:
        return shape.replace("%s", opening * depth + "7" + closing * depth).encode()

    taken = 100
    refused = 100_000
    assert stored(spool, body(taken))
    assert not stored(spool, body(refused))
    while taken + 1 < refused:
        depth = (taken + refused) // 2
        if stored(spool, body(depth)):
            taken = depth
        else:
            refused = depth
    for depth in range(taken - 3, taken + 1):
        alarm = stored(spool, body(depth))
        text = alarm.message(NOON_MS, MADRID)
        assert text.startswith("Team, **Alarm Event** : ")
        assert "damaged" not in text
        assert alarm.plain_text(MADRID)
        assert format_digest([alarm], NOON_MS, MADRID)[1] <= 1  # its line was made, long or not
        assert isinstance(alarm.uuid() + "".join(alarm.cleared_uuids()), str)
        assert alarm.outage() is None or "X" in alarm.outage()


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
        json.dumps(alarm.fields).encode()  # it can be stored
        assert from_the_spool(alarm) == Alarm(alarm.fields, NOON_MS)


@pytest.mark.parametrize(
    "body",
    [b"", b"  \r\n", b"null", b"7", b'"x"', b"[]", b"[1]", b'[{}, "x"]', b"{", b"{}{}", b"x=1",
     b"\xff\xfe\x00", b"\x00"],
)  # fmt: skip
def test_what_is_no_alarm_is_refused_with_a_reason(body):
    with pytest.raises(BadRequest, match=r"no JSON that can be read: |expected an alarm, a JSON "):
        parse_alarms(body, 0)
