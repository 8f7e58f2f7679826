"""A stop answers what is on its way, lets the send in flight end, and waits for nobody else."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import threading

import pytest
from harness import Client, Relay, alarm, crowd, flood, head, post_from, posted, wait_until
from webex_standin import Fault

NEIGHBOUR, OTHER = "127.0.0.2", "127.0.0.3"


def terminate(relay: Relay) -> None:
    """Begin a stop, and wait until nothing listens: from then on it waits for what is under way."""

    def is_refused() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", relay.port)) != 0

    relay.terminate()
    relay.told("STOPPING=1")
    wait_until(is_refused)


@pytest.mark.pitfall(14)
def test_a_stop_waits_for_a_request_in_flight_but_not_for_who_has_nothing_to_say(tmp_path, webex):
    body = alarm()
    forever = dict.fromkeys(("STOP_S", "HEADER_S", "BODY_S", "IDLE_S"), 3600)
    limits = {**forever, "GRACE_S": 0.05, "LINGER_S": 0.3, "TICK_S": 0.1}
    with (
        Relay(tmp_path, webex.url, limits) as relay,
        crowd(relay, 5) as (busy, refused, unread, idle, silent),
    ):
        busy.send(head(Content_Length=len(body)), body[:9])  # and the connection is to be kept
        assert refused.ask(b"no HTTP\r\n").status == 400
        assert unread.ask(head(authorization=None, Content_Length=1000)).status == 401
        assert idle.ask(posted()).status == 200
        assert post_from(relay, OTHER) == 200  # accepted after the silent one
        terminate(relay)
        for client in (silent, idle, unread, refused):
            assert client.is_closed()
        with pytest.raises(subprocess.TimeoutExpired):
            relay.process.wait(0.5)  # it waits for us
        answer = busy.ask(body[9:])
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert relay.process.wait(20) == 0
    with Relay(tmp_path, webex.url):
        webex.wait_for_texts(json.loads(body)["message"])


@pytest.mark.pitfall(14)
def test_a_stop_does_not_wait_for_clients_that_go_on_posting(tmp_path, webex):
    with Relay(tmp_path, webex.url, {"STOP_S": 3600}) as relay, flood(relay, 2):
        relay.terminate()
        assert relay.process.wait(20) == 0


@pytest.mark.pitfall(14)
def test_a_stop_answers_what_came_in_at_the_same_time(relay):
    with crowd(relay, 40) as clients:
        for client in clients:
            assert client.ask(posted()).status == 200
        relay.process.send_signal(signal.SIGSTOP)
        for client in clients:
            client.send(posted())
        relay.terminate()
        relay.process.send_signal(signal.SIGCONT)
        assert [client.answer().status for client in clients] == [200] * 40
        assert relay.process.wait(20) == 0


@pytest.mark.pitfall(14)
def test_a_stop_answers_requests_that_are_on_their_way(tmp_path, webex):
    limits = {"GRACE_S": 20}
    with Relay(tmp_path, webex.url, limits) as relay, crowd(relay, 20) as silent:
        assert post_from(relay, OTHER) == 200  # accepted after them
        terminate(relay)
        for client in silent:
            client.send(posted())
        assert [client.answer().status for client in silent] == [200] * 20
        assert relay.process.wait(20) == 0


def test_a_stop_lets_the_send_in_flight_end_and_begins_no_other(tmp_path, webex):
    release = threading.Event()
    webex.faults.append(Fault(take=True, status=200, hold=release))
    with Relay(tmp_path, webex.url) as relay, Client(relay) as under_way:
        under_way.send(b"POST / HTTP/1.1\r\n")  # a request for which the stop waits
        relay.post({"message": "the first"})
        relay.post({"message": "the second"})
        webex.wait_for(lambda: webex.requests)
        terminate(relay)
        under_way.close()
        with pytest.raises(subprocess.TimeoutExpired):
            relay.process.wait(0.5)  # it waits for Webex
        release.set()
        assert relay.process.wait(20) == 0
    assert len(webex.requests) == 1
    with Relay(tmp_path, webex.url):
        webex.wait_for(lambda: len(webex.messages) >= 2)
    first, second = webex.texts()  # the first was recorded, and not sent again
    assert "the first" in first
    assert "the second" in second


@pytest.mark.pitfall(15)
def test_ctrl_c_stops_it_as_well(relay):
    relay.process.send_signal(signal.SIGINT)
    assert relay.process.wait(20) == 0


def test_a_relay_that_was_suspended_goes_on(tmp_path, webex):
    with Relay(tmp_path, webex.url, {"TICK_S": 0.01}) as relay:
        for _ in range(40):
            relay.process.send_signal(signal.SIGSTOP)
            threading.Event().wait(0.02)  # longer than it waits between two looks around
            relay.process.send_signal(signal.SIGCONT)
        assert relay.post({"message": "after it"})[0] == 200
