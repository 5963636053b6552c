"""Under load, among clients that leave: places freed, answers never mixed, failures that stay alone."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from mm_interleaved.serving.settings import Limits, ServerSettings
from serving_requests import chat, chunks, error
from stub_serving import StubEngine, raw, running_server

PATH = "/v1/chat/completions"


def waits(what, seconds=3.0) -> bool:
    """Whether it comes true in time."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if what():
            return True
        time.sleep(0.005)
    return False


def request_bytes(text: str, *, stream: bool, extra: bytes = b"", path: str = PATH) -> bytes:
    asked = {
        "messages": [{"role": "user", "content": text}],
        "stream": stream,
        "layout": "T I T",
        "partial_images": 3,
    }
    if path.endswith("responses"):
        asked = {"input": text, "stream": stream, "layout": "T I T"}
    if path.endswith("generations"):
        asked = {"prompt": text, "stream": stream, "n": 2}
    body = json.dumps(asked).encode()
    return request_head(path, body) + extra + b"\r\n" + body


def request_head(path: str, body: bytes) -> bytes:
    kind = f"Content-Type: application/json\r\nContent-Length: {len(body)}"
    return f"POST {path} HTTP/1.1\r\nHost: x\r\n{kind}\r\n".encode()


@pytest.fixture(scope="module")
def slow():
    """Every step takes 50 ms; two run, four wait."""
    with running_server(engine=StubEngine(max_running=2, max_queue=4, seconds=0.05)) as running:
        yield running


def is_empty(engine) -> bool:
    return not engine.running and not engine.waiting


@pytest.mark.parametrize("path", [PATH, "/v1/responses", "/v1/images/generations"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after", [0.0, 0.02, 0.08, 0.15])
def test_a_client_that_leaves_frees_its_place(slow, path, stream, after):
    aborted = slow.engine.counts.aborted
    connection = socket.create_connection(("127.0.0.1", slow.port))
    connection.sendall(request_bytes("hello", stream=stream, path=path))
    time.sleep(after)
    connection.close()
    assert waits(lambda: is_empty(slow.engine), 1.0)
    if 0 < after < 0.1:
        assert waits(lambda: slow.engine.counts.aborted > aborted, 1.0)


def test_a_client_that_leaves_while_it_waits_frees_its_place(slow):
    with ThreadPoolExecutor(2) as pool:
        running = [
            pool.submit(
                httpx2.post, f"{slow.url}{PATH}", json={"messages": [{"role": "user", "content": f"{i}"}]}
            )
            for i in range(2)
        ]
        assert waits(lambda: len(slow.engine.running) == 2)
        connection = socket.create_connection(("127.0.0.1", slow.port))
        connection.sendall(request_bytes("hello", stream=True))
        assert waits(lambda: len(slow.engine.waiting) == 1)
        connection.close()
        assert waits(lambda: not slow.engine.waiting, 1.0)
        assert [found.result().json()["choices"][0]["message"]["content"] for found in running] == [
            "0: 0\n\n2: 0",
            "0: 1\n\n2: 1",
        ]


def test_a_client_that_leaves_in_the_middle_of_its_body_costs_nothing(slow):
    accepted = len(slow.engine.documents)
    for part in (10, 100, 250):
        connection = socket.create_connection(("127.0.0.1", slow.port))
        connection.sendall(request_bytes("hello " * 20, stream=True)[:part])
        connection.close()
    assert httpx2.get(f"{slow.url}/health").status_code == 200
    assert len(slow.engine.documents) == accepted and is_empty(slow.engine)


def test_ids_that_clients_choose_are_no_keys(slow):
    """Two send the same id, one leaves: the other's answer is its own."""
    same = b"X-Request-Id: same\r\n"
    connection = socket.create_connection(("127.0.0.1", slow.port))
    connection.sendall(request_bytes("leaves", stream=True, extra=same))
    answers: list[bytes] = []
    thread = threading.Thread(
        target=lambda: answers.append(
            raw(slow.port, request_bytes("stays", stream=True, extra=same + b"Connection: close\r\n"))
        )
    )
    thread.start()
    time.sleep(0.06)
    connection.close()
    thread.join(5)
    [answer] = answers
    assert b"stays" in answer and b"leaves" not in answer and b"[DONE]" in answer
    assert b"x-request-id: same" not in answer and b"x-request-id: " in answer


def test_a_full_queue_says_when_to_come_back(slow):
    def ask(number):
        return httpx2.post(f"{slow.url}{PATH}", json={"messages": [{"role": "user", "content": f"{number}"}]})

    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(ask, range(20)))
    answered = [each for each in found if each.status_code == 200]
    refused = [each for each in found if each.status_code != 200]
    assert len(answered) >= 6 and refused
    for each in refused:
        assert error(each, 429)["code"] == "queue_full" and each.headers["retry-after"] == "2"
        assert each.json()["error"]["type"] == "rate_limit_error"
    for number, each in enumerate(found):
        if each.status_code == 200:
            assert each.json()["choices"][0]["message"]["content"] == f"0: {number}\n\n2: {number}"
    assert is_empty(slow.engine)


def test_a_server_that_stops_takes_nothing_new():
    with running_server() as running:
        running.engine.is_draining = True
        with httpx2.Client(base_url=running.url) as client:
            found = chat(client)
            assert error(found, 503)["code"] == "draining" and found.headers["retry-after"] == "3"


def test_an_engine_that_died_is_told():
    with running_server() as running:
        running.engine.healthy = False
        with httpx2.Client(base_url=running.url) as client:
            for path in ("/health", "/ready"):
                found = client.get(path)
                assert found.status_code == 503 and found.headers["retry-after"]
            assert "mm_interleaved_healthy 0.0" in client.get("/metrics").text
        running.engine.healthy = True


@pytest.mark.parametrize("text", ["raises", "fails inside"])
def test_a_failure_of_ours_says_its_number_and_nothing_else(client, caplog, text):
    with caplog.at_level(logging.ERROR):
        found = error(chat(client, text), 500)
    assert found["type"] == "server_error" and found["request_id"]
    assert "secret" not in json.dumps(found) and "Traceback" not in json.dumps(found)
    assert any(found["request_id"] in record.getMessage() for record in caplog.records)
    *_, failed, done = chunks(chat(client, text, stream=True))
    assert failed["error"]["code"] and "secret" not in json.dumps(failed) and done == "[DONE]"
    assert chat(client, "after", layout="T").json()["choices"][0]["message"]["content"] == "0: after"


def test_what_takes_too_long_ends():
    with running_server(ServerSettings(limits=Limits(seconds=0.3)), StubEngine(seconds=0.2)) as running:
        with httpx2.Client(base_url=running.url) as client:
            assert error(chat(client), 504)["code"] == "timeout"
            *_, failed, done = chunks(chat(client, stream=True))
            assert failed["error"]["code"] == "timeout" and done == "[DONE]"
        assert is_empty(running.engine)


def test_a_quiet_stream_is_kept_open_by_comments():
    settings = ServerSettings(keep_alive_seconds=0.02)
    with (
        running_server(settings, StubEngine(seconds=0.1)) as running,
        httpx2.Client(base_url=running.url) as client,
    ):
        found = chat(client, stream=True, layout="T")
    assert found.text.count(": keep-alive\n\n") >= 3
    assert chunks(found)[-1] == "[DONE]"


def test_a_client_that_does_not_read_is_left():
    """Its place is freed, and others do not wait for it."""
    limits = Limits(write_seconds=0.3, times_own_pixels=10_000)
    with running_server(ServerSettings(limits=limits)) as running:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.connect(("127.0.0.1", running.port))
        asked = {
            "messages": [{"role": "user", "content": "hello"}],
            "stream": True,
            "layout": "I I I I",
            "size": "800x800",
        }
        body = json.dumps(asked).encode()
        connection.sendall(request_head(PATH, body) + b"\r\n" + body)
        assert waits(lambda: bool(running.engine.running), 3)
        began = time.monotonic()
        with httpx2.Client(base_url=running.url) as client:
            assert chat(client, layout="T").status_code == 200
        assert time.monotonic() - began < 3
        assert waits(lambda: is_empty(running.engine), 5)
        connection.close()


def _lines(caplog) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.name == "mm_interleaved.serving.guard"]


