"""The benchmarks measure what they say: the textbook is right, differences are noticed, counts are exact."""

import itertools
import json
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import (
    batch,
    decode_mmfs,
    decode_token,
    denoising,
    model,
    precision,
    prefill_mmfs,
    sampler,
    score,
    serving,
    story,
    train_mmfs,
    unet_step,
)
from benchmarks.__main__ import PARTS, main
from benchmarks.cost import cached_cost, sampling_flops, textbook_cost
from benchmarks.harness import Setting, compare, exact_first, peak_bytes, saved_for_backward
from benchmarks.machine import Rates
from benchmarks.models import random_image_decoder, random_model, writer_config
from benchmarks.plot import DRAWN, draw
from benchmarks.sizes import (
    LANGUAGE,
    SynchronizerSize,
    feature_synchronizer,
    gated_synchronizer,
    packed_visibility,
    random_module,
)
from benchmarks.textbook import TextbookGate, TextbookMap, textbook_between, textbook_layers
from mm_interleaved.generation.engine import InterleavedGenerator
from mm_interleaved.generation.settings import GenerationSettings
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.models.unet import MapSynchronizer
from mm_interleaved.tokens.visibility import relative_image_index
from tiny import tiny_config, tiny_model, tiny_processor

EXACT = 1e-12
CPU = torch.device("cpu")
TINY = SynchronizerSize(
    query_dim=24,
    feature_dim=12,
    value_dim=16,
    num_heads=4,
    num_points=2,
    level_sizes=(4, 2),
    max_images=8,
    base_size=4,
)


@pytest.fixture
def setting():
    return Setting(device=CPU, dtype=torch.float64, quick=True, least=3, seconds=0.0, patience=0.0, turn=0.0)


@pytest.fixture(scope="module")
def writer():
    config = writer_config(hidden=32, layers=2, intermediate=32, heads=2, value_dim=16, vision_dim=16)
    return random_model(config, CPU, torch.float64)


def inputs(dtype=torch.float64, queries=9, images=5):
    generator = torch.Generator().manual_seed(0)
    cells = torch.randn(2, images, TINY.cells, TINY.feature_dim, generator=generator, dtype=torch.float64)
    hidden = torch.randn(2, queries, TINY.query_dim, generator=generator, dtype=torch.float64)
    # One row sees its images causally, one is packed; the first queries see nothing.
    visible = torch.cat([packed_visibility(queries, images, documents, CPU) for documents in (1, 3)])
    assert visible.any() and not visible.all()
    return cells.to(dtype), hidden.to(dtype), relative_image_index(visible)


@pytest.fixture
def layer():
    layer = gated_synchronizer(TINY, CPU, torch.float64)
    layer.synchronizer.implementation = "reference"
    layer.synchronizer.ignore_value.normal_()
    return layer


# ---- The textbook --------------------------------------------------------------------------------


def test_the_textbook_equals_our_reference_and_so_do_all_its_gradients(layer):
    cells, hidden, index = inputs()
    assert (index == 0).all(-1).any() and (index > 1).any()
    leaves = [
        cells.requires_grad_(),
        hidden.requires_grad_(),
        *(p for p in layer.parameters() if p.requires_grad),
    ]
    outputs = []
    for side in (TextbookGate(layer), layer):
        out = side(hidden, side.project_cells(cells, TINY.level_sizes), index)
        outputs.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    for theirs, ours in zip(*outputs, strict=True):
        assert (theirs - ours).abs().max() < EXACT * max(1, theirs.abs().max())


