"""What a browser sees of a relay."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

from harness import Relay, get


class Page(HTMLParser):
    """What the status page of a relay shows."""

    def __init__(self, relay: Relay) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.h1: list[str] = []  # its class and its text
        self.rows: dict[str, list[list[str]]] = {}  # by the table's class; class and cells of each
        self.place: list[str] = []  # where text goes
        status, self.headers, self.text = get(relay, "/")
        assert status == 200
        self.feed(self.text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag == "table":
            self.table = self.rows.setdefault(found["class"], [])
        elif tag == "tr":
            self.table.append([found.get("class") or ""])
        elif tag in ("h1", "td"):
            self.place = self.h1 if tag == "h1" else self.table[-1]
            self.place += [found["class"], ""] if tag == "h1" else [""]

    def handle_endtag(self, tag: str) -> None:
        self.place = []

    def handle_data(self, data: str) -> None:
        if self.place:
            self.place[-1] += data


def sentence(said: str) -> str:
    """Return what a status says, without its countdown."""
    said = said.replace("STATUS=", "").partition("; listening on ")[0]
    return re.sub(r"again in \d+ s", "again", said)
