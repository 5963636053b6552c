"""What is chosen for a model and a memory: the least loss that fits, and less of everything behind it."""

from dataclasses import replace

import pytest

from mm_interleaved.devices import FORMATS
from mm_interleaved.models.cost import Needs, needs_of
from mm_interleaved.models.device_memory import host_free
from mm_interleaved.models.memory_plan import MemoryPlan, Room, memory_plans
from tiny import tiny_config, tiny_model

GB = 10**9
NEEDS = Needs(
    parameters=10 * GB, tokens=2048, images=30, cached_values=GB // 2, working_values=GB // 2,
    few_bits_parameters=8 * GB, token_parameters=8 * GB, token_flops=1.0, token_tensors=1, step_tensors=1,
    generation_flops=1.0, image_flops=1.0, steps=30,
)  # fmt: skip
"""40 GB in float32, 20 GB in bfloat16, 12 GB with int8, 8.5 GB with nf4; 2 GB a document in bfloat16."""


def gpu(gigabytes, host=100, formats=FORMATS):
    return Room(
        device="a GPU", device_type="cuda", free=gigabytes * GB, host_free=host * GB,
        fast_formats=frozenset(formats),
    )  # fmt: skip


def cpu(gigabytes, formats=("float32",)):
    return Room(
        device="this CPU", device_type="cpu", free=gigabytes * GB, host_free=gigabytes * GB,
        fast_formats=frozenset(formats),
    )  # fmt: skip


def chosen(room, memory="auto", saved="float32", **asked):
    plans = memory_plans(NEEDS, room, memory=memory, saved=saved, quantizations=("int8", "nf4"), **asked)
    return plans[0]


def form(plan):
    return plan.dtype, plan.quantization, plan.offload


@pytest.mark.parametrize(
    ("gigabytes", "expected"),
    [
        (80, ("float32", None, None)),
        (50, ("float32", None, None)),
        (40, ("bfloat16", None, None)),
        (24, ("bfloat16", "int8", None)),
        (12, ("bfloat16", "nf4", None)),
        (8, ("bfloat16", None, "cpu")),
        (4, ("bfloat16", None, "cpu")),
    ],
)
def test_the_smaller_the_gpu_the_more_is_given_up_exactness_last(gigabytes, expected):
    assert form(chosen(gpu(gigabytes))) == expected


def test_what_is_chosen_fits():
    for gigabytes in range(3, 90):
        plan = chosen(gpu(gigabytes))
        assert plan.fits and plan.held <= 0.9 * gigabytes * GB


def test_as_many_documents_at_once_as_there_is_room_for():
    assert [chosen(gpu(80), most_at_once=most).batch_size for most in (1, 4, 16)] == [1, 4, 8]
    assert chosen(gpu(26), saved="bfloat16").batch_size == 1


@pytest.mark.parametrize(
    ("gigabytes", "expected"),
    [
        (64, ("float32", None, None)),
        (30, ("bfloat16", None, None)),
        (16, ("bfloat16", "int8", None)),
        (8, ("bfloat16", None, "disk")),
    ],
)
def test_a_cpu_has_the_disk_alone_for_what_waits(gigabytes, expected):
    assert form(chosen(cpu(gigabytes))) == expected


def test_a_host_too_small_for_the_weights_leaves_them_on_the_disk():
    assert form(chosen(gpu(8, host=100))) == ("bfloat16", None, "cpu")
    assert form(chosen(gpu(8, host=10))) == ("bfloat16", None, "disk")


def test_low_takes_as_little_of_the_device_as_can_be_one_document_at_once():
    for room in (gpu(80), gpu(8)):
        plan = chosen(room, "low")
        assert form(plan) == ("bfloat16", None, "cpu") and plan.on_device == 0 and plan.batch_size == 1
    # On a CPU the disk is the last resort: each word would read all weights from it.
    assert form(chosen(cpu(64), "low")) == ("bfloat16", "nf4", None)
    assert form(chosen(cpu(6), "low")) == ("bfloat16", None, "disk")


def test_what_is_named_is_kept_to():
    assert form(chosen(gpu(40), dtype="float32")) == ("float32", "int8", None)
    assert form(chosen(gpu(80), dtype="float16")) == ("float16", None, None)
    assert form(chosen(gpu(80), quantization="nf4")) == ("bfloat16", "nf4", None)


def test_weights_saved_in_a_format_that_the_device_is_slow_in_are_widened_if_they_fit():
    assert chosen(cpu(64), saved="bfloat16").dtype == "float32"
    assert chosen(cpu(30), saved="bfloat16").dtype == "bfloat16"
    assert chosen(gpu(40, formats=("float32", "float16"))).dtype == "float16"


def test_the_next_plans_take_less_and_the_last_is_tried_anyway():
    plans = memory_plans(NEEDS, gpu(80), memory="auto", saved="float32", quantizations=("int8",))
    assert [form(plan) for plan in plans] == [
        ("float32", None, None), ("bfloat16", None, None), ("bfloat16", "int8", None),
        ("bfloat16", None, "cpu"), ("bfloat16", None, "disk"),
    ]  # fmt: skip
    [last] = memory_plans(NEEDS, gpu(1, host=1), memory="auto", saved="float32")
    assert not last.fits and last.offload == "disk"


def test_a_plan_comes_back_from_a_manifest():
    plan = chosen(gpu(24))
    assert MemoryPlan.of_record({**plan.record(), "of a later version": 1}) == plan


def test_the_sizes_are_those_of_the_weights():
    model = tiny_model()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    needs = needs_of(tiny_config().to_dict(), shapes)
    num_bytes = sum(tensor.numel() * 4 for tensor in model.state_dict().values())
    assert needs.weight_bytes("float32") == num_bytes and needs.weight_bytes("bfloat16") == num_bytes // 2
    linear = sum(
        parameter.numel()
        for name, parameter in model.language_model.layers.named_parameters()
        if name.endswith("proj.weight") and "synchronizer" not in name
    )
    assert needs.few_bits_parameters == linear
    half, int8 = (needs.weight_bytes("bfloat16", kind) for kind in (None, "int8"))
    assert half - int8 == pytest.approx(linear, rel=0.02)
    assert replace(needs, working_values=0).document_bytes("float32") < needs.document_bytes("float32")


def test_the_free_memory_is_that_of_the_container(tmp_path):
    meminfo, groups = tmp_path / "meminfo", tmp_path / "cgroup"
    groups.mkdir()
    meminfo.write_text("MemTotal:       32 kB\nMemFree:  1 kB\nMemAvailable:      1000000 kB\n")
    assert host_free(meminfo, groups) == 1_024_000_000
    (groups / "memory.max").write_text("max\n")
    assert host_free(meminfo, groups) == 1_024_000_000
    (groups / "memory.max").write_text("700000000\n")
    (groups / "memory.current").write_text("200000000\n")
    assert host_free(meminfo, groups) == 500_000_000
    assert host_free(tmp_path / "not there", groups) == 500_000_000