def test_a_log_is_one_line_a_request_whatever_it_holds(client, caplog):
    evil = "a\r\nINFO forged\x1b[31m\u202e"
    with caplog.at_level(logging.INFO, logger="mm_interleaved.serving"):
        chat(client, evil, model=evil)
        client.get("/a%0d%0aINFO%20forged%1b%5b31m")
        client.get("/v1/models", headers={"X-Request-Id": "x\x1b[31m"})
        # A line is written when its answer has gone: the client may be here before it.
        assert waits(lambda: len(_lines(caplog)) == 3, 5)
    lines = _lines(caplog)
    assert all(line.isprintable() for line in lines)
    assert not any("hello" in line for line in lines)


def test_many_clients_at_once_get_their_own_answers():
    """200 at once, half of them streams: each has its nonce, and every stream one end."""
    with running_server(engine=StubEngine(max_running=16, max_queue=300, seconds=0.001)) as running:
        client = httpx2.Client(base_url=running.url, timeout=60, limits=httpx2.Limits(max_connections=64))

        def ask(number):
            nonce = f"nonce-{number:04d}-{number * 7919 % 10_007}"
            found = chat(client, nonce, stream=bool(number % 2), seed=number)
            assert found.status_code == 200, found.text
            if not number % 2:
                return nonce, found.json()["choices"][0]["message"]["content"]
            *parts, done = chunks(found)
            reasons = [part["choices"][0]["finish_reason"] for part in parts]
            assert done == "[DONE]" and reasons.count("stop") == 1 and reasons[-1] == "stop"
            return nonce, "".join(part["choices"][0]["delta"].get("content", "") for part in parts)

        with client, ThreadPoolExecutor(64) as pool:
            found = list(pool.map(ask, range(200)))
        assert all(answer == f"0: {nonce}\n\n2: {nonce}" for nonce, answer in found) and len(found) == 200
        assert is_empty(running.engine) and running.engine.counts.finished == 200