@pytest.mark.parametrize("grid", [4, 6])
def test_the_textbook_of_a_map_equals_ours(grid):
    def build():
        return MapSynchronizer(feature_synchronizer(TINY), TINY.query_dim, TINY.feature_dim, grid_size=4)

    block = random_module(build, CPU, torch.float64)
    cells, _, _ = inputs()
    pixels = torch.randn(2, TINY.query_dim, grid, grid, dtype=torch.float64)
    visible = torch.tensor([[True, False, True, True, False], [False] * 5])
    theirs = TextbookMap(block)(pixels, cells, visible, TINY.level_sizes)
    ours = block(pixels, block.project_cells(cells, TINY.level_sizes), relative_image_index(visible))
    assert (theirs - ours).abs().max() < 1e-11


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_textbook_computes_in_half_precision(layer, dtype):
    cells, hidden, index = inputs()
    exact = TextbookGate(layer)(hidden, TextbookGate(layer).project_cells(cells, TINY.level_sizes), index)
    cells, hidden, index = inputs(dtype)
    side = TextbookGate(layer.to(dtype))
    out = side(hidden, side.project_cells(cells, TINY.level_sizes), index)
    assert out.dtype == dtype
    assert (out - exact).norm() < 0.1 * exact.norm()


@torch.no_grad()
def test_a_language_model_and_an_image_decoder_with_textbook_layers_equal_ours(writer, setting):
    ids = torch.tensor([[1, 998, *[999] * 64, 5, 6, 998, *[999] * 64, 7]])
    pixels = torch.rand(2, 3, 112, 112, dtype=torch.float64)
    arguments = {"input_ids": ids, "pixel_values": pixels, "image_start": torch.tensor([[1, 68]])}
    ours = writer(**arguments).hidden
    with textbook_layers(writer.language_model):
        theirs = writer(**arguments).hidden
    assert (theirs - ours).abs().max() < 1e-11 * ours.abs().max()
    assert torch.equal(writer(**arguments).hidden, ours)
    decoder, sizes = random_image_decoder((32, 32, 32, 32), 8, 32, CPU, torch.float64)
    case = unet_step.step_case(setting, decoder, sizes, 8, 1)
    assert case["equal"] and case["share_of_flops"]["ours"] < case["share_of_flops"]["textbook"]
    assert textbook_between is unet_step.textbook_between
    # What is computed of an image is its steps and what comes once before them.
    once, ours = case["projecting_once_seconds"], case["picture_seconds_computed"]["ours"]
    assert ours["30 steps"] == pytest.approx(once + 30 * case["seconds"]["ours"])
    image = unet_step.image_case(setting, decoder, 8, unet_step.prepare(setting, decoder, sizes, 8, 1), 4)
    assert image["equal"] and image["steps"] == 4
    timed = unet_step.share_case(setting, decoder, sizes, 8)
    assert timed["equal"] and all(0 < share < 1 for share in timed["share"].values())


def test_operations_of_the_textbook_are_those_counted_by_torch(layer):
    cells, hidden, index = inputs()
    side = TextbookGate(layer)
    values = side.project_cells(cells, TINY.level_sizes)
    with FlopCounterMode(display=False) as counter:
        side(hidden, values, index)
    cost = textbook_cost(TINY, 9, 5, 2, 8).flops - sampling_flops(TINY, 2 * 9 * 5)
    assert counter.get_total_flops() == cost


def test_operations_of_ours_do_not_grow_with_images_but_for_the_samples():
    few, many = cached_cost(TINY, 1, 1, 1, 4), cached_cost(TINY, 1, 32, 1, 4)
    assert many.flops - few.flops == sampling_flops(TINY, 31)


# ---- The harness ---------------------------------------------------------------------------------


def test_outputs_that_differ_are_not_timed(setting):
    calls = []
    result = compare(
        setting, {"one": lambda: torch.ones(2), "other": lambda: calls.append(0) or torch.ones(2) * 1.001}
    )
    assert not result.equal and not result.median and len(calls) == 1
    assert result.record("other")["ratio"] is None
    assert not compare(
        setting, {"one": lambda: torch.ones(2), "nan": lambda: torch.full((2,), torch.nan)}
    ).equal
    assert not compare(setting, {"one": lambda: torch.ones(2), "long": lambda: torch.ones(3)}).equal


