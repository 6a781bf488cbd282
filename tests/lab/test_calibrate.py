"""Calibration: its sums agree with a plain numpy forward pass; resuming, rare experts, imatrix, the command."""

from __future__ import annotations

import os
import shutil
import struct
import tracemalloc
from pathlib import Path

import families
import numpy as np
import pytest
import reference
from decoded import Decoded

from edgemoe.cli.main import main
from edgemoe.config import dense_tensors
from edgemoe.convert.convert import convert
from edgemoe.convert.hf import HFCheckpoint
from edgemoe.convert.imatrix import convert_imatrix
from edgemoe.errors import FormatError, OutOfBudget
from edgemoe.file.reader import open_moe
from edgemoe.file.summing import SummedWriter
from edgemoe.lab.bits import balanced, moments, tapped
from edgemoe.lab.bits import calibrate as lab
from edgemoe.lab.bits.calibrate import calibrate, is_begun, windows_of
from edgemoe.quant import Calibration, write_calibration
from edgemoe.quant.calibration import MIN_TOKENS
from edgemoe.quant.columns import ColumnScales
from edgemoe.store import ExpertStore

TEXT = "".join(f"line {i}: the quick brown fox, {i * i} times. " for i in range(12))
WINDOW = 96


@pytest.fixture(scope="module")
def made(tiny_moe, tmp_path_factory):
    """A calibration with products."""
    path = tmp_path_factory.mktemp("calib") / "tiny.calib"
    calibrate(tiny_moe, TEXT, path, full=True, window=WINDOW, threads=1)
    return path


class Sums(dict):
    """Sums of arrays, by name."""

    def add(self, name, value):
        self[name] = self.get(name, 0) + value

    def see(self, name, x):
        self.add(name + ".count", len(x))
        self.add(name + ".products", x.T @ x)


def reference_sums(decoded, windows):
    """Runs the reference's layers, and sums the inputs of each matrix."""
    config, sums = decoded.config, Sums()
    for ids in windows:
        x = decoded.tensors["embed"][ids] * config.embedding_multiplier
        for i in range(config.num_layers):
            w = {
                n.removeprefix(f"layers.{i}."): t.astype(np.float64)
                for n, t in decoded.tensors.items()
                if n.startswith(f"layers.{i}.")
            }
            h = reference.rms_norm(x, w["attn_norm"], config.norm_eps)
            sums.see(f"dense.layers.{i}.q", h)
            eye = {**w, "o": np.eye(len(w["o"]))}
            attended = reference.mix(config.mixer(i), eye, decoded.tensors, h)
            sums.see(f"dense.layers.{i}.o", attended)
            x = x + attended @ w["o"].T
            h = reference.rms_norm(x, w["ffn_norm"], config.norm_eps)
            sums.see(f"dense.layers.{i}.shared.gate", h)
            inner = silu(h @ w["shared.gate"].T) * (h @ w["shared.up"].T)
            sums.see(f"dense.layers.{i}.shared.down", inner)
            out = inner @ w["shared.down"].T / (1 + np.exp(-(h @ w["shared.sigmoid"])))[:, None]
            chosen, gates = reference.route(config, h @ w["router"].T)
            for e in range(config.num_experts):
                token, place = np.nonzero(chosen == e)
                gate, up, down = decoded.expert(i, e)
                inner = silu(h[token] @ gate.T) * (h[token] @ up.T)
                y = inner @ down.T
                g = gates[token, place]
                out[token] += g[:, None] * y
                p = f"experts.{i}.{e}."
                sums.see(p + "gate", h[token])
                sums.see(p + "down", inner)
                sums.add(p + "gates", g.sum())
                sums.add(p + "gates2", (g**2).sum())
                sums.add(p + "output2", (y**2).sum())
                largest = np.abs(y).max(initial=0)
                sums[p + "output_max"] = max(sums.get(p + "output_max", 0), largest)
            x = x + out
        sums.see("dense.head", reference.rms_norm(x, decoded.tensors["norm"], config.norm_eps))
    return sums


