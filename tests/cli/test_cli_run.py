"""`edgemoe-run` as its users meet it: in pipes, in scripts and at a terminal."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import edgemoe
from edgemoe.cli.stats import full_line, stats_line, stats_table
from edgemoe.convert.demo import demo_path
from edgemoe.runtime.meter import Stats
from edgemoe.text.sampler import SamplingParams

RUN = [sys.executable, "-m", "edgemoe.cli.run"]
STATS = re.compile(
    r"^# \d+ prompt \+ \d+ tokens(: [^;]*)?(; hit [\d.]+%)?; read [\d.]+ GB( at [\d.]+ GB/s)?"
    r"(; [\d.]+ bits)?; peak \d+ MiB; #[0-9a-f]+$"
)
PATIENCE_S = 60  # only a hang takes so long

# The same program with a slow model, so that there is time to interrupt it.
SLOW = """
import sys, time
import edgemoe.cli.run
from edgemoe.runtime.engine import Engine
fast = Engine.generate
def slow(self, *args, **kwargs):
    for token in fast(self, *args, **kwargs):
        time.sleep(0.05)
        yield token
Engine.generate = slow
sys.exit(edgemoe.cli.run.main(sys.argv[1:]))
"""


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """Returns a clean environment with folders of its own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("EDGEMOE_")}
    kept.pop("NO_COLOR", None)
    own = {f"XDG_{name}_HOME": str(tmp_path / name.lower()) for name in ("CACHE", "STATE")}
    own |= {"TERM": "xterm", "EDGEMOE_STATS": "full"}
    return kept | own


def run(
    env: dict[str, str], *args: object, stdin: bytes = b"", **variables: str
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*RUN, *map(str, args)],
        input=stdin,
        capture_output=True,
        env=env | variables,
        timeout=PATIENCE_S,
        check=False,
    )


def greedy_reply(path: Path, prompt: str, tokens: int, **options: object) -> str:
    params = edgemoe.SamplingParams(temperature=0, max_tokens=tokens)
    with edgemoe.load(path, **options) as engine:
        return "".join(edgemoe.Chat(engine, params=params).say(prompt))


# --- in pipes and scripts


def test_help_takes_nothing_heavy(env: dict[str, str]) -> None:
    result = run(env, "--help")
    assert result.returncode == 0
    assert b"--ram SIZE" in result.stdout
    heavy = "import sys, edgemoe.cli.run as r\nassert not {'numpy', 'tokenizers'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", heavy], env=env, check=True)


def test_version(env: dict[str, str]) -> None:
    result = run(env, "--version")
    assert re.fullmatch(
        rb"edgemoe-run \d+\.\d+\.\d+\S* \((gcc|clang) [\d.]+, \w+ of [\w, ]+; Python [^;]+; Linux [^;]+\)\n",
        result.stdout,
    )


def test_a_piped_prompt_gives_just_the_reply(env: dict[str, str], tiny_moe: Path) -> None:
    flags = ("--temp", 0, "-n", 12)
    result = run(env, tiny_moe, *flags, stdin=b"What is the capital of France?\n")
    assert result.returncode == 0
    expected = greedy_reply(tiny_moe, "What is the capital of France?", 12)
    assert result.stdout.decode() == expected.removesuffix("\n") + "\n"
    (line,) = result.stderr.decode().splitlines()
    assert STATS.match(line), line
    assert run(env, "-m", tiny_moe, *flags, "-p", "What is the capital of France?").stdout == (
        result.stdout
    )


def replied(text: str) -> str:
    return text.removesuffix("\n") + "\n"


def test_what_flags_say_is_joined_and_stdin_only_where_it_is_asked_for(
    env: dict[str, str], tiny_moe: Path, tmp_path: Path
) -> None:
    (tmp_path / "b").write_text("b\n")
    flags, piped = (tiny_moe, "--temp", 0, "-n", 8), "\ufeffc\r\n".encode()
    for given, prompt in (
        (("-p", "a", "-f", tmp_path / "b"), "a\nb"),
        (("-p", "a", "-f", "-"), "a\nc"),
        (("-f", "-"), "c"),
        ((), "c"),
    ):
        result = run(env, *flags, *given, stdin=piped)
        assert result.stdout.decode() == replied(greedy_reply(tiny_moe, prompt, 8)), given
    assert run(env, *flags, "-p", "a", "-f", "-").stderr == (
        b"edgemoe-run: stdin: expected a prompt, got nothing\n"
    )


def test_a_loop_over_a_file_answers_every_line(
    env: dict[str, str], tiny_moe: Path, tmp_path: Path
) -> None:
    questions = ["Who?", "What?", "Where?"]
    (tmp_path / "questions").write_text("".join(f"{q}\n" for q in questions))
    loop = 'while read -r q; do "$@" -p "$q"; done < questions'
    result = subprocess.run(
        ["sh", "-c", loop, "sh", *RUN, str(tiny_moe), "--temp", "0", "-n", "8"],
        cwd=tmp_path, capture_output=True, env=env, timeout=PATIENCE_S, check=True,
    )  # fmt: skip
    replies = [replied(greedy_reply(tiny_moe, q, 8)) for q in questions]
    assert result.stdout.decode() == "".join(replies)


