"""Compiles the kernels for sm_90, on a machine without any GPU, and prints what came out as JSON.

The operators are called with tensors of the published sizes; instead of running, each launch is compiled as
it would be on an H100 or H200. A program of its own because Triton decides when it is imported whether it
compiles or interprets. The interpreter sees neither what does not compile, nor registers that spill, nor
narrow loads; this does.
"""

import json
import os
import re
import subprocess
import tempfile

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.driver import driver

from mm_interleaved.ops.triton_op import attend_images, attend_images_backward

HOPPER = GPUTarget("cuda", 90, 32)
H, D, P = 16, 64, 8
LLM, UNET = (32, 16, 8), (64, 32, 16, 8)


class AbsentGPU:
    """What Triton asks a driver for before it compiles."""

    def get_current_target(self):
        return HOPPER

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_launches(found: dict, case: str) -> None:
    """Makes Triton compile each kernel that is launched, and skip the launch."""

    def compile_instead(*, fn, compile, **_):
        options = json.loads(compile["specialization_data"])["options"]
        chosen = {name: options[name] for name in ("num_warps", "maxnreg")}
        source = ASTSource(fn.jit_function, compile["signature"], compile["constants"], compile["configs"][0])
        binary = triton.compile(source, HOPPER, chosen)
        found[f"{case}: {fn.jit_function.__name__}"] = {
            **resources(binary),
            "threads": 32 * chosen["num_warps"],
        }
        return True

    triton.knobs.runtime.jit_cache_hook = compile_instead


def resources(binary) -> dict[str, int]:
    """Registers a thread, bytes spilled, and how often each kind of access to memory stands in the PTX."""
    ptx = binary.asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    accesses = re.findall(r"\b((?:ld|st|red|atom)\.global[.\w:]*)", ptx)
    return {
        "registers": int(re.findall(r"Used (\d+) registers", said)[0]),
        "spilled": int(re.findall(r"(\d+) bytes spill stores", said)[0]),
        "shared": binary.metadata.shared,
        **{access: accesses.count(access) for access in sorted(set(accesses))},
    }


def arguments(levels, base_size, num_queries, num_images, dtype, places):
    S, E = sum(size * size for size in levels), 2 * P + len(levels) * P
    return (
        torch.empty(num_images, S, H, D, dtype=dtype),
        torch.zeros(1, num_images, dtype=torch.int64),
        torch.empty(1, num_queries, H, E),
        torch.empty(50, H, E),
        torch.zeros(1, num_queries, num_images, dtype=torch.int64),
        torch.empty(1, places, 2),
        torch.empty(H, D, dtype=dtype),
    ), (list(levels), P, base_size)


def main() -> None:
    driver.set_active(AbsentGPU())
    found = {}
    for case, levels, base_size, num_queries, num_images, dtype, places in (
        ("prefill bfloat16", LLM, 16.0, 2048, 8, torch.bfloat16, 1),
        ("prefill float32", LLM, 16.0, 2048, 8, torch.float32, 1),
        ("u-net bfloat16", UNET, 64.0, 4096, 1, torch.bfloat16, 4096),
    ):
        compile_launches(found, case)
        tensors, sizes = arguments(levels, base_size, num_queries, num_images, dtype, places)
        out, lse = attend_images(*tensors, *sizes)
        attend_images_backward(out, *tensors[:-1], out, lse, *sizes, True, True, True)
    compile_launches(found, "decode bfloat16")
    tensors, sizes = arguments(LLM, 16.0, 1, 8, torch.bfloat16, 1)
    attend_images(*tensors, *sizes)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
