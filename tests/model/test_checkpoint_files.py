"""Checkpoints by name: what is downloaded from a hub on this machine, what is kept, and what is refused."""

import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, hf_hub_download

from dit4sr_pl.common.hub import HubAddress, cache_folder
from dit4sr_pl.model import load_part
from dit4sr_pl.model.checkpoint_files import checkpoint_file
from testing.local_hub import TOKEN, LocalHub, Repo, serving
from testing.releases import GOLDEN, write_release

REPO = "acceptee/DiT4SR"


@pytest.fixture(scope="module")
def releases(tmp_path_factory) -> Path:
    """Releases in half precision: dit4sr_q in two shards and with zero keys, dit4sr_r1 in one file."""
    folder = tmp_path_factory.mktemp("releases")
    write_release(folder / "dit4sr_q", frozen=torch.float16, zero_keys=True, shards=2)
    write_release(folder / "dit4sr_r1", GOLDEN / "r1_dual", frozen=torch.bfloat16)
    return folder


@pytest.fixture
def hub(releases, monkeypatch, tmp_path):
    hub = LocalHub()
    hub.add(REPO, releases)
    with serving(hub, monkeypatch, tmp_path):
        yield hub


def kept() -> list[str]:
    """Returns the files below the cache's folder, without locks and notes of commits."""
    files = [file.relative_to(cache_folder()).as_posix() for file in cache_folder().rglob("*") if file.is_file()]
    return [file for file in files if not file.endswith("/.lock") and "/refs/" not in file]


def test_a_release_is_downloaded_once_and_its_lr_stream_alone_is_kept(hub, releases):
    files = {word: checkpoint_file(word) for word in ("dit4sr_q", "dit4sr_r1")}
    weights = sum(file.stat().st_size for file in releases.rglob("*") if file.is_file())
    assert hub.sent == weights
    assert len(kept()) == 2 and sum(file.stat().st_size for file in files.values()) < weights / 2
    for word, legacy in (("dit4sr_q", True), ("dit4sr_r1", False)):
        part, expected = load_part(files[word]), load_part(releases / word)
        assert (part.network_config, part.base) == (expected.network_config, expected.base)
        assert part.network_config["variant"]["legacy_lr_keys"] is legacy
        assert all(torch.equal(part.state[name], expected.state[name]) for name in part.state | expected.state)
    hub.requests.clear()
    assert checkpoint_file("dit4sr_q") == files["dit4sr_q"]
    assert hub.sent == weights and hub.requests == [f"GET /api/models/{REPO}/revision/main"]


def test_a_new_commit_is_downloaded_and_an_old_one_is_read_by_its_name_without_asking(hub, releases):
    first = checkpoint_file("dit4sr_r1")
    old = hub.repos[REPO].refs["main"]
    new = hub.add(REPO, releases / "dit4sr_q", "dit4sr_r1/")
    assert checkpoint_file("dit4sr_r1").parents[1].name == new
    hub.requests.clear()
    assert checkpoint_file(f"dit4sr_r1@{old}") == checkpoint_file(f"hub:{REPO}/dit4sr_r1@{old}") == first
    assert not hub.requests
    hub.repos[REPO].refs["v1"] = old
    assert checkpoint_file("dit4sr_r1@v1") == first


def test_an_address_may_name_the_folder_its_transformer_or_the_top(hub, releases):
    hub.add("someone/else", releases / "dit4sr_r1")
    assert load_part(checkpoint_file("hub:someone/else")).base == load_part(releases / "dit4sr_r1").base
    assert checkpoint_file(f"hub:{REPO}/dit4sr_r1/transformer").is_file()