def test_an_inherited_pipe_that_nobody_closes_is_not_waited_for(
    env: dict[str, str], tiny_moe: Path
) -> None:
    reader, writer = os.pipe()
    try:
        command = [*RUN, str(tiny_moe), "-p", "Hi", "-n", "2"]
        result = subprocess.run(
            command, stdin=reader, capture_output=True, env=env, timeout=PATIENCE_S, check=True
        )
    finally:
        os.close(reader)
        os.close(writer)
    assert result.stderr.startswith(b"# ")


def test_arguments_are_utf8_whatever_the_locale_is(env: dict[str, str], tiny_moe: Path) -> None:
    ascii_ = env | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    flags = (tiny_moe, "--temp", 0, "-n", 8)
    assert (
        run(env, *flags, "-p", "café").stderr.split(b"#")[-1]
        == (
            run(ascii_, *flags, "-p", "café").stderr.split(b"#")[-1]  # the logits' hash
        )
    )
    for flag in ("-p", "-sys", "-r"):
        for variables in (env, ascii_):
            result = subprocess.run(
                [*RUN, str(tiny_moe), "-p", "Hi", flag, b"caf\xe9"], stdin=subprocess.DEVNULL,
                capture_output=True, env=variables, timeout=PATIENCE_S, check=False,
            )  # fmt: skip
            assert (result.returncode, result.stdout) == (1, b"")
            expected = f"edgemoe-run: {flag}: expected UTF-8 text, got byte 0xe9 at offset 3\n"
            assert result.stderr.decode() == expected


def test_names_that_are_no_utf8_are_names(
    env: dict[str, str], tiny_moe: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "\udcff"
    folder.mkdir()
    model, prompt, trace, profile = (folder / f"{n}\udcfe" for n in ("m.moe", "p", "t", "l"))
    shutil.copy(tiny_moe, model)
    prompt.write_text("Hi")
    flags = ("-n", 2, "--temp", 0, "--trace", trace, "--profile", profile)
    result = run(env, model, "-f", prompt, *flags, "-v")
    assert result.returncode == 0, result.stderr
    assert result.stdout.decode() == replied(greedy_reply(tiny_moe, "Hi", 2))
    assert trace.is_file()
    assert profile.is_file()
    assert rb"m.moe\xfe" in result.stderr
    assert run(env, folder / "absent\udcfd", "-p", "Hi").stderr.endswith(
        rb"absent\xfd: no such file" + b"\n"
    )
    for command in (["inspect", model, "--json"], ["profile", "report", trace, "--json"]):
        result = subprocess.run([*ENTRY, *map(str, command)], env=env, capture_output=True)
        assert result.returncode == 0, result.stderr
        assert isinstance(json.loads(result.stdout), dict)


def test_a_seed_and_a_length(env: dict[str, str], tiny_moe: Path) -> None:
    flags = (tiny_moe, "-p", "Hi", "-n", 9, "--ignore-eos")
    first, again = (run(env, *flags, "--seed", 4) for _ in range(2))
    assert first.stdout == again.stdout
    assert first.stdout != run(env, *flags, "--seed", 5).stdout
    assert b" + 9 tokens" in first.stderr


def test_a_stop_text_ends_the_reply(env: dict[str, str], tiny_moe: Path) -> None:
    text = greedy_reply(tiny_moe, "Hi", 12)
    stop = text[5:8]
    result = run(env, tiny_moe, "-p", "Hi", "--temp", 0, "-n", 12, "-r", "absent", "-r", stop)
    assert result.stdout.decode().removesuffix("\n") == text[: text.find(stop)]


def test_raw_text_is_continued(env: dict[str, str], tiny_moe: Path) -> None:
    result = run(env, tiny_moe, "-p", "Once upon", "--temp", 0, "-n", 8, "--raw")
    with edgemoe.load(tiny_moe) as engine:
        ids = engine.tokenizer.encode("Once upon")
        params = edgemoe.SamplingParams(temperature=0, max_tokens=8)
        text = engine.tokenizer.decode([*ids, *engine.generate(ids, params)])
    assert result.stdout.decode().removesuffix("\n") == text.removeprefix("Once upon")


def test_the_environment_gives_defaults(env: dict[str, str], tiny_moe: Path) -> None:
    variables = {"EDGEMOE_MODEL": str(tiny_moe), "EDGEMOE_PREDICT": "5", "EDGEMOE_TEMP": "0",
                 "EDGEMOE_IGNORE_EOS": "1"}  # fmt: skip
    assert b" + 5 tokens" in run(env, "-p", "Hi", **variables).stderr
    assert b" + 3 tokens" in run(env, "-p", "Hi", "-n", "3", **variables).stderr
    for name, value, expected in (
        ("TOP_K", "many", "a whole number"),
        ("TOP_P", "most", "a number"),
        ("RAW", "maybe", "1 or 0"),
    ):
        result = run(env, "-p", "Hi", **variables, **{f"EDGEMOE_{name}": value})
        assert result.returncode == 2
        line = f"edgemoe-run: EDGEMOE_{name}: expected {expected}, got '{value}'; "
        assert result.stderr.decode().startswith(line)
        assert result.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    ("args", "stdin", "code", "message"),
    [
        (("--nonsense",), b"", 2, r"unrecognized arguments: --nonsense;"),
        (("MODEL", "--top-k", "x"), b"", 2, r"argument --top-k: expected a whole number, got 'x';"),
        (
            ("MODEL", "--temp", "-1"),
            b"",
            2,
            r"sampling: temperature: expected 0 or more, got -1\.0;",
        ),
        (("MODEL",), b"", 1, r"stdin: expected a prompt, got nothing"),
        (("MODEL", "-p", ""), b"", 1, r"-p: expected a prompt, got nothing"),
        (("MODEL", "-f", "/dev/null"), b"", 1, r"/dev/null: expected a prompt, got nothing"),
        (
            ("MODEL", "--ram", "16"),
            b"",
            2,
            r"argument --ram: 16 are bytes; expected a size like 16GiB or 50%;",
        ),
        (("MODEL",), b"ab\xff", 1, r"stdin: expected UTF-8 text, got byte 0xff at offset 2"),
        (("MODEL", "-f", "absent.txt"), b"", 1, r"absent\.txt: No such file or directory"),
        (("absent.moe", "-p", "Hi"), b"", 1, r".*absent\.moe.*"),
        (("BROKEN", "-p", "Hi"), b"", 1, r".*broken\.moe.*"),
        (
            ("MODEL", "--ram", "0%"),
            b"",
            2,
            r"argument --ram: expected a size like 4GiB or 50%, got '0%';",
        ),
        (
            ("MODEL", "--ram", "much", "-p", "Hi"),
            b"",
            2,
            r"argument --ram: expected a size .*much.*",
        ),
        (
            ("MODEL", "--bits", "x"),
            b"",
            2,
            r"argument --bits: expected a whole number or auto, got 'x'",
        ),
        (("MODEL", "-f", "/dev/zero"), b"", 1, r"/dev/zero: expected a prompt of at most 16 MiB"),
        (("MODEL", "--ram", "1MB", "-p", "Hi"), b"", 1, r".*"),
        (("MODEL", "--bits", "9", "-p", "Hi"), b"", 1, r".*bits.*9.*"),
        (
            ("MODEL", "-c", "16", "-p", "word " * 99),
            b"",
            1,
            r"the conversation is too long for the context; .*; -c N makes it longer, the model's most is 512",
        ),
        (
            ("MODEL", "-c", "1", "-p", "Hi"),
            b"",
            1,
            r"the conversation is too long for .* less than 1 tokens, got 52 characters;",
        ),
    ],
)
def test_an_error_is_one_line(
    env: dict[str, str],
    tiny_moe: Path,
    tmp_path: Path,
    args: tuple[str, ...],
    stdin: bytes,
    code: int,
    message: str,
) -> None:
    broken = tmp_path / "broken.moe"
    broken.write_bytes(b"not a model")
    names = {"MODEL": str(tiny_moe), "BROKEN": str(broken)}
    result = run(env, *(names.get(a, a) for a in args), stdin=stdin)
    assert result.returncode == code
    assert result.stdout == b""
    line = result.stderr.decode().removesuffix("\n")
    assert re.match(rf"^edgemoe-run: {message}[^\n]*$", line), line
    assert "\n" not in line


