"""Asks a server for replies that follow random JSON schemas, at temperature 2, and validates each that ends by itself.

python benchmarks/schemas.py MODEL.moe [-n 200]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
from serve import Server, serving

LEAVES: list[dict[str, Any]] = [
    {"type": "boolean"}, {"type": "null"}, {"type": "integer", "minimum": -3, "maximum": 40},
    {"type": "number", "minimum": 0, "maximum": 1}, {"type": "string", "maxLength": 8}, {"enum": ["red", "green", 7]},
    {"type": "string", "pattern": "^[a-f0-9]{4}$"}, {"type": "string", "format": "date"}, {"const": {"v": [1, None]}},
    {"type": "string", "format": "ipv4"}, {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100},
]  # fmt: skip


def schema(rng: random.Random, depth: int) -> dict[str, Any]:
    """Returns a random schema that is nested at most `depth` levels deep."""
    kind = rng.randrange(5) if depth else 0
    if kind <= 1:
        return dict(rng.choice(LEAVES))
    if kind == 2:
        least = rng.randrange(3)
        return {
            "type": "array",
            "items": schema(rng, depth - 1),
            "minItems": least,
            "maxItems": least + 2,
        }
    if kind == 3:
        return {"anyOf": [schema(rng, depth - 1), schema(rng, depth - 1)]}
    names = [f"key{i}" for i in range(rng.randrange(1, 4))]
    return {
        "type": "object", "properties": {name: schema(rng, depth - 1) for name in names},
        "required": names[: rng.randrange(len(names) + 1)], "additionalProperties": False,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("-n", type=int, default=200, metavar="N", help="schemas")
    args = parser.parse_args()
    rng = random.Random(0)
    schemas = [schema(rng, 3) for _ in range(args.n)]

    def ask(i: int) -> tuple[str, int]:
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schemas[i]}}
        done = server.ask({
            "messages": [{"role": "user", "content": "Go."}], "response_format": form, "temperature": 2, "seed": i,
            "max_tokens": 400,
        })  # fmt: skip
        choice = done["choices"][0]
        if choice["finish_reason"] == "stop":
            jsonschema.validate(json.loads(choice["message"]["content"]), schemas[i])
        return choice["finish_reason"], done["usage"]["completion_tokens"]

    with (
        Server(serving(args.model, "-np", "4", "-c", "1024")) as server,
        ThreadPoolExecutor(4) as pool,
    ):
        ends = list(pool.map(ask, range(args.n)))
    whole = sum(end == "stop" for end, _ in ends)
    print(f"{args.n} schemas: {whole} replies ended by themselves, all of their schema")
    print(
        f"{args.n - whole} were cut at 400 tokens; {statistics.median(n for _, n in ends):.0f} in the median"
    )


if __name__ == "__main__":
    main()
