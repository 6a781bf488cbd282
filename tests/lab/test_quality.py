"""Quality is measured as llama.cpp does, and agrees with torch on the same logits."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import edgemoe
from edgemoe import _core
from edgemoe.cli import main as edgemoe_cli
from edgemoe.errors import FormatError
from edgemoe.file.reader import open_moe
from edgemoe.lab.quality.logprobs import LogProbs, LogProbsWriter
from edgemoe.lab.quality.loss import standard_error
from edgemoe.lab.quality.quality import Quality, Sample, Trial, agreement, measure, recorded, score
from edgemoe.lab.quality.text import default_text
from edgemoe.lab.report.levels import bits_per_weight, levels
from edgemoe.store import expert_bytes, load_dense
from edgemoe.text.logprobs import log_softmax
from edgemoe.text.tokenizer import Tokenizer

CHUNK, CHUNKS = 24, 3
FULL, LOW = Trial(bits=8, dense_bits=8), Trial(bits=2, dense_bits=2)


@pytest.fixture(scope="module")
def sample(tiny_moe: Path) -> Sample:
    tokenizer = Tokenizer.from_files(open_moe(tiny_moe).sections)
    return Sample.of_text(default_text(), tokenizer, chunk=CHUNK, chunks=CHUNKS)


@pytest.fixture(scope="module")
def low(tiny_moe: Path, sample: Sample) -> Quality:
    with recorded(tiny_moe, FULL, sample) as (_, reference):
        return measure(tiny_moe, LOW, sample, reference=reference)


# ------------------------------------------------------------ the file of log-probabilities


def written(log_probs: np.ndarray, windows: np.ndarray) -> bytes:
    file = io.BytesIO()
    LogProbsWriter(file, windows, log_probs.shape[1]).add(log_probs)
    return file.getvalue()


def test_log_probabilities_are_written_as_llama_cpp_does() -> None:
    """As in llama.cpp's tools/perplexity/perplexity.cpp, here in plain loops. Its tools have read such a file."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 6, (2, 7)).astype(np.float32)
    windows = np.arange(5, dtype=np.int32).reshape(1, 5)
    out = bytearray(b"_logits_" + struct.pack("<iii", 5, 7, 1) + struct.pack("<5i", *range(5)))
    for row in logits.astype(float):
        low = max(row.min(), row.max() - 16)
        scale = (row.max() - low) / 65535
        total = sum(math.exp(x - row.max()) for x in row)
        out += struct.pack("<ff", scale, low - row.max() - math.log(total))
        out += struct.pack("<7H", *(round((x - low) / scale) if x > low else 0 for x in row))
        out += struct.pack("<H", 0)  # pads to an even number
    content = written(log_softmax(logits), windows)
    mine, other = (np.frombuffer(c[40:], "<u2").reshape(2, 12) for c in (content, bytes(out)))
    assert content[:40] == out[:40]
    assert np.abs(mine[:, 4:].astype(int) - other[:, 4:]).max() <= 1
    for a, b in zip(mine, other, strict=True):
        np.testing.assert_allclose(a[:4].view("<f4"), b[:4].view("<f4"), rtol=1e-6)


def test_log_probabilities_come_back(tmp_path: Path) -> None:
    logits = np.random.default_rng(1).normal(0, 3, (5, 9)).astype(np.float32)
    logits[3] = 2.5  # a flat one has no range
    true = log_softmax(logits)
    windows = np.arange(12, dtype=np.int32).reshape(1, 12) % 9
    (path := tmp_path / "x").write_bytes(written(true, windows))
    with LogProbs(path) as saved:
        assert (saved.vocab_size, saved.windows.tolist()) == (9, windows.tolist())
        came = -true[np.arange(1, 5), windows[0, 8:]]
        np.testing.assert_allclose(saved.loss(0, 1, saved.rows(0, 1, 4)), came, atol=16 / 65535)
        np.testing.assert_allclose(saved.rows(0, 0, 5), true, atol=16 / 65535)
        assert np.array_equal(saved.rows(0, 2, 2), saved.rows(0, 0, 5)[2:4])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"", "not a file of log-probabilities"),
        (lambda data: b"\x89MOE" + data[4:], "not a file of log-probabilities"),
        (lambda data: data[:15], "truncated inside its head"),
        (lambda data: data[:8] + struct.pack("<i", 0) + data[12:], "its head makes no sense"),
        (
            lambda data: data[:12] + struct.pack("<i", 2**31 - 1) + data[16:],
            "its head makes no sense",
        ),
        (lambda data: data[:-1], "expected 208 bytes, got 207"),
        (lambda data: data[:20] + b"\x09" + data[21:], "tokens outside a vocabulary of 9"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, change, message: str) -> None:
    true = log_softmax(np.zeros((5, 9), np.float32))
    path = tmp_path / "x"
    path.write_bytes(change(written(true, np.zeros((1, 12), np.int32))))
    with pytest.raises(FormatError, match=message) as error:
        LogProbs(path)
    assert str(error.value).startswith(str(path))