def test_a_traceback_only_when_asked(env: dict[str, str]) -> None:
    result = run(env, "absent.moe", "-p", "Hi", "-v")
    assert result.returncode == 1
    assert b"Traceback" in result.stderr


def test_a_reader_that_has_enough_is_no_error_to_report(
    env: dict[str, str], tiny_moe: Path
) -> None:
    command = [*RUN, str(tiny_moe), "-p", "Hi", "-n", "200", "--ignore-eos"]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(PATIENCE_S) == 1


@pytest.mark.parametrize(
    ("redirect", "code", "stderr"),
    [
        (">&-", 1, r"edgemoe-run: stdout is closed; .*\n"),
        (">/dev/full", 1, r"edgemoe-run: stdout: No space left on device\n"),
        ("2>&-", 0, r""),
        ("<&-", 0, r"# .*\n"),
    ],
)
def test_missing_streams(
    env: dict[str, str], tiny_moe: Path, redirect: str, code: int, stderr: str
) -> None:
    result = subprocess.run(
        ["sh", "-c", f'"$@" {redirect}', "sh", *RUN, str(tiny_moe), "-p", "Hi", "-n", "4"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=env,
        timeout=PATIENCE_S,
        check=False,
    )
    assert result.returncode == code
    assert re.fullmatch(stderr, result.stderr.decode())
    assert bool(result.stdout) == (code == 0)


def test_how_much_is_said_after_a_reply(env: dict[str, str], tiny_moe: Path) -> None:
    flags = (tiny_moe, "-p", "Hi", "-n", 4, "--ignore-eos")
    short = run(env, *flags, "--stats", "short").stderr.decode()
    assert re.fullmatch(
        r"# [\d.]+ tok/s, 4 tokens(, \d+% of experts in memory)?, 8 bits, #[0-9a-f]{8}\n", short
    )
    assert run(env, *flags, EDGEMOE_STATS="off").stderr == b""
    wrong = run(env, *flags, "--stats", "many")
    assert (wrong.returncode, wrong.stderr.count(b"\n")) == (2, 1)
    assert b"expected short, full or off, got 'many'" in wrong.stderr


def test_a_session_goes_on_where_it_was(
    env: dict[str, str], tiny_moe: Path, tmp_path: Path
) -> None:
    from edgemoe.cli.sessions import hold

    flags = (tiny_moe, "-n", 3, "--temp", 0, "--ignore-eos", "--stats", "off")
    path = tmp_path / "state/edgemoe/sessions/work.json"
    first = run(env, *flags, "--session", "work", "-sys", "Be brief.", "-p", "Hi")
    assert first.stderr.decode() == f"# session work: new, kept in {path}\n"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    second = run(env, *flags, "--session", "work", "-p", "And you?")
    assert second.stderr.decode() == f"# session work: 3 messages so far, kept in {path}\n"
    kept = json.loads(path.read_text())["messages"]
    assert [m["role"] for m in kept] == ["system", "user", "assistant", "user", "assistant"]
    assert kept[0]["content"] == "Be brief."
    with edgemoe.load(tiny_moe) as engine:  # the same turns in one conversation
        chat = engine.chat(
            system="Be brief.", params=SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
        )
        both = ["".join(chat.say(text)) for text in ("Hi", "And you?")]
    assert [first.stdout.decode(), second.stdout.decode()] == [replied(text) for text in both]
    with hold(path):  # as another process that has it does
        busy = run(env, *flags, "--session", "work", "-p", "Third")
    assert (busy.returncode, busy.stdout) == (1, b"")
    assert busy.stderr == b"edgemoe-run: --session: work is open in another process\n"
    assert json.loads(path.read_text())["messages"] == kept
    wrong = run(env, *flags, "--session", "../x", "-p", "Hi")
    assert b"--session: expected a name of letters" in wrong.stderr


def test_a_session_that_cannot_be_kept_stays_new(
    tiny_moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgemoe.cli.sessions import keep
    from edgemoe.file import whole

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(whole.os, "fsync", full)
    with edgemoe.load(tiny_moe) as engine:
        chat = engine.chat(params=SamplingParams(temperature=0, max_tokens=1))
        "".join(chat.say("Hi"))
        with pytest.raises(OSError, match="No space left"):
            keep(chat, tmp_path / "work.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("-hf", "Qwen"), "expected user/repo, user/repo:BITS or user/repo:QUANT, got 'Qwen'"),
        (("MODEL", "-ngl", "99"), "-ngl: there is one budget for all memory, --ram"),
        (("MODEL", "--n-gpu-layers=99"), "--n-gpu-layers: there is one budget"),
        (
            ("Qwen/Qwen3-30B-A3B",),
            "Qwen/Qwen3-30B-A3B: no such file or model; edgemoe pull Qwen/Qwen3-30B-A3B gets it",
        ),
        (("smollm2-moe",), "smollm2-moe: no such file or model; did you mean smollm2-moe-v4?"),
        (("mixtral",), "mixtral: no such file or model; edgemoe list shows"),
        (("Say hi",), "'Say hi': no such model; a prompt is what edgemoe-run -p takes"),
        (("my models/tiny.moe",), "my models/tiny.moe: no such file"),
        (("MODEL", "-m", "other.moe"), "expected one model, got MODEL '"),
        (("MODEL", "-p", "Hi", "-t", "9999"), "threads: expected 1 to 1024, got 9999"),
        (("MODEL", "-p", "Hi", "--profile", "."), ".: is a folder, not a profile"),
        (("MODEL", "-p", "Hi", "--ram", "1B"), "a budget of 1 B is too small; the smallest"),
    ],
)
def test_what_people_type_first_is_answered_about_that(
    env: dict[str, str], tiny_moe: Path, flags: tuple[str, ...], message: str
) -> None:
    result = run(env, *(tiny_moe if f == "MODEL" else f for f in flags))  # stdin is no terminal
    assert result.returncode in (1, 2)
    assert result.stdout == b""
    assert result.stderr.decode().startswith(f"edgemoe-run: {message}")
    assert result.stderr.count(b"\n") == 1


def test_what_a_recipe_asks_for_and_is_so_anyway_is_noted(
    env: dict[str, str], tiny_moe: Path
) -> None:
    flags = (tiny_moe, "-n", 4, "--temp", 0)
    result = run(env, *flags, "--jinja", "--no-display-prompt", "-p", "Hi")
    assert result.stdout == run(env, *flags, "-p", "Hi").stdout
    first, second, _ = result.stderr.decode().splitlines()
    assert first == "# --jinja: the model's chat template is used anyway"
    assert second == "# --no-display-prompt: the prompt is never repeated"


def test_a_mistyped_variable_is_told(env: dict[str, str], tiny_moe: Path) -> None:
    result = run(env, tiny_moe, "-p", "Hi", "-n", 2, EDGEMOE_RAMM="1GiB")
    assert result.returncode == 0
    note = result.stderr.decode().splitlines()[0]
    assert note == "# EDGEMOE_RAMM in the environment means nothing; did you mean EDGEMOE_RAM?"


def test_more_threads_than_cores_are_noted(env: dict[str, str], tiny_moe: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    result = run(env, tiny_moe, "-p", "Hi", "-n", 2, "-t", cores + 7)
    assert f"# {cores + 7} threads on {cores} cores" in result.stderr.decode()


def test_ctrl_c_ends_a_single_reply(env: dict[str, str], tiny_moe: Path) -> None:
    command = [sys.executable, "-c", SLOW, str(tiny_moe), "-p", "Hi", "--ignore-eos"]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.stdout.read().endswith(b"\n")
        assert process.stderr.read() == b""
        assert process.wait(PATIENCE_S) == 130


def test_a_share_of_the_memory(env: dict[str, str], tiny_moe: Path) -> None:
    result = run(env, tiny_moe, "--ram", "50%", "-p", "Hi", "-n", 2, "--ignore-eos")
    assert result.returncode == 0
    assert b" + 2 tokens" in result.stderr


def test_without_a_model_the_demo_is_run(
    env: dict[str, str], tiny_moe: Path, tmp_path: Path
) -> None:
    path = demo_path(tmp_path / "edgemoe")
    path.parent.mkdir()
    path.symlink_to(tiny_moe)
    env.pop("EDGEMOE_MODEL", None)
    result = run({**env, "XDG_CACHE_HOME": str(tmp_path)}, "-p", "Hi", "--temp", 0, "-n", 3)
    assert result.returncode == 0
    expected = greedy_reply(tiny_moe, "Hi", 3)
    assert result.stdout.decode().removesuffix("\n") == expected.removesuffix("\n")


def test_a_demo_that_cannot_be_built_says_why(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "edgemoe").write_text("in the way")
    env.pop("EDGEMOE_MODEL", None)
    result = run({**env, "XDG_CACHE_HOME": str(tmp_path)}, "-p", "Hi")
    assert result.returncode == 1
    assert result.stdout == b""
    assert result.stderr.count(b"\n") == 1
    assert result.stderr.startswith(b"edgemoe demo: ")


def test_a_folder_called_edgemoe_is_not_taken_for_the_package(
    env: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "edgemoe").mkdir()
    (tmp_path / "edgemoe" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "edgemoe").write_text("in the way")
    code = "import sys; sys.path.pop(0); from edgemoe.cli.run import main; sys.exit(main(['-p', 'Hi']))"
    env.pop("EDGEMOE_MODEL", None)
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**env, "XDG_CACHE_HOME": str(cache)},
        stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr.startswith(b"edgemoe demo: "), result.stderr


# --- at a terminal

# What prompt_toolkit switches on before it reads keys, and off when it has a line.
READY, DONE = "\x1b[?2004h", "\x1b[?2004l"


class Terminal:
    """The program on a pseudo-terminal, as a user meets it."""

    # Makes the terminal on stdin the controlling one, so that the byte of Ctrl-C becomes a signal.
    _LAUNCH = (
        "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )

    def __init__(self, env: dict[str, str], *command: str) -> None:
        self._fd, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 120, 0, 0))
        self._process = subprocess.Popen(
            [sys.executable, "-c", self._LAUNCH, *command],
            stdin=inner, stdout=inner, stderr=inner, env=env, start_new_session=True,
        )  # fmt: skip
        os.close(inner)
        self.seen = ""
        self._read = b""

    def expect(self, text: str) -> str:
        """Waits until `text` appears, and returns and forgets everything up to its end."""
        deadline = time.monotonic() + PATIENCE_S
        while text not in self.seen:
            if not self._more(deadline):
                raise AssertionError(f"expected {text!r}, got {self.seen!r}")
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def press_until(self, keys: str, text: str) -> None:
        """Presses keys until `text` appears.

        Python's own input() loses a Ctrl-C that comes between its prompt and its wait for a line.
        """
        for _ in range(PATIENCE_S):
            self.send(keys)
            deadline = time.monotonic() + 1
            while text not in self.seen and time.monotonic() < deadline:
                self._more(deadline)
            if text in self.seen:
                break
        self.expect(text)

    def expect_text(self) -> None:
        """Waits for any text except escape sequences and blanks."""
        deadline = time.monotonic() + PATIENCE_S
        while not re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\s", "", self.seen):
            assert self._more(deadline), self.seen

    def send(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def send_bytes(self, keys: bytes) -> None:
        os.write(self._fd, keys)

    def end(self) -> int:
        """Waits for the end of the program and returns its exit code."""
        deadline = time.monotonic() + PATIENCE_S
        while self._more(deadline):
            pass
        return self._process.wait(PATIENCE_S)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._fd)

    def _more(self, deadline: float) -> bool:
        left = max(0.0, deadline - time.monotonic())
        if not select.select([self._fd], [], [], left)[0]:
            return False
        try:
            content = os.read(self._fd, 65536)
        except OSError:  # the program is gone
            return False
        self._read += content
        self.seen += content.decode(errors="replace")
        return bool(content)


