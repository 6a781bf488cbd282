"""The types in `_core.pyi` agree with the signatures of the built module.

`mypy.stubtest`, which `scripts/check` runs, compares only names: pybind11's functions have no signature to inspect.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from edgemoe import _core

Arguments = list[tuple[str, str, str | None]]
STUB = ast.parse(Path(_core.__file__).with_name("_core.pyi").read_text())


def arguments(function: ast.FunctionDef) -> Arguments:
    """Returns the name, kind and default of each argument except self."""
    a = function.args
    plain = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(plain) - len(a.defaults)) + [ast.unparse(d) for d in a.defaults]
    out = [(p.arg, "plain", d) for p, d in zip(plain, defaults, strict=True) if p.arg != "self"]
    for k, d in zip(a.kwonlyargs, a.kw_defaults, strict=True):
        out.append((k.arg, "keyword", None if d is None else ast.unparse(d)))
    return out


def stubs() -> dict[str, Arguments]:
    out = {}
    for node in STUB.body:
        owner = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for f in node.body if owner else [node]:
            if isinstance(f, ast.FunctionDef) and not any(
                ast.unparse(d).endswith(("property", "setter")) for d in f.decorator_list
            ):
                out[owner + f.name] = arguments(f)
    return out


def built() -> dict[str, Arguments]:
    out = {}
    for name, member in vars(_core).items():
        parts = vars(member) if inspect.isclass(member) else {}
        found = {f"{name}.{k}": getattr(member, k) for k in parts} if parts else {name: member}
        for of, function in found.items():
            signature = (getattr(function, "__doc__", None) or "").split("\n")[0]
            if callable(function) and signature.startswith(of.split(".")[-1] + "("):
                out[of] = arguments(ast.parse(f"def {signature}: ...").body[0])
    return out


@pytest.mark.parametrize("name", sorted(stubs().keys() | built().keys()))
def test_the_stub_says_what_the_module_takes(name):
    assert stubs().get(name) == built().get(name)
