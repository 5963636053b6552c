"""lmms-eval runs its own tasks on the shipped model, from its command line to its table of scores.

Its data sets lie on a hub; a folder of the same name in the working directory comes first, and here holds
StoryWorld in the records of each task. Not collected by a plain `pytest`: `.ci/run harnesses` makes the
environment that this needs.
"""

import base64
import io
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import pytest
from datasets import Dataset, Features, Sequence, Value
from datasets import Image as ImageFeature
from lmms_eval.api.instance import Instance
from PIL import Image as PILImage

from mm_interleaved.documents.document import Image, Text
from mm_interleaved.documents.images import to_png
from mm_interleaved.storyworld.tasks import document

SPLIT, SEED = "test", 5
QUESTIONS, STORIES = 24, 4
TASKS = Path(find_spec("lmms_eval").submodule_search_locations[0]) / "tasks"


def questions(wanted):
    """The first questions of the test split that are wanted: (image, question, answer)."""
    found, index = [], 0
    while len(found) < QUESTIONS:
        made = document(SPLIT, SEED, index, "vqa")
        image = next(part for part in made.parts if isinstance(part, Image))
        question = next(part for part in made.parts if isinstance(part, Text))
        if wanted(made, made.target[0].text):
            found.append((image, question.text, made.target[0].text))
        index += 1
    return found


def stored(image):
    return {"bytes": to_png(image.load()), "path": None}


def write_pope(folder):
    rows = [
        {
            "id": str(number), "question_id": str(number), "question": question, "answer": answer,
            "image_source": "storyworld", "image": stored(image), "category": "popular",
        }
        for number, (image, question, answer) in enumerate(questions(lambda _, a: a in ("yes", "no")))
    ]  # fmt: skip
    target = folder / "lmms-lab-encoder" / "POPE" / "data" / "test-00000-of-00001.parquet"
    target.parent.mkdir(parents=True)
    Dataset.from_list(rows).cast_column("image", ImageFeature()).to_parquet(target)


COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "white")


def write_seed_bench(folder):
    """Questions for a colour, with three others to choose from."""
    rows = []
    for number, (image, question, answer) in enumerate(questions(lambda _, a: a in COLOURS)):
        others = [colour for colour in COLOURS if colour != answer]
        choices = [others[(number + step) % len(others)] for step in range(3)]
        choices.insert(number % 4, answer)
        letters = dict(zip(("choice_a", "choice_b", "choice_c", "choice_d"), choices, strict=True))
        record = {"question_id": str(number), "question": question, "answer": "ABCD"[number % 4]}
        rows.append({**record, **letters, "data_type": "image", "image": [stored(image)]})
    names = [name for name in rows[0] if name != "image"]
    features = Features({**{name: Value("string") for name in names}, "image": Sequence(ImageFeature())})
    target = folder / "lmms-lab-encoder" / "SEED-Bench" / "data" / "test-00000-of-00001.parquet"
    target.parent.mkdir(parents=True)
    Dataset.from_list(rows, features=features).to_parquet(target)


def write_ueval(folder):
    """Scenes to be drawn; two rubrics each."""
    target = folder / "primerL" / "UEval" / "test.jsonl"
    target.parent.mkdir(parents=True)
    rubric = [{"criterion": "It shows what the question describes.", "tags": []}]
    rows = [
        {
            "id": index, "prompt": document(SPLIT, SEED, index, "draw").text, "task_type": "story",
            "question_type": "open", "text_ref": "", "text_rubrics": rubric, "image_rubrics": rubric,
        }
        for index in range(STORIES)
    ]  # fmt: skip
    target.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_tasks(folder):
    """The stock tasks without the words around a question that the shipped model never saw."""
    folder.mkdir()
    (folder / "pope_storyworld.yaml").write_text(
        f"include: {TASKS}/pope/pope.yaml\ntask: pope_storyworld\n"
        'lmms_eval_specific_kwargs: {mm_interleaved: {pre_prompt: "", post_prompt: ""}}\n'
    )
    (folder / "seedbench_ppl_storyworld.yaml").write_text(
        f"include: {TASKS}/seedbench/seedbench_ppl.yaml\ntask: seedbench_ppl_storyworld\n"
        'doc_to_text: "{{question}}"\n'
    )


class Judge(BaseHTTPRequestHandler):
    """Speaks as the service that `ueval` asks: a rubric is met if what it is shown has an image of 64 px."""

    asked: ClassVar[list] = []

    def do_POST(self):
        said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        parts = said["contents"][0]["parts"]
        shown = [part["inlineData"]["data"] for part in parts if "inlineData" in part]
        sizes = [PILImage.open(io.BytesIO(base64.urlsafe_b64decode(data))).size for data in shown]
        self.asked.append(sizes)
        verdict = json.dumps({"explanation": "", "criteria_met": sizes == [(64, 64)]})
        answer = {"candidates": [{"content": {"role": "model", "parts": [{"text": verdict}]}}]}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lmms_eval")
    write_pope(folder)
    write_seed_bench(folder)
    write_ueval(folder)
    write_tasks(folder / "tasks")
    return folder


