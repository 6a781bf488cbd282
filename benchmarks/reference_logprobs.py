"""Saves a float checkpoint's predictions, for `edgemoe quality --reference` and `llama-perplexity --kl-divergence`.

    python benchmarks/reference_logprobs.py CHECKPOINT TEXT OUT [--chunk 512] [--chunks N]

The model runs in transformers (the extra `test` installs it) in float32, one chunk at a time. OUT takes
vocabulary × chunk bytes per chunk: 13 MB for 50,000 tokens and chunks of 256.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from edgemoe.lab.quality.logprobs import LogProbsWriter
from edgemoe.lab.quality.quality import Sample
from edgemoe.text.logprobs import log_softmax
from edgemoe.text.tokenizer import Tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--chunks", type=int)
    args = parser.parse_args()
    files = ("tokenizer.json", "tokenizer_config.json")
    tokenizer = Tokenizer.from_files(
        {name: (args.checkpoint / name).read_bytes() for name in files}
    )
    text = args.text.read_text(encoding="utf-8")
    sample = Sample.of_text(text, tokenizer, chunk=args.chunk, chunks=args.chunks)
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32).eval()
    part = args.out.with_name(args.out.name + ".part")
    with open(part, "wb") as file, torch.inference_mode():
        record = LogProbsWriter(file, sample.windows, model.config.vocab_size)
        for window in tqdm(sample.windows, unit="chunk"):
            tokens = torch.tensor(window[None], dtype=torch.int64)
            if sample.first_token is not None:
                tokens[0, 0] = sample.first_token
            logits = model(tokens).logits[0, args.chunk // 2 : -1].float().numpy()
            record.add(log_softmax(logits))
    part.replace(args.out)


if __name__ == "__main__":
    main()