# Mamba-2 with ungated FFNs, Mamba-2, short convolutions, and delta rules with low-rank decays.
@pytest.mark.parametrize("name", ["nemotron_h", "granitemoehybrid", "lfm2_moe", "kimi_linear"])
def test_the_input_of_every_matrix_is_summed(name, tmp_path):
    convert(HFCheckpoint(families.make(name, tmp_path / "hf")), tmp_path / "x.moe")
    moe = open_moe(tmp_path / "x.moe")
    config, ids = moe.config, np.array(families.random_ids(20), np.int32)
    form, tensors = moments.SumForm([rung[0] for rung in moe.ladder], len(ids), "full"), {}
    with tapped.TappedModel(
        moe, ram=1 << 30, process=1 << 28, beside=0, window=len(ids), threads=1
    ) as model:
        x = np.empty((len(ids), config.hidden_size), np.float32)
        model.embed(ids, x)
        for layer in range(config.num_layers):
            sums = moments.LayerSums(config, layer, form)
            model.run_layer(layer, ids, x, sums)
            for key, (kind, _) in moments.sum_forms(config, layer, form).items():
                tensors[key] = sums.sums[key].astype(kind)
    bits = " ".join(map(str, form.level_bits))
    meta = {"source": "test", "model": name, "tokens": "20", "window": "20", "bits": bits}
    write_calibration(tmp_path / "x.calib", tensors, meta)
    c = Calibration(tmp_path / "x.calib")
    c.check(config)
    heads = ("k_b", "v_b")  # these get one row for each head
    for matrix, spec in dense_tensors(config).items():
        if spec.kind == "nested" and (config.tied or matrix != "embed"):
            assert c.count(matrix) == len(ids) or matrix.endswith(heads), matrix
            assert c.diagonal(matrix).any(), matrix
            assert c.matrix(matrix).shape == (spec.shape[1],) * 2


def silu(x):
    return x / (1 + np.exp(-x))


def close(ours, theirs, *, within=0.02):
    """Checks that sums agree with the reference's within 2%: the engine's activations have 8 bits."""
    error = np.linalg.norm(np.asarray(ours, np.float64) - theirs)
    assert error <= within * np.linalg.norm(theirs)


def test_sums_are_those_of_a_plain_forward_pass(tiny_moe, made):
    moe = open_moe(tiny_moe)
    sums = reference_sums(Decoded(tiny_moe), windows_of(moe, TEXT, window=WINDOW, count=None))
    c = Calibration(made, min_tokens=0)
    for name in (
        "layers.0.q",
        "layers.1.o",
        "layers.0.shared.gate",
        "layers.1.shared.down",
        "head",
    ):
        n = sums[f"dense.{name}.count"]
        assert c.count(name) == n
        close(c.matrix(name), sums[f"dense.{name}.products"] / n)
        close(c.diagonal(name), np.diag(sums[f"dense.{name}.products"]) / n)
    assert np.array_equal(c.diagonal("layers.0.v"), c.diagonal("layers.0.q"))
    assert np.array_equal(c.diagonal("layers.1.shared.up"), c.diagonal("layers.1.shared.gate"))
    compared = 0
    for i in c.layers:
        for e in range(moe.config.num_experts):
            p = f"experts.{i}.{e}."
            n = sums[p + "gate.count"]
            assert abs(c.count(p + "gate") - n) <= 4  # routers may have near ties
            if c.count(p + "gate") != n or n < 10:
                continue
            compared += 1
            close(c.matrix(p + "up"), sums[p + "gate.products"] / n, within=0.05)
            close(c.matrix(p + "down"), sums[p + "down.products"] / n, within=0.05)
            close(c.diagonal(p + "down"), np.diag(sums[p + "down.products"]) / n, within=0.05)
            for what in ("gates", "gates2", "output2", "output_max"):
                close(c.layer(i, what)[e], sums[p + what], within=0.05)
    assert compared >= 8


def test_products_and_squares_agree(made):
    c = Calibration(made)
    assert c.is_full
    for name in ("layers.1.q", "experts.0.1.gate", "experts.1.2.down"):
        matrix = c.matrix(name)
        np.testing.assert_allclose(np.diag(matrix), c.diagonal(name), rtol=1e-5)
        np.testing.assert_allclose(matrix, matrix.T, atol=1e-5 * np.abs(matrix).max())


