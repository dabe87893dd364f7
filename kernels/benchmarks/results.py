"""What a benchmark of an op reports, and the ceilings that its figures are held against."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import ModuleType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from lorajax_kernels.device import current_device
from lorajax_kernels.measure import Time, compare, copy_bandwidth, matmul_rate

C = TypeVar("C")

_LONGEST_NOTE = 120


@dataclass(frozen=True)
class Ceilings:
    """What this device can do, measured in this process.

    Attributes:
        bytes_per_second: of a copy, read and written together.
        flops: operations per second of a large matrix product in `half`.
        half: name of the 16-bit type in which everything is measured.
    """

    bytes_per_second: float
    flops: float
    half: str

    @classmethod
    def measured(cls, *, tiny: bool) -> Ceilings:
        half = jnp.dtype("float32") if jax.default_backend() == "cpu" else current_device().half_dtype
        sizes = (2**20, 256) if tiny else (2**31, 8192)
        return cls(copy_bandwidth(sizes[0]), matmul_rate(half, sizes[1]), half.name)


@dataclass(frozen=True)
class Work:
    """What one call has to do at least; `what` is the ceiling that bounds it: "flops" or "bytes"."""

    amount: float
    what: str


@dataclass(frozen=True)
class Row:
    """One implementation of one op in one case.

    Attributes:
        op, case, implementation: what was measured; `ours` says whose it is.
        bound: it does a part of the work, and is what the op would take if all else were free.
        ms: median time of a call; None where it did not run, and `note` says why.
        fastest, slowest: of the runs that ms is the median of.
        rate: TFLOP/s or GB/s.
        of_ceiling: rate over the ceiling.
        note: anything else.
    """

    op: str
    case: str
    implementation: str
    ours: bool
    ms: float | None
    fastest: float | None = None
    slowest: float | None = None
    rate: str | None = None
    of_ceiling: float | None = None
    note: str = ""
    bound: bool = False


class TorchResult:
    """What torch has queued on the GPU, in a form that jax.block_until_ready waits for."""

    def __init__(self, result: Any):
        self.result = result

    def block_until_ready(self) -> TorchResult:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self


def measure_case(
    op: str,
    case: str,
    work: Work,
    ceilings: Ceilings,
    makers: Mapping[str, Callable[[], Callable[[], Any]]],
    *,
    ours: tuple[str, ...],
    rounds: int,
    bounds: tuple[str, ...] = (),
    notes: Mapping[str, str] | None = None,
) -> list[Row]:
    """Time all implementations of a case in turns.

    Args:
        makers: by name, functions that give what is to be timed (see measure.compare); one that raises is
            reported with its reason.
        ours: names of this library's.
        bounds: names of what does a part of the work.
        notes: by name; makers may add to them.
    """
    calls: dict[str, Callable[[], Any]] = {}
    failed: dict[str, str] = {}
    for name, make in makers.items():
        try:
            call = make()
            jax.block_until_ready(call())
            calls[name] = call
        except Exception as error:  # a peer may raise anything, and the others still run
            failed[name] = reason(error)
    times = compare(calls, rounds=rounds)
    rows = []
    for name in makers:
        note = (notes or {}).get(name, "")
        if name in failed:
            row = Row(op, case, name, name in ours, None, note=failed[name])
        else:
            row = _row(op, case, name, name in ours, times[name], work, ceilings, note)
        rows.append(replace(row, bound=name in bounds))
    return rows


def reason(error: Exception) -> str:
    """Why something did not run, on one short line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:_LONGEST_NOTE]


def import_tokamax() -> Any:
    """tokamax, without two things of its own benchmarks that stand in the way here.

    It would take this program's options for absl's, and refuse them; and it imports xprof, a profiler.
    """
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS([__name__])
    try:
        importlib.import_module("xprof")
    except ModuleNotFoundError:
        for name in ("xprof", "xprof.cli", "xprof.cli.tools"):
            sys.modules[name] = ModuleType(name)
        sys.modules["xprof.cli.tools"].get_kernel_stats_tool = None  # type: ignore[attr-defined]
    return importlib.import_module("tokamax")


def temporary_memory(compiled: Any) -> str:
    """What a compiled function holds besides its arguments and results, as a note."""
    return f"{compiled.memory_analysis().temp_size_in_bytes / 1e6:.0f} MB of temporary memory"


def measure_cases(
    measure: Callable[[C, Ceilings, int], list[Row]], cases: Iterable[C], ceilings: Ceilings, rounds: int
) -> list[Row]:
    """The rows of one case after the other."""
    return [row for case in cases for row in measure(case, ceilings, rounds)]


