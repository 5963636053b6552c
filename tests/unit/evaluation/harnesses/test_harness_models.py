"""The classes that harnesses load, against stand-ins that state what these call and expect.

The harnesses themselves are tried in an environment of their own: `.ci/run harnesses`.
"""

import importlib
import json
import sys
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from types import ModuleType

import pytest
from PIL import Image as PILImage

from mm_interleaved.errors import ImageError, InputError, TooLongError, UsageError
from mm_interleaved.evaluation.harnesses import lmms_eval_manifest
from mm_interleaved.generation.engine import InterleavedGenerator
from tiny import tiny_model, tiny_processor

RED = PILImage.new("RGB", (8, 8), (200, 0, 0))


@pytest.fixture(scope="module")
def generator():
    model = tiny_model(7)
    return InterleavedGenerator(model, tiny_processor(model.config))


@dataclass
class Instance:
    """A request of lmms-eval 0.7.3 (`lmms_eval/api/instance.py`), as far as models read it."""

    args: tuple


@dataclass
class GenerationResult:
    """What models may return in place of a text (the same file)."""

    text: str
    token_counts: object = None


class Lmms:
    """lmms-eval 0.7.3's base of models (`lmms_eval/api/model.py`), as far as it is called."""

    is_simple = True

    def __init__(self):
        self._rank, self._world_size = 0, 1
        self.task_dict = {}

    @property
    def rank(self):
        return self._rank

    def clean(self):
        self.is_clean = True


@dataclass(frozen=True)
class ModelManifest:
    """lmms-eval 0.7.3's (`lmms_eval/models/registry_v2.py`)."""

    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple = ()


class BaseModel:
    """VLMEvalKit's base of models (`vlmeval/vlm/base.py`, main of 2026-05), as its loop calls it."""

    INTERLEAVE = False
    allowed_types = ("text", "image", "video")

    def __init__(self):
        self.dump_image_func = None

    def generate(self, message, dataset=None):
        assert all(item["type"] in self.allowed_types for item in message)
        return self.generate_inner(message, dataset)

    def chat(self, messages, dataset=None):
        return self.chat_inner(messages, dataset=dataset)


@dataclass
class StandIns:
    """Modules that are there for one test, and what is loaded anew on top of them."""

    monkeypatch: pytest.MonkeyPatch
    generator: InterleavedGenerator
    loads: list = field(default_factory=list)

    def put(self, name, **members):
        parent, _, own = name.rpartition(".")
        if parent and parent not in sys.modules:
            self.put(parent)
        module = ModuleType(name)
        module.__path__ = []
        module.__dict__.update(members)
        self.monkeypatch.setitem(sys.modules, name, module)
        if parent:
            self.monkeypatch.setattr(sys.modules[parent], own, module, raising=False)

    def load(self, name):
        full = f"mm_interleaved.evaluation.harnesses.{name}"
        self.monkeypatch.delitem(sys.modules, full, raising=False)
        module = importlib.import_module(full)
        self.monkeypatch.delitem(sys.modules, full)

        def load_generator(name, **asked):
            self.loads.append((name, asked))
            return self.generator

        self.monkeypatch.setattr("mm_interleaved.generation.loading.load_generator", load_generator)
        return module


@pytest.fixture
def stand_ins(monkeypatch, generator):
    return StandIns(monkeypatch, generator)


@pytest.fixture
def lmms_eval(stand_ins):
    stand_ins.put("lmms_eval.api.instance", Instance=Instance, GenerationResult=GenerationResult)
    stand_ins.put("lmms_eval.api.model", lmms=Lmms)
    stand_ins.put("lmms_eval.models.registry_v2", ModelManifest=ModelManifest)
    return stand_ins


def model_of(lmms_eval, tmp_path, form="MMInterleavedSimple", **options):
    module = lmms_eval.load("lmms_eval_model")
    options = {"num_inference_steps": 1, "guidance_scale": 1.0, "max_new_tokens": 6, **options}
    model = getattr(module, form)(output_image_dir=str(tmp_path), batch_size=2, **options)
    records = [{"q": "Hi", "images": [RED]}, {"q": "Ho", "images": []}, {"q": "He", "images": [RED]}]
    model.task_dict = {name: {"test": records} for name in ("plain", "ueval", "gedit_bench")}
    return model


def visuals(record):
    return record["images"]


def messages(record):
    content = [{"type": "image", "url": image} for image in record["images"]]
    return [{"role": "user", "content": [*content, {"type": "text", "text": record["q"]}]}]