@pytest.fixture
def terminal(env: dict[str, str], tiny_moe: Path) -> Iterator[Terminal]:
    """Starts a slow model and greets the user."""
    terminal = Terminal(env, sys.executable, "-c", SLOW, str(tiny_moe), "--ignore-eos", "-c256")
    terminal.expect("Ctrl-D leaves")
    terminal.expect(READY)
    yield terminal
    terminal.close()


@pytest.fixture
def brief(env: dict[str, str], tiny_moe: Path) -> Iterator[Terminal]:
    """Starts a model that replies with six tokens."""
    flags = ("--ignore-eos", "-n6", "--temp=0", "-c512")
    terminal = Terminal(env, *RUN, str(tiny_moe), *flags)
    terminal.expect("Ctrl-D leaves")
    terminal.expect(READY)
    yield terminal
    terminal.close()


def test_ctrl_c_stops_the_reply_and_not_the_program(terminal: Terminal, tmp_path: Path) -> None:
    terminal.send("Hello\r")
    terminal.expect(DONE)
    terminal.expect_text()
    terminal.send("\x03")
    terminal.expect("# stopped")
    terminal.expect("peak")
    terminal.expect(READY)
    terminal.send(f"/save {tmp_path}/chat.json\r")
    terminal.expect("chat.json: 2 messages")  # the half reply is in the conversation
    terminal.expect(READY)
    terminal.send("\x04")
    assert terminal.end() == 0


