"""Pages of the site that are not in docs/: the repository's own texts, and every program's --help."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
TEXTS = {
    "index.md": "README.md",
    "security.md": "SECURITY.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "log.md": "benchmarks/LOG.md",
}
PICTURES = ("benchmarks/levers.png", "benchmarks/scaling.png")


def on_files(files, config):
    """Adds the generated pages to those of the folder."""
    for page, source in TEXTS.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        for at, name in TEXTS.items():
            text = text.replace(f"]({name})", f"]({at})")
        files.append(File.generated(config, page, content=text.replace("](docs/", "](")))
    for picture in PICTURES:
        content = (ROOT / picture).read_bytes()
        files.append(File.generated(config, f"images/{Path(picture).name}", content=content))
    files.append(File.generated(config, "reference/flags.md", content=flags()))
    files.append(File.generated(config, "reference/families.md", content=families()))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turns links that hold in a clone, such as ../SECURITY.md, into those of the site."""
    site = {source: at for at, source in TEXTS.items()}
    site |= {picture: f"images/{Path(picture).name}" for picture in PICTURES}
    for source, at in site.items():
        markdown = markdown.replace(f"](../{source})", f"]({at})")
    return markdown


def flags() -> str:
    """Returns a page with the help of every command and its subcommands."""
    from edgemoe.cli.main import COMMANDS

    names = [["edgemoe-run"], *(["edgemoe", name] for name in COMMANDS if name != "run")]
    parts = ["# All flags\n\nThis page is made from the programs' own `--help`.\n"]
    for name in names:
        text = help_of(name)
        parts.append(f"## {' '.join(name)}\n\n```text\n{text}\n```\n")
        for sub in subcommands(text):
            parts.append(f"### {' '.join([*name, sub])}\n\n```text\n{help_of([*name, sub])}\n```\n")
    return "\n".join(parts)


def families() -> str:
    """Returns a page with the families and formats that convert."""
    text = output_of(["edgemoe", "families"])
    compared = re.findall(r'<a id="(\w+)">', (ROOT / "docs/matrix.md").read_text(encoding="utf-8"))
    links = ", ".join(f"[{name}](../matrix.md#{name})" for name in sorted(compared))
    return (
        f"# Families\n\nThis page is made by `edgemoe families`.\n\n```text\n{text}\n```\n\n"
        f"Compared with transformers and llama.cpp: {links}.\n"
    )


def help_of(command: list[str]) -> str:
    """Returns a command's help: that of `--help-all` if there is one."""
    text = output_of([*command, "--help"])
    return output_of([*command, "--help-all"]) if "--help-all" in text else text


def output_of(command: list[str]) -> str:
    """Runs one of the programs and returns what it prints."""
    entry = "edgemoe_run" if command[0] == "edgemoe-run" else "edgemoe"
    code = f"import sys; sys.argv = {command!r}; from edgemoe.cli.entry import {entry} as e; sys.exit(e())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "COLUMNS": "100", "HOME": "/home/user"},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr}")
    return done.stdout.rstrip()


def subcommands(text: str) -> list[str]:
    """Returns the names between braces in a usage line, as argparse writes subcommands."""
    found = re.search(r"^usage: edgemoe \S+ .*?\{([a-z,-]+)\}", text, re.S)
    return found[1].split(",") if found and " ..." in text.split("\n\n")[0] else []
