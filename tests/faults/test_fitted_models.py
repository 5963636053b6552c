"""Models fitted into memory: what is chosen for a saved one, how it is loaded, runs that go on smaller."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from echo_runs import contents, echo_model, echo_request, nothing, run
from narrow_generator import Narrow

from mm_interleaved.documents.document import Document, Text
from mm_interleaved.errors import UsageError
from mm_interleaved.generation.fitting import explain, plans_for
from mm_interleaved.generation.loading import load_generator
from mm_interleaved.models.memory_plan import MemoryPlan, Room
from mm_interleaved.runs.generate import run_documents
from tiny import tiny_model, tiny_processor


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitting") / "model"
    model = tiny_model()
    model.save_pretrained(folder)
    tiny_processor(model.config).save_pretrained(folder)
    return folder


# ---- Runs ----


def test_a_run_goes_on_smaller_loses_nothing_and_is_taken_up_with_what_it_came_to(tmp_path, saved, caplog):
    request = echo_request(tmp_path, saved)
    run(replace(request, output=tmp_path / "whole"))
    planned = replace(request, model=replace(request.model, memory="auto"))
    plans = []

    def load(folder, *, plan, **choice):
        plans.append(plan)
        return Narrow(9 if len(plans) > 1 else 0)

    with caplog.at_level(logging.WARNING):
        outcome = run_documents(planned, nothing, load=load)
    assert "memory auto: float32; " in caplog.text and "going on with bfloat16" in caplog.text
    assert outcome.num_failed == 1 and plans[0].held > plans[1].held
    records = (tmp_path / "out" / "results.jsonl").read_bytes()
    assert records == (tmp_path / "whole" / "results.jsonl").read_bytes()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["memory_plan"] == plans[1].record() == manifest["memory_changes"][-1]
    # The last line is made again, by the plan that was at work.
    lines = records.splitlines(keepends=True)
    (tmp_path / "out" / "results.jsonl").write_bytes(b"".join(lines[:-1]))
    before = contents(tmp_path / "whole")
    run_documents(planned, nothing, load=load)
    assert plans[-1] == plans[1]
    after = contents(tmp_path / "out")
    assert {name for name in after if after[name] != before[name]} == set()


def test_another_way_of_fitting_is_another_run(tmp_path):
    request = echo_request(tmp_path, echo_model(tmp_path))
    run(request)
    with pytest.raises(UsageError, match=r"memory was not there, is now \"low\""):
        run(replace(request, model=replace(request.model, memory="low")))


# ---- Models ----


def room(num_bytes):
    return Room(
        device="this CPU", device_type="cpu", free=num_bytes, host_free=num_bytes,
        fast_formats=frozenset({"float32"}),
    )  # fmt: skip


def test_plans_for_a_folder_name_what_they_are_and_why(saved):
    large, small = room(10**9), room(2 * 10**6)
    plan, *_ = plans_for(saved, "auto", device="cpu", room=large)
    assert explain(plan, "auto", large).startswith("memory auto: float32; 8 documents at once, ")
    plan, *_ = plans_for(saved, "auto", device="cpu", room=small)
    assert plan.batch_size == 1
    assert explain(plan, "auto", small).endswith(
        "of 2 MB free on this CPU (slow: no units for bfloat16 here)"
    )
    with pytest.raises(UsageError, match=r"memory: found 'lo', expected one of auto, low"):
        plans_for(saved, "lo")


@pytest.mark.filterwarnings("ignore:The following device_map keys do not match")
@pytest.mark.parametrize(
    "plan",
    [
        MemoryPlan(dtype="float32"),
        MemoryPlan(dtype="float32", offload="disk", on_device=300_000),
        MemoryPlan(dtype="float32", offload="cpu", on_device=0),
    ],
    ids=["as it is", "partly on disk", "all waiting"],
)
def test_a_model_that_waits_elsewhere_says_the_same(saved, plan):
    document = Document(id="d", parts=[Text("hello")])
    wanted, found = (
        load_generator(saved, device="cpu", plan=each).generate(
            document, layout="T I", max_new_tokens=3, num_inference_steps=2, seed=5
        )
        for each in (None, plan)
    )
    assert found.text == wanted.text
    pixels = [torch.tensor(list(each.images[0].load().tobytes())) for each in (wanted, found)]
    # Folding rounds otherwise: a level of 255, here and there.
    assert (pixels[0] - pixels[1]).abs().max() <= 1


def test_a_plan_names_the_number_format(saved):
    model = load_generator(saved, device="cpu", plan=MemoryPlan(dtype="bfloat16")).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.quantize
def test_a_plan_with_few_bits_generates(saved):
    plan = MemoryPlan(dtype="bfloat16", quantization="int8")
    generator = load_generator(saved, device="cpu", plan=plan)
    made = generator.generate(
        Document(id="d", parts=[Text("hello")]), layout="T I", max_new_tokens=2, num_inference_steps=2
    )
    assert len(made.parts) == 3
