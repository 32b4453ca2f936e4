import pytest

from dit4sr_pl.backbone import Backbone


@pytest.fixture(scope="session")
def tiny_backbone() -> Backbone:
    return Backbone("tiny-sd3", dtype="float32", t5_tokens=8)
