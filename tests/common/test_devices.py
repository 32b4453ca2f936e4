import pytest

from dit4sr_pl.common import devices
from dit4sr_pl.common.devices import device_count


@pytest.mark.parametrize(
    "given, gpus, count",
    [
        (1, 0, 1),
        ("4", 0, 4),
        ([0], 8, 1),
        ([0, 2], 8, 2),
        ("0,3", 8, 2),
        ("0,", 8, 1),
        ("auto", 8, 8),
        (-1, 8, 8),
        ("-1", 2, 2),
    ],
)
def test_devices_are_counted_however_they_are_named(monkeypatch, given, gpus, count):
    monkeypatch.setattr(devices, "gpu_count", lambda: gpus)
    assert device_count(given, "gpu") == count


@pytest.mark.parametrize(
    "given, accelerator",
    [(0, "gpu"), (-2, "gpu"), ("all", "gpu"), ([], "gpu"), (None, "gpu"), ([0], "cpu"), (True, "cpu")],
)
def test_what_names_no_devices_is_one_line(given, accelerator):
    with pytest.raises(ValueError, match="trainer.devices="):
        device_count(given, accelerator)


def test_all_devices_of_a_machine_without_gpus(monkeypatch):
    monkeypatch.setattr(devices, "gpu_count", lambda: 0)
    assert device_count("auto", "cpu") == device_count(-1, "auto") == 1
    with pytest.raises(ValueError, match="there is no GPU here; take trainer=cpu"):
        device_count(-1, "gpu")
