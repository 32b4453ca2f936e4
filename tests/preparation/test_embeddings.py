import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dit4sr_pl.backbone import prompt_cache
from dit4sr_pl.backbone.prompt_cache import Origin, PromptCache, prompt_key
from dit4sr_pl.backbone.sd3 import Backbone
from dit4sr_pl.cli.command import quiet_libraries
from dit4sr_pl.common.files import folder_lock
from dit4sr_pl.preparation import embeddings
from dit4sr_pl.preparation.embeddings import write_embeddings
from testing.sigkill import assert_kills_change_nothing

CPU = torch.device("cpu")


def toy_encode(prompt: str):
    """Numbers that bfloat16 holds exactly."""
    length = float(len(prompt.encode()))
    return torch.full((1, 4, 6), length), torch.full((1, 3), -length)


def write(folder, prompts, encode=toy_encode, file_bytes=200, **arguments):
    return write_embeddings(prompts, encode, folder, "toy", 2, file_bytes, **arguments)


def read(folder, dtype=torch.float32, backbone="toy", t5_tokens=2) -> PromptCache:
    return PromptCache(folder, backbone, t5_tokens, dtype)


def stored_prompts(folder) -> list[str]:
    """Returns the prompts in every file of a cache, without its index."""
    prompts = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            texts = json.loads(file.metadata()["embeddings"])["prompts"]
            assert set(file.keys()) == {f"{key}.{kind}" for key in texts for kind in ("embeds", "pooled")}
        prompts += texts.values()
    return prompts


def test_cache_gives_what_the_encoder_gives_in_bfloat16(tiny_backbone, tmp_path):
    prompts = ["a cat", "", "ein Hund, größer"]
    encode = lambda prompt: tiny_backbone.prompts.encode(prompt, CPU)  # noqa: E731
    assert write_embeddings(prompts, encode, tmp_path, "tiny-sd3", 8, 10**6) == 3
    for dtype in (torch.float32, torch.bfloat16):
        cached = PromptCache(tmp_path, "tiny-sd3", 8, dtype)([*prompts, prompts[0]], CPU)
        encoded = tiny_backbone.prompts([*prompts, prompts[0]], CPU)
        for ours, theirs in zip(cached, encoded, strict=True):
            assert ours.dtype == dtype and torch.equal(ours, theirs.bfloat16().to(dtype))


def test_equal_prompts_are_stored_once_and_the_empty_one_always(tmp_path):
    calls = []
    encode = lambda prompt: calls.append(prompt) or toy_encode(prompt)  # noqa: E731
    assert write(tmp_path, ["b", "a", "b"], encode) == 3
    assert sorted(calls) == sorted(stored_prompts(tmp_path)) == ["", "a", "b"]
    assert write(tmp_path, ["c", "a"], encode) == 1 and calls[3:] == ["c"]
    assert sorted(stored_prompts(tmp_path)) == ["", "a", "b", "c"]
    assert read(tmp_path)(["c", "a"], CPU)[1].tolist() == [[-1.0] * 3] * 2


def test_files_are_of_bounded_size_and_indexed(tmp_path):
    write(tmp_path, map(str, range(99)), file_bytes=540)
    per_prompt = (4 * 6 + 3) * 2  # bytes: ten prompts reach 540
    sizes = []
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            sizes.append(sum(file.get_tensor(name).nbytes for name in file.keys()))  # noqa: SIM118
    assert sizes == [10 * per_prompt] * 10
    index = json.loads((tmp_path / "index.json").read_text())
    assert (index["backbone"], index["t5_tokens"]) == ("toy", 2)
    assert set(index["files"]) == {prompt_key(prompt) for prompt in ["", *map(str, range(99))]}
    assert set(index["files"].values()) == {path.name for path in tmp_path.glob("*.safetensors")}


def test_shards_make_the_whole_in_any_order_and_number(tmp_path):
    prompts = [f"prompt {i}" for i in range(40)]
    counts = [write(tmp_path, prompts, shard=(i, 3)) for i in (3, 1)]
    assert all(5 < count < 25 for count in counts)
    counts += [write(tmp_path, prompts, shard=(i, 2)) for i in (1, 2)]  # the last third, now in halves
    assert sum(counts) == 41 == len(stored_prompts(tmp_path))
    assert read(tmp_path)(prompts, CPU)[0].shape == (40, 4, 6)


def test_a_file_that_another_task_adds_meanwhile_is_indexed_too(tmp_path, monkeypatch):
    write(tmp_path, ["a"])
    (tmp_path / "index.json").unlink()
    list_cache_files, other = embeddings.list_cache_files, tmp_path / "other"
    write(other, ["b"])
    late = prompt_key("b") + ".safetensors"
    listed = []

    def listing(folder):
        listed.append(1)
        if len(listed) == 3:  # after the headers were read, before the index was written
            next(other.glob(f"*{late}")).rename(folder / late)
        return list_cache_files(folder)

    monkeypatch.setattr(embeddings, "list_cache_files", listing)
    embeddings.write_index(tmp_path, Origin("toy", 2))
    assert prompt_key("b") in json.loads((tmp_path / "index.json").read_text())["files"]