def test_sides_take_turns(setting):
    order = []
    result = compare(
        setting, {name: lambda name=name: order.append(name) or torch.ones(1) for name in ("a", "b")}
    )
    assert result.equal and result.runs == 3
    turns = [name for name, last in zip(order, [None, *order], strict=False) if name != last]
    assert turns[-6:] == ["a", "b"] * 3


def test_memory_is_counted_while_tensors_live():
    x = torch.zeros(1000)
    with peak_bytes(CPU) as peak:
        y = x + 1
        del y
        z = x + 2
        w = z.view(10, 100) * 2
        del z, w
    assert peak["bytes"] == 8000


def test_what_backward_needs_is_counted_once():
    weight, x = torch.randn(10, 10, requires_grad=True), torch.randn(5, 10)
    with saved_for_backward((weight, x)) as saved:
        (x @ weight).exp().sum()
    assert saved["bytes"] == 200


@pytest.mark.parametrize("equal", [True, False])
def test_the_last_line_is_one_json_object_and_differences_fail(monkeypatch, capsys, tmp_path, equal):
    part = types.ModuleType("benchmarks.precision", "Nothing.")
    part.run = lambda setting: iter([{"images": 1, "ratio": 2.0, "equal": equal, "error": {}}])
    monkeypatch.setitem(sys.modules, "benchmarks.precision", part)
    monkeypatch.setattr("benchmarks.__main__.torch.set_num_threads", lambda threads: None)
    assert main(["precision", "--quick", "--output", str(tmp_path)]) == (not equal)
    out = capsys.readouterr()
    last = json.loads(out.out.splitlines()[-1])
    assert last.keys() >= {"benchmark", "device", "commit", "cases", "hardware", "versions"}
    assert last["cases"][0]["ratio"] == 2.0
    assert json.loads((tmp_path / "precision-cpu.json").read_text()) == last
    assert ("OUTPUTS DIFFER" in out.out) == ("outputs differ" in out.err) == (not equal)


