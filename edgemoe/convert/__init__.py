"""Turns checkpoints into `.moe` files; the only place that knows model families."""