def measure_xla(
    op: str,
    case: str,
    function: Callable[..., Any],
    arguments: Sequence[Any],
    ceilings: Ceilings,
    rounds: int,
) -> list[Row]:
    """Time what XLA alone makes; the work is to read each argument and to write each result, once."""
    compiled = jax.jit(function).lower(*arguments).compile()
    moved = sum(array.nbytes for array in jax.tree.leaves((arguments, compiled(*arguments))))
    return measure_case(
        op,
        case,
        Work(moved, "bytes"),
        ceilings,
        {"xla": lambda: lambda: compiled(*arguments)},
        ours=("xla",),
        rounds=rounds,
        notes={"xla": temporary_memory(compiled)},
    )


def _row(
    op: str, case: str, name: str, ours: bool, time: Time, work: Work, ceilings: Ceilings, note: str
) -> Row:
    rate = work.amount / (time.median / 1e3)
    if work.what == "flops":
        text, ceiling = f"{rate / 1e12:.1f} TFLOP/s", ceilings.flops
    else:
        text, ceiling = f"{rate / 1e9:.0f} GB/s", ceilings.bytes_per_second
    of_ceiling = round(rate / ceiling, 3)
    times = (round(value, 4) for value in time)
    return Row(op, case, name, ours, *times, rate=text, of_ceiling=of_ceiling, note=note)


def table(rows: list[Row]) -> str:
    """The rows as text, each time with its ratios to the best of another library and to the bound."""
    lines = [("op", "case", "implementation", "ms", "rate", "of ceiling", "to best peer", "to bound", "note")]
    for row in rows:
        ratios = to_best_peer(row, rows), to_bound(row, rows)
        lines.append(
            (
                row.op,
                row.case,
                row.implementation,
                "-" if row.ms is None else f"{row.ms:.3f}",
                row.rate or "",
                "" if row.of_ceiling is None else f"{row.of_ceiling:.2f}",
                *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
                row.note,
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def markdown(record: Mapping[str, Any]) -> str:
    """The record of a run as a table in Markdown: a line a case, times in ms, fastest first.

    Cases that none of this library's implementations was timed in are left out, and the column of bounds if
    none was. Records from before bounds were told apart have them among the others.
    """
    any_bounds = any(row.get("bound") for row in record["rows"])
    titles = ["op and case", "this library", "of the ceiling", "to the fastest other", "others"]
    titles += ["to the bound"] if any_bounds else []
    lines = [f"| {' | '.join(titles)} |", f"| {' | '.join(['---'] * len(titles))} |"]
    for op, case in dict.fromkeys((row["op"], row["case"]) for row in record["rows"]):
        rows = [row for row in record["rows"] if (row["op"], row["case"]) == (op, case) and "ms" in row]
        rows.sort(key=lambda row: row["ms"])
        bounds = [row for row in rows if row.get("bound")]
        ours, others = ([r for r in rows if r["ours"] is mine and r not in bounds] for mine in (True, False))
        if not ours:
            continue
        names, other_names, bound_names = (
            ", ".join(f"{row['implementation']} {row['ms']:.3g}" for row in each)
            for each in (ours, others, bounds)
        )
        ratio = f"{ours[0]['ms'] / others[0]['ms']:.2f}" if others else ""
        cells = [f"{op}, {case}", names, f"{ours[0]['of_ceiling']:.0%}", ratio, other_names]
        if any_bounds:
            cells.append(f"{ours[0]['ms'] / bounds[0]['ms']:.2f}: {bound_names}" if bounds else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def as_json(row: Row, rows: list[Row]) -> dict[str, Any]:
    """What is known of a row, with its ratios to the best peer and to the bound among the rows."""
    known = asdict(row) | {"to_best_peer": to_best_peer(row, rows), "to_bound": to_bound(row, rows)}
    return {name: value for name, value in known.items() if value not in (None, "")}


def to_best_peer(row: Row, rows: list[Row]) -> float | None:
    """Time of one of ours over that of the fastest peer in the same case; None where there is none."""
    return _ratio(row, [other for other in rows if not other.ours and not other.bound])


def to_bound(row: Row, rows: list[Row]) -> float | None:
    """The same over the lowest bound."""
    return _ratio(row, [other for other in rows if other.bound])


def _ratio(row: Row, others: list[Row]) -> float | None:
    same = (other for other in others if (other.op, other.case) == (row.op, row.case))
    times = [other.ms for other in same if other.ms is not None]
    return row.ms / min(times) if row.ours and row.ms is not None and times else None


def run_alone(benchmark: Callable[[Ceilings, bool], list[Row]], description: str | None) -> None:
    """What a script does when it is run by itself."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that it works")
    arguments = parser.parse_args()
    print(table(benchmark(Ceilings.measured(tiny=arguments.tiny), arguments.tiny)))