def test_without_a_gpu_its_suite_measures_nothing(monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.__main__.torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("benchmarks.__main__.run_part", lambda *arguments: pytest.fail("it runs"))
    assert main(["all", "--device", "cuda"]) == 0
    assert "no GPU here: nothing was measured" in capsys.readouterr().err


def test_when_time_is_short_the_rest_is_quick(monkeypatch):
    sizes = []
    monkeypatch.setattr("benchmarks.__main__.torch.set_num_threads", lambda threads: None)
    clock = itertools.chain([0.0], itertools.count(0.0, 200.0))
    monkeypatch.setattr("benchmarks.__main__.time.perf_counter", lambda: float(next(clock)))

    def run_part(name, options, deadline):
        sizes.append("quick" if options.quick else "full")
        return {"benchmark": name, "cases": []}

    monkeypatch.setattr("benchmarks.__main__.run_part", run_part)
    assert main(["all", "--minutes", "12"]) == 0
    # Twelve minutes: 720, 520 and 320 seconds are left when the first three parts begin.
    assert sizes == ["full", "full"] + ["quick"] * (len(PARTS) - 2)


def test_past_the_deadline_of_a_part_the_fewest_turns_must_do(setting):
    sides = {"a": lambda: torch.ones(1), "b": lambda: torch.ones(1)}
    patient = replace(setting, least=6, seconds=60.0, patience=60.0)
    case = compare(replace(patient, deadline=time.perf_counter() - 1), sides).record("b")
    assert (case["runs"], case["runs_wanted"]) == (3, 6)
    case = compare(replace(patient, seconds=0.0), sides).record("b")
    assert case["runs"] == 6 and "runs_wanted" not in case


def test_a_quick_run_is_as_small_on_a_gpu(setting, monkeypatch):
    asked = []
    monkeypatch.setattr(prefill_mmfs, "prefill_case", lambda setting, **sizes: asked.append(sizes))
    monkeypatch.setattr(prefill_mmfs, "exact_first", lambda setting, case: case(setting))
    list(prefill_mmfs.run(replace(setting, device=torch.device("cuda"))))
    assert max(sizes["tokens"] for sizes in asked) == 512


def test_every_part_has_a_plot_or_a_table(tmp_path):
    pytest.importorskip("matplotlib")
    seconds = {"textbook": 2.0, "ours": 1.0, "read again": 2.0, "remembered": 1.0}
    case = {
        "images": 2, "batch": 1, "beams": 1, "context": 8, "tokens": 4, "documents": 2, "ratio": 2.0,
        "equal": True, "seconds": seconds, "share_of_limit": 0.5, "share": {"textbook": 0.5, "ours": 0.1},
        "channels": 64,
        "rounds": {"read again": [1.0, 2.0], "remembered": [1.0, 1.0]},
    }  # fmt: skip
    facts = {"device": "cpu", "hardware": "a machine", "threads": 1, "dtype": "float32", "commit": "0"}
    # Cases of other comparisons, which only the table shows.
    others = {
        "decode_token": [{"context": 8, "images": 2, "equal": True, "seconds": {"one by one": 2.0}}],
        "unet_step": [{"kind": "painting", "switch": "step_cache=2", "equal": True, "seconds": {}}],
    }
    for part in PARTS:
        (tmp_path / f"{part}-cpu.json").write_text(
            json.dumps({"benchmark": part, **facts, "cases": [case, case, *others.get(part, ())]})
        )
    draw(tmp_path, tmp_path)
    assert {path.stem for path in tmp_path.glob("*.png")} == {f"bench_{part}-cpu" for part in DRAWN}


def test_an_approximate_way_of_denoising_reports_its_error(setting):
    model = tiny_model(generation_settings={"num_inference_steps": 4, "scheduler": "ddim"})
    conditioning = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0))
    own = GenerationSettings.combine(model.config.generation_settings)
    inputs = denoising.DenoisingInputs(
        model.image_decoder, model.config.scheduler_config, own, conditioning, None
    )
    with torch.no_grad():
        [kept] = denoising.exact_cases(setting, inputs)
        exact = [inputs.steps(0)]
        case = denoising.lossy_case(setting, inputs, exact, "step_cache=2", {"step_cache": 2})
    assert kept["equal"] and kept["exact"] and kept["switch"] == "channels_last"
    assert case["equal"] and not case["exact"] and 0 < case["pixel_error"] <= case["pixel_error_most"]
    assert case["seconds"].keys() == {"exact", "switch"}


def test_half_precision_is_compared_in_single_precision_first(setting):
    half = replace(setting, dtype=torch.bfloat16)
    case = exact_first(half, lambda given: decode_mmfs.decode_case(given, TINY, 3, batch=1))
    assert case["equal"] and 0 < case["error_in_float32"]["ours"] < 1e-4 < case["error"]["ours"]
    wrong = {torch.float32: False, torch.bfloat16: True}
    assert not exact_first(half, lambda given: {"equal": wrong[given.dtype], "error": {}})["equal"]


# ---- The parts -----------------------------------------------------------------------------------


def test_the_parts_of_one_layer_agree_at_any_size(setting):
    cases = [
        decode_mmfs.decode_case(setting, TINY, 3, batch=2, beams=2),
        prefill_mmfs.prefill_case(setting, TINY, 12, 4, 2),
        train_mmfs.train_case(setting, TINY, 12, 4),
        *sampler.both_ways(
            setting, "language", sampler.language_inputs(setting, 1, 3, TINY), queries=1, images=3
        ),
        *sampler.both_ways(setting, "unet", sampler.unet_inputs(setting, 4, TINY), queries=16, images=1),
    ]
    for case in cases:
        assert case["equal"] and case["ratio"] > 0, case
    assert cases[0]["ratios"].keys() == {"textbook", "ours", "sample first", "dense"}
    assert cases[1]["ratios"].keys() >= {"textbook", "once a query", "folded", "ours"}
    assert cases[2]["ratios"].keys() == {"textbook", "once a query", "folded", "ours"}
    assert cases[2]["saved_bytes"]["ours"] < cases[2]["saved_bytes"]["textbook"]


