"""Number formats and threads follow the device, whatever the machine that the tests run on has."""

import os
import subprocess
import sys

import pytest
import torch

from mm_interleaved import devices
from mm_interleaved.devices import (
    cpu_formats,
    cpu_quota,
    limit_threads,
    slowness,
    torch_device,
    training_format,
    usable_cores,
    use_threads,
    weight_format,
)
from mm_interleaved.errors import UsageError
from mm_interleaved.training.settings import StageConfig

CPU = torch.device("cpu")
WITH = {"cpu_name": "new", "avx512_bf16": True}
WITHOUT = {"cpu_name": "old", "avx2": True, "avx512_bf16": False}


@pytest.fixture
def processor(monkeypatch):
    """Sets the flags that this machine's processor is taken to have."""
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    return lambda flags: monkeypatch.setattr(devices, "cpu_capabilities", lambda: flags)


def version_1(quota):
    return {"cpu,cpuacct/cpu.cfs_quota_us": quota, "cpu,cpuacct/cpu.cfs_period_us": "100000"}


@pytest.fixture
def groups(tmp_path):
    """Makes control groups out of {file: text}; returns what `cpu_quota` reads."""

    def make(membership, files):
        (tmp_path / "membership").write_text(membership)
        for name, text in files.items():
            path = tmp_path / "groups" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path / "groups", tmp_path / "membership"

    return make


# ---- Number formats ----


@pytest.mark.parametrize(
    ("flags", "cap", "formats"),
    [
        ({}, "", {"float32"}),
        ({"avx2": True, "avx512_f": True}, "", {"float32"}),
        ({"avx512_bf16": True}, "", {"float32", "bfloat16"}),
        ({"amx_bf16": True}, "", {"float32", "bfloat16"}),
        ({"bf16": True}, "", {"float32", "bfloat16"}),
        ({"sve_bf16": True}, "", {"float32", "bfloat16"}),
        ({"avx512_bf16": True, "avx512_fp16": True}, "", {"float32", "bfloat16", "float16"}),
        ({"avx512_bf16": True, "avx512_fp16": True}, "AVX512_CORE_BF16", {"float32", "bfloat16"}),
        ({"avx512_bf16": True}, "avx2", {"float32"}),
        ({"amx_bf16": True, "avx512_bf16": True}, "AVX512_CORE_VNNI", {"float32"}),
        ({"amx_bf16": True}, "DEFAULT", {"float32", "bfloat16"}),
    ],
)
def test_a_cpu_is_fast_where_it_has_units_that_are_not_switched_off(flags, cap, formats):
    assert cpu_formats(flags, {"ONEDNN_MAX_CPU_ISA": cap}) == formats


@pytest.mark.parametrize(
    ("flags", "asked", "chosen", "remark"),
    [
        (WITH, None, "bfloat16", ""),
        (WITHOUT, None, "float32", "training in float32, because this CPU (old) has no units for bfloat16"),
        (WITHOUT, "bfloat16", "bfloat16", "bfloat16 is slow here: this CPU (old) has no units"),
        (WITH, "bfloat16", "bfloat16", ""),
        (WITH, "float16", "float16", "float16 is slow here"),
        (WITH, "float32", "float32", ""),
        (WITHOUT, "float32", "float32", ""),
        ({}, None, "float32", "this CPU has no units for bfloat16"),
    ],
)
def test_training_takes_what_the_cpu_does_well_unless_it_is_told(processor, flags, asked, chosen, remark):
    processor(flags)
    found = training_format(asked, CPU)
    assert found.name == chosen
    assert remark in found.remark if remark else not found.remark
    assert "\n" not in found.remark


@pytest.mark.parametrize(
    ("capability", "chosen"), [((7, 0), "float16"), ((7, 5), "float16"), ((8, 0), "bfloat16")]
)
def test_a_gpu_before_bfloat16_trains_in_float16(monkeypatch, capability, chosen):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert training_format(None, torch.device("cuda", 0)).name == chosen
    assert weight_format("float16", torch.device("cuda", 0)).name == "float16"


@pytest.mark.parametrize("saved", ["float32", "float16", "bfloat16", "float64", ""])
def test_weights_are_kept_as_saved_only_where_that_is_fast(processor, saved):
    processor(WITH)
    slow = saved == "float16"
    found = weight_format(saved, CPU)
    assert found.name == ("float32" if slow or not saved else saved)
    assert bool(found.remark) == slow and bool(slowness(saved, CPU)) == slow


