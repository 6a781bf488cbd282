"""Chooses the likeliest of several answers by their log-probabilities.

python examples/score.py MODEL.moe
"""

import sys

import numpy as np

import edgemoe


def log_softmax(x):
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


with edgemoe.load(sys.argv[1]) as engine:
    encode = engine.tokenizer.encode
    question = encode("The capital of France is")
    for answer in (" Paris.", " London.", " a small dog."):
        ids = question + encode(answer, add_special=False)
        rows = log_softmax(engine.logits(ids)[len(question) - 1 : -1])
        total = rows[np.arange(len(rows)), ids[len(question) :]].sum()
        print(f"{total:8.2f}  {answer}")
