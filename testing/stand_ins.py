"""Bicubic enlargement in the place of the network: everything that restoring does around it has a known result."""

import sys
from types import SimpleNamespace

from dit4sr_pl.images.resize import enlarge
from dit4sr_pl.restore import main


class Bicubic:
    """A stand-in for a `Restorer`, called like it; `calls` records the arguments of every call."""

    evaluations = 1

    def __init__(self):
        self.calls = []

    def __call__(self, lr, size, captions, names, seed, on_step):
        assert len(lr) == len(captions) == len(names)
        self.calls.append(SimpleNamespace(lr=lr, size=size, captions=captions, names=names, seed=seed))
        on_step()
        return enlarge(lr, size)


def run_restore(monkeypatch, *arguments) -> str | None:
    """Runs `python -m dit4sr_pl.restore` in this process and returns the line that it ends with if it fails."""
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setattr(sys, "argv", ["restore", "device=cpu", *map(str, arguments)])
    try:
        main()
    except SystemExit as exit:
        return exit.code
    return None


def command(monkeypatch, restorer, *arguments) -> str | None:
    """Does what `run_restore` does, with `restorer` in the place of the network; `restorer.loads` counts its loads."""
    loads = []
    load = lambda *_: loads.append(1) or restorer  # noqa: E731
    monkeypatch.setattr("dit4sr_pl.restoration.restorer.Restorer.load", load)
    try:
        return run_restore(monkeypatch, *arguments)
    finally:
        restorer.loads = len(loads)
