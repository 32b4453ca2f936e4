import os
from collections import Counter

from testing.fuzz import LIMIT, fuzz
from testing.odd_files import KINDS


def test_odd_files_are_restored_right_or_named_and_leave_nothing(tmp_path, monkeypatch):
    """Every kind occurs twice; COMPLETE=1 takes the 300 files of benchmarks/fuzz.py."""
    count = 300 if os.environ.get("COMPLETE") == "1" else 2 * len(KINDS)
    report = fuzz(tmp_path, count, monkeypatch)
    assert report.wrong == []
    assert 0 < report.slowest < LIMIT
    assert sum(map(Counter.total, (report.refused, report.restored, report.skipped))) == count
