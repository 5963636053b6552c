"""The command line from outside: what is typed, what is written, how it ends."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage
from skimage import data as skimage_data

from mm_interleaved.cli.chat import split_path
from mm_interleaved.cli.main import run, stop
from mm_interleaved.generation.settings import GenerationSettings
from studies.__main__ import create_app

COMMANDS = (
    "generate", "replay", "caption", "vqa", "ground", "draw", "story", "chat",
    "info", "convert", "compose", "doctor", "plan", "evaluate", "compare", "data", "serve",
)  # fmt: skip


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "given.png"
    PILImage.new("RGB", (40, 30), (30, 160, 90)).save(path)
    return path


@pytest.fixture
def documents(tmp_path, picture) -> Path:
    """Two good documents and one with a broken image."""
    (tmp_path / "broken.png").write_bytes(picture.read_bytes()[:50])
    lines = [
        {"id": "a", "content": [{"type": "text", "text": "Pip"}, {"type": "image", "image": "given.png"}]},
        {"id": "b", "content": [{"type": "image", "image": "broken.png"}]},
        {"id": "c", "content": [{"type": "text", "text": "no image"}], "layout": "T"},
    ]
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def records(folder: Path) -> list[dict]:
    lines = (folder / "results.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def fails(capsys, code: int, *arguments) -> str:
    """The one sentence on stderr of a command that ends with this code."""
    assert run([str(argument) for argument in arguments]) == code
    error = capsys.readouterr().err
    assert error.startswith("mm-interleaved: ") and error.count("\n") == 1, error
    return error


# ---- What is loaded, what is told ----


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["generate", "--help"], ["--version"], ["evaluate", "--help"], ["compare", "--help"]],
)
def test_help_loads_neither_torch_nor_transformers(arguments):
    script = (
        "import sys; from mm_interleaved.cli.main import run; code = run(sys.argv[1:])\n"
        "assert not {'torch', 'transformers', 'diffusers'} & set(sys.modules), 'loaded'\n"
        "sys.exit(code)"
    )
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, stdout=subprocess.DEVNULL)


def test_help_names_every_command(capsys):
    assert run(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in COMMANDS)


def test_every_setting_is_a_flag_with_its_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("TERMINAL_WIDTH", "300")
    assert run(["generate", "--help"]) == 0
    told = capsys.readouterr().out
    for field in fields(GenerationSettings):
        assert f"--{field.name.replace('_', '-')}" in told
    assert "Denoising steps an image (the model's own, else 30)." in told
    assert "what is not given is the document's own, then the model's" in told


def test_module_can_be_run():
    done = subprocess.run(
        [sys.executable, "-m", "mm_interleaved", "--version"], check=True, capture_output=True, text=True
    )
    assert done.stdout.startswith("mm-interleaved 0.")


# ---- Bad usage, bad input ----


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate"], "neither"),
        (["generate", "x.jsonl", "--text", "a"], "both"),
        (["generat"], "generate"),
        (["generate", "--text", "a", "--layuot", "T"], "--layout"),
        (["generate", "--text", "a", "--top-p", "2"], "top_p: found 2.0, expected 0 to 1"),
        (["generate", "--text", "a", "--top-p", "much"], "--top-p"),
        (["generate", "--text", "a", "--scheduler", "ddjm"], "did you mean"),
        (["generate", "--text", "a", "--scheduler", "dpm++"], "did you mean 'dpm-solver++'"),
        (["draw", "a", "--steps", "5"], "did you mean '--num-inference-steps'"),
        (["draw", "--prompt", "a"], "PROMPT is typed without a name"),
        (["paint", "a"], "did you mean 'draw'"),
        (["data", "lint", "a"], "did you mean 'check'"),
        (["train", "pretain"], "did you mean 'pretrain'"),
        (["draw", ""], "PROMPT: found an empty text"),
        (["draw", " \n"], "PROMPT: found an empty text"),
        (["story", ""], "OPENING: found an empty text"),
        (["generate", "--text", ""], "--text: found an empty text"),
        (["draw", "a", "-o", "cat.png"], "expected a folder"),
        (["data", "storyworld"], "expected OUT"),
        (["data", "storyworld", "a", "-o", "b"], "found both"),
        (["generate", "--text"], "--text"),
        (["evaluate", "storyword", "--data", ".", "-o", "x"], "storyword"),
        (["data", "storyworld", "x", "--format", "pdf"], "pdf"),
    ],
)
def test_bad_usage_ends_with_2(capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert words in fails(capsys, 2, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["curves", "-o", "page.html"], "expected a folder"),
        (["gallery", "-o", "sheet"], "expected a file NAME.png"),
        (["ablation", "--set", "twins=nobody"], "variants: found 'nobody'"),
        (["sightseeing"], "unknown command 'sightseeing'"),
    ],
)
def test_bad_usage_of_a_study_ends_with_2(capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert run(arguments, create_app) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_every_study_has_its_help(capsys):
    names = ("ablation", "scaling", "curves", "attention-maps", "sight", "gallery", "oracle", "census")
    for name in names:
        assert run([name, "--help"], create_app) == 0
        assert "Usage: studies" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"id": "a", "content": [', ":2"),
        ('{"id": "a", "content": [{"type": "image", "image": "absent.png"}]}', "absent.png"),
        ('{"id": "a", "content": [{"type": "text", "text": 5}]}', "content[0].text"),
        ('{"id": "a", "content": []}', "empty"),
        ('{"id": "a", "content": [{"type": "image", "image": "../outside.png"}]}', "outside.png"),
        ('{"id": "a", "content": [{"type": "text", "text": "x"}], "generation": {"seeed": 1}}', "'seed'"),
        ('{"id": "first", "content": [{"type": "text", "text": "x"}]}', "first"),
    ],
)
def test_bad_input_ends_with_3_before_anything_runs(capsys, tmp_path, tiny_folder, line, words):
    PILImage.new("RGB", (4, 4)).save(tmp_path / "outside.png")
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "documents.jsonl"
    path.write_text('{"id": "first", "content": [{"type": "text", "text": "good"}]}\n' + line + "\n")
    assert words in fails(capsys, 3, "generate", path, "-o", tmp_path / "out", "--model", tiny_folder)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["generate", "absent.jsonl"], "absent.jsonl"),
        (["generate", "--image", "absent.png"], "absent.png"),
        (["generate", "--image", "."], "not a regular file"),
        (["caption", "absent.png"], "absent.png"),
        (["replay", "absent.json"], "absent.json"),
        (["data", "check", "absent.json"], "absent.json"),
    ],
)
def test_missing_files_end_with_3(capsys, tmp_path, monkeypatch, command, words):
    monkeypatch.chdir(tmp_path)
    assert words in fails(capsys, 3, *command)


def test_unknown_models_end_with_4_and_say_where_they_were_looked_for(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "storyworld" in fails(capsys, 4, "generate", "--text", "a", "--model", "storyword")
    assert "hub cache" in fails(capsys, 4, "generate", "--text", "a", "--model", "nobody/no-such-model")
    assert "config.json" in fails(capsys, 4, "generate", "--text", "a", "--model", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "llama" in fails(capsys, 4, "info", tmp_path)


def test_cut_weights_end_with_4(capsys, tmp_path, tiny_folder):
    for path in tiny_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    out = tmp_path / "out"
    assert "cut" in fails(capsys, 4, "generate", "--text", "a", "--model", tmp_path, "-o", out)
    assert "cut" in fails(capsys, 4, "info", tmp_path)


def test_debug_shows_where(capsys):
    assert run(["generate", "absent.jsonl", "--debug"]) == 3
    assert "Traceback" in capsys.readouterr().err


# ---- The main job ----


def test_generate_writes_results_pictures_page_and_manifest(capsys, tmp_path, tiny_folder, documents):
    out = tmp_path / "out"
    command = ["generate", documents, "-o", out, "--model", tiny_folder, "--layout", "T I", "--seed", "5"]
    sentence = fails(capsys, 7, *command)
    assert "1 of 3" in sentence and "'b'" in sentence
    first, failed, last = records(out)
    assert [part["type"] for part in first["content"]] == ["text", "image", "text", "image"]
    assert [part.get("generated", False) for part in first["content"]] == [False, False, True, True]
    assert all(isinstance(part["seed"], int) for part in first["content"][2:])
    assert failed["error"]["code"] == "image"
    assert [part["type"] for part in last["content"]] == ["text", "text", "image"]
    for record in (first, last):
        for part in record["content"]:
            if part["type"] == "image":
                PILImage.open(out / part["image"]).verify()
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["settings"]["num_inference_steps"] == 2
    assert manifest["flags"] == {"layout": "T I", "seed": 5}
    assert manifest["threads"] >= 1 and len(manifest["model"]["sha256"]) == 64
    assert manifest["versions"]["torch"] and set(manifest["seeds"]) == {"a", "b", "c"}
    page = (out / "index.html").read_text()
    assert page.count("data:image/png") == 3 and "broken.png" in page

    # The same again: nothing is left to do; a missing result is made again; another setting is refused.
    before = (out / "results.jsonl").read_bytes()
    assert run([str(word) for word in command]) == 7
    assert (out / "results.jsonl").read_bytes() == before
    (out / "results.jsonl").write_bytes(b"".join(before.splitlines(keepends=True)[:2]))
    assert run([str(word) for word in command]) == 7
    assert (out / "results.jsonl").read_bytes() == before
    capsys.readouterr()
    assert "num_beams" in fails(capsys, 2, *command, "--num-beams", "2")

    # And from the manifest alone, with the input gone.
    documents.unlink()
    (tmp_path / "given.png").unlink()
    assert run(["replay", str(out / "manifest.json")]) == 0
    told = capsys.readouterr().out
    assert "3 of 3 records and 3 of 3 images are the same" in told


def test_photographs_of_every_kind_are_taken(tmp_path, tiny_folder):
    photo = PILImage.fromarray(skimage_data.astronaut()).resize((96, 64))
    exif = PILImage.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / "turned.jpg", exif=exif)
    photo.convert("CMYK").save(tmp_path / "cmyk.jpg")
    photo.convert("RGBA").save(tmp_path / "alpha.png")
    photo.convert("P").save(tmp_path / "palette.png")
    photo.convert("L").save(tmp_path / "grey.webp")
    PILImage.fromarray(np.arange(96 * 64, dtype=np.uint16).reshape(64, 96) * 10).save(tmp_path / "deep.png")
    names = ("turned.jpg", "cmyk.jpg", "alpha.png", "palette.png", "grey.webp", "deep.png")
    content = [{"type": "image", "image": name} for name in names]
    (tmp_path / "documents.json").write_text(
        json.dumps([{"id": "photos", "content": content, "layout": "T"}])
    )
    command = ["generate", str(tmp_path / "documents.json"), "-o", str(tmp_path / "out")]
    assert run([*command, "--model", str(tiny_folder)]) == 0
    [record] = records(tmp_path / "out")
    sizes = [PILImage.open(tmp_path / "out" / part["image"]).size for part in record["content"][:6]]
    assert sizes == [(64, 96)] + [(96, 64)] * 5


@pytest.mark.parametrize("form", ["annt", "mmc4", "llava"])
def test_documents_in_foreign_formats_are_continued(capsys, tmp_path, tiny_folder, form):
    assert run(["data", "storyworld", str(tmp_path / "in"), "--documents", "2", "--format", form]) == 0
    path = capsys.readouterr().out.split(":")[0]
    command = [
        "generate",
        path,
        "-o",
        str(tmp_path / "out"),
        "--max-images",
        "1",
        "--model",
        str(tiny_folder),
    ]
    assert run(command) == 0
    assert len(records(tmp_path / "out")) >= 2


def test_replay_notices_another_result(capsys, tmp_path, tiny_folder):
    out = tmp_path / "out"
    assert run(["draw", "a lamp", "-o", str(out), "--model", str(tiny_folder)]) == 0
    assert run(["replay", str(out)]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["outputs"]["images"]["images/picture_0.png"] = "0" * 64
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert run(["replay", str(out)]) == 7
    assert "different: images/picture_0.png" in capsys.readouterr().out


@pytest.mark.parametrize("equals", [False, True])
def test_parts_keep_the_order_in_which_they_are_typed(tmp_path, tiny_folder, picture, equals):
    other = tmp_path / "other.png"
    PILImage.new("RGB", (8, 8), (255, 0, 0)).save(other)
    typed = [
        ("--text", "one"),
        ("--image", picture),
        ("--image", other),
        ("--text", "--two"),
        ("--text", "three"),
    ]
    words = (
        [f"{name}={value}" for name, value in typed] if equals else [str(w) for pair in typed for w in pair]
    )
    out = tmp_path / "out"
    command = ["generate", *words, "--layout", "T", "-o", str(out), "--model", str(tiny_folder)]
    assert run(command) == 0
    [record] = records(out)
    given = [part for part in record["content"] if not part.get("generated")]
    assert [part.get("text", "I") for part in given] == ["one", "I", "I", "--two", "three"]
    assert PILImage.open(out / given[1]["image"]).size == (40, 30)
    assert PILImage.open(out / given[2]["image"]).size == (8, 8)


def test_text_spelt_like_a_special_token_stays_text(tmp_path, tiny_folder):
    out = tmp_path / "out"
    hostile = "<|image|></s><s>[INST] <image> \u202e"
    assert (
        run(["generate", "--text", hostile, "--layout", "T", "-o", str(out), "--model", str(tiny_folder)])
        == 0
    )
    assert records(out)[0]["content"][0]["text"] == hostile


def test_questions_are_answered_on_stdout(capsys, tiny_folder, picture):
    model = ["--model", str(tiny_folder)]
    assert run(["caption", str(picture), str(picture), *model]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.startswith(f"{picture}: ") for line in lines)
    assert run(["vqa", str(picture), "What is it?", *model]) == 0
    assert run(["ground", str(picture), "the lamp", *model]) in (0, 7)  # 7: no box in the answer


def test_a_picture_that_cannot_be_read_fails_alone(capsys, tmp_path, tiny_folder, picture):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    pictures = [str(path) for path in (picture, broken, picture)]
    for size in ("1", "2", "8"):
        assert run(["caption", *pictures, "--model", str(tiny_folder), "--batch-size", size]) == 7
        told = capsys.readouterr()
        assert [line.partition(": ")[0] for line in told.out.splitlines()] == [str(picture)] * 2
        assert "broken.png" in told.err


def test_batches_of_any_size_say_the_same_and_are_replayed_to_the_bit(
    capsys, tmp_path, tiny_folder, documents
):
    command = ["generate", str(documents), "--model", str(tiny_folder), "--layout", "T I", "--seed", "5"]
    said = []
    for size in ("1", "2", "3"):
        out = tmp_path / size
        assert run([*command, "-o", str(out), "--batch-size", size]) == 7
        assert json.loads((out / "manifest.json").read_text())["batch_size"] == int(size)
        said.append([part.get("text") for record in records(out) for part in record.get("content", ())])
        capsys.readouterr()
        assert run(["replay", str(out)]) == 0
        assert "3 of 3 records and 3 of 3 images are the same" in capsys.readouterr().out
    assert said[0] == said[1] == said[2]
    # A run goes on as it began, however many are asked for now.
    assert run([*command, "-o", str(tmp_path / "2")]) == 7
    capsys.readouterr()
    assert "batch_size was 2, is now 4" in fails(
        capsys, 2, *command, "-o", tmp_path / "2", "--batch-size", "4"
    )


def test_one_bad_picture_fails_alone(capsys, tmp_path, tiny_folder, picture):
    bad = tmp_path / "bad.gif"
    bad.write_text("no picture")
    model = ["--model", str(tiny_folder)]
    assert run(["caption", str(picture), str(bad), str(picture), *model]) == 7
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == 2 and "bad.gif" in told.err and told.err.count("\n") == 1
    for command in (["caption", bad], ["vqa", bad, "What?"], ["ground", bad, "lamp"]):
        assert "bad.gif" in fails(capsys, 3, *command, *model)
    for command in (["caption", picture, "--prompt", " "], ["vqa", picture, ""], ["ground", picture, ""]):
        assert "found an empty text" in fails(capsys, 2, *command, *model)


def test_a_second_run_says_that_nothing_was_left(capsys, tmp_path, tiny_folder):
    command = ["draw", "a lamp", "-o", str(tmp_path / "deep" / "er"), "--model", str(tiny_folder)]
    assert run(command) == 0
    assert "1 document, 1 image generated" in capsys.readouterr().out
    assert run(command) == 0
    told = capsys.readouterr().out
    assert "nothing was left to do, 1 document finished before" in told and "generated" not in told


def test_every_output_takes_the_spelling_of_earlier_versions(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for index, spelling in enumerate(("-o", "--output", "--out")):
        out = tmp_path / "a" / str(index)
        assert run(["data", "storyworld", spelling, str(out), "--documents", "2"]) == 0
        assert (out / "documents.jsonl").exists()
    assert run(["curves", "--no-cost"], create_app) == 0
    assert "out/curves" in capsys.readouterr().out and not (tmp_path / "docs").exists()
    assert run(["train", "--help"]) == 0
    told = capsys.readouterr().out
    assert "--output" in told and "--out " not in told


def test_story_opens_with_storyworld_where_nothing_is_given(tmp_path, tiny_folder):
    out = tmp_path / "out"
    assert run(["story", "--panels", "2", "-o", str(out), "--model", str(tiny_folder)]) == 0
    assert [part["type"] for part in records(out)[0]["content"]] == ["text", "image", "text", "image"]


def test_chat_answers_each_line_and_saves_the_conversation(
    capsys, tmp_path, tiny_folder, picture, monkeypatch
):
    import io

    said = f"hello\n/image {picture}\nwhat is this?\n/image absent.png\n/quit\nnever read\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    assert run(["chat", "-o", str(tmp_path / "chat"), "--model", str(tiny_folder), "--layout", "T I"]) == 0
    captured = capsys.readouterr()
    assert "image-1.png" in captured.out and "image-2.png" in captured.out
    assert "absent.png" in captured.err
    [conversation] = [json.loads(line) for line in (tmp_path / "chat" / "conversation.jsonl").open()]
    assert [message["role"] for message in conversation["messages"]] == ["user", "assistant"] * 2


def chat(monkeypatch, folder, model, said: str, *more: str) -> int:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    return run(["chat", "-o", str(folder), "--model", str(model), "--layout", "T", *more])


def test_commands_of_a_conversation_never_go_to_the_model(capsys, tmp_path, tiny_folder, monkeypatch):
    said = "/help\n/imge x.png\n/exit\n/image\n/draw\n/new\n/ hello\n/quit now\n/quit\nnever read\n"
    assert chat(monkeypatch, tmp_path / "chat", tiny_folder, said) == 0
    told = capsys.readouterr()
    assert "/image PATH" in told.out and "/quit" in told.out
    assert "did you mean '/image'" in told.err and "did you mean '/quit'" in told.err
    assert not (tmp_path / "chat").exists()


def test_a_conversation_shows_asks_and_draws(capsys, tmp_path, tiny_folder, picture, monkeypatch):
    odd = tmp_path / "it's a photo.png"
    odd.write_bytes(picture.read_bytes())
    folder = tmp_path / "chat"
    said = (
        f'/image {odd} What is this?\n/image "{odd}" And this?\n/new\n/draw a lamp\nwhat?\n'
        f"/image {picture}\n/draw the same at night\n"
    )
    assert chat(monkeypatch, folder, tiny_folder, said) == 0
    lines = [json.loads(line) for line in (folder / "conversation.jsonl").open(encoding="utf-8")]
    kinds = {
        line["id"]: "".join(part["type"][0] for m in line.get("messages", [line]) for part in m["content"])
        for line in lines
    }
    # Each picture, its question and the answer; the drawn one is what the next question is about.
    assert kinds == {"chat": "ittitt", "chat-2": "itt", "drawing-1": "ti", "drawing-2": "iti"}
    before = (folder / "conversation.jsonl").read_bytes()
    assert chat(monkeypatch, folder, tiny_folder, "hello\n") == 0
    assert (folder / "conversation.jsonl").read_bytes() == before
    assert (folder / "conversation-2.jsonl").exists()


@pytest.mark.parametrize(
    ("rest", "name", "words"),
    [
        ("a.png", "a.png", ""),
        ("a.png What is it?", "a.png", "What is it?"),
        ("my photo.png What is it?", "my photo.png", "What is it?"),
        ("my\\ photo.png What?", "my photo.png", "What?"),
        ("'my photo.png' What?", "my photo.png", "What?"),
        ('"a.png"', "a.png", ""),
        ("absent.png What?", "absent.png", "What?"),
        ("absent photo.JPG What?", "absent photo.JPG", "What?"),
        ("nothing at all", "nothing", "at all"),
    ],
)
def test_a_path_and_the_words_after_it_are_told_apart(tmp_path, monkeypatch, rest, name, words):
    monkeypatch.chdir(tmp_path)
    for file in ("a.png", "my photo.png"):
        (tmp_path / file).touch()
    assert split_path(rest) == (Path(name), words)


def test_info_counts_what_the_files_hold(capsys, tiny_folder):
    assert run(["info", str(tiny_folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    stored = {part["parameters"] for part in told["parts"].values()}
    assert (
        told["total"]["parameters"] == sum(part["parameters"] for part in told["parts"].values()) and stored
    )
    assert told["limits"]["image_input_pixels"] == 32 and told["limits"]["image_output_pixels"] == 32
    assert told["limits"]["context_tokens"] == 2048
    assert (
        run(["info", str(tiny_folder)]) == 0 and run(["plan", str(tiny_folder)]) == 0 and run(["doctor"]) == 0
    )


def test_evaluate_answers_and_scores(capsys, tmp_path, tiny_folder):
    data, out = tmp_path / "data", tmp_path / "scores"
    assert run(["data", "storyworld", str(data), "--documents", "7", "--seed", "2"]) == 0
    assert run(["data", "check", str(data / "documents.jsonl")]) == 0
    command = ["evaluate", "storyworld", "--data", str(data), "-o", str(out), "--batch-size", "2"]
    assert run([*command, "--model", str(tiny_folder)]) == 0
    scores = json.loads((out / "scores.json").read_text())
    assert scores["layout.correct"] == 1 and all(0 <= value <= 1 for value in scores.values())
    predictions = [json.loads(line) for line in (out / "predictions.jsonl").open()]
    assert len(predictions) == 7 and all({"id", "content"} <= set(line) for line in predictions)
    [ranking] = [line["meta"]["ranking"] for line in predictions if "meta" in line]
    assert sorted(ranking) == list(range(10))
    again = tmp_path / "again"
    command = ["evaluate", "storyworld", "--data", str(data), "-o", str(again)]
    assert run([*command, "--predictions", str(out / "predictions.jsonl")]) == 0
    assert json.loads((again / "scores.json").read_text()) == scores
    # Two processes give the same, and one of them speaks.
    shared = tmp_path / "shared"
    command = ["evaluate", "storyworld", "--data", str(data), "-o", str(shared), "--batch-size", "2"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, "mm_interleaved", *command, "--model", str(tiny_folder)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()].count("layout.correct") == 1
    for name in ("scores.json", "predictions.jsonl"):
        assert (shared / name).read_bytes() == (out / name).read_bytes()
    constant, page = tmp_path / "constant", tmp_path / "page"
    command = ["evaluate", "storyworld", "--data", str(data), "-o", str(constant), "--predictor", "copy"]
    assert run(command) == 0
    capsys.readouterr()
    assert run(["compare", str(out), f"none={constant}", str(again), "-o", str(page)]) == 0
    found = json.loads((page / "comparison.json").read_text())
    assert [one["name"] for one in found["runs"]] == ["scores", "none", "again"]
    assert found["runs"][0]["model"].startswith(str(tiny_folder)) and found["runs"][1]["model"] is None
    assert all(one["values"][0] == one["values"][2] for one in found["metrics"].values())
    assert "The same prompts" in (page / "comparison.html").read_text()
    assert "layout.correct" in capsys.readouterr().out


def test_compare_refuses_what_is_no_evaluation(capsys, tmp_path):
    page = tmp_path / "page"
    assert "expected two evaluations or more" in fails(capsys, 2, "compare", tmp_path, "-o", page)
    assert "two runs are called 'x'" in fails(capsys, 2, "compare", "a/x", "b/x", "-o", page)
    (tmp_path / "evaluation.json").write_text('{"task": 3}')
    assert "evaluation.json: " in fails(capsys, 3, "compare", tmp_path, tmp_path / "b", "-o", page)
    assert not page.exists()


# ---- How a run is stopped ----


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_stopped_runs_say_so_and_are_finished_later(capsys, tmp_path, tiny_folder, sent, code):
    path = tmp_path / "documents.jsonl"
    lines = [{"id": str(n), "content": [{"type": "text", "text": "x"}], "layout": "T I"} for n in range(400)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out"

    def stop_after_first_record():
        # Two lines: the second may be taken back, the first is safe.
        while not ((out / "results.jsonl").exists() and len(records(out)) > 1):
            time.sleep(0.02)
        os.kill(os.getpid(), sent)

    # A shell may have started these tests in the background, deaf to SIGINT.
    handlers = {signal.SIGTERM: stop, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        threading.Thread(target=stop_after_first_record, daemon=True).start()
        fails(capsys, code, "generate", path, "-o", out, "--model", tiny_folder)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert 0 < len(records(out)) < 400


def test_full_disk_ends_with_6_and_nothing_half_written(capsys, tmp_path, tiny_folder):
    """Files may grow to 0.5 kB, then to 5 kB, then as they like: the same command comes to its end."""
    out = tmp_path / "out"
    command = ["draw", "a lamp", "-o", str(out), "--model", str(tiny_folder)]
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (500, 5_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
        try:
            assert "cannot be written" in fails(capsys, 6, *command)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert not list(out.rglob(".tmp-*"))
    assert run(command) == 0
    assert len(records(out)) == 1


# ---- One part again, and what the model looked at ----


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, tiny_folder) -> Path:
    """A run of one story: a given text and image, a generated text and image."""
    place = tmp_path_factory.mktemp("finished")
    PILImage.new("RGB", (40, 30), (30, 160, 90)).save(place / "given.png")
    content = [{"type": "text", "text": "Pip"}, {"type": "image", "image": "given.png"}]
    (place / "story.jsonl").write_text(json.dumps({"id": "s", "content": content, "layout": "T I"}))
    arguments = [
        "generate",
        str(place / "story.jsonl"),
        "-o",
        str(place / "out"),
        "--model",
        str(tiny_folder),
    ]
    assert run(arguments) == 0
    return place / "out"


def test_redo_makes_one_part_again_beside_the_run(finished_run, capsys):
    before = {path: path.read_bytes() for path in finished_run.rglob("*") if path.is_file()}
    assert run(["redo", str(finished_run), "--part", "3"]) == 0
    assert "part 3, image, made again (seed " in capsys.readouterr().out
    new = finished_run.with_name("out-redo-1")
    [old], [again] = records(finished_run), records(new)
    assert again["content"][:3] == old["content"][:3] and again["content"][3] != old["content"][3]
    assert (new / "images" / "s_0.png").read_bytes() == (finished_run / "images" / "s_0.png").read_bytes()
    assert (new / "images" / "s_1.png").read_bytes() != (finished_run / "images" / "s_1.png").read_bytes()
    assert (new / "index.html").exists()
    # A second attempt is another one, and the first can be repeated.
    assert run(["redo", str(finished_run), "--part", "3", "--document", "s"]) == 0
    [other] = records(finished_run.with_name("out-redo-2"))
    assert other["content"][3]["seed"] != again["content"][3]["seed"]
    capsys.readouterr()
    assert run(["replay", str(new)]) == 0
    assert "1 of 1 records and 2 of 2 images are the same" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in finished_run.rglob("*") if path.is_file()} == before


def test_redo_says_that_a_greedy_text_does_not_depend_on_the_seed(finished_run, capsys):
    assert run(["redo", str(finished_run), "--part", "2", "--seed", "9"]) == 0
    said = capsys.readouterr().out
    assert "the text of part 2 came out as it was (seed 9)" in said and "--do-sample" in said


def test_redo_refuses_what_it_cannot_make(finished_run, tmp_path, capsys):
    sentence = fails(capsys, 2, "redo", finished_run, "--part", "7")
    assert "part: found 7, expected 0 to 3 (its parts: T I T I)" in sentence
    assert "--rest auto" in fails(capsys, 2, "redo", finished_run, "--part", "3", "--layout", "I")
    assert "did you mean 's'" in fails(capsys, 3, "redo", finished_run, "--part", "3", "--document", "S")
    assert "manifest of a run" in fails(capsys, 3, "redo", tmp_path, "--part", "3")
    assert "is the run itself" in fails(capsys, 2, "redo", finished_run, "--part", "3", "-o", finished_run)


def test_explain_writes_a_page_overlays_and_arrays(finished_run, tmp_path, capsys):
    assert run(["explain", str(finished_run), "-o", str(tmp_path / "seen"), "--regions", "4"]) == 0
    names = {path.relative_to(tmp_path / "seen").as_posix() for path in (tmp_path / "seen").rglob("*.*")}
    files = {"index.html", "arrays.npz", "explanation.json", "overlays/part_2.png", "overlays/part_3.png"}
    assert names == files
    with np.load(tmp_path / "seen" / "arrays.npz") as arrays:
        total = arrays["text.weight_TYHNLP"].sum((-3, -2, -1)) + arrays["text.ignore_TYH"]
        assert np.abs(total - 1).max() < 1e-5
        assert arrays["part3.heat_RYHNLGG"].shape[0] == 16
    labels = json.loads((tmp_path / "seen" / "explanation.json").read_text())
    assert labels["part3"]["pixel_error"] < 0.5
    assert "expected a new or an empty folder" in fails(
        capsys, 2, "explain", finished_run, "-o", tmp_path / "seen"
    )


def test_explain_continues_what_holds_nothing_generated(tiny_folder, picture, documents, tmp_path):
    lines = documents.read_text().splitlines()
    source = documents.with_name("two.jsonl")
    source.write_text(f"{lines[0]}\n{lines[2]}\n")
    arguments = ["explain", str(source), "-o", str(tmp_path / "seen"), "--model", str(tiny_folder)]
    assert run([*arguments, "--max-images", "1", "--max-new-tokens", "4"]) == 0
    for name in ("a", "c"):
        assert (tmp_path / "seen" / name / "index.html").exists()
    assert 'href="a/index.html"' in (tmp_path / "seen" / "index.html").read_text()