def test_ctrl_c_clears_the_line_and_twice_tells_how_to_leave(brief: Terminal) -> None:
    for keys in ("unwanted\x03", "\x03", "wanted too\x03", "\x03"):
        brief.send(keys)
        assert "leaves" not in brief.expect(READY)
    brief.send("\x03")
    brief.expect("Ctrl-D or /quit leaves")
    brief.expect(READY)
    brief.send("/quit\r")
    assert brief.end() == 0


def test_what_is_saved_replaces_no_other_file(
    brief: Terminal, tmp_path: Path, tiny_moe: Path
) -> None:
    model, notes, empty = tmp_path / "tiny.moe", tmp_path / "notes.txt", tmp_path / "empty"
    shutil.copy(tiny_moe, model)
    notes.write_text("dear diary")
    empty.touch()
    for path, answer in (
        (model, "tiny.moe: is a .moe file; expected another file to write"),
        (notes, "notes.txt: exists and is not a saved chat; it is left as it is"),
        (empty, "empty: 0 messages"),
        (empty, "empty: 0 messages"),  # now a saved chat
    ):
        brief.send(f"/save {path}\r")
        brief.expect(answer)
        brief.expect(READY)
    assert model.read_bytes() == tiny_moe.read_bytes()
    assert notes.read_text() == "dear diary"