def test_a_prompt_that_is_not_there_is_named_with_what_to_do(tmp_path):
    write(tmp_path, ["a"])
    with pytest.raises(ValueError, match=r"no embeddings of the prompt 'a horse'; run prepare stage=embeddings"):
        read(tmp_path)(["a", "a horse"], CPU)
    with pytest.raises(FileNotFoundError, match=r"index\.json: no such file; run prepare stage=embeddings"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize("other", [{"backbone": "sd3"}, {"t5_tokens": 256}])
def test_another_backbone_or_number_of_tokens_is_refused_by_reader_and_writer(tmp_path, other):
    write(tmp_path, ["a"])
    (name, value), *_ = other.items()
    with pytest.raises(ValueError, match=rf"made with .*{name}|{name}=.*this run has {value}"):
        read(tmp_path, **other)
    origin = {"backbone": "toy", "t5_tokens": 2} | other
    with pytest.raises(ValueError, match=f"this run has {value}"):
        write_embeddings(["b"], toy_encode, tmp_path, file_bytes=200, **origin)
    assert sorted(stored_prompts(tmp_path)) == ["", "a"]


def test_two_prompts_of_one_key_do_not_pass_silently(tmp_path, monkeypatch):
    for module in (embeddings, prompt_cache):
        monkeypatch.setattr(module, "prompt_key", lambda prompt: prompt[:1].encode().hex().zfill(2))
    with pytest.raises(ValueError, match="'cat' and 'cow' have the same key"):
        write(tmp_path, ["cat", "dog", "cow"])
    write(tmp_path, ["cat", "dog"])
    with pytest.raises(ValueError, match="'cat' and 'cow' have the same key"):
        write(tmp_path, ["cow"])
    with pytest.raises(ValueError, match="'dog' and 'deer' have the same key"):
        read(tmp_path)(["deer"], CPU)


def test_truncated_files_are_named(tmp_path):
    write(tmp_path, ["a"], file_bytes=10**6)
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-50])
    for use in (lambda: write(tmp_path, ["b"]), lambda: read(tmp_path)(["a"], CPU)):
        with pytest.raises(ValueError, match=re.escape(f"{path}: missing, truncated") + ".*delete it and run prepare"):
            use()
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(ValueError, match="not an index of embeddings"):
        read(tmp_path)


def test_a_changed_byte_of_an_embedding_is_noticed_when_it_is_read(tmp_path):
    write(tmp_path, ["a", "b"], file_bytes=10**6)
    (path,) = tmp_path.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # of the last key
    path.write_bytes(data)
    last, first = sorted(["", "a", "b"], key=prompt_key, reverse=True)[:2]
    cache = read(tmp_path)
    cache([first], CPU)
    with pytest.raises(ValueError, match="the hash of its embeddings is another.; delete it and run prepare"):
        cache([last], CPU)


def test_embeddings_of_other_encoders_are_refused_and_those_of_unknown_ones_are_taken(tmp_path):
    write(tmp_path, ["a"], encoders={"text_encoder": "1", "tokenizer": "2"})
    for encoders in ({}, {"tokenizer": "2"}, {"text_encoder": "1", "text_encoder_3": "9"}):
        cache = PromptCache(tmp_path, "toy", 2, torch.float32, encoders)
        assert cache.encoders == {"text_encoder": "1", "tokenizer": "2"}
    with pytest.raises(ValueError, match=r"index.json: embeddings made with another text_encoder than toy has now"):
        PromptCache(tmp_path, "toy", 2, torch.float32, {"text_encoder": "3"})
    with pytest.raises(ValueError, match=r"safetensors: embeddings made with another tokenizer than toy has now"):
        write(tmp_path, ["b"], encoders={"tokenizer": "3"})
    write(tmp_path / "before", ["a"])
    assert PromptCache(tmp_path / "before", "toy", 2, torch.float32, {"text_encoder": "3"}).encoders == {}


def test_a_truncated_file_is_found_before_its_prompts_are_read(tmp_path):
    write(tmp_path, ["a", "b"], file_bytes=1)
    cache = read(tmp_path)
    assert cache.check(["a", "b"]) == read(tmp_path).check(["b", "a"]) != cache.check(["a"])
    path = tmp_path / f"{prompt_key('b')}.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    cache.check(["a"])
    with pytest.raises(ValueError, match=f"{path.name}: missing, truncated, damaged or no file of embeddings"):
        cache.check(["a", "b"])


def test_embeddings_of_before_without_hashes_are_read(tmp_path):
    write(tmp_path, ["a"], file_bytes=10**6)
    (path,) = tmp_path.glob("*.safetensors")
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["embeddings"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del header["hashes"]
    save_file(tensors, path, {"embeddings": json.dumps(header)})
    assert torch.equal(read(tmp_path)(["a"], CPU)[0], toy_encode("a")[0])


def test_one_task_per_shard_writes_into_a_cache(tmp_path):
    with folder_lock(tmp_path, (1, 2)):
        for shard in ((1, 1), (1, 2)):
            with pytest.raises(ValueError, match="writes here; wait for it"):
                write(tmp_path, ["a"], shard=shard)
        write(tmp_path, ["a"], shard=(2, 2))


PROMPTS = [f"photo {i} of {i % 7} cats" for i in range(60)]


def encode_for_killing(folder) -> None:
    quiet_libraries()
    torch.set_num_threads(1)
    backbone = Backbone("tiny-sd3", "float32", 8)
    write_embeddings(PROMPTS, lambda prompt: backbone.prompts.encode(prompt, CPU), folder, "tiny-sd3", 8, 50_000)


@pytest.mark.slow
def test_killed_at_random_moments_nothing_is_lost_or_doubled(tmp_path):
    assert_kills_change_nothing(encode_for_killing, tmp_path, kills=2)
    assert sorted(stored_prompts(tmp_path / "killed0")) == sorted(["", *PROMPTS])
