"""VLMEvalKit's own `BaseModel` and inference loop, with our class, on StoryWorld.

The whole toolkit imports every model and data set that it knows, and torchvision with them; here its base
class and its loop are imported without those: what stands beside them is left empty.
"""

import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import pandas
import pytest

from mm_interleaved.documents.document import Image, Text
from mm_interleaved.documents.images import to_png
from mm_interleaved.storyworld.tasks import document

QUESTIONS = 12


def bare_package(name, *path):
    module = ModuleType(name)
    module.__path__ = [str(each) for each in path]
    sys.modules[name] = module
    return module


@pytest.fixture(scope="module", autouse=True)
def toolkit():
    """The toolkit's table of models."""
    root = Path(PathFinder.find_spec("vlmeval").submodule_search_locations[0])
    bare_package("vlmeval", root)
    bare_package("vlmeval.vlm", root / "vlm")
    bare_package("vlmeval.dataset").DATASET_TYPE = lambda name: "VQA"
    table = bare_package("vlmeval.config").supported_VLM = {}
    yield table
    for name in [name for name in sys.modules if name.split(".")[0] == "vlmeval"]:
        del sys.modules[name]


class StoryWorldQuestions:
    """What the loop asks of a data set."""

    dataset_name = "StoryWorldQuestions"

    def __init__(self, folder):
        rows = []
        for index in range(QUESTIONS):
            made = document("test", 5, index, "vqa")
            image = next(part for part in made.parts if isinstance(part, Image))
            question = next(part for part in made.parts if isinstance(part, Text))
            path = folder / f"{index}.png"
            path.write_bytes(to_png(image.load()))
            rows.append((index, str(path), question.text, made.target[0].text))
        self.data = pandas.DataFrame(rows, columns=["index", "image_path", "question", "answer"])

    def __len__(self):
        return len(self.data)

    def dump_image(self, line):
        return [line["image_path"]]

    def build_prompt(self, line):
        return [{"type": "image", "value": line["image_path"]}, {"type": "text", "value": line["question"]}]


def test_the_loop_asks_the_registered_model_and_writes_its_answers(toolkit, tmp_path, monkeypatch):
    monkeypatch.setenv("PRED_FORMAT", "tsv")
    from vlmeval.inference import infer_data_job
    from vlmeval.smp import get_pred_file_path, load

    from mm_interleaved.evaluation.harnesses.vlmevalkit import register

    register(max_new_tokens=16, output_image_dir=tmp_path / "images")
    dataset = StoryWorldQuestions(tmp_path)
    infer_data_job(toolkit["mm-interleaved"](), str(tmp_path), "mm-interleaved", dataset)
    file = get_pred_file_path(str(tmp_path), "mm-interleaved", dataset.dataset_name, use_env_format=True)
    answered = load(file)
    right = (answered["prediction"].str.strip() == answered["answer"]).sum()
    assert len(answered) == QUESTIONS and right >= 0.75 * QUESTIONS


def test_every_form_of_message_and_several_turns_are_answered(toolkit, tmp_path):
    from vlmeval.vlm.base import BaseModel

    from mm_interleaved.evaluation.harnesses.vlmevalkit import MMInterleaved

    made = document("test", 5, 0, "vqa")
    path = tmp_path / "picture.png"
    path.write_bytes(to_png(next(part for part in made.parts if isinstance(part, Image)).load()))
    question = next(part for part in made.parts if isinstance(part, Text)).text
    model = MMInterleaved(max_new_tokens=16)
    assert isinstance(model, BaseModel) and model.INTERLEAVE
    items = [{"type": "image", "value": str(path)}, {"type": "text", "value": question}]
    answer = model.generate(items)
    assert answer == model.generate([str(path), question]) and answer
    turns = [{"role": "user", "content": items}, {"role": "assistant", "content": answer}]
    again = [*turns, {"role": "user", "content": "Which place is this?"}]
    assert model.chat(again) and not model.chat(again).startswith("Chat Mode: Failed")
    with pytest.raises(AssertionError):
        model.generate([{"type": "sound", "value": "a"}, {"type": "text", "value": "b"}])
