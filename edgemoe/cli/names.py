"""Finds the model that MODEL on a command line means: a path, the name of a kept model, or nothing for the demo."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from edgemoe import library
from edgemoe.cli.apart import run_apart
from edgemoe.cli.converted import converted, is_source
from edgemoe.errors import quoted

__all__ = ["add_model", "choose_model", "demo_model", "fetched", "kept_model", "model_path"]


def add_model(
    parser: ArgumentParser, *, help: str = "a .moe file or a name of edgemoe list"
) -> None:
    """Adds the positional MODEL; without it the command uses the demo model."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help=f"{help} (default: the demo)")


def model_path(text: str | None, *, converts: bool = False) -> Path:
    """Returns the file that a MODEL means; the demo model is built the first time.

    Args:
        converts: take a checkpoint's directory or a GGUF file too, and convert it the first time.

    Raises:
        FileNotFoundError: there is no such file, and no model of that name; names similar ones.
        ValueError: it has spaces and is no path, so it was probably meant as a prompt.
        SystemExit: the demo or the conversion failed, and its process has said why.
    """
    if text is None:
        return demo_model()
    path = Path(text)
    if path.exists() or path.is_symlink():
        if converts and is_source(path):
            return converted(path)
        return path
    found = kept_model(text)
    if found is not None:
        library.note_use(found)
        return found
    if text == library.DEMO:
        return demo_model()
    raise _unknown(text)


def choose_model(parser: ArgumentParser, args: Namespace) -> None:
    """Sets `args.model` or `args.hf_repo` to what the command line names, as MODEL or with -m or -hf.

    What the command line names wins over the environment.

    Raises:
        ValueError: the command line names more than one model.
    """
    flags = {"-m": "model", "-hf": "hf_repo"}
    given = {flag: getattr(args, dest) for flag, dest in flags.items()}
    for flag, dest in flags.items():
        if given[flag] == parser.get_default(dest):
            given[flag] = None
    named = {name: text for name, text in {"MODEL": args.path, **given}.items() if text is not None}
    if len(named) > 1:
        said = " and ".join(f"{name} {quoted(text)}" for name, text in named.items())
        raise ValueError(f"expected one model, got {said}")
    if named:
        args.hf_repo = given["-hf"]
        args.model = None if args.hf_repo is not None else next(iter(named.values()))


def kept_model(text: str) -> Path | None:
    """Returns the file of a kept model; None if there is none. The name may be a hub's, such as user/repo:4."""
    found = library.find(text)
    if found is None and "/" in text:
        from edgemoe.hub.name import HubName

        try:
            found = library.find(HubName.parse(text).kept)
        except ValueError:
            return None
    return found


def fetched(args: Namespace) -> str | None:
    """Returns the path or name of the model to run; None for the demo. A model of -hf is fetched the first time.

    Raises:
        ValueError: the environment names two models, or what -hf names cannot be a hub's.
        SystemExit: it could not be fetched, and the fetching process has said why.
    """
    if args.hf_repo is None:
        return None if args.model is None else str(args.model)
    if args.model is not None:
        raise ValueError(
            f"expected EDGEMOE_MODEL or EDGEMOE_HF_REPO, got both: {args.model} and {args.hf_repo}"
        )
    from edgemoe.hub.name import HubName

    name = HubName.parse(args.hf_repo)
    path = kept_model(name.kept)
    if path is None:
        code = run_apart("pull", args.hf_repo)
        if code:
            raise SystemExit(code)
        path = library.find(name.kept)
        assert path is not None
    return str(path)


def demo_model() -> Path:
    """Returns the file of the demo model, which is built the first time.

    Building takes memory that `--ram` does not account for, so another process does it.

    Raises:
        SystemExit: it could not be built, and its process has said why.
    """
    path = library.demo_path()
    if not path.is_file():
        code = run_apart("demo")
        if code:
            raise SystemExit(code)
    return path


def _unknown(text: str) -> Exception:
    is_path = text.endswith((".moe", ".moea", ".gguf")) or text.startswith((".", "/", "~"))
    if not is_path and (" " in text or "\n" in text):
        return ValueError(f"{quoted(text)}: no such model; a prompt is what edgemoe-run -p takes")
    meant = library.near(text)
    if meant:
        return FileNotFoundError(
            f"{text}: no such file or model; did you mean {' or '.join(meant)}?"
        )
    if is_path:
        return FileNotFoundError(f"{text}: no such file")
    if text.count("/") == 1:
        return FileNotFoundError(f"{text}: no such file or model; edgemoe pull {text} gets it")
    return FileNotFoundError(
        f"{text}: no such file or model; edgemoe list shows what is here, edgemoe pull user/repo gets more"
    )