def test_commands(brief: Terminal, tmp_path: Path) -> None:
    def ask(line: str, answer: str) -> None:
        brief.send(line + "\r")
        brief.expect(DONE)
        brief.expect(answer)
        brief.expect(READY)

    ask("/help", "Ctrl-C stops a reply")
    ask("/nonsense", "/nonsense: unknown command; /help lists them, and a space before it says it")
    ask("Hello", " + 6 tokens")
    ask("/stats", "hash of the last logits")
    ask("/set", "scheduler               on-demand")
    ask("/set experts few", "/set experts: expected a whole number, got 'few'")
    ask("/set scheduler", "/set scheduler: expected a value")
    ask("/set temp 0.5", "temperature is 0.5")
    ask("/set dense_bits 4", "dense_bits is set when the model is opened: --dense-bits VALUE")
    ask("/bits", "experts run at 8 bits; there are 2, 3, 4, 6, 8")
    ask("/bits 4", "lossy: experts at 4 of the file's 8 bits")
    ask("/bits 5", "expected")
    ask("/set bits 8", "bits: 8")
    ask("/adapter", "adapter: none; there are none")
    ask("/adapter law", "adapter: expected one of none, got 'law'")
    ask("/bits few", "/bits: expected a whole number, got 'few'")
    ask("/set system Be brief", "/system TEXT says what the model is told first")
    ask("/help stats", "share of experts that were in memory when they were wanted")
    ask("/sessions", "edgemoe-run --session NAME keeps one; there are none yet")
    ask("/set temp hot", "temperature must be a number, got 'hot'")
    ask("/set top_p 3", "top_p: expected 0 to 1, got 3.0")
    ask("/set wrong 3", "no setting is called 'wrong'")
    ask("/set ignore-eos off", "ignore_eos is off")
    ask("/set n 3", "max_tokens is 3")
    ask("/set stop <end>", "stop is '<end>'")
    ask(f"/save {tmp_path}/chat.json", "chat.json: 2 messages")
    ask("/reset", "the conversation is empty")
    ask(f"/load {tmp_path}/chat.json", "chat.json: 2 messages")
    ask(f"/load {tmp_path}/absent.json", "absent.json: No such file or directory")
    ask("/save", "/save: expected a file's name")
    ask(f"/save {tmp_path}/no/where", "no: no such directory")
    ask("word " * 300, "too long for the context")
    ask("/system Be brief", "the model is told this first")
    ask("/undo", "taken back; 1 messages are left")
    ask("/undo", "nothing was asked yet")
    (tmp_path / "question").write_text("Who?\n")
    ask(f"/read {tmp_path}/question", " + 3 tokens")
    ask("/regenerate", " + 3 tokens")
    ask("quit", "/quit is the command; a space before it says it to the model")
    ask("/set temp 9", "above 2.0 most tokens are as likely as any other")
    brief.send("/sav\t")
    brief.expect("e")
    brief.send(f" {tmp_path}/again.json\r")
    brief.expect("again.json: 3 messages")
    brief.expect(READY)
    brief.send("/bye\r")
    assert brief.end() == 0
    said = json.loads((tmp_path / "again.json").read_text())["messages"]
    assert [m["content"] for m in said[:2]] == ["Be brief", "Who?"]