def test_a_stage_asks_for_what_its_settings_name(processor):
    processor(WITHOUT)
    stage = {"steps": 1, "learning_rate": 1.0}
    formats = {
        "float32": StageConfig(**stage),
        "bfloat16": StageConfig(**stage, use_bfloat16=True),
        "float16": StageConfig(**stage, use_float16=True, use_bfloat16=None),
    }
    for name, config in formats.items():
        assert config.number_format(CPU).name == name
    unnamed = StageConfig(**stage, use_bfloat16=None)
    assert unnamed.number_format(CPU).name == "float32"
    processor(WITH)
    assert unnamed.number_format(CPU).name == "bfloat16"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("banana", "expected auto, cpu, cuda or mps, found 'banana'"),
        ("", "expected auto, cpu, cuda or mps, found ''"),
        ("meta", "device meta: cannot be used here"),
    ],
)
def test_what_is_no_device_that_computes_is_refused(name, message):
    with pytest.raises(UsageError, match=message):
        torch_device(name)


# ---- Threads ----


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {}, None),
        # The limit of a group above binds as well; the least one counts.
        ("0::/a/b\n", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2.0),
        ("0::/a/b\n", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "50000 100000"}, 0.5),
        # In a container: the path is the host's, what is to be seen is the container's own root.
        ("0::/docker/123\n", {"cpu.max": "300000 100000"}, 3.0),
        ("4:cpu,cpuacct:/\n1:name=systemd:/\n", version_1("250000"), 2.5),
        ("4:cpu,cpuacct:/\n", version_1("-1"), None),
        ("0::/\n", {"cpu.max": "broken"}, None),
        ("0::/\n", {"cpu.max": "100000 0"}, None),
        ("0::/../..\n", {"cpu.max": "100000 100000"}, 1.0),
        ("", {"cpu.max": "100000 100000"}, None),
    ],
)  # fmt: skip
def test_the_quota_of_control_groups_is_read(groups, membership, files, quota):
    assert cpu_quota(*groups(membership, files)) == quota


def test_a_machine_without_control_groups_has_no_quota(tmp_path):
    assert cpu_quota(tmp_path, tmp_path / "none") is None


@pytest.mark.parametrize(
    ("mask", "quota", "cores"), [(8, None, 8), (8, 2.0, 2), (8, 1.2, 2), (8, 0.1, 1), (1, 4.0, 1)]
)
def test_cores_are_those_of_the_mask_within_the_quota(monkeypatch, mask, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(mask)), raising=False)
    monkeypatch.setattr(devices, "cpu_quota", lambda groups: quota)
    assert usable_cores() == cores


def test_a_program_keeps_within_its_cores_unless_the_environment_names_a_number(monkeypatch):
    monkeypatch.setattr(devices, "usable_cores", lambda: 3)
    for given, kept in (({}, "3"), ({"OMP_NUM_THREADS": ""}, "3"), ({"OMP_NUM_THREADS": "7"}, "7")):
        limit_threads(given)
        assert given["OMP_NUM_THREADS"] == kept
    environment = {"MKL_NUM_THREADS": "2"}
    limit_threads(environment)
    assert environment == {"MKL_NUM_THREADS": "2"}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("number", "variable", "cores", "expected"),
    [(3, "1", 1, 3), (0, "8", 1, 4), (0, "", 2, 2), (0, "", 16, 4)],
)
def test_threads_by_number_by_environment_by_cores(monkeypatch, threads, number, variable, cores, expected):
    torch.set_num_threads(4)
    monkeypatch.setattr(devices, "usable_cores", lambda: cores)
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    assert use_threads(number) == torch.get_num_threads() == expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity masks")
@pytest.mark.parametrize(
    ("mask", "variables"),
    [
        ("{min(os.sched_getaffinity(0))}", {}),
        ("os.sched_getaffinity(0)", {"OMP_NUM_THREADS": "1"}),
        ("os.sched_getaffinity(0)", {"MKL_NUM_THREADS": "1"}),
    ],
)
def test_the_command_obeys_affinity_and_environment(mask, variables):
    program = (
        f"import os; os.sched_setaffinity(0, {mask})\n"
        "from mm_interleaved.cli import main\n"
        "main.run = lambda arguments: __import__('torch').get_num_threads()\n"
        "main.main()"
    )
    kept = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    found = subprocess.run([sys.executable, "-c", program], env=kept | variables, timeout=120)
    assert found.returncode == 1
