"""The benchmarks that count or measure for a GPU, at toy size."""

import sys

import pytest

from benchmarks import launches


@pytest.mark.slow
def test_launches_are_counted_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["launches.py", "--toy"])
    launches.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "launches" in line]
    counts = [(row[0].rstrip(","), int(row[row.index("launches") - 1])) for row in rows]
    parts = ["encode", "forward", "backward", "update", "together"]
    assert [name for name, _ in counts] == ["evaluation", *parts, *parts]
    evaluation, checkpointed, kept = counts[0], dict(counts[1:6]), dict(counts[6:])
    assert evaluation[1] < kept["forward"]  # merged and without autocast
    assert checkpointed["backward"] - kept["backward"] == pytest.approx(kept["forward"], rel=0.1)
