"""Tables and the plot of `kernels_bench.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import kernels_gpu as gpu
from kernels_attention import Beside, Decode
from kernels_bars import Bar
from kernels_edits import Line

HEAD = (
    f"{'case':<40}{'KB':>7}{'cold':>8}{'/limit':>7}{'warm':>8}{'bmm/':>7}{'einsum/':>8}"
    f"{'base':>9}{'ours/base':>10}{'H100 predicted':>16}"
)
LEGEND = """us a call. cold: weights from memory; /limit: by the reading of as many bytes. warm: the
same weights again, as all that follows: bmm/ and einsum/ on gathered weights by ours; base: the
best of F.linear, oneDNN's reordered product and our own. H100: predicted from bytes, FLOPs and
launches, never measured, and the base product's beside it."""


def print_line(line: Line) -> None:
    case = line.case
    predicted = gpu.edits(case).us
    base = gpu.base(case.rows, case.in_size, case.out_size).us
    print(
        f"{case!s:<40}{case.nbytes / 1024:7.0f}{line.cold:8.1f}{line.cold / line.limit:7.2f}"
        f"{line.warm:8.1f}{_ratio(line.bmm, line.warm, 7)}{_ratio(line.einsum, line.warm, 8)}"
        f"{line.base:9.1f}{line.warm / line.base:10.2f}"
        f"{predicted:8.1f} /{base:6.1f}"
    )


def print_decodes(found: Iterable[Decode]) -> None:
    for decode in found:
        ratio = decode.us / decode.limit
        print(
            f"paged attention, {decode.name:<44}{decode.us:9.1f} us{ratio:7.2f} x reading K and V"
        )


def print_besides(found: Iterable[Beside]) -> None:
    for beside in found:
        ratio = beside.torchs / beside.ours
        print(f"{beside.name:<61}{beside.ours:9.1f} us{ratio:7.2f} x faster than torch")


def print_bars(bars: Iterable[Bar]) -> None:
    for bar in bars:
        sign, verdict = ">=" if bar.at_least else "<=", "holds" if bar.holds else "DOES NOT HOLD"
        print(f"{bar.name:<78}{bar.value:8.2f} {sign} {bar.bar:<6}{verdict}")


def print_predictions() -> None:
    print(f"\npredicted, H100: {'':<60}{'MB':>9}{'GFLOP':>9}{'launches':>9}{'us':>9}")
    for found in gpu.others():
        work = found.work
        print(
            f"{found.kernel:<22}{found.what:<54}{work.nbytes / 1e6:9.2f}{work.flops / 1e9:9.2f}"
            f"{work.launches:9}{work.us:9.1f}"
        )


def plot(lines: Mapping[str, list[dict[str, float]]], path: Path) -> None:
    """Each machine's cold decodes beside the reading of their bytes: one point a case."""
    from matplotlib import pyplot  # noqa: PLC0415

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5))
    for machine, points in lines.items():
        limits = [point["limit"] for point in points]
        left.loglog(limits, [point["cold"] for point in points], ".", label=machine)
        bases = [point["base"] for point in points]
        right.loglog(bases, [point["warm"] for point in points], ".", label=machine)
    for axes, factor, label in ((left, 1.3, "1.3 x"), (right, 0.2, "0.2 x")):
        low, high = axes.get_xlim()
        axes.plot([low, high], [low * factor, high * factor], "k--", linewidth=1, label=label)
        axes.set_ylabel("edits, us a call")
        axes.legend()
    left.set_title("weights from memory")
    left.set_xlabel("reading them once, us")
    right.set_title("weights in the cache")
    right.set_xlabel("base product of the same rows, us")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def _number(value: float | None, width: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.1f}"


def _ratio(value: float | None, by: float, width: int) -> str:
    return _number(None if value is None else value / by, width)