def test_a_story_is_read_sixteen_times_less_and_its_images_are_encoded_once(setting, writer):
    case = story.story_case(setting, writer, 3, num_tokens=2, repeats=1)
    assert case["equal"] and case["model_ratio_bytes"] > 1
    assert all(case["peak_bytes"][side] > 0 for side in ("read again", "remembered"))
    for side, work in story.expected_work(3, 2, writer.config.num_slots).items():
        found = (case["tokens_prefilled"][side], case["tokens_decoded"][side], case["images_encoded"][side])
        assert found == (work.prefilled, work.decoded, work.encoded), side
    published = story.expected_work(10, story.ROUND_TOKENS, 64)
    assert published["read again"].prefilled >= 16 * published["remembered"].prefilled
    assert (published["read again"].encoded, published["remembered"].encoded) == (100, 10)


def test_what_precision_costs_stands_beside_what_it_is(setting):
    [single, *_] = precision.language_cases(setting, TINY, 12, images=4)
    assert single["dtype"] == "float32" and single["equal"] and single["rms_error_ours"] < 1e-5
    assert single["bytes"]["ours"] < single["bytes"]["textbook"]
    assert all(single["peak_bytes"][side] > 0 for side in ("textbook", "ours"))


def test_options_are_scored_on_a_prefix_that_is_read_once(setting, writer):
    case = score.score_case(setting, writer, 12)
    assert case["equal"] and case["images_encoded"] == {"each alone": 12, "shared": 1}
    read = sum(5 + number % 9 for number in range(12))
    assert case["tokens_read"]["shared"] == case["context_tokens"] + read


def test_documents_at_once_are_compared_letter_by_letter_and_pixel_by_pixel(setting):
    longer = tiny_config().text_config.to_dict() | {"max_position_embeddings": 1024}
    small = tiny_model(text_config=longer)
    generator = InterleavedGenerator(small, tiny_processor(small.config))
    small.config.generation_settings = {"max_new_tokens": 4, "num_inference_steps": 1}
    case = batch.batch_case(setting, generator, "draw", "T I")
    assert case["equal"] and case["documents"] == 8 and case["ratio"] > 0
    words = [batch._bits(text) for text in ("a word", "a ward", "a wor", "")]
    assert all((one - words[0]).abs().max() == 1 for one in words[1:])
    at_once = {row[0]: row[-1] for row in model._batch()}
    one_by_one = {row[0]: row[1] for row in model._batch()}
    for what, cost in at_once.items():
        assert cost.flops == one_by_one[what].flops and cost.bytes < one_by_one[what].bytes / 3


def test_clients_of_the_engine_get_the_same_at_once_and_one_after_another(setting, monkeypatch):
    longer = tiny_config().text_config.to_dict() | {"max_position_embeddings": 1024}
    small = tiny_model(text_config=longer)
    small.config.generation_settings = {"max_new_tokens": 4, "num_inference_steps": 1}
    monkeypatch.setattr(serving, "CLIENTS", 3)
    case = serving.serving_case(
        setting, InterleavedGenerator(small, tiny_processor(small.config)), "draw", "I"
    )
    assert case["equal"] and case["documents"] == 6 and case["ratio"] > 0
    assert 1 < case["mean_image_rows"] <= 3


def test_a_token_of_a_whole_model_is_the_same_with_textbook_layers(setting, writer):
    cases = list(decode_token.token_cases(setting, writer, 40, (0, 2)))
    assert [case["equal"] for case in cases] == [True, True]
    assert cases[1]["growth_from_no_image"].keys() == {"textbook", "ours"}
    assert cases[1]["ratios"].keys() == {"textbook", "ours", "static"}
    assert cases[1]["ratios"]["textbook"] == 1 and cases[1]["ratios"]["ours"] == cases[1]["ratio"]