def test_an_lr_stream_file_is_read_as_it_is(hub, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    shutil.copy(checkpoint_file("tiny-dit4sr"), folder / "lr_stream.safetensors")
    hub.add("me/mine", folder, "run 1/".replace(" ", "_"))
    assert checkpoint_file("hub:me/mine/run_1").read_bytes() == (folder / "lr_stream.safetensors").read_bytes()
    with pytest.raises(ValueError, match="me/mine: neither .* is there; the repository has some in run_1: add one as"):
        checkpoint_file("hub:me/mine")


@pytest.mark.parametrize(
    "word, message",
    [
        ("dit4sr_q@nowhere", f"dit4sr_q@nowhere: .*/{REPO} has no revision nowhere; give a branch, tag or commit"),
        ("dit4sr_f", "dit4sr_f: neither .* is there; the repository has some in dit4sr_q, dit4sr_r1"),
        ("hub:no/where", "hub:no/where: .*does not exist or is not open to you; check the name; .*`hf auth login`"),
        ("hub:secret/model", "hub:secret/model: .*does not exist or is not open to you"),
        ("hub:gated/model", "hub:gated/model: a gated model; accept the licence at .*/gated/model, and run `hf auth"),
        ("hub:nowhere", r"hub:nowhere: not an address; give hub:OWNER/NAME\[/SUBFOLDER\]\[@REVISION\]"),
        ("hub:a/b/../c", "not an address"),
        ("hub:half/release", r"the repository lacks transformer/diffusion_pytorch_model-00002-of-00002.safetensors"),
    ],
)
def test_what_cannot_be_had_is_one_line(hub, releases, word, message):
    hub.repos["secret/model"] = Repo(private=True)
    hub.add("gated/model", releases / "dit4sr_r1", gated=True)
    commit = hub.add("half/release", releases / "dit4sr_q")
    hub.repos["half/release"].commits[commit].pop("transformer/diffusion_pytorch_model-00002-of-00002.safetensors")
    with pytest.raises((FileNotFoundError, ValueError), match=message) as error:
        checkpoint_file(word)
    assert "\n" not in str(error.value)
    assert not [file for file in kept() if file.endswith(".safetensors")]


def test_a_token_opens_gated_and_private_models(hub, releases, monkeypatch):
    hub.add("gated/model", releases / "dit4sr_r1", gated=True)
    hub.repos["gated/model"].private = True
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(FileNotFoundError, match="does not exist or is not open to you"):
        checkpoint_file("hub:gated/model")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(FileNotFoundError, match="a gated model; accept the licence"):
        checkpoint_file("hub:gated/model")
    hub.accepted.add(TOKEN)
    assert checkpoint_file("hub:gated/model").is_file()


def test_without_the_hub_the_last_download_is_used(hub, monkeypatch, caplog):
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(FileNotFoundError, match="dit4sr_q: not among the downloaded files, and HF_HUB_OFFLINE is"):
            checkpoint_file("dit4sr_q")
    hub.broken = True
    with pytest.raises(FileNotFoundError, match="dit4sr_q: http.* answers with error 503; try again later"):
        checkpoint_file("dit4sr_q")
    hub.broken = False
    file = checkpoint_file("dit4sr_q")
    hub.broken = True
    assert checkpoint_file("dit4sr_q") == file and "which was downloaded before" in caplog.text
    caplog.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert checkpoint_file("dit4sr_q") == file and not caplog.text
    with pytest.raises(FileNotFoundError, match="dit4sr_r1: not among the downloaded files"):
        checkpoint_file("dit4sr_r1")


def test_a_hub_that_is_not_there_is_one_line(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FileNotFoundError, match=r"dit4sr_q: http://127.0.0.1:9 cannot be reached; try again later$"):
        checkpoint_file("dit4sr_q")


def test_files_that_the_hubs_own_cache_holds_are_not_downloaded_again(hub, releases, monkeypatch):
    for file in (releases / "dit4sr_q" / "transformer").iterdir():
        hf_hub_download(REPO, f"dit4sr_q/transformer/{file.name}")
    sent = hub.sent
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = checkpoint_file("dit4sr_q")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert checkpoint_file("dit4sr_q") == offline and hub.sent == sent
    assert (load_part(offline).base) == load_part(releases / "dit4sr_q").base


def test_a_connection_that_breaks_once_is_resumed(hub, releases, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)  # what is lost at most when a connection breaks
    hub.cut, hub.cuts = 1000, 1
    part, whole = load_part(checkpoint_file("dit4sr_r1")), load_part(releases / "dit4sr_r1")
    assert all(torch.equal(part.state[name], whole.state[name]) for name in whole.state)
    assert hub.sent == sum(file.stat().st_size for file in (releases / "dit4sr_r1" / "transformer").iterdir())


def test_processes_that_ask_at_the_same_time_download_once(hub, releases):
    with ThreadPoolExecutor(3) as pool:
        files = list(pool.map(checkpoint_file, ["dit4sr_r1"] * 3))
    assert len(set(files)) == 1 and load_part(files[0]).base == load_part(releases / "dit4sr_r1").base
    assert hub.sent == sum(file.stat().st_size for file in (releases / "dit4sr_r1" / "transformer").iterdir())


def test_nothing_half_written_is_believed(hub, releases, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.cut, hub.cuts = 0, 100
    with pytest.raises(FileNotFoundError, match="dit4sr_q: .* run the same command again|cannot be reached") as error:
        checkpoint_file("dit4sr_q")
    assert "\n" not in str(error.value)
    assert not [file for file in kept() if file.endswith((".safetensors", ".incomplete"))]
    hub.cuts = 0
    file = checkpoint_file("dit4sr_q")
    whole = file.read_bytes()
    state = {name: weight.clone() for name, weight in load_part(file).state.items()}
    left = file.parent / ".download" / ".cache" / "huggingface" / "download" / "x.incomplete"  # of a killed process
    left.parent.mkdir(parents=True)
    left.write_bytes(b"x")
    for written in (whole[: len(whole) // 2], b""):
        file.write_bytes(written)
        again = load_part(checkpoint_file("dit4sr_q")).state
        assert all(torch.equal(again[name], state[name]) for name in state)
    assert [name for name in kept() if not re.search("lr_stream.safetensors$", name)] == []


def test_a_folder_or_file_of_that_name_goes_before_the_hub(hub, releases, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("dit4sr_q").mkdir()  # perhaps the output of an evaluation
    assert checkpoint_file("dit4sr_q").is_absolute()
    hub.requests.clear()
    monkeypatch.chdir(releases)
    assert checkpoint_file("dit4sr_q") == Path("dit4sr_q") and not hub.requests
    assert load_part(checkpoint_file("dit4sr_q")).network_config["variant"]["legacy_lr_keys"]
    assert HubAddress.parse("dit4sr_s") is None and checkpoint_file("dit4sr_s") == Path("dit4sr_s")


def test_the_cache_follows_the_hubs_and_the_desktops_rules(monkeypatch):
    for set_to, folder in (
        ({"HF_HOME": "/a/hf", "XDG_CACHE_HOME": "/b"}, "/a/hf/dit4sr_pl"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/dit4sr_pl/hub"),
        ({"HOME": "/c"}, "/c/.cache/dit4sr_pl/hub"),
    ):
        for name in ("HF_HOME", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in set_to.items():
            monkeypatch.setenv(name, value)
        assert str(cache_folder()) == folder