def asked(task, number, model, **given):
    context = model.task_dict[task]["test"][number]["q"]
    if model.is_simple:
        return Instance((context, given, visuals, number, task, "test"))
    return Instance((context, messages, given, number, task, "test"))


# ---- lmms-eval -----------------------------------------------------------------------------------


def test_the_entry_point_names_classes_that_are_there(lmms_eval):
    [point] = [p for p in entry_points(group="lmms_eval.models") if p.name == "mm_interleaved"] or [None]
    if point is not None:  # of an installed project; in a source tree alone there are none
        assert point.load() is lmms_eval_manifest.manifest
    manifest = lmms_eval_manifest.manifest()
    assert manifest.model_id == "mm_interleaved"
    module = lmms_eval.load("lmms_eval_model")
    for path, is_simple in ((manifest.simple_class_path, True), (manifest.chat_class_path, False)):
        made = getattr(module, path.rsplit(".", 1)[1])
        assert path.rsplit(".", 1)[0] == module.__name__ and issubclass(made, Lmms)
        assert made.is_simple == is_simple


@pytest.mark.parametrize("form", ["MMInterleavedChat", "MMInterleavedSimple"])
def test_answers_are_text_or_json_by_what_the_task_wants(lmms_eval, tmp_path, form):
    model = model_of(lmms_eval, tmp_path, form)
    requests = [asked(task, n, model) for n in range(3) for task in ("plain", "ueval", "gedit_bench")]
    answers = model.generate_until(requests)
    for plain, ueval, edit in zip(answers[::3], answers[1::3], answers[2::3], strict=True):
        assert isinstance(plain, str) and not plain.startswith("{")
        assert json.loads(ueval).keys() == {"text", "images"}
        [path] = json.loads(edit)["images"]
        assert PILImage.open(path).size == (32, 32) and json.loads(edit)["text"] == ""


def test_both_forms_answer_alike_and_batches_change_nothing(lmms_eval, tmp_path):
    answers = []
    for form, size in (("MMInterleavedChat", 1), ("MMInterleavedSimple", 3), ("MMInterleavedChat", 8)):
        model = model_of(lmms_eval, tmp_path, form)
        model.ours.batch_size = size
        answers.append(model.generate_until([asked("plain", n, model) for n in (0, 1, 2)]))
    assert answers[0] == answers[1] == answers[2]


def test_a_request_outranks_the_model_arguments_and_layout_may_come_from_either(lmms_eval, tmp_path):
    model = model_of(lmms_eval, tmp_path, max_new_tokens=5, layout="I")
    long, short = model.generate_until(
        [asked("plain", 0, model, layout="T"), asked("plain", 0, model, layout="T", max_new_tokens=1)]
    )
    assert long.startswith(short) and len(long) > len(short)
    assert len(json.loads(model.generate_until([asked("plain", 0, model)])[0])["images"]) == 1


def test_stop_texts_of_a_request_end_its_answer(lmms_eval, tmp_path):
    model = model_of(lmms_eval, tmp_path)
    [whole] = model.generate_until([asked("plain", 0, model)])
    stop = whole[2]
    [cut] = model.generate_until([asked("plain", 0, model, until=[stop])])
    assert whole.startswith(cut) and stop not in cut


def test_repetitions_of_a_request_are_sampled_anew_and_reproducibly(lmms_eval, tmp_path):
    model = model_of(lmms_eval, tmp_path)
    request = asked("plain", 0, model, do_sample=True, temperature=2.0)
    first = model.generate_until([request] * 4)
    assert len(set(first)) > 1
    assert first == model.generate_until([request] * 4)


def test_losses_are_those_of_the_continuation_alone_and_groups_change_nothing(lmms_eval, tmp_path, generator):
    model = model_of(lmms_eval, tmp_path)
    texts = [" a", " bc", lambda record: record["q"]]
    requests = [
        Instance((model.task_dict["plain"]["test"][n]["q"], text, visuals, n, "plain", "test"))
        for text in texts
        for n in range(3)
    ] + [Instance(("", "a"))]
    found = model.loglikelihood(requests)
    alone = [model.loglikelihood([request])[0] for request in requests]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in alone], abs=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in alone]
    from mm_interleaved.documents.document import Document, Image, Text

    document = Document(parts=[Image(RED, role="user"), Text("Hi", role="user")])
    one, two = (score for score, _ in generator.likelihoods(document, ["a", "bc"]))
    # As lmms-eval 0.7 reads it.
    assert all(isinstance(each, GenerationResult) and each.text == tuple(each) for each in found)
    assert found[0].token_counts is None
    # Lower is better, and length counts for nothing: as the losses of lmms-eval's own models.
    assert len(generator.processor.vocabulary.encode_text("bc")) == 2
    assert (found[0][0], found[3][0]) == pytest.approx((-one, -two / 2), abs=1e-5)
    with pytest.raises(UsageError, match="--force_simple"):
        model_of(lmms_eval, tmp_path, "MMInterleavedChat").loglikelihood(requests)


