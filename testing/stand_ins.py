"""Bicubic enlargement in the network's place: what restoring does around the network can then be told exactly."""

import sys
from types import SimpleNamespace

from dit4sr_pl.images.resize import enlarge
from dit4sr_pl.restore import main


class Bicubic:
    """Called as a `Restorer`; remembers what it was asked for."""

    evaluations = 1

    def __init__(self):
        self.calls = []

    def __call__(self, lr, size, captions, names, seed, on_step):
        assert len(lr) == len(captions) == len(names)
        self.calls.append(SimpleNamespace(lr=lr, size=size, captions=captions, names=names, seed=seed))
        on_step()
        return enlarge(lr, size)


def command(monkeypatch, restorer, *arguments) -> str | None:
    """`python -m dit4sr_pl.restore` in this process; returns the line it ends with if it fails."""
    loads = []
    load = lambda *_: loads.append(1) or restorer  # noqa: E731
    monkeypatch.setattr("dit4sr_pl.restoration.restorer.Restorer.load", load)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setattr(sys, "argv", ["restore", "device=cpu", *map(str, arguments)])
    try:
        main()
    except SystemExit as exit:
        return exit.code
    finally:
        restorer.loads = len(loads)
    return None