def test_one_matrix_for_all_experts_of_a_layer(tiny_moe, made, tmp_path):
    calibrate(tiny_moe, TEXT, tmp_path / "x.calib", layers=True, window=WINDOW, threads=1)
    mine, whole = Calibration(tmp_path / "x.calib"), Calibration(made)
    config = open_moe(tiny_moe).config
    mine.check(config)
    mine.verify()
    for layer in config.moe_layers:
        # The shared expert has the same inputs as all routed experts together, which get each token equally often.
        shared = mine.matrix(f"layers.{layer}.shared.gate")
        assert np.array_equal(shared, whole.matrix(f"layers.{layer}.shared.gate"))
        for name in (f"experts.{layer}.0.gate", f"experts.{layer}.7.up"):
            assert mine.knows(name)
            np.testing.assert_allclose(mine.matrix(name), shared, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            mine.layer_matrix(layer), whole.layer_matrix(layer), rtol=1e-4, atol=1e-5
        )
        down = f"experts.{layer}.0.down"
        assert whole.knows(down)
        assert not mine.knows(down)
        assert mine.matrix(down) is None
        np.testing.assert_array_equal(mine.diagonal(down), whole.diagonal(down))
    with pytest.raises(ValueError, match="layers: not together with full"):
        calibrate(tiny_moe, TEXT, tmp_path / "y.calib", layers=True, full=True)


def test_errors_are_the_change_of_the_layers_output(tiny_moe, made):
    moe, c = open_moe(tiny_moe), Calibration(made)
    assert c.bits == (2, 3, 4, 6, 8)
    store = ExpertStore.open(moe, bits=8, budget_bytes=1 << 24, verify=True)
    layer = 1
    error2, counts = c.layer(layer, "error2"), c.layer(layer, "count")
    assert (error2[:, -1] == 0).all()
    assert (np.diff(error2[counts > 10], axis=1) < 0).all()
    # Moments describe the change of the output well where it is linear: for w_down alone, on the calibrated inputs.
    e = int(np.argmax(counts))
    row = layer * moe.config.num_experts + e
    low, high = store.cache.decode(row, 3)[2], store.cache.decode(row, 5)[2]
    change = low.astype(np.float64) - high
    per_token = np.einsum("ij,jk,ik->", change, c.matrix(f"experts.{layer}.{e}.down"), change)
    gates2 = c.layer(layer, "gates2")[e]
    assert 0.2 < per_token * gates2 / error2[e, 2] < 1  # w_gate and w_up add to it
    # `error` sums norms over windows, and `error2` sums their squares.
    windows = int(c.meta["tokens"]) // int(c.meta["window"])
    error = c.layer(layer, "error")
    assert (error**2 <= windows * error2 * (1 + 1e-9)).all()
    assert (error**2 >= error2 * (1 - 1e-9)).all()


class Stopped(Exception):
    pass


def stop_at(*at):
    """Returns a progress callback that raises Stopped at each of these counts in turn, and the counts it was given."""
    seen, left = [], list(at)

    def stop(done, total):
        seen.append(done)
        if left and done == left[0]:
            left.pop(0)
            raise Stopped

    return stop, seen


@pytest.mark.usefixtures("small_process")
@pytest.mark.parametrize("full", [True, False])
def test_a_run_that_was_interrupted_goes_on(tiny_moe, made, tmp_path, full):
    """It goes on after the last layer that was done, whatever the memory. Both layers have n windows."""
    out, run = tmp_path / "again.calib", {"full": full, "window": WINDOW, "threads": 2}
    n = len(windows_of(open_moe(tiny_moe), TEXT, window=WINDOW, count=None))
    stop, seen = stop_at(1, n + 2, 2 * n)
    for is_saved in (False, True, True):
        with pytest.raises(Stopped):
            calibrate(tiny_moe, TEXT, out, progress=stop, **run)
        assert not out.exists()
        assert is_begun(out) == is_saved
    said = []
    calibrate(tiny_moe, TEXT, out, progress=stop, say=said.append, ram="1GiB", **run)
    second = [*range(n + 1, 2 * n + 1)]
    assert seen == [1, *range(1, n + 1), *second[:2], *second, *second]
    assert f"{n} windows of {WINDOW} tokens through 2 layers, from layer 1 on; again" in said[0]
    assert list(tmp_path.iterdir()) == [out]
    if full:
        assert out.read_bytes() == made.read_bytes()
    else:
        a, b = Calibration(out), Calibration(made)
        for name in ("layers.0.q", "experts.0.3.down", "experts.1.0.gate", "head"):
            assert a.matrix(name) is None
            assert np.array_equal(a.diagonal(name), b.diagonal(name))


