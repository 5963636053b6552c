"""`python -m benchmarks NAME [--quick]`: run one part or `all` of them; `plot` what was measured, or print
the `model` of what a GPU would take at least.

Each part runs the textbook and our side in turns and compares their outputs first; the last line is one JSON
object. Exits 1 where outputs differ; measures nothing where the GPU that was asked for is not there.
"""

import argparse
import importlib
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Case, Setting
from benchmarks.machine import machine_facts, rates
from mm_interleaved.runs.provenance import commit

PARTS = (
    "decode_mmfs",
    "decode_token",
    "prefill_mmfs",
    "train_mmfs",
    "sampler",
    "unet_step",
    "story",
    "score",
    "batch",
    "serving",
    "precision",
)
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
QUICK_SECONDS = {
    "decode_mmfs": 40, "decode_token": 35, "prefill_mmfs": 50, "train_mmfs": 75, "sampler": 35,
    "unet_step": 45, "story": 25, "score": 8, "batch": 60, "serving": 90, "precision": 15,
}  # fmt: skip
FULL_SECONDS = {
    "decode_mmfs": 130, "decode_token": 65, "prefill_mmfs": 110, "train_mmfs": 210, "sampler": 60,
    "unet_step": 270, "story": 90, "score": 30, "batch": 180, "serving": 360, "precision": 30,
}  # fmt: skip
"""What a part takes about, on one core."""
RESULTS = Path(__file__).parent / "results"
_SHOWN = ("ratio", "equal", "model_ratio", "share_of_limit")
_HIDDEN = (
    "error",
    "seconds_min",
    "ratio_of_minima",
    "flops",
    "bytes",
    "runs",
    "runs_wanted",
    "rounds",
    "model_ratio_bytes",
)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.name == "model":
        from benchmarks.model import report

        print(report())
        return 0
    if options.name == "plot":
        from benchmarks.plot import draw

        draw(options.output or RESULTS, options.images)
        return 0
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        print("no GPU here: nothing was measured", file=sys.stderr)
        return 0
    torch.set_num_threads(options.threads)
    names = PARTS if options.name == "all" else (options.name,)
    begin = time.perf_counter()
    results = []
    for number, name in enumerate(names):
        now = time.perf_counter()
        left = math.inf if options.minutes is None else 60 * options.minutes - (now - begin)
        short = argparse.Namespace(**vars(options))
        short.quick = options.quick or is_short(left, names[number:])
        # Past its deadline a part hurries, so that those after it have their time.
        deadline = now + left - sum(QUICK_SECONDS[later] for later in names[number + 1 :])
        results.append(run_part(name, short, deadline))
    wrong = [result["benchmark"] for result in results if not all(c["equal"] for c in result["cases"])]
    if wrong:
        print(f"outputs differ: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


def is_short(seconds: float, parts: Sequence[str]) -> bool:
    """Whether the next of these parts has to be quick for all of them to be done in this time."""
    return seconds < FULL_SECONDS[parts[0]] + sum(QUICK_SECONDS[later] for later in parts[1:])


def run_part(name: str, options: argparse.Namespace, deadline: float = math.inf) -> dict[str, Any]:
    """Run one part; print each case as it comes, and the result as one line of JSON.

    Args:
        deadline: see `Setting`.
    """
    device = torch.device(options.device)
    setting = Setting(
        device=device,
        dtype=DTYPES[options.dtype or ("bfloat16" if device.type == "cuda" else "float32")],
        quick=options.quick,
        least=5 if options.quick else 11 if device.type == "cpu" else 20,
        seconds=2.0 if options.quick else 6.0,
        patience=5.0 if options.quick else 10.0,
        deadline=deadline,
        compiles=device.type == "cuda",
    )
    part = importlib.import_module(f"benchmarks.{name}")
    begin = time.perf_counter()
    print(f"\n{name}: {part.__doc__.splitlines()[0]}", flush=True)
    cases = []
    for case in part.run(setting):
        cases.append(case)
        print(_line(case), flush=True)
    rate = rates(device, setting.dtype)
    result = {
        "benchmark": name,
        "device": device.type,
        "commit": commit(Path(__file__).parent, "../src", "."),
        "quick": setting.quick,
        "dtype": str(setting.dtype).removeprefix("torch."),
        **machine_facts(device),
        "part_seconds": time.perf_counter() - begin,
        "copy_gb_a_second": rate.bytes_a_second / 1e9,
        "product_gflop_a_second": rate.flops_a_second / 1e9,
        "cases": cases,
    }
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        path = options.output / f"{name}-{device.type}.json"
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result), flush=True)
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=(*PARTS, "all", "model", "plot"))
    parser.add_argument("--quick", action="store_true", help="fewer sizes, fewer turns")
    parser.add_argument(
        "--minutes", type=float, help="for all parts together; when time is short, the rest is quick"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where results are kept (or read: plot)")
    parser.add_argument(
        # The second is the former name.
        "--images",
        "--pictures",
        type=Path,
        metavar="DIR",
        default=Path("docs/images"),
        help="where plots go",
    )
    return parser


def _line(case: Case) -> str:
    """A case in one line: sizes first, then times, then the ratio."""
    words = [
        f"{key}={_number(value)}"
        for key, value in case.items()
        if key not in (*_SHOWN, *_HIDDEN) and not isinstance(value, dict | list)
    ]
    words += [f"{side} {1e3 * value:.3g} ms" for side, value in case.get("seconds", {}).items()]
    words += [f"{key}={_number(case[key])}" for key in _SHOWN if case.get(key) is not None]
    if not case["equal"]:
        words.append(f"OUTPUTS DIFFER: {case.get('error')}")
    return "  " + "  ".join(words)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
