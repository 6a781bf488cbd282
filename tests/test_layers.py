"""The structure of the code: imports point only downwards (see docs/design.md), and functions stay short."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import edgemoe

ROOT = Path(__file__).parent.parent / "edgemoe"
CSRC = ROOT.parent / "csrc"
ROWS = [
    {"arguments", "errors", "places", "plan", "config", "space", "specs"},
    {"devices", "file", "hardware", "library", "quant"},
    {"scheduler", "store", "text"},
    {"ops"},
    {"experts"},
    {"model"},
    {"runtime"},
    {"convert", "doctor", "hub", "lab", "serve"},
    {"cli"},
    {"__main__"},
]
# Observers are told of batches: only a type is imported, and nothing that runs.
EXCEPTIONS = {("experts", "model")}
CORE = {"devices", "file", "hardware", "ops", "quant", "runtime", "scheduler", "store"}
"""The rooms that may import the compiled module."""

# These import torch only when asked to train, and need the extra `train`.
TRAIN = {"lab/routing/paths.py"}
TORCH = {
    "lab/bits/bit_router.py",
    "lab/bits/choosing.py",
}  # these import torch at their top, and are imported only by calls that train


@functools.cache
def modules():
    return [
        (path.relative_to(ROOT), ast.parse(path.read_text())) for path in sorted(ROOT.rglob("*.py"))
    ]


def room(path):
    return path.parts[0].removesuffix(".py")


def imports(tree):
    """Yields the names of imported modules; `from edgemoe import x` gives "edgemoe.x"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "edgemoe":
                yield from (f"edgemoe.{alias.name}" for alias in node.names)
            else:
                yield node.module


def test_imports_point_downwards():
    row = {name: i for i, names in enumerate(ROWS) for name in names}
    for path, tree in modules():
        if path.name == "__init__.py" and len(path.parts) == 1:
            continue
        mine = room(path)
        for name in imports(tree):
            if not name.startswith("edgemoe."):
                continue
            theirs = name.split(".")[1]
            if theirs == mine or (mine, theirs) in EXCEPTIONS:
                continue
            if theirs == "_core":
                assert mine in CORE, f"{path} opens the door to the compiled module"
                continue
            assert row[theirs] <= row[mine], f"{path} imports {name}, which lies above it"


def test_the_model_sees_verbs_only():
    """The model uses no arithmetic on arrays, no native core, no allocation: a new device only implements `Ops`."""
    seen = [p for p, _ in modules() if room(p) in ("model", "experts")]
    seen.remove(Path("model/batch.py"))  # joins tokens of sequences, which are arrays of the host
    assert len(seen) > 3
    for path, tree in modules():
        if path not in seen:
            continue
        hinted = [
            n for n in tree.body if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)
        ]
        runs = ast.Module([n for n in tree.body if n not in hinted], [])
        for name in imports(runs):
            assert name.split(".")[0] != "numpy", f"{path} imports numpy"
            assert name.split(".")[:2] != ["edgemoe", "_core"], f"{path} imports the core"


def test_torch_is_not_needed_to_run():
    for path, tree in modules():
        if path.as_posix() in TORCH:
            continue
        if path.as_posix() in TRAIN:
            # Only the imports that run when the module is imported.
            outside = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
            tree = ast.Module(outside, [])
        for name in imports(tree):
            assert name.split(".")[0] not in ("torch", "transformers"), f"{path} imports {name}"


def test_only_the_command_line_prints_and_reads_the_environment():
    for path, tree in modules():
        if room(path) == "cli":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", f"{path}:{node.lineno} prints"
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "argv"):
                assert isinstance(node.value, ast.Name), path
                assert (node.value.id, node.attr) in (("os", "environ"),), path


def test_exported_names_are_sorted_and_exist():
    assert edgemoe.__all__ == sorted(edgemoe.__all__)
    for name in edgemoe.__all__:
        assert getattr(edgemoe, name).__name__ == name


def test_only_the_console_writes_to_the_terminal():
    for path, tree in modules():
        if path.as_posix() == "cli/console.py":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                writes = called == "print" or called.startswith(("sys.stdout.", "sys.stderr."))
                assert not writes or called.endswith(".flush"), f"{path}:{node.lineno}: {called}"


MOST_LINES = 80
"""The most lines of a function, from its first (without decorators) to its last, docstrings and comments included."""
MOST_OF_FILE = 350
FILES = (
    "edgemoe/runtime/engine.py",
    "edgemoe/runtime/prefix*.py",
    "edgemoe/file/*.py",
    *(f"edgemoe/serve/{name}.py" for name in ("app", "completions", "grammar", "reply", "service")),
    "edgemoe/cli/profile/*.py",
    "csrc/bindings/*",
)
"""Files that were once larger than `MOST_OF_FILE` lines."""


def test_functions_are_short():
    others = [
        p
        for name in ("tests", "benchmarks", "examples")
        for p in (ROOT.parent / name).rglob("*.py")
    ]
    for path, tree in [*modules(), *((p, ast.parse(p.read_text())) for p in others)]:
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= MOST_LINES, f"{path}: {node.name} has {lines} lines"


def test_functions_of_the_core_are_short():
    seen = 0
    for path in sorted(CSRC.rglob("*")):
        if path.suffix in (".cpp", ".h", ".cu", ".cuh"):
            for first, lines in blocks(path.read_text().split("\n")):
                seen += 1
                assert lines <= MOST_LINES, f"{path.name}: {first} has {lines} lines"
    assert seen > 1000


def blocks(lines):
    """Yields the first line of each function of a C++ file, and its number of lines.

    It relies on the layout of clang-format: a function begins at the start of a line or, in a class, two spaces in, and
    ends with a brace alone in the same column. Anything else that looks so is part of a function.
    """
    for indent in ("", "  "):
        start = 0
        for i, line in enumerate(lines):
            text = line.removeprefix(indent) if line.startswith(indent) else ""
            if not text or text[0] in " #":
                continue
            if text == "}" and not lines[start].lstrip().startswith(
                ("class", "struct", "namespace")
            ):
                yield lines[start].strip(), i - start + 1
            start = i


def test_files_that_were_large_stay_small():
    for pattern in FILES:
        files = list(ROOT.parent.glob(pattern))
        assert files, pattern
        for path in files:
            lines = len(path.read_text().splitlines())
            assert lines < MOST_OF_FILE, f"{path.name} has {lines} lines"