@pytest.mark.parametrize("name", ["x.calib.part", "x.calib.part.state"])
def test_a_damaged_part_is_made_again(tiny_moe, made, tmp_path, name):
    out = tmp_path / "x.calib"
    n = len(windows_of(open_moe(tiny_moe), TEXT, window=WINDOW, count=None))
    run = {"full": True, "window": WINDOW, "threads": 1}
    stop, seen = stop_at(n + 1)
    with pytest.raises(Stopped):
        calibrate(tiny_moe, TEXT, out, progress=stop, **run)
    content = bytearray((tmp_path / name).read_bytes())
    content[-1000] ^= 1
    (tmp_path / name).write_bytes(content)
    calibrate(tiny_moe, TEXT, out, progress=stop, **run)
    assert seen == [*range(1, n + 2), *range(1, 2 * n + 1)]
    assert out.read_bytes() == made.read_bytes()
    assert list(tmp_path.iterdir()) == [out]


def test_parts_of_another_text_or_form_are_not_used(tiny_moe, tmp_path):
    out = tmp_path / "x.calib"
    n = len(windows_of(open_moe(tiny_moe), TEXT, window=WINDOW, count=None))
    stop, seen = stop_at(n + 1)
    with pytest.raises(Stopped):
        calibrate(tiny_moe, TEXT, out, window=WINDOW, progress=stop)
    for text, layers in ((TEXT[7:], False), (TEXT, True)):
        with pytest.raises(Stopped):
            calibrate(tiny_moe, text, out, layers=layers, window=WINDOW, progress=stop_at(1)[0])
        assert is_begun(out)  # kept until another run has done a layer
    calibrate(tiny_moe, TEXT[7:], out, window=WINDOW, progress=stop)
    assert seen[n + 1] == 1


def test_checksums_are_four_bytes_a_row_and_counted(tiny_moe, tmp_path, monkeypatch):
    array = np.zeros((20_000, 1), np.float32)
    with SummedWriter(tmp_path / "x", {"a": (array.dtype, array.shape)}, {}) as file:
        tracemalloc.start()
        file.add("a", array)
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert file.sums_bytes == 4 * (len(array) + 2)
        assert held <= file.sums_bytes + (4 << 10)
        again, sums = file.sums.astype(np.int64), file.sums
        assert file.resume(again)
        assert np.array_equal(file.sums, sums)
        again[-1] ^= 1
        assert not file.resume(again)

    books, tapped = [], balanced.Machine.tapped

    def seen(machine, beside, window):
        books.append(beside)
        return tapped(machine, beside, window)

    monkeypatch.setattr(balanced.Machine, "tapped", seen)
    calibrate(tiny_moe, TEXT, tmp_path / "y", full=True, window=WINDOW, count=2, more=TEXT)
    config, made = open_moe(tiny_moe).config, Calibration(tmp_path / "y")
    tokens = int(made.meta["tokens"])
    counts = 2 * 8 * config.num_experts * config.num_layers  # for two windows at a time
    assert books[0] == 4 * 2 * WINDOW * config.hidden_size + counts
    # Two float32 of each layer for every token, three times.
    form = moments.SumForm(made.bits, tokens, "full")
    sums = moments.sum_bytes(moments.sum_forms(config, 1, form, is_filed=False))
    assert (
        books[1] >= 4 * tokens * config.hidden_size + sums + 3 * 4 * 2 * config.num_layers * tokens
    )


def test_two_at_once_do_not_write_the_same_file(tiny_moe, tmp_path):
    out = tmp_path / "x.calib"

    def other(done, total):
        with pytest.raises(BlockingIOError, match="another calibration is writing it"):
            calibrate(tiny_moe, TEXT, out, window=WINDOW)

    calibrate(tiny_moe, TEXT, out, window=WINDOW, count=1, progress=other)


