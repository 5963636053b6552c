"""Files that expire, rates, names and keys: the small parts by themselves."""

from __future__ import annotations

import pytest

from mm_interleaved.errors import InputError, UsageError
from mm_interleaved.serving.files_store import FilesStore
from mm_interleaved.serving.keys import KEY_VARIABLE, read_keys
from mm_interleaved.serving.metrics import Rate
from mm_interleaved.serving.settings import Limits, checked_url, name_of


def test_files_expire_and_the_oldest_make_room():
    now = [0.0]
    store = FilesStore(Limits(files_bytes=100, file_seconds=10), clock=lambda: now[0])
    first = store.add(b"x" * 40)
    now[0] = 5
    second = store.add(b"y" * 40)
    assert store.get(first) == b"x" * 40 and len(first) == 32
    third = store.add(b"z" * 40)
    assert store.get(first) is None and store.get(second) and store.get(third) and store.held_bytes == 80
    now[0] = 15
    assert store.get(second) is None and store.get(third) is None and store.held_bytes == 0


@pytest.mark.parametrize("host", ["http://a", "https://a.b:8/under/it", "http://[::1]:8000"])
def test_a_file_is_known_by_any_address_that_names_it(host):
    store = FilesStore(Limits())
    name = store.add(b"x")
    assert store.named_by(f"{host}/files/{name}.png") == b"x"
    for wrong in (
        f"{host}/files/{name}",
        f"{host}/files/{name}.png?a",
        f"{host}/{name}.png",
        f"file:///files/{name}.png",
    ):
        assert store.named_by(wrong) is None


def test_a_rate_is_taken_over_the_last_minute():
    rate = Rate()
    assert rate.of(0, 0) == 0
    assert rate.of(30, 10) == pytest.approx(3)
    assert rate.of(90, 70) == pytest.approx(1)
    assert rate.of(90, 140) == pytest.approx(0)


def test_keys_come_from_flags_a_file_and_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    (tmp_path / "keys").write_text("one\n\n two \n")
    assert read_keys(["zero"], tmp_path / "keys") == ("zero", "one", "two")
    monkeypatch.setenv(KEY_VARIABLE, "three")
    assert read_keys([], None) == ("three",)
    for wrong in ("", "a b", "\u00e9"):
        with pytest.raises(UsageError, match="api key"):
            read_keys([wrong], None)
    (tmp_path / "empty").write_text("\n")
    for name in ("empty", "missing"):
        with pytest.raises(InputError, match=name):
            read_keys(["zero"], tmp_path / name)


@pytest.mark.parametrize(
    "url", ["pictures.example", "ftp://x", "http://a b", "http://a/(x)", "http://a?b", "javascript:x"]
)
def test_the_public_address_goes_into_markdown_and_is_checked(url):
    with pytest.raises(UsageError, match="public_url"):
        checked_url(url)


def test_metrics_tell_what_is_asked_for(client):
    assert client.get("/health").status_code == 200
    text = client.get("/metrics").text
    for name in (
        "queued",
        "running",
        "aborted_total",
        "batches_total",
        "seconds_to_first_token",
        "seconds_to_first_image",
        "text_tokens_per_second",
        "images_per_second",
        "prefix_hit_rate",
        "prefix_bytes",
        "requests_total",
    ):
        assert f"\nmm_interleaved_{name}" in text


def test_routes_in_metrics_are_few_whatever_is_asked_for(client):
    for number in range(5):
        client.get(f"/made-up/{number}")
        client.get(f"/files/{number:032x}.png")
    text = client.get("/metrics").text
    assert (
        "made-up" not in text and 'route="other",status="404"' in text and 'route="/files/{name}.png"' in text
    )


@pytest.mark.parametrize("model", ["storyworld", "models/storyworld", "somebody/storyworld", "./storyworld/"])
def test_a_model_is_asked_for_by_what_stands_last_in_its_name(model):
    assert name_of(model) == "storyworld"
