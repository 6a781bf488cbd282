"""Encodes the texts that llama.cpp tests its tokenizers with, and compares with the ids that it expects.

    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36 && tar xf llama_cpp_python-*.tar.gz
    python benchmarks/gguf_vocabularies.py llama_cpp_python-0.3.36/vendor/llama.cpp/models

Those files hold vocabularies of models and nothing else. A kind of tokenizer that no supported family has is refused by
its name.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenizers import Tokenizer

from edgemoe.convert.gguf.reader import GGUFFile
from edgemoe.convert.gguf.tokenizer import tokenizer_files
from edgemoe.errors import FormatError

_BETWEEN = "\n__ggml_vocab_test__\n"


def compared(path: Path) -> str:
    """Returns a row's text for one vocabulary."""
    meta = GGUFFile(path).meta
    kind = f"{meta.get('tokenizer.ggml.model')} / {meta.get('tokenizer.ggml.pre')}"
    texts, expected = (path.with_name(f"{path.name}.{end}") for end in ("inp", "out"))
    try:
        files = tokenizer_files(meta, context_length=1, where=path.name)
    except FormatError as error:
        return f"{kind:24} refused: {str(error)[:90]}"
    if not texts.exists():
        return f"{kind:24} no texts"
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    wrong = 0
    pairs = list(
        zip(texts.read_text().split(_BETWEEN), expected.read_text().split("\n"), strict=False)
    )
    for text, line in pairs:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        wrong += ids != [int(i) for i in line.split()]
    return f"{kind:24} {len(pairs) - wrong} of {len(pairs)} texts"


def main() -> None:
    """Prints a row for each vocabulary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the files ggml-vocab-*.gguf are")
    for path in sorted(parser.parse_args().folder.glob("ggml-vocab-*.gguf")):
        print(f"{path.stem.removeprefix('ggml-vocab-'):20} {compared(path)}")


if __name__ == "__main__":
    main()