def test_a_round_that_never_ends_is_an_error_that_names_its_task(lmms_eval, tmp_path, monkeypatch):
    model = model_of(lmms_eval, tmp_path)
    monkeypatch.setitem(model.generate_until_multi_round.__globals__, "MAX_ROUNDS", 3)

    def text_of_round(record, round_idx, previous_output, previous_round_info):
        return [], "Hi", False, previous_output, None

    request = Instance(("Hi", {}, visuals, text_of_round, 0, "plain", "test"))
    with pytest.raises(InputError, match="task plain, document 0: its task asked on after 3 rounds"):
        model.generate_until_multi_round([request])


def test_what_cannot_be_answered_is_an_error_that_names_it(lmms_eval, tmp_path):
    model = model_of(lmms_eval, tmp_path)
    model.task_dict["plain"]["test"][1] = {"q": "Ho", "images": [str(tmp_path / "none.png")]}
    with pytest.raises(ImageError, match=r"^task plain, document 1: .*none\.png.*no such file"):
        model.generate_until([asked("plain", n, model) for n in range(3)])
    model.task_dict["plain"]["test"][1] = {"q": "a" * 500, "images": []}
    with pytest.raises(TooLongError, match=r"^task plain, document 1: "):
        model.generate_until([asked("plain", n, model) for n in range(3)])


def test_the_model_is_loaded_once_and_its_memory_given_back(lmms_eval, tmp_path):
    model = model_of(lmms_eval, tmp_path, pretrained="folder", device="cpu", dtype="float32")
    model.generate_until([asked("plain", 0, model)])
    assert lmms_eval.loads == [("folder", {"device": "cpu", "dtype": "float32"})]
    model.clean()
    assert model.is_clean and "generator" not in vars(model.ours)
    with pytest.raises(UsageError, match="unknown generation setting 'tempratur'"):
        model_of(lmms_eval, tmp_path, tempratur=1)


# ---- VLMEvalKit ----------------------------------------------------------------------------------


@pytest.fixture
def vlmevalkit(stand_ins):
    stand_ins.put("vlmeval.vlm.base", BaseModel=BaseModel)
    stand_ins.put("vlmeval.config", supported_VLM={})
    return stand_ins.load("vlmevalkit")


def test_vlmevalkit_asks_interleaved_messages_and_reads_a_string(vlmevalkit, tmp_path):
    RED.save(tmp_path / "red.png")
    model = vlmevalkit.MMInterleaved(max_new_tokens=6, output_image_dir=tmp_path / "out")
    assert model.INTERLEAVE and isinstance(model, BaseModel)
    image = {"type": "image", "value": str(tmp_path / "red.png")}
    message = [{"type": "text", "value": "a"}, image, {"type": "text", "value": "<image>"}, image]
    answer = model.generate(message, dataset="D")
    assert isinstance(answer, str) and answer == model.generate(message, dataset="D")
    turns = [{"role": "user", "content": message}, {"role": "assistant", "content": message[:1]}]
    assert isinstance(model.chat([*turns, turns[0]], dataset="D"), str)
    with pytest.raises(AssertionError):
        model.generate([{"type": "video", "value": "a.mp4"}])
    with pytest.raises(ImageError, match=r"^D-[0-9a-f]{16}: .*gone\.png"):
        model.generate([{"type": "image", "value": str(tmp_path / "gone.png")}], dataset="D")


def test_vlmevalkit_gets_images_where_the_layout_has_them(vlmevalkit, tmp_path):
    model = vlmevalkit.MMInterleaved(
        layout="T I", num_inference_steps=1, guidance_scale=1.0, max_new_tokens=3, output_image_dir=tmp_path
    )
    said = json.loads(model.generate([{"type": "text", "value": "a"}], dataset="D"))
    assert said["text"] and [PILImage.open(path).size for path in said["images"]] == [(32, 32)]


def test_vlmevalkit_finds_the_registered_model_in_its_table(vlmevalkit):
    vlmevalkit.register("ours", model_path="folder", max_new_tokens=2)
    model = sys.modules["vlmeval.config"].supported_VLM["ours"]()
    assert isinstance(model, vlmevalkit.MMInterleaved)
    assert model.ours.name == "folder" and model.ours.settings["max_new_tokens"] == 2
