"""Measuring on a GPU: times by events, launches, kernels by name, waits of the host, peaks of memory."""

import gc
import json
import statistics
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

GIB = 2**30


class Bench:
    """The things that all sections share: the device, the time that is left, and the results' file.

    Args:
        device: where everything runs.
        toy: whether everything has toy size, for a test of the benchmark itself.
        out: folder of `results.json`.
        seconds: time for all sections together.
    """

    def __init__(self, device: str, toy: bool, out: Path, seconds: float):
        self.device, self.toy, self.out = torch.device(device), toy, out
        self.cuda = self.device.type == "cuda"
        self.end = time.monotonic() + seconds
        self.sections: dict[str, dict] = {}
        out.mkdir(parents=True, exist_ok=True)

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.end - time.monotonic()

    def run(self, name: str, seconds: float, section: Callable[["Bench", dict], None]) -> None:
        """Runs a section if `seconds` are left, and writes all results so far; an error ends the section alone."""
        rows = self.sections[name] = {}
        if self.left < seconds and not self.toy:
            rows["skipped"] = f"{self.left:.0f} s are left of {seconds:.0f} s"
        else:
            began = time.monotonic()
            try:
                section(self, rows)
            except Exception as error:  # the next section still runs
                rows["error"] = f"{type(error).__name__}: {error}"[:500]
                rows["trace"] = traceback.format_exc()[-2000:]
            rows["seconds"] = round(time.monotonic() - began, 1)
            torch._dynamo.reset()
            self.free()
        (self.out / "results.json").write_text(json.dumps({"sections": self.sections}, indent=1))
        print(f"{name}: {rows.get('error') or rows.get('skipped') or rows['seconds']}", flush=True)

    def free(self) -> None:
        """Gives memory that nothing refers to back to the device."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def wait(self) -> None:
        """Waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def time(self, run: Callable[[], object], repeats: int = 10, warm: int = 3) -> dict[str, float]:
        """Returns the median milliseconds of a call, its spread, and the milliseconds until the call returned.

        The queue is empty before every call.
        """
        repeats, warm = (2, 1) if self.toy else (repeats, warm)
        for _ in range(warm):
            run()
        times, launches = [], []
        for _ in range(repeats):
            self.wait()
            began, begin = time.perf_counter(), self.mark()
            run()
            end = self.mark()
            launches.append(1e3 * (time.perf_counter() - began))
            times.append(self.between(begin, end))
        spread = (max(times) - min(times)) / statistics.median(times)
        timed = {"ms": statistics.median(times), "spread": spread, "launch_ms": statistics.median(launches)}
        return {name: round(value, 4) for name, value in timed.items()}

    def mark(self) -> "torch.cuda.Event | float":
        """Marks a moment: an event in the device's queue, or the time on a CPU."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin: "torch.cuda.Event | float", end: "torch.cuda.Event | float") -> float:
        """Returns the milliseconds between two marks."""
        if not self.cuda:
            return 1e3 * (end - begin)
        end.synchronize()
        return begin.elapsed_time(end)

    def kernels(self, run: Callable[[], object], top: int = 12) -> dict | None:
        """Returns how many kernels a call runs, their milliseconds together, and the longest by name; None: a CPU."""
        if not self.cuda:
            return None
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            run()
            self.wait()
        events = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
        events.sort(key=lambda event: -event.self_device_time_total)
        return {
            "kernels": sum(event.count for event in events),
            "busy_ms": round(sum(event.self_device_time_total for event in events) / 1e3, 2),
            "top": [[each.key[:70], each.count, round(each.self_device_time_total / 1e3, 2)] for each in events[:top]],
        }

    @contextmanager
    def waits(self) -> Iterator[Counter[str]]:
        """Yields a counter that has, after the block, how often each line made the host wait for the device.

        PyTorch warns only while `torch.cuda.set_sync_debug_mode("warn")` is on, see `watch`.
        """
        lines = Counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield lines
        found = [warning for warning in caught if "synchroniz" in str(warning.message)]
        lines.update(f"{Path(warning.filename).name}:{warning.lineno}" for warning in found)

    def watch(self, on: bool) -> None:
        """Switches the warnings about waits of the host on or off."""
        if self.cuda:
            torch.cuda.set_sync_debug_mode("warn" if on else "default")

    def waits_of(self, run: Callable[[], object]) -> dict:
        """Returns how often the host waits in a call, by line."""
        with self.waits() as lines:
            self.watch(True)
            try:
                run()
            finally:
                self.watch(False)
        return summary(lines)


def summary(lines: Counter[str]) -> dict:
    """Returns a counter of lines as a row of the results."""
    return {"count": sum(lines.values()), "lines": dict(lines.most_common(12))}


def distance(ours: Tensor, reference: Tensor) -> float:
    """Returns the norm of the difference over the norm of the reference."""
    return float((ours.double() - reference.double()).norm() / reference.double().norm())


def table(sections: dict[str, dict]) -> list[str]:
    """Returns the results as lines of a Markdown table; a time stands next to its ratio to the section's first."""
    lines = ["| section | measured | value | of the first |", "|---|---|---|---|"]
    for section, rows in sections.items():
        for group, nested in grouped(rows):
            first = None
            for name, value in nested.items():
                milliseconds = value.get("ms") if isinstance(value, dict) else None
                first = first or milliseconds
                ratio = f"{milliseconds / first:.2f}" if milliseconds and first else ""
                lines.append(f"| {section} | {group}{name} | {cell(value)} | {ratio} |")
    return lines


def grouped(rows: dict) -> list[tuple[str, dict]]:
    """Returns a section's rows in groups: those that are groups themselves, and all others together."""
    groups = {name: value for name, value in rows.items() if is_group(value)}
    rest = {name: value for name, value in rows.items() if name not in groups and name != "trace"}
    return [(f"{name}: ", value) for name, value in groups.items()] + [("", rest)]


def is_group(value: object) -> bool:
    """Returns whether a row holds rows."""
    return isinstance(value, dict) and not value.keys() & {"ms", "count", "busy_ms"}


def cell(value: object) -> str:
    """Returns a result in a few words."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if not isinstance(value, dict):
        return str(value)
    if "ms" in value:
        return f"{value['ms']:.2f} ms, launched in {value['launch_ms']:.2f} ms, spread {100 * value['spread']:.0f}%"
    if "busy_ms" in value:
        return f"{value['kernels']} kernels, busy {value['busy_ms']} ms"
    return f"{value['count']} waits"