def test_a_message_of_several_lines(brief: Terminal, tmp_path: Path, env: dict[str, str]) -> None:
    brief.send("one\\\rtwo\x1b\rthree\r")
    brief.expect(" + 6 tokens")
    brief.expect(READY)
    brief.send(f"/save {tmp_path}/chat.json\r")
    brief.expect("2 messages")
    brief.expect(READY)
    brief.send("\x04")
    assert brief.end() == 0
    assert "one\\ntwo\\nthree" in (tmp_path / "chat.json").read_text()
    history = Path(env["XDG_CACHE_HOME"], "edgemoe", "history")
    assert "three" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0


def test_what_begins_with_a_slash_and_is_no_command_is_said(
    brief: Terminal, tmp_path: Path
) -> None:
    pasted = "\x1b[200~/help\n    int f();\n\x1b[201~"  # as terminals mark what is pasted
    for text in ("/etc/passwd is what?", "/* a comment */", " /help", "/", pasted):
        brief.send(text + "\r")
        brief.expect(" + 6 tokens")
        brief.expect(READY)
    for line in ('"""', "/reset", "", "last", '"""'):
        brief.send(line + "\r")
        brief.expect(DONE)
    brief.expect(" + 6 tokens")
    brief.expect(READY)
    brief.send(f"/save {tmp_path}/chat.json\r")
    brief.expect("12 messages")
    brief.expect(READY)
    brief.send("\x04")
    assert brief.end() == 0
    said = json.loads((tmp_path / "chat.json").read_text())["messages"][::2]
    assert [m["content"] for m in said] == [
        "/etc/passwd is what?", "/* a comment */", "/help", "/", "/help\n    int f();\n", "/reset\n\nlast",
    ]  # fmt: skip


def test_a_name_that_is_no_utf8_can_be_typed(brief: Terminal, tmp_path: Path) -> None:
    brief.send("Hello\r")
    brief.expect(" + 6 tokens")
    brief.expect(READY)
    brief.send_bytes(b"/save " + os.fsencode(tmp_path) + b"/caf\xe9\r")
    brief.expect(r"caf\xe9: 2 messages")
    brief.expect(READY)
    brief.send_bytes(b"caf\xe9\r")
    brief.expect("the text: expected UTF-8 text, got byte 0xe9 at offset 3")
    brief.expect(READY)
    brief.send("\x04")
    assert brief.end() == 0
    assert (tmp_path / "caf\udce9").is_file()


def test_a_plain_terminal_takes_names_and_blocks_and_refuses_what_it_cuts(
    env: dict[str, str], tiny_moe: Path, tmp_path: Path
) -> None:
    flags = ("-n", "4", "--ignore-eos", "--temp", "0")
    terminal = Terminal(env | {"TERM": "dumb"}, *RUN, str(tiny_moe), *flags)
    try:
        terminal.expect("> ")
        for part in ["x" * 500] * 12:
            terminal.send(part)
            terminal.expect(part)  # waits for the echo, so that no key is lost
        terminal.send("\n")
        terminal.expect("this terminal cuts lines at 4095 bytes; a backslash at the end goes on")
        terminal.expect("> ")
        for line in ('"""', "/reset", "one", '"""'):
            terminal.send(line + "\n")
        terminal.expect(" + 4 tokens")
        terminal.expect("> ")
        terminal.send_bytes(b"/save " + os.fsencode(tmp_path) + b"/caf\xe9\n")
        terminal.expect(r"caf\xe9: 2 messages")
        terminal.expect("> ")
        terminal.send("\x04")
        assert terminal.end() == 0
    finally:
        terminal.close()
    messages = json.loads((tmp_path / "caf\udce9").read_text())["messages"]
    assert messages[0]["content"] == "/reset\none"


def test_a_dumb_terminal_is_enough(env: dict[str, str], tiny_moe: Path) -> None:
    terminal = Terminal(
        env | {"TERM": "dumb"}, *RUN, str(tiny_moe), "-n", "4", "--ignore-eos", "--temp", "0"
    )
    try:
        terminal.expect("Ctrl-D leaves")
        terminal.expect("> ")
        terminal.send("one\\\n")
        terminal.expect(". ")
        terminal.send("two\n")
        terminal.expect(" + 4 tokens")
        terminal.expect("> ")
        terminal.press_until("\x03", "Ctrl-D or /quit leaves")
        terminal.expect("> ")
        terminal.send("\x04")
        assert terminal.end() == 0
        assert b"\x1b" not in terminal._read
    finally:
        terminal.close()


def test_no_colour_where_it_is_unwanted(env: dict[str, str], tiny_moe: Path) -> None:
    for variables, is_dim in (({}, True), ({"NO_COLOR": "1"}, False)):
        command = [*RUN, str(tiny_moe), "-p", "Hi", "-n", "2"]
        terminal = Terminal(env | variables, *command)
        assert terminal.end() == 0
        assert ("\x1b[2m# " in terminal.seen) == is_dim
        terminal.close()


# --- the line of figures

