import os

import pytest
from PIL import Image

from dit4sr_pl.restoration.worklist import batches, make_worklist


def save(path, size=(3, 2)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)


def results(worklist, output) -> dict[str, str]:
    return {entry.name: entry.target.relative_to(output).as_posix() for entry in worklist.entries}


def test_results_keep_the_folders_and_the_stems(tmp_path):
    for name in ("a.png", "deep/b.JPG", "deep/v1.2.webp"):
        save(tmp_path / "in" / name)
    output = tmp_path / "out"
    worklist = make_worklist(tmp_path / "in", output)
    assert results(worklist, output) == {"a": "a.png", "deep/b": "deep/b.png", "deep/v1.2": "deep/v1.2.png"}
    worklist = make_worklist(tmp_path / "in", output, keep_suffix=True)
    assert list(results(worklist, output).values()) == ["a.png.png", "deep/b.JPG.png", "deep/v1.2.webp.png"]
    (entry,) = make_worklist(tmp_path / "in/deep/b.JPG", output).entries
    assert (entry.name, entry.target, entry.size) == ("b", output / "b.png", (2, 3))


def test_captions_from_files_lose_sentences_and_a_typed_prompt_does_not(tmp_path):
    save(tmp_path / "in/a.png")
    (tmp_path / "in/a.txt").write_text("A red car.  Its\nbackground is Blurry. It has 3.5 doors!")
    words = {"dropped_words": ["blur"]}
    given = [{}, words, words | {"prompt": "A blurry car."}]
    prompts = [make_worklist(tmp_path / "in", tmp_path / "out", **options).entries[0].prompt for options in given]
    assert prompts == [
        "A red car. Its background is Blurry. It has 3.5 doors!", "A red car. It has 3.5 doors!", "A blurry car.",
    ]  # fmt: skip


def test_samples_have_a_folder_and_a_batch_each_and_one_caption(tmp_path):
    for name in ("a.png", "deep/b.png"):
        save(tmp_path / "in" / name)
    save(tmp_path / "out/sample01/a.png")
    worklist = make_worklist(tmp_path / "in", tmp_path / "out", samples=2)
    assert (worklist.done, worklist.total) == (1, 4)
    targets = {(entry.name, entry.sample): entry.target.relative_to(tmp_path / "out").as_posix()
               for entry in worklist.entries}  # fmt: skip
    expected = {("a", 0): "sample00/a.png", ("deep/b", 0): "sample00/deep/b.png", ("deep/b", 1): "sample01/deep/b.png"}
    assert targets == expected
    assert {entry.caption_file for entry in worklist.entries if entry.name == "deep/b"} == {
        tmp_path / "out/sample00/deep/b.txt"
    }
    assert [[entry.target.parts[-2] for entry in batch] for batch in batches(worklist.entries, 8)] == [
        ["sample00", "deep"], ["deep"],
    ]  # fmt: skip


def test_files_that_would_share_a_result_are_all_named_and_can_keep_their_suffixes(tmp_path):
    for name in ("a.png", "a.jpg", "b.png"):
        save(tmp_path / "in" / name)
    worklist = make_worklist(tmp_path / "in", tmp_path / "out")
    assert [entry.name for entry in worklist.entries] == ["b"] and worklist.total == 3
    assert [failure.split(": ")[0] for failure in worklist.failures] == [
        str(tmp_path / f"in/a.{s}") for s in ("jpg", "png")
    ]
    assert all(f"2 files share the result {tmp_path / 'out/a.png'}" in failure for failure in worklist.failures)
    kept = make_worklist(tmp_path / "in", tmp_path / "out", keep_suffix=True)
    assert [entry.target.name for entry in kept.entries] == ["a.jpg.png", "a.png.png", "b.png.png"]
    assert [entry.name for entry in kept.entries] == ["a", "a", "b"]  # their noise is as without


def test_no_result_replaces_an_input_or_is_restored_again(tmp_path):
    save(tmp_path / "in/a.png")
    save(tmp_path / "in/out/a.png")
    save(tmp_path / "in/out/deep/b.png")
    worklist = make_worklist(tmp_path / "in", tmp_path / "in/out")
    assert (worklist.entries, worklist.done, worklist.total) == ([], 1, 1)
    worklist = make_worklist(tmp_path / "in", tmp_path / "in" / "deep" / ".." / "out", overwrite=True)
    assert [entry.name for entry in worklist.entries] == ["a"]
    worklist = make_worklist(tmp_path / "in/a.png", tmp_path / "in", overwrite=True)
    assert not worklist.entries and "would replace an input" in worklist.failures[0]
    with pytest.raises(ValueError, match="no images in this folder or below it, except in the output folder"):
        make_worklist(tmp_path / "in/out", tmp_path / "in/out")
    save(tmp_path / "x/x/a.png")
    save(tmp_path / "x/a.png")
    worklist = make_worklist(tmp_path / "x/x", tmp_path / "x")
    assert worklist.done == 1  # no input: it lies above


def test_headers_show_what_cannot_be_restored(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("text")
    (tmp_path / "c.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "d.png")
    frames = [Image.new("RGB", (2, 2), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "e.gif", save_all=True, append_images=frames[1:])
    worklist = make_worklist(tmp_path, tmp_path / "out")
    assert [entry.name for entry in worklist.entries] == ["a"]
    reasons = ("b.png: not a readable image (unknown format)", "c.png: not a readable image (no such file)")
    reasons += ("d.png: not a readable image (not a file)", "e.gif: not a readable image (2 frames or pages; first")
    for failure, reason in zip(worklist.failures, reasons, strict=True):
        assert failure.startswith(f"{tmp_path}/{reason}")


def test_a_prompt_for_all_goes_before_the_file_beside_the_picture(tmp_path):
    save(tmp_path / "deep/a.png")
    save(tmp_path / "b.png")
    (tmp_path / "deep/a.txt").write_text("a  cat\n")
    assert [entry.prompt for entry in make_worklist(tmp_path, tmp_path / "out").entries] == ["", "a cat"]
    assert [entry.prompt for entry in make_worklist(tmp_path, tmp_path / "out", prompt="a dog").entries] == [
        "a dog"
    ] * 2
    assert make_worklist(tmp_path / "deep/a.png", tmp_path / "out").entries[0].prompt == "a cat"
    (tmp_path / "b.txt").write_bytes(b"\xff")
    assert "b.txt: the caption is not UTF-8" in make_worklist(tmp_path, tmp_path / "out").failures[0]


def test_links_that_lead_back_up_end(tmp_path):
    save(tmp_path / "in/a/1.png")
    save(tmp_path / "in/b/2.png")
    (tmp_path / "in/a/up").symlink_to(tmp_path / "in")
    (tmp_path / "in/a/over").symlink_to(tmp_path / "in/b")
    (tmp_path / "in/b/back").symlink_to(tmp_path / "in/a")
    (tmp_path / "in/self").symlink_to(tmp_path / "in/self")
    names = [entry.name for entry in make_worklist(tmp_path / "in", tmp_path / "out").entries]
    assert names == ["a/1", "a/over/2", "b/2", "b/back/1"]


def test_batches_are_of_one_size(tmp_path):
    for i, size in enumerate([(3, 2), (4, 2), (3, 2), (3, 2), (2, 3)]):
        save(tmp_path / f"{i}.png", size)
    entries = make_worklist(tmp_path, tmp_path / "out").entries
    assert [[entry.name for entry in batch] for batch in batches(entries, 2)] == [["0", "2"], ["3"], ["1"], ["4"]]
