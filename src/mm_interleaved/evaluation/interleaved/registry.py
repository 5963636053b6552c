"""The benchmarks of interleaved generation by name. A new one is a file with a `Benchmark` and a line
here.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from mm_interleaved.evaluation.interleaved.comm import COMM
from mm_interleaved.evaluation.interleaved.files import Benchmark
from mm_interleaved.evaluation.interleaved.isg import ISG_BENCH
from mm_interleaved.evaluation.interleaved.mmie import MMIE
from mm_interleaved.evaluation.interleaved.opening import OPENING
from mm_interleaved.evaluation.interleaved.simple import INTERLEAVED_BENCH, INTERSYN, UEVAL
from mm_interleaved.evaluation.interleaved.vistory import VISTORY_BENCH
from mm_interleaved.evaluation.interleaved.weave import WEAVE

BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType(
    {
        "opening": OPENING,
        "isg-bench": ISG_BENCH,
        "mmie": MMIE,
        "comm": COMM,
        "vistorybench": VISTORY_BENCH,
        "ueval": UEVAL,
        "weave": WEAVE,
        "interleavedbench": INTERLEAVED_BENCH,
        "intersyn": INTERSYN,
    }
)