FIGURES = Stats(
    prompt_tokens=12, cached_tokens=100, new_tokens=128, prompt_s=0.141, decode_s=11.34,
    first_token_s=0.42, hits=873, misses=127, evictions=3, bytes_read=1_940_000_000, read_s=0.924,
    average_bits=3.1, peak_bytes=812 * 2**20, resident_bytes=700 * 2**20, logits_hash="a31f09c2",
)  # fmt: skip


def test_the_line_of_figures() -> None:
    assert (
        stats_line(FIGURES)
        == "# 11.2 tok/s, 128 tokens, 87% of experts in memory, 3.1 bits, #a31f09c2"
    )
    assert full_line(FIGURES) == (
        "# 12 prompt + 128 tokens: 85.1 prompt tok/s, 11.2 tok/s, first 0.42 s; hit 87.3%; dropped 3; "
        "read 1.94 GB at 2.1 GB/s; 3.1 bits; peak 812 MiB; #a31f09c2"
    )
    assert "873 of 1000" in stats_table(FIGURES)


def test_figures_of_nothing_are_left_out() -> None:
    nothing = Stats(peak_bytes=2**20)
    assert stats_line(nothing) == "# 0 tokens"
    assert full_line(nothing) == "# 0 prompt + 0 tokens; read 0.00 GB; peak 1 MiB"
    assert "none yet" in stats_table(nothing)


def test_the_kv_cache_in_eight_bits_is_said_and_comes_from_the_environment(env, tiny_moe):
    flags = (str(tiny_moe), "-p", "Hi", "-n", "2", "--ignore-eos", "--temp", "0", "--raw")
    by_flag = run(env, *flags, "-ctk", "q8_0", "-ctv", "q8_0")
    by_name = run(env, *flags, EDGEMOE_CACHE_TYPE_K="q8_0", EDGEMOE_CACHE_TYPE_V="q8_0")
    for result in (by_flag, by_name):
        assert result.returncode == 0
        assert b"# lossy: keys and values of the KV cache at 8 of 16 bits\n" in result.stderr
    assert by_flag.stderr.split(b"#")[-1] == by_name.stderr.split(b"#")[-1]  # the logits' hash
    assert b"lossy" not in run(env, *flags).stderr
    wrong = run(env, *flags, "-ctk", "q4")
    assert wrong.returncode == 1
    assert (
        wrong.stderr
        == b"edgemoe-run: cache_type_k: expected f16, f32, q8_0, q4_0, q3_0 or q2_0, got q4\n"
    )


def test_what_the_model_gave_as_a_whole_number_may_be_set_to_a_fraction(tiny_moe: Path) -> None:
    from edgemoe.cli.repl import _Session

    with edgemoe.load(tiny_moe) as engine:
        chat = engine.chat(params=SamplingParams(temperature=1, top_p=1))
        _Session(engine, chat).take("/set temp 0.5")
    assert (chat.params.temperature, chat.params.top_p) == (0.5, 1)


ENTRY = [
    sys.executable,
    "-c",
    "import sys; from edgemoe.cli.entry import edgemoe; sys.exit(edgemoe())",
]


def test_help_and_version_take_any_stdout(env: dict[str, str]) -> None:
    ascii_ = env | {"PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": "1"}
    result = subprocess.run([*ENTRY, "bench", "--help"], env=ascii_, capture_output=True)
    assert (result.returncode, result.stderr) == (0, b"")
    assert b"N,?" in result.stdout
    for command in ([*ENTRY, "--version"], [*RUN, "--version"]):
        with open("/dev/full", "wb") as full:
            result = subprocess.run(command, env=ascii_, stdout=full, stderr=subprocess.PIPE)
        assert result.returncode == 1
        assert re.fullmatch(rb"edgemoe(-run)?: [^\n]*No space left on device\n", result.stderr)


def test_ctrl_c_before_a_command_begins_is_no_traceback(env: dict[str, str]) -> None:
    # As the program is started, at the first import of a command, and while its flags are read.
    for where, code in (
        ("edgemoe.cli.main", -signal.SIGINT),
        ("edgemoe.cli.bench", 130),
        ("edgemoe.runtime.bench", 130),
    ):
        program = f"""
import os, signal, sys
class Interrupt:
    def find_spec(self, name, *_):
        if name == {where!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
from edgemoe.cli.entry import edgemoe
sys.exit(edgemoe())
"""
        command = [sys.executable, "-c", program, "bench", "nothing.moe"]
        result = subprocess.run(command, env=env, capture_output=True)
        assert (result.returncode, result.stderr) == (code, b""), where


def test_a_program_that_ignores_ctrl_c_goes_on_ignoring_it(env: dict[str, str]) -> None:
    program = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
from edgemoe.cli import entry, main
main.main = lambda: os.kill(os.getpid(), signal.SIGINT) or 7
sys.exit(entry.edgemoe())
"""
    result = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True)
    assert (result.returncode, result.stderr) == (7, b"")


def test_a_full_disk_does_not_end_a_chat_for_its_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgemoe.cli import line

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "edgemoe").mkdir()
    (tmp_path / "edgemoe" / "history").symlink_to("/dev/full")
    history = line._session(()).history
    history.append_string("Hello")
    assert history.get_strings() == ["Hello"]


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(FileNotFoundError, match="expected HOME or XDG_CACHE_HOME"):
        demo_path()
