"""What the compiler makes of the kernels for an H100 or H200; needs no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = Path(__file__).with_name("compile_for_hopper.py")
FORWARD, TERMS, VALUES = "forward_kernel", "term_gradients_kernel", "value_gradients_kernel"
KERNELS = {
    **{f"{case}: {kernel}": kernel
       for case in ("prefill bfloat16", "prefill float32", "u-net bfloat16")
       for kernel in (FORWARD, TERMS, VALUES)},
    "decode bfloat16: forward_kernel": FORWARD,
    "decode bfloat16: combine_kernel": "combine_kernel",
}  # fmt: skip
REGISTERS_OF_A_MULTIPROCESSOR = 65536


@pytest.fixture(scope="module")
def found():
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, PROGRAM], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout)


def accesses(resources, *parts):
    """How many accesses to memory have all these words in their name."""
    return sum(n for name, n in resources.items() if ".global" in name and set(parts) <= set(name.split(".")))


def test_every_kernel_compiles(found):
    assert set(found) == set(KERNELS)


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_register_is_spilled(found, kernel):
    assert found[kernel]["spilled"] == 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_two_programs_fit_a_multiprocessor_in_half_precision_and_one_in_single(found, kernel):
    at_least = 1 if "float32" in kernel else 2
    used = found[kernel]["registers"] * found[kernel]["threads"]
    assert at_least * used <= REGISTERS_OF_A_MULTIPROCESSOR, found[kernel]


@pytest.mark.parametrize("kernel", [k for k, kind in KERNELS.items() if kind in (FORWARD, TERMS)])
def test_cells_are_loaded_sixteen_bytes_at_a_time(found, kernel):
    levels = 4 if "u-net" in kernel else 3
    assert accesses(found[kernel], "ld", "v4") >= 4 * levels
    assert accesses(found[kernel], "ld", "b16") <= 1  # the ignore value


@pytest.mark.parametrize("kernel", [k for k, kind in KERNELS.items() if kind == VALUES])
def test_value_gradients_are_added_by_relaxed_vectors(found, kernel):
    levels = 4 if "u-net" in kernel else 3
    vectors = accesses(found[kernel], "relaxed", "add", "v4", "f32")
    assert vectors == accesses(found[kernel], "add") == levels


@pytest.mark.parametrize("kernel", [k for k, kind in KERNELS.items() if kind == TERMS])
def test_term_gradients_are_added_relaxed_once_a_program(found, kernel):
    levels = 4 if "u-net" in kernel else 3
    assert accesses(found[kernel], "relaxed", "add", "f32") == accesses(found[kernel], "add") == 2 + levels
