import logging
import os
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dit4sr_pl.data.datasets import Draw, TrainingCrops, ValidationImages
from dit4sr_pl.data.module import SuperResolutionData
from dit4sr_pl.data.photo_sets import Mixture, PhotoSet, open_sets
from dit4sr_pl.images.files import write_image
from dit4sr_pl.preparation.build_manifest import build_manifest


def write_photos(folder: Path, count: int) -> Path:
    for i in range(count):
        write_image(folder / f"{i % 2}/{i:02}.png", torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(i)))
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_photos(tmp_path / "photos", 10)


def names(photo_set: PhotoSet) -> list[str]:
    return [photo.name for photo in photo_set.photos]


# Mixture


def epochs(mixture: Mixture, count: int) -> list[list[int]]:
    return [[mixture.photo(index, epoch) for index in range(len(mixture))] for epoch in range(count)]


def test_weights_of_one_leave_every_sample_its_own_photo():
    assert epochs(Mixture([3, 5, 2], [1, 1.0, 1], seed=4), 3) == [list(range(10))] * 3


def test_whole_weights_repeat_every_photo():
    (epoch,) = epochs(Mixture([3, 4], [2, 3.0], seed=0), 1)
    assert Counter(epoch) == {photo: 2 if photo < 3 else 3 for photo in range(7)}


@pytest.mark.parametrize("weight", [0.1, 0.25, 0.7, 1.3, 2.5])
def test_fractions_come_equally_often_in_epochs_of_equal_length(weight):
    mixture, share = Mixture([4, 10, 3], [1, weight, 2], seed=0), round(10 * weight)
    assert len(mixture) == 4 + share + 6
    seen = Counter()
    for number, epoch in enumerate(epochs(mixture, 30), 1):
        assert len(epoch) == len(mixture)
        seen.update(epoch)
        assert all(seen[photo] == number for photo in range(4))
        assert all(seen[photo] == 2 * number for photo in range(14, 17))
        counts = [seen[photo] for photo in range(4, 14)]
        assert sum(counts) == number * share and max(counts) - min(counts) <= 1


def test_photos_of_a_fraction_are_drawn_from_seed_and_epoch():
    first, again, other = (epochs(Mixture([40], [0.5], seed), 4) for seed in (0, 0, 1))
    assert first == again != other
    assert sorted(first[0] + first[1]) == sorted(first[2] + first[3]) == list(range(40))
    assert first[0] not in (sorted(first[0]), first[2])


def test_repeated_photo_gives_another_sample_each_time(folder):
    sets = {"one": {"folder": folder, "limit": 1, "weight": 3}}
    dataset = TrainingCrops([], 16, 0, min_gradient=0, sets=sets)
    samples = [dataset[Draw(index, 0, 0)] for index in range(len(dataset))]
    assert [sample["name"] for sample in samples] == ["0/00"] * 3
    assert len({sample["seed"] for sample in samples}) == 3
    assert len({sample["image"].numpy().tobytes() for sample in samples}) == 3


# Sets


def test_folders_come_before_named_sets_and_sets_without_a_folder_are_left_out(folder, tmp_path):
    more = write_photos(tmp_path / "more", 2)
    sets = {"absent": {"folder": None, "limit": 5}, "some": {"folder": folder, "limit": 3, "weight": 0.5}}
    opened = open_sets(more, sets)
    assert [(s.name, names(s), s.weight) for s in opened] == [
        (str(more), ["0/00", "1/01"], 1.0),
        ("some", ["0/00", "0/02", "0/04"], 0.5),
    ]
    with pytest.raises(ValueError, match="name at least one folder"):
        open_sets([], {"absent": {"folder": None}})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"limit": 0}, "ffhq: limit=0; give a positive number"),
        ({"weight": 0}, "ffhq: weight=0; give a positive number"),
        ({"weight": float("nan")}, "ffhq: weight=nan"),
        ({"weight": 0.04}, "weight=0.04 of 10 photos: fewer than one"),
        ({"captions": "nowhere"}, "nowhere: no such file or folder of captions"),
        ({"manifest": "nowhere"}, "nowhere: no such manifest"),
    ],
)
def test_mistakes_are_named(folder, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        PhotoSet(folder, name="ffhq", **options)


def test_captions_come_from_where_the_set_says(folder, tmp_path, caplog):
    (folder / "1/03.txt").write_text("beside")
    (tmp_path / "t.jsonl").write_text('{"image": "0/00", "caption": "of the table"}\n')
    beside, table = PhotoSet(folder, name="a"), PhotoSet(folder, name="b", captions=tmp_path / "t.jsonl", limit=1)
    assert Counter(photo.prompt for photo in beside.photos) == {"beside": 1, "": 9}
    assert [photo.prompt for photo in table.photos] == ["of the table"]
    with caplog.at_level(logging.INFO):
        beside.check()
        table.check()
    assert caplog.messages == ["a: 1 of 10 photos have a caption (none for 0/00)", "b: 1 of 1 photos have a caption"]
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]  # warnings are seen on the terminal