@pytest.fixture(scope="module")
def judge():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def evaluate(folder, out, *arguments, **environment):
    """(results by task, samples by task) of a run of the command."""
    command = [sys.executable, "-m", "lmms_eval", "--model", "mm_interleaved", "--include_path", "tasks"]
    command += ["--batch_size", "8", "--output_path", out, "--log_samples", *arguments]
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "TOKENIZERS_PARALLELISM": "false"}
    run = subprocess.run(
        command, cwd=folder, env=os.environ | quiet | environment, capture_output=True, text=True
    )
    # It ends with 0 even where it failed; then there are no results.
    files = sorted((folder / out).rglob("*_results.json"))
    assert run.returncode == 0 and files, run.stdout[-3000:] + run.stderr[-3000:]
    results = json.loads(files[-1].read_text())["results"]
    samples = {
        task: [
            json.loads(line)
            for file in (folder / out).rglob(f"*_{task}.jsonl")
            for line in file.read_text().splitlines()
        ]
        for task in results
    }
    return results, samples


def test_tasks_with_text_and_with_images_run_from_the_command_line(folder, judge):
    results, samples = evaluate(
        folder, "generated", "--tasks", "pope_storyworld,ueval",
        "--model_args", "num_inference_steps=8,max_new_tokens=16",
        GOOGLE_API_KEY="none", GOOGLE_GEMINI_BASE_URL=judge,
    )  # fmt: skip
    assert len(samples["pope_storyworld"]) == QUESTIONS
    assert results["pope_storyworld"]["pope_accuracy,none"] >= 0.9
    # Every text rubric fails, and every image rubric holds whose image arrived.
    assert results["ueval"]["image_score,none"] == 1.0
    assert results["ueval"]["text_score,none"] == 0.0
    assert sorted(Judge.asked) == [[]] * STORIES + [[(64, 64)]] * STORIES
    for sample in samples["ueval"]:
        said = json.loads(sample["filtered_resps"])
        assert [Path(path).is_file() for path in said["images"]] == [True]


def test_a_task_that_weighs_continuations_runs_with_simple_models(folder):
    results, samples = evaluate(folder, "weighed", "--tasks", "seedbench_ppl_storyworld", "--force_simple")
    assert len(samples["seedbench_ppl_storyworld"]) == QUESTIONS
    assert results["seedbench_ppl_storyworld"]["acc,none"] >= 0.9


def model_of(form, images):
    from mm_interleaved.evaluation.harnesses import lmms_eval_model

    made = getattr(lmms_eval_model, form)(
        output_image_dir=str(images), batch_size="auto", max_new_tokens=12, num_inference_steps=2
    )
    made.task_dict = {"rounds": {"test": [{}]}, "aided": {"test": [{}]}}
    return made


def instance(kind, arguments):
    metadata = {"task": arguments[-2], "doc_id": arguments[-3], "repeats": 1}
    return Instance(request_type=kind, arguments=arguments, idx=0, metadata=metadata)


@pytest.mark.parametrize("form", ["MMInterleavedChat", "MMInterleavedSimple"])
def test_a_task_of_several_rounds_hears_each_answer(form, tmp_path):
    """As a task's `doc_to_text` and lmms-eval's `doc_to_messages` hand rounds over."""
    model = model_of(form, tmp_path)
    heard = []
    question = "Pip is a red pig. What colour is the pig?"

    def text_of_round(record, round_idx, previous_output, previous_round_info):
        heard.append((round_idx, list(previous_output), previous_round_info))
        return [], question, round_idx == 2, previous_output, round_idx

    def messages(record, round_idx=None, previous_output=None, previous_round_info=None):
        said = [{"role": "user", "content": [{"type": "text", "text": question}]}]
        if round_idx is None:
            return said
        _, _, ends, output, info = text_of_round(record, round_idx, previous_output, previous_round_info)
        return (None if ends else said), ends, output, info

    given = {"max_new_tokens": 8, "until": ["\n\n"], "do_sample": False}
    arguments = (
        (question, given, lambda record: [], text_of_round, 0, "rounds", "test")
        if model.is_simple
        else (question, messages, given, 0, "rounds", "test")
    )
    [answers] = model.generate_until_multi_round([instance("generate_until_multi_round", arguments)])
    assert len(answers) == 2 and answers[0] == answers[1] and answers[0]
    assert heard == [(1, answers[:1], None), (2, answers, 1)]


def test_an_image_is_drawn_before_the_answer_where_a_task_wants_it(tmp_path):
    model = model_of("MMInterleavedSimple", tmp_path)
    context = "[GEN_PROMPT]A red pig stands.[/GEN_PROMPT][QUESTION]What colour is the pig?[/QUESTION]"
    arguments = (context, {"visual_cot": True, "do_sample": False}, lambda record: None, 0, "aided", "test")
    answers = model.generate_visual_cot([instance("generate_visual_cot", arguments)])
    assert answers and answers[0] and not answers[0].startswith("{")
    assert len(list(tmp_path.rglob("*.png"))) == 1
