"""`--json-schema`: replies of any model conform to the schema."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from edgemoe.cli.run import main

SCHEMA = {
    "type": "object",
    "properties": {"at": {"enum": ["sky", "sea"]}, "n": {"type": "integer", "maximum": 99, "minimum": 0}},
    "required": ["at", "n"], "additionalProperties": False,
}  # fmt: skip


def run(path, capsys, *flags):
    code = main([str(path), "-p", "Where?", "--temp", "2", *flags])
    return code, capsys.readouterr()


def test_every_reply_is_of_the_schema(tiny_moe, tmp_path, capsys):
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    for seed, given in enumerate([json.dumps(SCHEMA), str(tmp_path / "schema.json")]):
        code, said = run(tiny_moe, capsys, "--json-schema", given, "--seed", str(seed))
        assert code == 0, said.err
        jsonschema.validate(json.loads(said.out), SCHEMA)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("{no", "--json-schema: expected JSON"), ('{"type": "nothing"}', "--json-schema"),
        ("nowhere.json", "nowhere.json"), ("large.json", "large.json has more than 1048576 bytes"),
        ("latin.json", "latin.json"),
    ],
)  # fmt: skip
def test_what_is_no_schema_is_one_line(tiny_moe, capsys, given, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("large.json").write_text('{"title": "' + "x" * (1 << 20) + '"}')
    Path("latin.json").write_bytes('{"title": "Größe"}'.encode("latin-1"))
    try:
        code, said = run(tiny_moe, capsys, "--json-schema", given)
    except SystemExit as error:
        code, said = error.code, capsys.readouterr()
    assert code in (1, 2)
    assert words in said.err
    assert said.err.strip().count("\n") == 0
    assert not said.out
