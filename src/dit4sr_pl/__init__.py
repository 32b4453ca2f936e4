"""DiT4SR (Duan et al., ICCV 2025) for PyTorch Lightning and Hydra; docs/architecture.md is the way in."""

__version__ = "0.1.0"
