"""Instruments that tests and benchmarks share: toy runs, stand-ins, kills, a SLURM of one machine, odd files."""

from pathlib import Path

ROOT = Path(__file__).parents[1]  # of the repository
