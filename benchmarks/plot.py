"""Plots of the result files: cost against images and rounds, and the share of the limit.

Needs matplotlib (extra `bench`).
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Result = Mapping[str, Any]

TEXTBOOK, OURS, LIMIT = "#b0483a", "#2b6a99", "#8a8a8a"
TIMES = "\N{MULTIPLICATION SIGN}"
WIDTH, HEIGHT, DOTS = 6.4, 4.0, 130


def draw(results: Path, images: Path) -> None:
    """Draw `bench_*.png` of every result that is there."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise SystemExit("plots need matplotlib: pip install 'mm-interleaved[bench]'") from error
    images.mkdir(parents=True, exist_ok=True)
    found = {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))
    }
    for name, result in found.items():
        draw_part = DRAWN.get(result["benchmark"])
        if draw_part is None:
            continue
        figure, axes = pyplot.subplots(figsize=(WIDTH, HEIGHT), layout="constrained")
        draw_part(axes, result)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        path = images / f"bench_{name}.png"
        # Without a date, so that the same results give the same file.
        figure.savefig(path, dpi=DOTS, metadata={"Software": None})
        pyplot.close(figure)
        print(path)


def _decode(axes: Any, result: Result) -> None:
    cases = [case for case in result["cases"] if case["batch"] == 1 and case["beams"] == 1]
    images = [case["images"] for case in cases]
    theirs = [1e3 * case["seconds"]["textbook"] for case in cases]
    ours = [1e3 * case["seconds"]["ours"] for case in cases]
    axes.plot(images, theirs, "o-", color=TEXTBOOK)
    axes.plot(images, ours, "o-", color=OURS)
    limit = [1e3 * case["share_of_limit"] * case["seconds"]["ours"] for case in cases]
    axes.plot(images, limit, ":", color=LIMIT)
    _label(axes, images[-1], theirs[-1], "textbook", TEXTBOOK)
    _label(axes, images[-1], ours[-1], "ours", OURS)
    _label(axes, images[-1], limit[-1], "limit", LIMIT)
    for count, low, case in zip(images, ours, cases, strict=True):
        axes.annotate(
            _ratio(case, 0), (count, low), (0, 7), textcoords="offset points", ha="center", color=OURS
        )
    axes.set_yscale("log")
    axes.set_xlim(-1, images[-1] * 1.2)
    axes.set_xticks(images)
    _titles(axes, result, "One layer's synchronizer, one new token", "images in the document", "ms")


def _token(axes: Any, result: Result) -> None:
    # Several documents at once are another comparison, for the table alone.
    alone = [case for case in result["cases"] if "textbook" in case.get("seconds", {})]
    context = max(case["context"] for case in alone)
    cases = [case for case in alone if case["context"] == context]
    images = [case["images"] for case in cases]
    for side, color in (("textbook", TEXTBOOK), ("ours", OURS)):
        times = [1e3 * case["seconds"][side] for case in cases]
        axes.plot(images, times, "o-", color=color)
        _label(axes, images[-1], times[-1], side, color)
    limit = [1e3 * case["share_of_limit"] * case["seconds"]["ours"] for case in cases]
    axes.plot(images, limit, ":", color=LIMIT)
    _label(axes, images[-1], limit[-1], "limit", LIMIT)
    axes.set_yscale("log")
    axes.set_xlim(-1, images[-1] * 1.2)
    axes.set_xticks(images)
    layers = cases[0].get("layers")
    what = "a whole model" if layers is None else f"{layers} layers of the published size"
    _titles(axes, result, f"A token of {what}, context {context}", "images in the document", "ms")


def _prefill(axes: Any, result: Result) -> None:
    labels = [_prompt(case) for case in result["cases"]]
    _bars(axes, result, labels, "textbook", "ours")
    _titles(axes, result, "One layer's synchronizer over a prompt", "tokens, images", "ms")


def _train(axes: Any, result: Result) -> None:
    labels = [f"{case['tokens']}, {case['images']}" for case in result["cases"]]
    _bars(axes, result, labels, "textbook", "ours")
    _titles(axes, result, "The same in training, forward and backward", "tokens, images", "ms")


def _story(axes: Any, result: Result) -> None:
    case = max(result["cases"], key=lambda case: case["images"])
    rounds = range(1, case["images"] + 1)
    for side, color in (("read again", TEXTBOOK), ("remembered", OURS)):
        times = [1e3 * seconds for seconds in case["rounds"][side]]
        axes.plot(rounds, times, "o-", color=color, markersize=3)
        _label(axes, case["images"], times[-1], side, color)
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, case["images"] * 1.25)
    _titles(axes, result, "A round of 40 tokens and an image", "round", "ms, without denoising")


def _unet(axes: Any, result: Result) -> None:
    cases = [case for case in result["cases"] if "share" in case]
    seen = ("no earlier image", "one earlier image")
    labels = [f"{seen[case['images'] > 0]},\n{case['channels']} channels" for case in cases]
    rows = [("textbook", TEXTBOOK, -0.2), ("ours", OURS, 0.2)]
    for side, color, shift in rows:
        shares = [100 * case["share"][side] for case in cases]
        places = [place + shift for place in range(len(cases))]
        bars = axes.bar(places, shares, 0.36, color=color, label=side)
        axes.bar_label(bars, [f"{share:.1f} %" for share in shares], padding=2)
    axes.set_xticks(range(len(cases)), labels)
    axes.margins(y=0.3)  # room for the legend above the highest label
    axes.legend(frameon=False, loc="upper left", ncol=2)
    _titles(axes, result, "The synchronizers' share of a denoising step", "", "% of the time")


def _bars(axes: Any, result: Result, labels: list[str], first: str, second: str) -> None:
    cases = result["cases"]
    for side, color, shift in ((first, TEXTBOOK, -0.2), (second, OURS, 0.2)):
        times = [1e3 * case["seconds"][side] for case in cases]
        axes.bar([place + shift for place in range(len(cases))], times, 0.36, color=color, label=side)
    for place, case in enumerate(cases):
        height = 1e3 * case["seconds"][second]
        axes.annotate(_ratio(case, 1), (place + 0.2, height), (0, 3), textcoords="offset points", ha="center")
    axes.set_xticks(range(len(cases)), labels)
    axes.legend(frameon=False)


def _prompt(case: Mapping[str, Any]) -> str:
    packed = f"\n{case['documents']} documents" if case["documents"] > 1 else ""
    return f"{case['tokens']}, {case['images']}{packed}"


def _ratio(case: Mapping[str, Any], digits: int) -> str:
    return f"{case['ratio']:.{digits}f}{TIMES}"


def _label(axes: Any, x: float, y: float, text: str, color: str) -> None:
    axes.annotate(text, (x, y), (6, -3), textcoords="offset points", color=color)


def _titles(axes: Any, result: Result, title: str, across: str, up: str) -> None:
    threads = f", {result['threads']} thread" if result["device"] == "cpu" else ""
    axes.set_title(f"{title}\n", loc="left", fontweight="bold")
    axes.text(
        0, 1.02, f"{result['hardware']}{threads}, {result['dtype']}, commit {result['commit']}",
        transform=axes.transAxes, color="#555555", fontsize=9,
    )  # fmt: skip
    axes.set_xlabel(across)
    axes.set_ylabel(up)


DRAWN: dict[str, Callable[[Any, Result], None]] = {
    "decode_mmfs": _decode,
    "decode_token": _token,
    "prefill_mmfs": _prefill,
    "train_mmfs": _train,
    "story": _story,
    "unet_step": _unet,
}
"""What is drawn of each part; the others are tables."""