# Manifests


@pytest.mark.parametrize("limit", [None, 4])
def test_set_is_the_same_with_and_without_manifest(folder, tmp_path, limit):
    walked = PhotoSet(folder, limit=limit).photos
    elsewhere = build_manifest(folder, tmp_path / "elsewhere.parquet").manifest
    listed = PhotoSet(folder, limit=limit, manifest=elsewhere)
    assert listed.sizes == [os.path.getsize(photo.path) for photo in walked]
    assert [photo.path for photo in listed.photos] == [photo.path for photo in walked]
    build_manifest(folder)
    assert PhotoSet(folder, limit=limit).sizes == listed.sizes


def test_manifest_is_believed_without_a_look_at_the_folder(folder, monkeypatch):
    build_manifest(folder)
    monkeypatch.setattr("dit4sr_pl.data.manifest.find_images", lambda folder: pytest.fail("walked the folder"))
    monkeypatch.setattr("dit4sr_pl.data.manifest.file_size", lambda path: pytest.fail("looked at a file"))
    assert len(PhotoSet(folder).photos) == 10


def test_damaged_photos_of_a_manifest_are_left_out(folder, caplog):
    (folder / "0/02.png").write_bytes(b"rubbish")
    build_manifest(folder)
    photo_set = PhotoSet(folder, name="a", limit=3)
    assert names(photo_set) == ["0/00", "0/04"]
    photo_set.check()
    assert caplog.messages[:1] == ["a: 1 damaged photos are left out (0/02.png)"]


def test_truncated_photo_is_found_before_the_run(folder):
    build_manifest(folder)
    data = SuperResolutionData([], folder, None, crop_size=16, sets={"a": {"folder": folder}})
    data.prepare_data()
    os.truncate(folder / "1/05.png", 100)
    with pytest.raises(ValueError, match=r"1 of 10 photos differ from its manifest: 1/05.png \(100 bytes, were"):
        data.prepare_data()
    os.remove(folder / "manifest.parquet")
    SuperResolutionData(folder, [], None, crop_size=16).prepare_data()  # nothing to compare with


@pytest.mark.parametrize(
    "path", ["../victim/precious.png", "/etc/precious.png", "a/../../precious.png", "A.png", "a\0.png"]
)
def test_a_manifest_from_elsewhere_names_no_files_outside_of_its_folder(tmp_path, path):
    """Results and captions are written by these names. `A.png` is `a.png` on some file systems."""
    write_image(tmp_path / "photos" / "a.png", torch.zeros(3, 32, 32))
    manifest = build_manifest(tmp_path / "photos").manifest
    (row,) = pq.read_table(manifest).to_pylist()
    pq.write_table(pa.Table.from_pylist([row, row | {"path": path}]), manifest)
    with pytest.raises(ValueError, match="manifest.parquet: .*(does not stay within its folder|are one name)"):
        PhotoSet(tmp_path / "photos")
    with pytest.raises(ValueError, match="does not stay within its folder|are one name"):
        ValidationImages(tmp_path / "photos", 32, 0)