# ------------------------------------------------------------ scores


def test_text_is_cut_with_the_models_first_token(tiny_moe: Path) -> None:
    tokenizer = Tokenizer.from_files(open_moe(tiny_moe).sections)
    plain = Sample.of_text("abcdefghij", tokenizer, chunk=4)
    assert plain.first_token is None
    assert plain.windows.tolist() == np.array(tokenizer.encode("abcdefgh")).reshape(2, 4).tolist()
    assert plain.positions == 2

    class WithFirst:
        def encode(self, text: str, *, add_special: bool = True) -> list[int]:
            return [256] * add_special + tokenizer.encode(text)

    started = Sample.of_text("abcdefghij", WithFirst(), chunk=4)
    assert started.first_token == 256
    assert started.windows[0, 0] == 256
    assert started.windows[0, 1:].tolist() == tokenizer.encode("abc")
    with pytest.raises(ValueError, match="the text has 10 tokens; expected at least 3 × 4"):
        Sample.of_text("abcdefghij", tokenizer, chunk=4, chunks=3)
    with pytest.raises(ValueError, match="expected at least 1 chunk of at least 4 tokens"):
        Sample.of_text("abcdefghij", tokenizer, chunk=3)


def test_scores_agree_with_torch(tiny_moe: Path, sample: Sample, low: Quality) -> None:
    def logits(bits: int) -> torch.Tensor:
        with edgemoe.load(tiny_moe, bits=bits, dense_bits=bits) as engine:
            rows = [engine.logits(w)[CHUNK // 2 : CHUNK - 1].copy() for w in sample.windows]
        return torch.tensor(np.concatenate(rows)).double()

    def error(values: torch.Tensor) -> float:
        means = values.reshape(len(sample.windows), -1).mean(1)
        alone = values.std(correction=0) / len(values) ** 0.5
        return max(alone, means.std() / len(means) ** 0.5).item()

    full, other = logits(8), logits(2)
    came = torch.tensor(sample.windows[:, CHUNK // 2 + 1 :].reshape(-1), dtype=torch.int64)
    loss = torch.nn.functional.cross_entropy(other, came)
    kl = torch.nn.functional.kl_div(
        other.log_softmax(1), full.log_softmax(1), log_target=True, reduction="none"
    ).sum(1)
    assert low.positions == len(came) == sample.positions
    assert low.perplexity == pytest.approx(loss.exp().item(), rel=1e-9)
    # The file has 16 bits per log-probability, and nothing below e^-16.
    assert low.kl == pytest.approx(kl.mean().item(), rel=1e-3)
    assert low.kl_99 == pytest.approx(kl.quantile(0.99).item(), rel=1e-3)
    assert low.kl_error == pytest.approx(error(kl), rel=1e-3)
    assert low.same_top == pytest.approx((full.argmax(1) == other.argmax(1)).double().mean().item())
    assert low.average_bits == 2
    # The change is exact, not from the 16-bit file. Its error is that of pairs, far below that of one perplexity.
    change = loss - torch.nn.functional.cross_entropy(full, came)
    pairs = full.log_softmax(1) - other.log_softmax(1)
    pairs = pairs[torch.arange(len(came)), came]
    assert low.loss_change == pytest.approx(change.item(), rel=1e-9)
    assert low.loss_error == pytest.approx(error(pairs), rel=1e-9)


def test_tokens_of_a_chunk_are_not_taken_for_independent() -> None:
    chunks = np.repeat(
        [0.0, 1.0, 0.0, 1.0], 10
    )  # all tokens of a chunk say the same: 4 values, not 40
    assert standard_error(chunks, 4) == pytest.approx(np.std([0, 1, 0, 1], ddof=1) / 2)
    within = np.tile([0.0, 1.0], 20)  # chunks are as alike as they can be
    assert standard_error(within, 4) == standard_error(within, 1) == pytest.approx(0.5 / 40**0.5)
    rng = np.random.default_rng(1)
    shared = rng.normal(size=(400, 1)) * 0.3 + rng.normal(size=(400, 20))
    means = [standard_error(shared[i : i + 40].reshape(-1), 40) for i in range(0, 400, 40)]
    assert np.mean(means) == pytest.approx((0.3**2 / 40 + 1 / 800) ** 0.5, rel=0.1)


def test_bits_of_a_byte_are_those_of_a_token_where_each_is_a_byte(
    sample: Sample, low: Quality
) -> None:
    assert low.bits_per_byte == pytest.approx(math.log2(low.perplexity), rel=1e-9)


def test_agreement_is_the_share_of_choices_that_come_again() -> None:
    a = [np.array([[0, 1], [2, 3]], np.int32), np.array([[0, 1], [0, 1]], np.int32)]
    b = [np.array([[1, 0], [2, 0]], np.int32), np.array([[4, 5], [0, 1]], np.int32)]
    assert agreement(a, a) == 1
    assert agreement(a, b) == pytest.approx((3 / 4 + 2 / 4) / 2)
    assert agreement(None, b) is None
    assert agreement([], []) is None


def test_capacity_weighs_what_is_understood_against_what_is_read(
    tiny_moe: Path, sample: Sample
) -> None:
    small = dataclasses.replace(FULL, slots=3 * expert_bytes(open_moe(tiny_moe), 5), decode=True)
    quality = measure(tiny_moe, small, sample)
    assert quality.read_per_token is not None
    expected = 8 - math.log2(quality.perplexity) - 24
    assert quality.capacity == pytest.approx(expected / math.log2(quality.read_per_token))
    assert measure(tiny_moe, FULL, sample).capacity is None


def test_a_model_does_not_diverge_from_itself(tiny_moe: Path, sample: Sample, low: Quality) -> None:
    with recorded(tiny_moe, FULL, sample) as (alone, reference):
        itself = measure(tiny_moe, FULL, sample, reference=reference)
    assert alone.kl is None
    assert itself.perplexity == alone.perplexity
    assert abs(itself.kl) < 1e-5
    assert itself.same_top == itself.same_experts == 1
    assert low.same_experts is not None
    assert 0.3 < low.same_experts < 1
    assert itself.loss_change == itself.loss_error == 0
    assert low.kl > 0.01


def test_scores_do_not_depend_on_how_they_are_computed(
    tiny_moe: Path, sample: Sample, low: Quality, monkeypatch
) -> None:
    from edgemoe.lab.quality import quality

    done = []
    with recorded(tiny_moe, FULL, sample) as (_, reference):
        decode = Trial(bits=2, dense_bits=2, decode=True, threads=1)
        decoded = measure(tiny_moe, decode, sample, reference=reference)
        assert dataclasses.replace(decoded, capacity=None) == low
        monkeypatch.setattr(quality, "_LOGITS", 5 * 264)
        monkeypatch.setattr(quality, "_BLOCK", 2 * 264)
        again = measure(
            tiny_moe, LOW, sample, reference=reference, progress=lambda *at: done.append(at)
        )
        assert again == low
    assert done == [(1, 3), (2, 3), (3, 3)]


def test_the_first_token_is_seen_but_not_scored(tiny_moe: Path, sample: Sample) -> None:
    changed = sample.windows.copy()
    changed[:, 0] = 7
    with edgemoe.load(tiny_moe, context=CHUNK) as engine:
        given = score(engine, Sample(sample.windows, 256))
        assert given == score(engine, Sample(changed, 256))
        assert given != score(engine, sample)


def test_another_reference_is_refused(tiny_moe: Path, sample: Sample, tmp_path: Path) -> None:
    other = np.random.default_rng(0).integers(0, 9, (1, CHUNK)).astype(np.int32)
    for vocab_size, message in ((264, "the same tokens"), (9, "a vocabulary of 264 tokens, got 9")):
        rows = log_softmax(np.zeros((CHUNK // 2 - 1, vocab_size), np.float32))
        (path := tmp_path / "x").write_bytes(written(rows, other))
        with LogProbs(path) as reference, pytest.raises(ValueError, match=message):
            measure(tiny_moe, LOW, sample, reference=reference)


# ------------------------------------------------------------ sizes


def test_sizes_are_those_of_the_file(tiny_moe: Path) -> None:
    moe = open_moe(tiny_moe)
    sizes = levels(moe)
    nested = {n: t for n, t in moe.tensors.items() if t.spec.kind == "nested"}
    assert [level.bits for level in sizes] == [2, 3, 4, 6, 8]
    assert sizes[-1].dense_bytes == sum(sum(t.lengths) for t in nested.values())
    embed = nested.pop("embed")  # below the highest level only its rows are looked up
    for i, level in enumerate(sizes[:-1], start=1):
        assert level.dense_bytes == sum(sum(t.lengths[:i]) for t in nested.values())
        assert level.dense_weights == sizes[-1].dense_weights - np.prod(embed.spec.shape)
        # In memory they take whole pages; vectors and the table of embedding rows are separate.
        held = load_dense(moe, i, verify=False).values()
        pages = sum(-(-sum(t.lengths[:i]) // 4096) * 4096 for t in nested.values())
        assert pages == sum(w.bytes for w in held if isinstance(w, _core.Nested))
    assert sizes[-1].expert_bytes == len(moe.experts.offsets) * moe.experts.ends[-1]
    assert sizes[0].expert_weights == 2 * 8 * 3 * 96 * 48
    for level in sizes:
        # Scales take half a bit per weight and 16 bits a row. The rest is padding: 96 and 48 columns take 128 and 64.
        assert level.bits + 0.5 < level.bits_per_weight < (level.bits + 0.5 + 16 / 48) * 1.4
        same = bits_per_weight(moe, level.bits, level.dense_bits)
        assert same == pytest.approx(level.bits_per_weight)
    between = bits_per_weight(moe, 2.5, 2)
    assert sizes[0].bits_per_weight < between < sizes[1].bits_per_weight


# ------------------------------------------------------------ the command


def run(*argv: object) -> int:
    return edgemoe_cli.main(["quality", *map(str, argv)])


SHORT = ("--chunk", CHUNK, "--chunks", CHUNKS, "-t", 1)


def test_command_measures_every_level(tiny_moe: Path, tmp_path: Path, capsys, low: Quality) -> None:
    out = tmp_path / "x.json"
    assert run(tiny_moe, *SHORT, "--json", out) == 0
    printed = capsys.readouterr()
    table = printed.out.splitlines()[2:]
    assert [line.split(" | ")[1] for line in table] == ["8", "6", "4", "3", "2"]
    assert "| reference | – | – |" in table[0]
    rows = json.loads(out.read_text())["rows"]
    assert [row["bits"] for row in rows] == [8, 6, 4, 3, 2]
    assert rows[-1]["kl"] == low.kl
    kls = [row["kl"] for row in rows[1:]]
    assert kls == sorted(kls)
    assert f"the package's own (Moby-Dick, speeches), 3 chunks of {CHUNK} tokens" in printed.err
    assert "# 3 chunks are too few to trust the standard errors\n" in printed.err


def test_command_compares_with_other_references(tiny_moe: Path, tmp_path: Path, capsys) -> None:
    out, saved = tmp_path / "x.json", tmp_path / "saved"
    (text := tmp_path / "text.txt").write_text(default_text()[:2000])

    def rows(*argv: object) -> list[dict]:
        assert run(tiny_moe, "--bits", 2, "-t", 1, "--json", out, *argv) == 0
        capsys.readouterr()
        return json.loads(out.read_text())["rows"]

    with_text = ("--text", text, "--chunk", CHUNK)
    highest = rows(*with_text)
    assert (
        rows(*with_text, "--reference", 8) == rows(*with_text, "--reference", tiny_moe) == highest
    )
    assert 0 < rows(*with_text, "--bits", 8, "-ctk", "q8_0")[0]["kl"] < highest[0]["kl"]
    assert json.loads(out.read_text())["rows"][0]["cache_types"] == ["q8_0", "f16"]
    assert rows(*with_text, "--reference", 4)[0]["kl"] != highest[0]["kl"]
    tokenizer = Tokenizer.from_files(open_moe(tiny_moe).sections)
    sample = Sample.of_text(text.read_text(), tokenizer, chunk=CHUNK)
    with open(saved, "wb") as file:
        measure(tiny_moe, FULL, sample, record=LogProbsWriter(file, sample.windows, 264))
    clipped = {
        name: pytest.approx(highest[0][name], abs=0.5) for name in ("loss_change", "loss_error")
    }
    unknown = {"same_experts": None}  # the saved file does not tell
    assert rows("--reference", saved) == [{**highest[0], **clipped, **unknown}]
    assert rows("--reference", saved, "--chunks", 2)[0]["positions"] == 2 * (CHUNK // 2 - 1)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("absent.moe",), "absent.moe: no such file"),
        (("MODEL", "--bits", 5), "bits: expected one of 2, 3, 4, 6, 8"),
        (("MODEL", "--dense-bits", 5), "dense_bits: expected one of 2, 3, 4, 6, 8"),
        (("MODEL", "--reference", 5), "bits: expected one of 2, 3, 4, 6, 8"),
        (("MODEL", "--reference", "."), "config.json: no such file"),
        (("MODEL", "--reference", "absent"), "absent: No such file or directory"),
        (("MODEL", "--scheduler", "magic"), "--scheduler: expected one of on-demand"),
        (("MODEL", "--bits", "auto"), "holds no allocation; edgemoe allocate makes one"),
        (("MODEL", "--set", "x"), "--set: expected KEY=VALUE"),
        (("MODEL", "-ctk", "q4"), "expected f16, f32, q8_0, q4_0, q3_0 or q2_0"),
        (("MODEL", "--chunks", 0), "--chunks: expected at least 1, got 0"),
        (("MODEL", "--chunk", 600, "--chunks", 1), "context: expected 1 to 512"),
        (("MODEL", "--text", "short.txt"), "the text has 5 tokens; expected at least 1 × 512"),
        (("MODEL", "--text", "latin.txt"), "latin.txt: expected UTF-8 text, got another byte at"),
        (("MODEL", "--json", "no/x.json"), "no: no such directory"),
        (("MODEL", "--plot", "x.gif"), "x.gif: expected a name that ends in .png, .svg, .pdf"),
    ],
)
def test_command_fails_in_one_line(
    tiny_moe: Path, tmp_path: Path, capsys, monkeypatch, argv, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    assert run(*(tiny_moe if a == "MODEL" else a for a in argv)) == 1
    output = capsys.readouterr()
    assert "|" not in output.out
    assert message in output.err
    assert output.err.count("\n") == 1


def test_command_measures_schedulers_and_allocations(
    tiny_moe: Path, tmp_path: Path, capsys
) -> None:
    from edgemoe.file.append import add_sections
    from edgemoe.quant.allocation import Allocation

    path = Path(shutil.copy(tiny_moe, tmp_path / "x.moe"))
    bits = np.full((2, 8), 3, np.int8)
    bits[:, ::2] = 2
    add_sections(
        path, {"allocation": Allocation(method="test", layers=(0, 1), bits=bits).to_json()}
    )
    out = tmp_path / "x.json"
    argv = (path, *SHORT, "--bits", 3, "auto", 2, "--dense-bits", 8, "--decode", "--json", out)
    assert run(*argv, "--set", "look-ahead=off") == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["bits"] for row in rows] == [3, 2, "auto"]
    three, two, auto = rows
    assert 2 < auto["average_bits"] < 3
    for name in ("kl", "bits_per_weight"):
        assert min(two[name], three[name]) < auto[name] < max(two[name], three[name])
    capsys.readouterr()
    assert run(path, "--set", "help") == 0
    assert "look_ahead" in capsys.readouterr().out.replace("-", "_")


def test_command_draws_a_plot(tiny_moe: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    out = tmp_path / "x.svg"
    assert run(tiny_moe, *SHORT, "--bits", 4, 2, "--plot", out) == 0
    assert "on-demand: mean" in out.read_text()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    capsys.readouterr()
    assert run(tiny_moe, "--plot", out) == 1
    assert "a plot needs matplotlib: pip install 'edgemoe[lab]'" in capsys.readouterr().err