@pytest.mark.slow
def test_compiled_sides_are_the_same_and_report_how_long_they_took_to_compile(setting, writer, monkeypatch):
    compile_traced, shapes = torch.compile, []

    def compile_eagerly(run, fullgraph=False, **others):
        # Traced as on a GPU; what is traced runs as it is.
        shapes.append(run)
        return compile_traced(run, backend="eager", fullgraph=fullgraph)

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    setting = replace(setting, compiles=True)
    few, many = decode_token.token_cases(setting, writer, 24, (0, 8), (8,))
    assert few["equal"] and many["equal"] and "compile_seconds" not in few and len(shapes) == 2
    assert many["compile_seconds"].keys() == {"compiled", "textbook, compiled"}
    case = decode_mmfs.decode_case(setting, TINY, 7, batch=1)
    assert "textbook, compiled" not in case["ratios"] and case["equal"]
    inputs = sampler.language_inputs(setting, 4, 2, TINY)
    for case in sampler.both_ways(setting, "language", inputs, queries=4, images=2):
        assert case["equal"] and "reference, compiled" in case["compile_seconds"]


def test_the_growth_of_a_group_of_layers_is_measured_and_counted(setting, writer):
    size = replace(
        LANGUAGE, query_dim=32, feature_dim=16, value_dim=16, num_heads=8,
    )  # fmt: skip
    cases = list(decode_token.group_cases(setting, writer, size, 40, (0, 2, 8)))
    assert [(case["images"], case["equal"]) for case in cases] == [(0, True), (2, True), (8, True)]
    assert all(case["seconds"].keys() == {"textbook", "ours"} for case in cases)
    assert cases[0]["growth_from_no_image"] == 0 and cases[0]["growth_counted"]["bytes"] == 0
    few, many = (case["growth_counted"] for case in cases[1:])
    assert 0 < few["bytes"] < many["bytes"] and 0 < few["flops"] < many["flops"]
    # Six images more cost six times what sampling one costs, and nothing else.
    text_bytes = writer.dtype.itemsize * sum(
        each.numel()
        for name, each in (
            *writer.language_model.layers.named_parameters(),
            *writer.text_head.named_parameters(),
        )
        if "synchronizer" not in name
    )
    more = [cached_cost(size, 1, images, 1, writer.dtype.itemsize).bytes for images in (2, 8)]
    assert (many["bytes"] - few["bytes"]) * text_bytes < more[1] - more[0]


def test_published_sizes_are_counted_as_the_goal_wants():
    # Of the released model: a group of four layers, one of which looks into images; nothing is allocated.
    config = writer_config(
        hidden=5120, layers=4, intermediate=13824, heads=40, value_dim=1024, vision_dim=1024
    )
    with torch.device("meta"):
        model = MMInterleavedForConditionalGeneration(config)
    assert model.language_model.synchronized_layers == (0,)
    synchronizer = model.language_model.layers[0].synchronizer.synchronizer
    assert synchronizer.query_projection.weight.shape == (LANGUAGE.query_dim, LANGUAGE.query_dim)
    assert synchronizer.value_projection.weight.shape == (LANGUAGE.value_dim, LANGUAGE.feature_dim)
    counted = decode_token.counted_growth(model, LANGUAGE, 512, 32, Rates(1e10, 1e11))
    assert 0 < counted["flops"] < 0.015 and 0 < counted["bytes"] < 0.015


def test_what_the_docs_report_of_a_gpu_is_what_is_computed():
    docs = Path(__file__).parents[2] / "docs" / "performance_results.md"
    assert model.report() in docs.read_text(encoding="utf-8")


def test_a_token_of_several_documents_at_once_is_the_same(setting, writer):
    case = decode_token.batch_case(setting, writer, 40, 2)
    assert case["equal"] and case["documents"] == 4
