"""Verdicts, their memory, and a judge behind a URL: busy, silly, gone."""

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from PIL import Image as PILImage

from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.errors import InputError, ModelFileError, StorageError, UsageError
from mm_interleaved.evaluation.judges.judge import (
    AXES,
    InvalidVerdictError,
    RememberingJudge,
    prompt_parts,
    read_verdict,
)
from mm_interleaved.evaluation.judges.local import LocalJudge
from mm_interleaved.evaluation.judges.url import UrlJudge

QUESTION = Document(id="q", parts=(Text("Draw a cat."),))
ANSWER = Document(id="q", parts=(Text("Here."), Image(PILImage.new("RGB", (4, 4), (9, 9, 9)))))
GOOD = json.dumps({name: number for number, name in enumerate(AXES)})


class Scripted:
    """Replies with the given texts in turn."""

    name = "scripted"

    def __init__(self, *replies):
        self.replies, self.asked = list(replies), 0

    def reply(self, parts, attempt):
        self.asked += 1
        return self.replies.pop(0)


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ('{"a": 3, "b": 10}', {"a": 3, "b": 10}),
        ('I think {"a": 1} at first, but: {"a": 4, "b": 0, "c": 1}.', {"a": 4, "b": 0}),
        ('{"a": 3}', None),
        ('{"a": 3, "b": 11}', None),
        ('{"a": 3, "b": true}', None),
        ('{"a": 3, "b": 2.5}', None),
        ("{a: 3}", None),
        ("", None),
    ],
)
def test_a_verdict_has_a_whole_number_for_every_axis(text, scores):
    assert read_verdict(text, ["a", "b"]) == scores


def test_an_invalid_verdict_is_asked_for_again_and_a_valid_one_is_remembered(tmp_path):
    path = tmp_path / "judge" / "verdicts.jsonl"
    scripted = Scripted("no idea", GOOD)
    judge = RememberingJudge(scripted, path)
    verdict = judge(QUESTION, ANSWER)
    assert scripted.asked == 2 and list(verdict.scores) == list(AXES) and verdict.judge == "scripted"
    assert judge(QUESTION, ANSWER) == verdict and scripted.asked == 2
    # Another run goes on with what there is; other pixels are another answer.
    again = Scripted(GOOD)
    assert RememberingJudge(again, path)(QUESTION, ANSWER) == verdict and again.asked == 0
    other = Document(id="q", parts=(Text("Here."), Image(PILImage.new("RGB", (4, 4), (9, 9, 8)))))
    RememberingJudge(again, path)(QUESTION, other)
    assert again.asked == 1 and len(path.read_text().splitlines()) == 2


def test_a_judge_that_never_judges_is_named(tmp_path):
    with pytest.raises(InvalidVerdictError, match=r"scripted: no verdict about 'q' in 3 attempts.*found 'c'"):
        RememberingJudge(Scripted("a", "b", "c"), tmp_path / "v.jsonl")(QUESTION, ANSWER)
    assert not (tmp_path / "v.jsonl").exists()
    (tmp_path / "v.jsonl").write_text('{"key": 1}\n')
    with pytest.raises(InputError, match=r"v\.jsonl:1: no verdict of a judge"):
        RememberingJudge(Scripted(), tmp_path / "v.jsonl")


def test_a_missing_answer_is_said_to_be_missing():
    texts = [part.text for part in prompt_parts(QUESTION, None) if isinstance(part, Text)]
    assert "(there is no answer)" in texts and "Draw a cat." in texts


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, self.headers.get("Authorization"), body))
        status, text = self.server.replies.pop(0)
        data = text.encode()
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", "0")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    found = HTTPServer(("127.0.0.1", 0), Handler)
    found.seen, found.replies = [], []
    thread = threading.Thread(target=found.serve_forever)
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


def completion(text):
    return 200, json.dumps({"choices": [{"message": {"content": text}}]})


def test_a_busy_server_is_asked_again(server, tmp_path):
    server.replies = [(429, ""), (503, ""), completion("hm"), completion(GOOD)]
    url = f"http://127.0.0.1:{server.server_port}/v1/"
    judge = UrlJudge(url, "judge-1", "secret", wait=0.0)
    RememberingJudge(judge, tmp_path / "v.jsonl")(QUESTION, ANSWER)
    assert len(server.seen) == 4
    path, key, body = server.seen[-1]
    assert (path, key, body["model"]) == ("/v1/chat/completions", "Bearer secret", "judge-1")
    kinds = [part["type"] for part in body["messages"][0]["content"]]
    assert kinds.count("image_url") == 1 and kinds[0] == "text"
    assert [seen[2]["temperature"] for seen in server.seen] == [0.0, 0.0, 0.0, 0.5]
    assert "secret" not in (tmp_path / "v.jsonl").read_text() and "secret" not in judge.name


def test_a_server_that_hangs_or_breaks_off_is_asked_again(tmp_path):
    """Once silence, once half a reply, once no HTTP; then a verdict."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        good = json.dumps({"choices": [{"message": {"content": GOOD}}]})
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(good)}\r\nConnection: close\r\n\r\n"
        replies = [None, head + good[:9], "what?\r\n\r\n", head + good]

        def serve():
            held = []
            for reply in replies:
                connection, _ = listening.accept()
                if reply is None:
                    held.append(connection)
                    continue
                with connection:
                    received = b""
                    while not received.endswith(b"}"):
                        received += connection.recv(2**20)
                    connection.sendall(reply.encode())
            for connection in held:
                connection.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        judge = UrlJudge(url, "m", seconds=0.5, wait=0.0)
        verdict = RememberingJudge(judge, tmp_path / "v.jsonl")(QUESTION, ANSWER)
        thread.join(timeout=10)
    assert list(verdict.scores) == list(AXES) and not thread.is_alive()


def test_a_run_that_was_killed_while_it_kept_a_verdict_goes_on(tmp_path):
    path = tmp_path / "v.jsonl"
    RememberingJudge(Scripted(GOOD), path)(QUESTION, ANSWER)
    whole = path.read_bytes()
    other = Document(id="q", parts=(Text("Another answer."),))
    RememberingJudge(Scripted(GOOD), path)(QUESTION, other)
    torn = path.read_bytes()[:-7]
    assert torn.startswith(whole)
    path.write_bytes(torn)
    again = Scripted(GOOD)
    judge = RememberingJudge(again, path)
    judge(QUESTION, ANSWER)
    assert again.asked == 0
    judge(QUESTION, other)
    assert again.asked == 1 and len(path.read_text().splitlines()) == 2


def test_what_a_server_does_wrong_is_said(server):
    judge = UrlJudge(f"http://127.0.0.1:{server.server_port}", "m", wait=0.0)
    server.replies = [(401, "")]
    with pytest.raises(StorageError, match="refused with 401"):
        judge.reply([Text("x")], 0)
    server.replies = [(200, "<html>")]
    with pytest.raises(StorageError, match="expected a chat completion"):
        judge.reply([Text("x")], 0)
    server.replies = [(503, "")] * 5
    with pytest.raises(StorageError, match="refused with 503"):
        judge.reply([Text("x")], 0)
    with pytest.raises(UsageError, match="expected an http or https URL"):
        UrlJudge("file:///etc/passwd", "m")
    with pytest.raises(StorageError, match="cannot be reached"):
        UrlJudge("http://127.0.0.1:9", "m", wait=0.0).reply([Text("x")], 0)


def test_a_local_judge_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ModelFileError, match=r"judge .*cannot be loaded"):
        LocalJudge(tmp_path / "nowhere")