def test_what_ends_before_a_layer_is_written_leaves_nothing(tiny_moe, tmp_path):
    for error, given in ((Stopped, {"progress": stop_at(1)[0]}), (OutOfBudget, {"ram": "100KiB"})):
        with pytest.raises(error):
            calibrate(tiny_moe, TEXT, tmp_path / "x.calib", window=WINDOW, count=1, **given)
        assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_seen_before_the_work(tiny_moe, tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    stop, seen = stop_at()
    with pytest.raises(OSError, match=r"the disk has 1 MiB free; this takes \d"):
        calibrate(tiny_moe, TEXT, tmp_path / "x.calib", full=True, window=WINDOW, progress=stop)
    assert seen == []
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_sufficed_suffices_to_go_on(tiny_moe, tmp_path, monkeypatch):
    """A run asks for room for two states; when it goes on, one of them is on the disk already."""
    out, run = tmp_path / "x.calib", {"window": WINDOW, "threads": 1}
    n = len(windows_of(open_moe(tiny_moe), TEXT, window=WINDOW, count=None))
    usage, disk = shutil.disk_usage(tmp_path), 0

    def free(path):
        taken = sum(file.stat().st_blocks * 512 for file in tmp_path.iterdir())
        return usage._replace(free=disk - taken)

    monkeypatch.setattr(shutil, "disk_usage", free)
    monkeypatch.setattr(lab, "size_text", str)
    with pytest.raises(OSError, match="the disk has 0 free; this takes ") as error:
        calibrate(tiny_moe, TEXT, out, **run)
    disk = int(error.value.strerror.split()[-1])
    with pytest.raises(Stopped):
        calibrate(tiny_moe, TEXT, out, progress=stop_at(n + 1)[0], **run)
    stop, seen = stop_at()
    calibrate(tiny_moe, TEXT, out, progress=stop, **run)
    assert seen == [*range(n + 1, 2 * n + 1)]


@pytest.mark.parametrize("kind", ["state", "counts"])
def test_a_link_of_others_beside_it_is_not_followed(tiny_moe, tmp_path, kind):
    out, theirs = tmp_path / "x.calib", tmp_path / "theirs"
    theirs.write_text("theirs")
    (tmp_path / f"x.calib.part.{kind}").symlink_to("theirs")
    calibrate(tiny_moe, TEXT, out, window=WINDOW, count=1, threads=1, more=TEXT)
    assert theirs.read_text() == "theirs"
    assert {path.name for path in tmp_path.iterdir()} == {"x.calib", "theirs"}


def test_of_a_link_what_it_leads_to_is_made(tiny_moe, tmp_path):
    """If the output is a link, its target is written, with parts beside the target. A folder or pipe is refused."""
    link, far = tmp_path / "link.calib", tmp_path / "far"
    far.mkdir()
    link.symlink_to("far/real.calib")
    run = {"window": WINDOW, "threads": 1}
    n = len(windows_of(open_moe(tiny_moe), TEXT, window=WINDOW, count=None))
    with pytest.raises(Stopped):
        calibrate(tiny_moe, TEXT, link, progress=stop_at(n + 1)[0], **run)
    assert is_begun(link)
    assert {path.name for path in tmp_path.iterdir()} == {"link.calib", "far"}
    calibrate(tiny_moe, TEXT, link, **run)
    real = far / "real.calib"
    assert [*far.iterdir()] == [real]
    real.chmod(0o600)
    calibrate(tiny_moe, TEXT, link, count=1, **run)
    assert link.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o600
    assert Calibration(link).meta["tokens"] == str(WINDOW)
    os.mkfifo(tmp_path / "pipe")
    for there in (tmp_path / "pipe", far):
        with pytest.raises(FileExistsError, match="is no regular file; expected one to write"):
            calibrate(tiny_moe, TEXT, there, **run)
    assert (tmp_path / "pipe").is_fifo()


def test_inputs_stand_for_their_products(tiny_moe, made, tmp_path, monkeypatch):
    """For a short text the inputs are kept, for a long one their products: both give the same matrices."""
    monkeypatch.setattr(moments, "keeps_rows", lambda config, tokens: False)
    calibrate(tiny_moe, TEXT, tmp_path / "x", full=True, window=WINDOW, threads=1)
    summed, kept = Calibration(tmp_path / "x"), Calibration(made)
    assert summed.has("in.products")
    assert not summed.has("in.rows")
    assert kept.has("in.rows")
    assert not kept.has("in.products")
    s = ColumnScales(open_moe(tiny_moe).config, 1 + np.random.default_rng(0).random((5, 96), "f4"))
    few = [np.flatnonzero(kept.layer(i, "count") < MIN_TOKENS) for i in (0, 1)]
    assert any(len(experts) for experts in few)
    for a, b in ((summed, kept), (summed.with_scales(s), kept.with_scales(s))):
        for layer in (0, 1):
            for e in range(8):
                name = f"experts.{layer}.{e}.up"
                np.testing.assert_allclose(a.matrix(name), b.matrix(name), rtol=1e-4, atol=1e-5)
            of_layer = a.layer_matrix(layer), b.layer_matrix(layer)
            np.testing.assert_allclose(*of_layer, rtol=1e-4, atol=1e-5)
            assert np.array_equal(b.layer_matrix(layer), b.layer_matrix(layer).T)


def test_more_text_is_taken_until_experts_have_seen_enough(tiny_moe, tmp_path, monkeypatch):
    """A repetitive text starves experts; more text is taken from a second one, and no more than needed."""
    skewed, more = "aaaa" * (WINDOW // 2), "".join(map(chr, range(33, 126))) * 16
    monkeypatch.setattr(lab, "ENOUGH", 40)
    monkeypatch.setattr(balanced, "ENOUGH", 40)
    monkeypatch.setattr(balanced, "BALANCED", 1.0)

    def made(name, **given):
        path = tmp_path / name
        starved = calibrate(tiny_moe, skewed, path, window=WINDOW, threads=1, **given)
        return starved, Calibration(path)

    starved, alone = made("a")
    counts = {i: alone.layer(i, "count") for i in (0, 1)}
    assert starved == [(i, e) for i in (0, 1) for e in range(8) if counts[i][e] < 40]
    assert starved
    none, filled = made("b", more=more)
    assert none == []
    after = {i: filled.layer(i, "count") for i in (0, 1)}
    assert min(n.min() for n in after.values()) >= 40
    tokens = int(filled.meta["tokens"])
    assert tokens < len(skewed) + len(more) // WINDOW * WINDOW
    # One window less would not have been enough, and the whole first text is used.
    whole = f"{skewed}{more}"[: tokens - WINDOW]
    short = tmp_path / "c"
    assert calibrate(tiny_moe, whole, short, window=WINDOW, threads=1)
    assert (after[0] >= counts[0]).all()

    # Products are taken of the same text. An interrupted run goes on, and does not count again what was counted.
    stop, counted = stop_at(2 * len(skewed) // WINDOW + 1)
    for _ in range(2):
        with pytest.raises(Stopped):
            made("d", more=more, full=True, counting=stop, progress=stop_at(3)[0])
        assert is_begun(tmp_path / "d")
    assert counted == [*range(1, 6), *range(5, len(counted))]
    before = len(counted)
    _, full = made("d", more=more, full=True, counting=stop)
    assert len(counted) == before
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c", "d"}
    assert np.array_equal(full.layer(0, "count"), after[0])
    assert np.trace(full.matrix("experts.0.1.gate")) == pytest.approx(
        full.diagonal("experts.0.1.gate").sum(), rel=1e-3
    )


def test_rare_experts_lean_on_their_layer(tmp_path):
    squares = np.array([[100, 200], [0, 0], [30, 0]], np.float32)
    count = np.array([100, 0, 10])
    path = tmp_path / "x.calib"
    write_calibration(
        path, {"experts.3.count": count, "experts.3.in.squares": squares}, {"source": "edgemoe"}
    )
    c = Calibration(path, min_tokens=40)
    assert c.layers == (3,)
    np.testing.assert_allclose(c.diagonal("experts.3.0.gate"), [1, 2])
    layer = np.array([130, 200]) / 110
    np.testing.assert_allclose(c.diagonal("experts.3.1.up"), layer, rtol=1e-6)
    np.testing.assert_allclose(
        c.diagonal("experts.3.2.gate"), ([30, 0] + 30 * layer) / 40, rtol=1e-6
    )
    assert c.diagonal("experts.3.0.down") is None
    assert c.diagonal("layers.3.q") is None
    with pytest.raises(FormatError, match=r"has no experts\.3\.error"):
        c.layer(3, "error")


@pytest.mark.parametrize("content", [b"", b"not safetensors", struct.pack("<Q", 2) + b"{}"])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "x.calib"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"x\.calib: not a calibration file"):
        Calibration(path)


# ---------------------------------------------------------------- imatrix


def entries(seed=0):
    """Returns an imatrix's sums and counts by llama.cpp's names: of 814 tokens, with 2 of 8 experts each."""
    rng = np.random.default_rng(seed)
    out = {}
    for i in range(2):
        for name, cols, matrices in (
            ("attn_q", 96, 1), ("attn_k", 96, 1), ("attn_v", 96, 1), ("attn_output", 96, 1),
            ("ffn_gate_exps", 96, 8), ("ffn_up_exps", 96, 8), ("ffn_down_exps", 48, 8),
            ("ffn_gate_shexp", 96, 1), ("ffn_up_shexp", 96, 1), ("ffn_down_shexp", 80, 1),
        ):  # fmt: skip
            counts = np.arange(200, 208) if matrices == 8 else np.array([814])
            sums = rng.random((matrices, cols), np.float32) * counts[:, None]
            out[f"blk.{i}.{name}.weight"] = (sums.astype(np.float32), counts)
    return out


def write_gguf(path, values):
    import gguf

    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_string("general.type", "imatrix")
    for name, (sums, counts) in values.items():
        writer.add_tensor(f"{name}.in_sum2", sums)
        writer.add_tensor(f"{name}.counts", counts.astype(np.float32)[:, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_dat(path, values, calls=7):
    data = struct.pack("<i", len(values))
    for name, (sums, counts) in values.items():
        means = (sums / counts[:, None] * calls).astype("<f4").tobytes()
        data += struct.pack("<i", len(name)) + name.encode()
        data += struct.pack("<ii", calls, len(means) // 4) + means
    path.write_bytes(data + struct.pack("<ii", calls, 5) + b"x.txt")


@pytest.mark.parametrize("write", [write_gguf, write_dat])
def test_imatrix(tiny_moe, tmp_path, write):
    source, out, values = tmp_path / "im", tmp_path / "im.calib", entries()
    write(source, values)
    assert convert_imatrix(tiny_moe, source, out) == ("head",)
    c = Calibration(out)
    assert c.meta["source"] == "imatrix"
    assert c.meta["tokens"] == str(814 if write is write_gguf else 7 * 512)
    for ours, theirs, e in (
        ("layers.1.k", "blk.1.attn_q", 0), ("layers.0.o", "blk.0.attn_output", 0),
        ("layers.0.shared.down", "blk.0.ffn_down_shexp", 0),
        ("experts.1.6.up", "blk.1.ffn_gate_exps", 6), ("experts.0.7.down", "blk.0.ffn_down_exps", 7),
    ):  # fmt: skip
        sums, counts = values[theirs + ".weight"]
        np.testing.assert_allclose(c.diagonal(ours), sums[e] / counts[e], rtol=1e-5)
    if write is write_gguf:
        assert c.count("layers.1.o") == values["blk.1.attn_output.weight"][1][0]
    assert c.matrix("layers.0.q") is None
    assert not c.is_full


def planted(path, names):
    """Writes an imatrix of one token, in which the sums of the n-th name begin at n; returns the sums by name."""
    values = {
        f"blk.{name}.weight": (1 + n + np.arange(cols, dtype=np.float32)[None], np.ones(1, int))
        for n, (name, cols) in enumerate(names.items())
    }
    write_gguf(path, values)
    return {name: values[f"blk.{name}.weight"][0][0] for name in names}


def test_an_imatrix_of_recurrent_layers(tmp_path):
    """In GGUF files of Qwen3.5 the value heads of key heads are interleaved: here two for each of two key heads."""
    convert(HFCheckpoint(families.make("qwen3_5_moe", tmp_path / "hf")), tmp_path / "x.moe")
    names = {"0.attn_qkv": 64, "0.ssm_out": 64, "1.attn_q": 64, "1.attn_output": 96}
    sums = planted(tmp_path / "im", names)
    missing = convert_imatrix(tmp_path / "x.moe", tmp_path / "im", tmp_path / "x.calib")
    c = Calibration(tmp_path / "x.calib")
    for name in ("qkv", "z"):
        np.testing.assert_array_equal(c.diagonal(f"layers.0.{name}"), sums["0.attn_qkv"])
    tiled = sums["0.ssm_out"].reshape(4, 16)
    np.testing.assert_array_equal(c.diagonal("layers.0.o").reshape(4, 16), tiled[[0, 2, 1, 3]])
    np.testing.assert_array_equal(c.diagonal("layers.1.o"), sums["1.attn_output"])
    assert {"layers.2.qkv", "layers.2.o", "layers.2.shared.gate"} <= set(missing)


def test_an_imatrix_of_layers_that_are_stored_apart(tmp_path):
    """Nemotron's mixers and FFNs are separate blocks: mamba, moe, mamba, attention, moe."""
    convert(HFCheckpoint(families.make("nemotron_h", tmp_path / "hf")), tmp_path / "x.moe")
    names = {
        "0.ssm_in": 64, "0.ssm_out": 128, "1.ffn_up_shexp": 64, "1.ffn_down_shexp": 48, "2.ssm_in": 64,
        "3.attn_q": 64, "3.attn_output": 96, "4.ffn_up_shexp": 64,
    }  # fmt: skip
    sums = planted(tmp_path / "im", names)
    convert_imatrix(tmp_path / "x.moe", tmp_path / "im", tmp_path / "x.calib")
    c = Calibration(tmp_path / "x.calib")
    for ours, theirs in {
        "0.xbc": "0.ssm_in", "0.x_gate": "0.ssm_in", "0.o": "0.ssm_out", "0.shared.up": "1.ffn_up_shexp",
        "0.shared.down": "1.ffn_down_shexp", "1.xbc": "2.ssm_in", "2.v": "3.attn_q", "2.o": "3.attn_output",
        "2.shared.up": "4.ffn_up_shexp",
    }.items():  # fmt: skip
        np.testing.assert_array_equal(c.diagonal(f"layers.{ours}"), sums[theirs], err_msg=ours)


def test_a_wrong_imatrix_is_refused(tiny_moe, tmp_path):
    source, out = tmp_path / "im", tmp_path / "im.calib"
    wide = {"blk.0.ffn_gate_exps.weight": (np.ones((4, 96), np.float32), np.ones(4, np.int64))}
    write_gguf(source, wide)
    with pytest.raises(
        FormatError, match=r"ffn_gate_exps\.weight is \[4, 96\]; expected \[8, 96\]"
    ):
        convert_imatrix(tiny_moe, source, out)
    for content in (
        b"",
        b"\x01\x00",
        struct.pack("<iii", 1, 3, 9),
        b"GGUF",
        b"GGUF" + b"\xff" * 40,
    ):
        source.write_bytes(content)
        with pytest.raises(FormatError):
            convert_imatrix(tiny_moe, source, out)
    write_dat(source, entries())
    source.write_bytes(source.read_bytes()[:5000])
    with pytest.raises(FormatError, match="not an imatrix"):
        convert_imatrix(tiny_moe, source, out)
    assert not out.exists()


# ---------------------------------------------------------------- the command


def test_command(tiny_moe, tmp_path, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "a.calib"
    text.write_text(TEXT)
    run = ["calibrate", str(tiny_moe), "--text", str(text), "-o", str(out), "--window", "96"]
    assert main([*run, "--chunks", "2", "-t", "1"]) == 0
    assert Calibration(out).meta["tokens"] == "192"
    said = capsys.readouterr().err
    assert "fewer than 128 tokens for expert 0." in said
    assert "others (layer.expert); --more goes on with more text" in said
    assert main(run) == 1
    assert "exists; --overwrite replaces it" in capsys.readouterr().err
    assert main([*run, "--overwrite", "--window", "100000"]) == 2
    before = tiny_moe.read_bytes()
    for target in (tiny_moe, text):  # by mistake
        assert (
            main(
                ["calibrate", str(tiny_moe), "--text", str(text), "-o", str(target), "--overwrite"]
            )
            == 1
        )
        assert "expected another file to write" in capsys.readouterr().err
    assert tiny_moe.read_bytes() == before
    short = tmp_path / "short.txt"
    short.write_text("short")
    assert main([*run, "--overwrite", "--more", str(short)]) == 2
    assert "more: expected at least one window of 96 tokens, got 5" in capsys.readouterr().err
    text.write_text("short")
    assert main([*run, "--overwrite"]) == 2
    assert "text: expected at least one window of 96 tokens, got 5" in capsys.readouterr().err
    source = tmp_path / "im.dat"
    write_dat(source, entries())
    imported = [
        "calibrate",
        str(tiny_moe),
        "--imatrix",
        str(source),
        "-o",
        str(tmp_path / "b.calib"),
    ]
    assert main(imported) == 0
    assert Path(tmp_path / "b.calib").is_file()
