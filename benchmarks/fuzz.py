"""Restores 300 malformed and odd files by `python -m dit4sr_pl.restore`, with bicubic in the place of the network.

    python benchmarks/fuzz.py [--count 300]

It prints how many files of each kind were refused by name, restored and skipped (folders), and every mistake: a crash,
a result of a bad file, a result that shows another picture than the undamaged file, a file that is neither named nor
restored, a leftover.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from pytest import MonkeyPatch

sys.path.insert(0, str(Path(__file__).parents[1]))
from testing.fuzz import fuzz


def main() -> None:
    """Runs the benchmark and prints its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    count = parser.parse_args().count
    with tempfile.TemporaryDirectory() as folder, MonkeyPatch.context() as patch:
        start = time.perf_counter()
        report = fuzz(Path(folder), count, patch)
        seconds = time.perf_counter() - start
    columns = {"refused": report.refused, "restored": report.restored, "skipped": report.skipped}
    for kind in sorted(set().union(*columns.values())):
        print(f"{kind:22}", *(f"{counter[kind]:3} {name}" for name, counter in columns.items()), sep="  ")
    totals = ", ".join(f"{counter.total()} {name}" for name, counter in columns.items())
    slowest = f"the slowest restoring or writing in {report.slowest:.2f} s"
    print(f"{count} files: {totals}; {len(report.wrong)} wrong; {slowest}; {seconds:.0f} s in all")
    for line in report.wrong:
        print("wrong:", line)
    sys.exit(len(report.wrong) > 0)


if __name__ == "__main__":
    main()
