"""A server in a process of its own among clients that mean no good: slow ones, many, and signals.

The engine is a stub, so that what is tested is the server; `tests/end_to_end/test_serve.py` has a model.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import psutil
import pytest

from mm_interleaved.serving.settings import Limits, ServerSettings
from serving_requests import chat, chunks, error
from stub_serving import StubEngine, raw, running_server

STUB = Path(__file__).parents[1] / "stub_serving.py"


class Process:
    """The stub's server.

    Args:
        seconds: of each of its steps.
        grace: after the first signal.
    """

    def __init__(self, seconds: float = 0.0, grace: float = 20.0):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(STUB.parent)])}
        command = [sys.executable, str(STUB), str(seconds), str(grace)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
        self.port = int(self.process.stdout.readline())
        limits = httpx2.Limits(max_connections=64)
        self.client = httpx2.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60, limits=limits)
        while True:
            try:
                assert self.client.get("/health").status_code == 200
                return
            except httpx2.TransportError:
                time.sleep(0.05)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.client.close()
        self.process.kill()
        self.process.wait(10)


def nonce_answer(client, number: int) -> bool:
    """Whether the answer to a request, streamed every second time, is its own and whole."""
    nonce = f"nonce-{number:04d}-{number * 7919 % 10_007}"
    found = chat(client, nonce, stream=bool(number % 2), seed=number)
    if not number % 2:
        return found.json()["choices"][0]["message"]["content"] == f"0: {nonce}\n\n2: {nonce}"
    *parts, done = chunks(found)
    reasons = [part["choices"][0]["finish_reason"] for part in parts]
    text = "".join(part["choices"][0]["delta"].get("content", "") for part in parts)
    return done == "[DONE]" and reasons.count("stop") == 1 and text == f"0: {nonce}\n\n2: {nonce}"


def test_two_thousand_requests_lose_nothing_and_leave_nothing():
    """Clients that leave, bad requests and images among them; memory and open files stay as they were."""
    with Process() as server, ThreadPoolExecutor(32) as pool:
        process = psutil.Process(server.process.pid)

        def ask(number):
            if number % 10 == 7:
                return error(chat(server.client, gidance_scale=number))["param"] == "gidance_scale"
            if number % 10 == 9:
                body = {"messages": [{"role": "user", "content": "slow"}], "stream": True}
                with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
                    return next(response.iter_lines()).startswith("data: ")
            if number % 10 == 5:
                asked = {
                    "messages": [{"role": "user", "content": "a"}],
                    "answer_format": "markdown",
                    "size": "64x64",
                }
                return "/files/" in server.client.post("/v1/chat/completions", json=asked).text
            return nonce_answer(server.client, number)

        assert all(pool.map(ask, range(400)))
        time.sleep(0.3)
        # 256 MB of images may wait at their addresses: here they are a few kB each.
        before, files = process.memory_info().rss, process.num_fds()
        assert all(pool.map(ask, range(400, 2000)))
        time.sleep(0.5)
        text = server.client.get("/metrics").text
        assert "\nmm_interleaved_running 0.0" in text and "\nmm_interleaved_queued 0.0" in text
        assert process.memory_info().rss - before < 20 * 2**20
        assert process.num_fds() <= files + 4


def test_a_signal_under_load_loses_nothing_that_was_taken():
    with Process(seconds=0.02) as server, ThreadPoolExecutor(40) as pool:
        running = [pool.submit(nonce_answer, server.client, number) for number in range(20)]
        while "\nmm_interleaved_running 20.0" not in server.client.get("/metrics").text:
            time.sleep(0.005)
        server.process.send_signal(signal.SIGTERM)
        while server.client.get("/ready").status_code == 200:
            time.sleep(0.002)
        refused = chat(server.client, "new")
        assert error(refused, 503)["code"] == "draining" and refused.headers["retry-after"]
        assert all(each.result() for each in running)
        assert server.process.wait(15) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(number):
    with Process(seconds=5.0, grace=600.0) as server, ThreadPoolExecutor(1) as pool:
        running = pool.submit(chat, server.client, "hello")
        while "\nmm_interleaved_running 1.0" not in server.client.get("/metrics").text:
            time.sleep(0.005)
        server.process.send_signal(number)
        while server.client.get("/ready").status_code == 200:
            time.sleep(0.002)
        server.process.send_signal(number)
        assert server.process.wait(2) == 130
        assert isinstance(running.exception(), httpx2.TransportError)


def test_what_has_not_finished_after_the_grace_fails_and_the_exit_code_is_0():
    with Process(seconds=60.0, grace=0.5) as server, ThreadPoolExecutor(1) as pool:
        pool.submit(chat, server.client, "hello")
        while "\nmm_interleaved_running 1.0" not in server.client.get("/metrics").text:
            time.sleep(0.005)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def test_slow_headers_and_bodies_are_closed_while_others_are_answered():
    """100 bodies and 50 headers that drip; the limits are shorter than by default, so that it takes less."""
    limits = Limits(header_seconds=1.0, body_seconds=1.0)
    with running_server(ServerSettings(limits=limits)) as running:
        bodies = [HEAD + b"Content-Length: 1000\r\n\r\n{"] * 75 + [
            HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
        ] * 25
        held = []
        for data in [*bodies, *[HEAD] * 50]:
            connection = socket.create_connection(("127.0.0.1", running.port))
            connection.sendall(data)
            held.append(connection)
        began, slowest, is_open = time.monotonic(), 0.0, set(held)
        with httpx2.Client(base_url=running.url) as client:
            while is_open and time.monotonic() - began < 10:
                for connection in list(is_open):
                    try:
                        connection.sendall(b"X")
                        connection.setblocking(False)
                        if not connection.recv(65536):
                            is_open.discard(connection)
                    except BlockingIOError:
                        pass
                    except OSError:
                        is_open.discard(connection)
                    finally:
                        connection.setblocking(True)
                asked = time.monotonic()
                assert client.get("/health").status_code == 200
                slowest = max(slowest, time.monotonic() - asked)
                time.sleep(0.05)
        assert not is_open, f"{len(is_open)} of {len(held)} are still held"
        assert slowest < 1.0
        for connection in held:
            connection.close()


def test_a_slow_body_is_told_so():
    with running_server(ServerSettings(limits=Limits(body_seconds=0.3))) as running:
        answer = raw(running.port, HEAD + b"Content-Length: 1000\r\n\r\n{")
    assert answer.startswith(b"HTTP/1.1 408 ") and b"connection: close" in answer.lower()
    assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["code"] == "timeout"


def test_a_long_upload_that_goes_on_is_read():
    with running_server(
        ServerSettings(limits=Limits(body_seconds=0.3, body_bytes_per_second=10_000))
    ) as running:
        body = json.dumps({"messages": [{"role": "user", "content": "x" * 15_000}]}).encode()
        with socket.create_connection(("127.0.0.1", running.port), 5) as connection:
            connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body))
            for start in range(0, len(body), 2000):
                connection.sendall(body[start : start + 2000])
                time.sleep(0.1)
            assert connection.recv(100).startswith(b"HTTP/1.1 200 ")


def test_a_queue_far_over_its_capacity_stays_bounded():
    """Ten times as many as it takes: each is answered or refused, and none waits without end."""
    with running_server(engine=StubEngine(max_running=4, max_queue=16, seconds=0.01)) as running:
        limits = httpx2.Limits(max_connections=200)
        with (
            httpx2.Client(base_url=running.url, timeout=30, limits=limits) as client,
            ThreadPoolExecutor(200) as pool,
        ):
            found = list(pool.map(lambda number: chat(client, f"{number}", layout="T"), range(200)))
        kinds = [each.status_code for each in found]
        assert set(kinds) == {200, 429} and kinds.count(200) >= 20
        assert all(each.headers["retry-after"] for each in found if each.status_code == 429)


def test_schemathesis_finds_no_failure_of_ours():
    """Requests made of our own OpenAPI description, right and wrong ones: never a 5xx."""
    with running_server() as running:
        command = [
            str(Path(sys.executable).with_name("schemathesis")), "run", f"{running.url}/openapi.json",
            "--max-examples", "10", "--checks", "not_a_server_error,status_code_conformance",
            "--phases", "coverage,fuzzing", "--mode", "all", "--seed", "1", "--workers", "1", "--no-color",
        ]  # fmt: skip
        found = subprocess.run(command, capture_output=True, text=True, timeout=280)
        assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]
        with httpx2.Client(base_url=running.url) as client:
            assert chat(client, "after", layout="T").json()["choices"][0]["message"]["content"] == "0: after"
