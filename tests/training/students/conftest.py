from pathlib import Path

import pytest

from testing.students import write_teacher


@pytest.fixture(scope="session")
def teacher(toy_backbone, tmp_path_factory) -> Path:
    """Returns the file of a teacher."""
    return write_teacher(toy_backbone, tmp_path_factory.mktemp("teacher") / "lr_stream.safetensors")
