"""A model fetched from a hub file by file is the same as one converted from the whole checkpoint."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import families
import gguf_models
import hubs
import pytest

from edgemoe import library
from edgemoe.cli import main as edgemoe_cli
from edgemoe.convert.convert import convert
from edgemoe.convert.open import open_checkpoint
from edgemoe.errors import EdgemoeError
from edgemoe.file.reader import open_moe
from edgemoe.hub import outline
from edgemoe.hub.name import HubName
from edgemoe.hub.pull import pull
from edgemoe.hub.remote import HubError, Repository, Unreachable


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hubs.Hub]:
    """A hub without models, which this process uses; models are kept in a folder of the test."""
    from huggingface_hub import constants

    (tmp_path / "hub").mkdir()
    monkeypatch.setenv("EDGEMOE_MODELS", str(tmp_path / "models"))
    with hubs.serving(tmp_path / "hub") as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
        yield served


def fetch(name: str = "user/tiny", progress=lambda done, total: None) -> tuple[Path, list[str]]:
    lines: list[str] = []
    return pull(HubName.parse(name), say=lines.append, progress=progress, retries=0), lines


def save(hub: hubs.Hub, family: str = "qwen3_moe", size: str = "60KB", **how) -> Path:
    return families.make(family, hub.root / "user/tiny", max_shard_size=size, **how)


def sums(path: Path) -> tuple:
    moe = open_moe(path)
    dense = {name: tensor.crcs for name, tensor in moe.tensors.items()}
    return moe.config, dense, moe.experts.crcs.tolist(), moe.sections


def assert_as_converted(path: Path, source: Path, tmp_path: Path, bits: int | None = None) -> None:
    convert(open_checkpoint(source), tmp_path / "whole.moe", bits=bits)
    assert sums(path) == sums(tmp_path / "whole.moe")
    assert not list(path.parent.glob(".*"))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral-window", "deepseek_v3"])
def test_the_model_is_that_of_the_whole_checkpoint(family, hub, tmp_path) -> None:
    source = save(hub, family)
    shards = {p.name: p.stat().st_size for p in source.glob("*.safetensors")}
    assert len(shards) > 3
    most, seen = 0, []

    def progress(done: int, total: int) -> None:
        nonlocal most
        seen.append((done, total))
        most = max(most, taken(tmp_path / "models"))

    path, _ = fetch(progress=progress)
    assert path == tmp_path / "models/user/tiny.moe"
    assert_as_converted(path, source, tmp_path)
    assert all(a[0] <= b[0] for a, b in itertools.pairwise(seen))
    assert seen[-1][0] == seen[-1][1]
    # Nothing but the header of each file was requested twice.
    assert all(hub.sent[name] <= 2 * size for name, size in shards.items())
    # At most, the disk held the model, one file and one more for records that span two files, and small files.
    assert most <= path.stat().st_size + 2 * max(shards.values()) + 400_000


def taken(folder: Path) -> int:
    files = [p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()]
    return sum(p.stat().st_blocks * 512 for p in files)


def test_fewer_bits_make_a_file_of_its_own(hub, tmp_path) -> None:
    source = save(hub)
    path, _ = fetch("user/tiny:4")
    assert path.name == "tiny-4bit.moe"
    assert_as_converted(path, source, tmp_path, bits=4)
    with pytest.raises(ValueError, match="5"):
        fetch("user/tiny:5")


def test_gguf_files_are_taken_by_their_quant(hub, tmp_path) -> None:
    source = families.make("mixtral", tmp_path / "hf")
    folder = hub.root / "user/tiny-GGUF"
    (folder / "F16").mkdir(parents=True)
    (folder / "Q8_0").mkdir()
    (folder / "mmproj-F16.gguf").write_bytes(b"of pictures")
    first, *_ = gguf_models.split(source, folder / "F16", 3)
    gguf_models.save(source, folder / "Q8_0" / "tiny-Q8_0.gguf", quant="F16")
    for quant, file in {"f16": first, "Q8_0": folder / "Q8_0" / "tiny-Q8_0.gguf"}.items():
        path, _ = fetch(f"user/tiny-GGUF:{quant}")
        assert path.name == f"tiny-GGUF-{quant.upper()}.moe"
        convert(open_checkpoint(file), tmp_path / "whole.moe")
        assert sums(path) == sums(tmp_path / "whole.moe")
    with pytest.raises(EdgemoeError, match="no GGUF files of Q2_K; there are F16, Q8_0"):
        fetch("user/tiny-GGUF:Q2_K")
    path, lines = fetch("user/tiny-GGUF")
    assert lines == [
        "user/tiny-GGUF: F16 of F16, Q8_0; user/tiny-GGUF:QUANT takes another"
    ]  # Q4_K_M, if there is one


def test_the_values_that_a_gguf_file_is_opened_with_are_there(hub, tmp_path) -> None:
    import numpy as np

    source = families.make("mixtral", tmp_path / "hf")
    factors = {"rope_freqs.weight": np.linspace(1, 4, 8, dtype=np.float32)}
    (hub.root / "user/tiny").mkdir(parents=True)
    file = gguf_models.save(source, hub.root / "user/tiny/tiny-F32.gguf", tensors=factors)
    path, _ = fetch()
    convert(open_checkpoint(file), tmp_path / "whole.moe")
    assert sums(path) == sums(tmp_path / "whole.moe")


def test_a_head_that_is_no_copy_of_the_embedding_is_found_when_both_are_there(hub) -> None:
    from safetensors.numpy import load_file, save_file

    source = save(hub, "mixtral-window", size="1GB")
    tensors = load_file(source / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].copy()
    save_file({**tensors, "lm_head.weight": head}, source / "model.safetensors")
    path, _ = fetch()
    path.unlink()
    head[3, 4] += 1
    save_file({**tensors, "lm_head.weight": head}, source / "model.safetensors")
    with pytest.raises(EdgemoeError, match="lm_head.weight: differs from"):
        fetch()
    assert not path.exists()


def test_another_version_replaces_the_one_here(hub, tmp_path) -> None:
    save(hub)
    path, lines = fetch()
    assert lines == []
    before = path.read_bytes()
    _, lines = fetch()
    assert lines == ["user/tiny: is here, and the hub has no other"]
    assert path.read_bytes() == before
    shutil.rmtree(hub.root / "user/tiny")
    source = save(hub, seed=1)
    path, lines = fetch()
    assert lines == ["user/tiny: the hub has another version of it, which replaces the one here"]
    assert_as_converted(path, source, tmp_path)


def test_what_a_hub_refuses_is_one_line_and_leaves_nothing(hub, tmp_path) -> None:
    save(hub)

    def refused(name: str = "user/tiny") -> str:
        with pytest.raises(HubError) as error:
            fetch(name)
        assert not list((tmp_path / "models").rglob("*.moe"))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert refused("user/nothing").startswith("user/nothing: there is no such model, or it is not")
    assert refused("user/tiny@v9") == "user/tiny: there is no such revision"
    hub.token = "secret"
    assert "accept their terms first" in refused()
    hub.token = ""
    hub.answer = lambda path: (404, {"X-Error-Code": "EntryNotFound"}) if "00003" in path else None
    assert refused() == "user/tiny: model-00003-of-00011.safetensors: there is no such file"
    hub.answer = lambda path: (429, {"Retry-After": "7"}) if "00004" in path else None
    assert refused().endswith("too many requests from here; try again in 7 s")
    hub.answer = lambda path: (500, {})
    assert "the hub answered 500" in refused()
    hub.answer = lambda path: None
    hub.cut = {"model-00002-of-00011.safetensors": 0}
    assert "ended after 0 of 82832 bytes" in refused()


def test_without_a_network_one_line_says_what_is_here_and_what_to_do(
    hub, tmp_path, monkeypatch
) -> None:
    from huggingface_hub import constants

    def unreachable(address: str = "http://no-such-host.invalid") -> str:
        with monkeypatch.context() as patch, pytest.raises(Unreachable) as error:
            patch.setattr(constants, "ENDPOINT", address)
            template = address + "/{repo_id}/resolve/{revision}/{filename}"
            patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            fetch()
        said = str(error.value)
        assert said.startswith(f"user/tiny: {address} cannot be reached: ")
        assert "Errno" not in said
        assert "\n" not in said
        return said

    save(hub, size="1GB")
    nothing = "; nothing of it is here: edgemoe pull user/tiny fetches it once a hub can be asked"
    assert nothing in unreachable()
    assert f"Connection refused{nothing}" in unreachable("http://127.0.0.1:1")
    hub.answer = lambda path: (404, {}) if ".safetensors" in path and has_begun(tmp_path) else None
    with pytest.raises(HubError, match="there is no such model"):
        fetch()
    assert " of it are here, and edgemoe pull user/tiny goes on there once" in unreachable()
    hub.answer = lambda path: None
    fetch()
    assert "is here, and edgemoe-run user/tiny runs it" in unreachable()


def test_a_plan_says_what_is_here_when_the_hub_goes_away_amid_it(hub, monkeypatch, capfd) -> None:
    save(hub, size="1GB")

    def read(self: Repository, name: str, *_: object) -> bytes:
        raise Unreachable(f"{self.repo}: {name}")

    monkeypatch.setattr(Repository, "read", read)
    monkeypatch.setattr(Repository, "read_whole", read)
    assert edgemoe_cli.main(["plan", "user/tiny"]) == 1
    assert (
        "; nothing of it is here: edgemoe pull user/tiny fetches it once" in capfd.readouterr().err
    )


def has_begun(tmp_path: Path) -> bool:
    return any((tmp_path / "models").rglob("*.part"))


def test_wrong_bytes_and_half_a_file_are_never_converted(hub, tmp_path) -> None:
    source = save(hub)
    name = "model-00004-of-00011.safetensors"
    right = (source / name).read_bytes()
    size = len(right)
    wrong = right[: size - 9] + b"\xff" + right[size - 8 :]
    hub.swap = {name: wrong}
    with pytest.raises(
        HubError, match=f"{name}: its sum must be {hashlib.sha256(right).hexdigest()}"
    ):
        fetch()
    assert not list((tmp_path / "models").rglob(f"landed/{name}*"))
    hub.swap = {}
    hub.cut = {name: 20_000}  # the header fits; the rest comes in several connections
    path, _ = fetch()
    assert_as_converted(path, source, tmp_path)
    asked = [r for _, p, r in hub.requests if p.endswith(name)]
    assert f"bytes=20000-{size - 1}" in asked


def test_links_of_others_are_not_followed(hub, tmp_path) -> None:
    save(hub)
    victim, folder = tmp_path / "victim", tmp_path / "models/user/tiny.moe.pull"
    victim.mkdir(parents=True)
    folder.parent.mkdir(parents=True)
    folder.symlink_to(victim)
    with pytest.raises(FileExistsError, match="is a symbolic link"):
        fetch()
    assert not list(victim.iterdir())
    repository = Repository("user/tiny", retries=0)
    name = "model-00004-of-00011.safetensors"
    part = tmp_path / f"{name}.{repository.files[name].sha256[:16]}.part"
    (victim / "file").write_bytes(b"mine")
    part.symlink_to(victim / "file")
    with pytest.raises(FileExistsError, match="is a symbolic link"):
        repository.download(name, tmp_path / name, lambda have: None)
    assert (victim / "file").read_bytes() == b"mine"


def test_a_disk_that_is_too_small_is_found_before_the_first_file(
    hub, tmp_path, monkeypatch
) -> None:
    source = save(hub)
    largest = max(p.stat().st_size for p in source.glob("*.safetensors"))
    fetch()
    file = (tmp_path / "models/user/tiny.moe").stat().st_size
    shutil.rmtree(tmp_path / "models")
    hub.sent.clear()
    free = shutil.disk_usage(tmp_path)._replace(free=file + (1 << 20) + largest)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(OSError, match="MB free; the model and one file of its source take"):
        fetch()
    assert not list((tmp_path / "models").rglob("landed/*"))
    assert not list((tmp_path / "models").rglob("*.moe"))


def test_what_hugging_face_s_cache_has_is_used_and_stays(hub, tmp_path, monkeypatch) -> None:
    from huggingface_hub import constants, snapshot_download

    source = save(hub)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set, and it is not in"):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        fetch()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    folder = tmp_path / "hf/models--user--tiny"  # as the library lays it out
    commit = hub.commit("user/tiny")
    (folder / "blobs").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "refs/main").write_text(commit)
    for path in source.iterdir():
        content = path.read_bytes()
        name = hashlib.sha256(content).hexdigest()
        if path.suffix != ".safetensors":
            name = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        (folder / "blobs" / name).write_bytes(content)
        (folder / "snapshots" / commit / path.name).symlink_to(folder / "blobs" / name)
    assert snapshot_download("user/tiny", local_files_only=True)  # the library agrees
    with monkeypatch.context() as patch, pytest.raises(Unreachable) as error:
        patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
        fetch()
    assert "cache has it: HF_HUB_OFFLINE=1 edgemoe pull user/tiny makes" in str(error.value)
    config = folder / "snapshots" / commit / "config.json"
    with monkeypatch.context() as patch, pytest.raises(Unreachable, match="nothing of it is here"):
        patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
        blob = config.readlink()
        config.unlink()  # another program wanted the weights alone
        try:
            fetch()
        finally:
            config.symlink_to(blob)
    hub.sent.clear()
    path, _ = fetch()
    assert_as_converted(path, source, tmp_path)
    assert all(hub.sent.get(p.name, 0) < p.stat().st_size for p in source.glob("*.safetensors"))
    path.unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    path, _ = fetch()
    assert_as_converted(path, source, tmp_path)
    blobs = sorted((folder / "blobs").iterdir())
    assert len(blobs) == len(list(source.iterdir()))
    largest = max(blobs, key=lambda p: p.stat().st_size)
    path.unlink()
    largest.write_bytes(largest.read_bytes()[:-1] + b"\xff")
    with pytest.raises(HubError, match="is not what was downloaded; its sum is wrong"):
        fetch()


def test_a_folder_that_cannot_be_written_is_one_line(hub, tmp_path, monkeypatch) -> None:
    save(hub)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("EDGEMOE_MODELS", str(tmp_path / "file/models"))
    with pytest.raises(OSError, match="file/models"):
        fetch()
    monkeypatch.setenv("EDGEMOE_MODELS", str(tmp_path / "models"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(PermissionError, match=r"cannot be written: '.*models/user'"):
        fetch()
    assert hub.requests == []


@pytest.mark.parametrize("address", ["", "hub.corp"])
def test_an_address_that_is_none_is_one_line(hub, monkeypatch, address) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    with pytest.raises(HubError, match="HF_ENDPOINT: expected an address like https://"):
        fetch()


def test_a_hub_without_sums_is_said(hub, tmp_path, monkeypatch) -> None:
    source = save(hub)
    sibling = hubs._sibling

    def without(*a):
        return {k: v for k, v in sibling(*a).items() if k in ("rfilename", "size")}

    monkeypatch.setattr(hubs, "_sibling", without)
    path, lines = fetch()
    assert lines == ["user/tiny: there are no sums of 14 files: only their sizes are checked"]
    assert_as_converted(path, source, tmp_path)


def heads(hub: hubs.Hub) -> list[str]:
    return sorted(Path(path).name for method, path, _ in hub.requests if method == "HEAD")


def test_sizes_that_the_list_lacks_are_asked_for_where_files_are_needed(hub, tmp_path) -> None:
    source = save(hub)
    (source / "figures.png").write_bytes(b"of pictures")
    (source / "tiny-Q8_0.gguf").write_bytes(b"of another kind")
    shard = min(source.glob("*.safetensors")).name
    lacks = ("config.json", shard, "figures.png", "tiny-Q8_0.gguf")
    hub.without_size = lambda name: name in lacks
    path, _ = fetch()
    assert_as_converted(path, source, tmp_path)
    assert heads(hub) == ["config.json", shard]


def test_a_size_that_a_hub_never_says_is_one_line(hub) -> None:
    save(hub)
    hub.without_size = lambda name: name == "config.json"
    hub.answer = lambda path: (302, {"Location": "http://x.test"}) if "config" in path else None
    with pytest.raises(HubError, match=f"user/tiny: {hub.url} does not say how large config.json"):
        fetch()
    hub.answer = lambda path: (404, {"X-Error-Code": "EntryNotFound"}) if "config" in path else None
    with pytest.raises(HubError, match=r"user/tiny: config\.json: there is no such file"):
        fetch()


def test_a_small_file_that_is_large_is_not_left_out_silently(hub, monkeypatch) -> None:
    (save(hub) / "tokenizer.json").write_text("{}" * 1000)
    monkeypatch.setattr(outline, "_MOST_SMALL", 1024)
    with pytest.raises(EdgemoeError, match=r"json: expected at most 1 KiB, got 1\.\d+ KiB"):
        fetch()


ENTRY = [sys.executable, "-m", "edgemoe"]


def environment(hub: hubs.Hub, tmp_path: Path) -> dict[str, str]:
    return {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"),
        "EDGEMOE_MODELS": str(tmp_path / "models"), "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }  # fmt: skip


def test_a_pull_that_is_killed_goes_on(hub, tmp_path) -> None:
    source = save(hub)
    sizes = {p.name: p.stat().st_size for p in source.glob("*.safetensors")}
    hub.rate = 1_000_000
    env = environment(hub, tmp_path)
    for count in (3, 8):
        process = subprocess.Popen(
            [*ENTRY, "pull", "user/tiny"], env=env, stderr=subprocess.DEVNULL
        )
        while sum(hub.sent.get(name, 0) >= size for name, size in sizes.items()) < count:
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
        process.wait()
        assert not list((tmp_path / "models/user").glob("*.moe"))
    hub.rate = None
    hub.sent.clear()
    path, _ = fetch()
    assert_as_converted(path, source, tmp_path)
    # Seven of eleven files were part of the model already; two more may share records with the next one.
    assert sum(hub.sent.values()) < 0.6 * sum(sizes.values())


def test_two_pulls_of_one_model_make_it_once(hub, tmp_path) -> None:
    source = save(hub)
    hub.rate = 1_500_000
    env = environment(hub, tmp_path)
    both = [
        subprocess.Popen([*ENTRY, "pull", "user/tiny"], env=env, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    said = [process.communicate()[1].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("another process pulls user/tiny; waiting" in text for text in said) == 1
    assert sum("is here, and the hub has no other" in text for text in said) == 1
    assert_as_converted(tmp_path / "models/user/tiny.moe", source, tmp_path)
    assert library.find("tiny") == tmp_path / "models/user/tiny.moe"
