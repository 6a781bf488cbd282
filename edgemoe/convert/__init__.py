"""Conversion of checkpoints to `.moe` files. No other package knows about model families."""
