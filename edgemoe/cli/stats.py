"""What a reply cost, as the one line after it and as the table of /stats."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe.cli.console import note

if TYPE_CHECKING:
    from edgemoe.runtime.chat import TooLong
    from edgemoe.runtime.engine import Engine
    from edgemoe.runtime.meter import Stats

__all__ = ["full_line", "say_stats", "stats_line", "stats_table", "too_long"]


def say_stats(engine: Engine, kind: str) -> None:
    """Writes the line after a reply: short, full, or none for "off"."""
    if kind != "off":
        note((full_line if kind == "full" else stats_line)(engine.stats))


def too_long(engine: Engine, error: TooLong) -> ValueError:
    """Returns an error about a full context, which says how to make it longer where the model allows that."""
    most = engine.config.context_length
    more = f"; -c N makes it longer, the model's most is {most}" if engine.context < most else ""
    return ValueError(f"{error}{more}".removeprefix("say: "))


def stats_line(stats: Stats) -> str:
    """Returns the line after a reply: how fast it was, and how many experts were in memory when they were wanted."""
    parts = [
        _rate(stats.new_tokens - 1, stats.decode_s, "tok/s"),
        f"{stats.new_tokens} token{'' if stats.new_tokens == 1 else 's'}",
        f"first after {stats.first_token_s:.1f} s" if stats.first_token_s >= 1 else "",
        f"{100 * stats.hit_rate:.0f}% of experts in memory" if stats.misses else "",
        f"{stats.average_bits:.3g} bits" if stats.average_bits else "",
        *_changed(stats),
        f"#{stats.logits_hash}" if stats.logits_hash else "",
    ]
    return "# " + ", ".join(p for p in parts if p)


def full_line(stats: Stats) -> str:
    """Returns the line of --stats full. What did not happen (no prompt, no reads) has no figure."""
    tokens = f"{stats.prompt_tokens} prompt + {stats.new_tokens} tokens"
    speeds = [
        _rate(stats.prompt_tokens, stats.prompt_s, "prompt tok/s"),
        _rate(stats.new_tokens - 1, stats.decode_s, "tok/s"),
        f"first {stats.first_token_s:.2f} s" if stats.new_tokens else "",
    ]
    first = ", ".join(s for s in speeds if s)
    parts = [
        f"{tokens}: {first}" if first else tokens,
        _hit_rate(stats),
        _copied(stats),
        f"dropped {stats.evictions}" if stats.evictions else "",
        _reads(stats),
        f"{stats.average_bits:.1f} bits" if stats.average_bits else "",
        *_changed(stats),
        stats.scheduler,
        f"peak {_mib(stats.peak_bytes)}",
        f"#{stats.logits_hash}" if stats.logits_hash else "",
    ]
    return "# " + "; ".join(p for p in parts if p)


def stats_table(stats: Stats) -> str:
    """Returns every figure of the last reply, one a line."""
    rows = [
        ("prompt", f"{stats.prompt_tokens} tokens, and {stats.cached_tokens} kept from before"),
        ("prompt time", f"{stats.prompt_s:.2f} s"),
        ("reply", f"{stats.new_tokens} tokens"),
        (
            "reply time",
            f"{stats.decode_s:.2f} s after the first token, at {stats.first_token_s:.2f} s",
        ),
        ("experts found in memory", f"{stats.hits} of {stats.hits + stats.misses}"),
        *_device_rows(stats),
        ("experts dropped", f"{stats.evictions}"),
        ("read from disk", f"{stats.bytes_read / 1e9:.2f} GB in {stats.read_s:.2f} s"),
        ("waited for reads", f"{stats.wait_s:.2f} s"),
        ("bits of an expert's weight", f"{stats.average_bits:.2f} on average"),
        ("experts skipped", f"{100 * stats.skipped_share:.2f}% of what routers chose"),
        ("experts substituted", f"{100 * stats.substituted_share:.2f}%"),
        ("scheduler", stats.scheduler or "nothing to report"),
        ("experts in memory now", _mib(stats.resident_bytes)),
        ("KV cache, when full", _mib(stats.kv_bytes)),
        ("memory at most", f"{_mib(stats.peak_bytes)}, the whole process"),
        ("hash of the last logits", stats.logits_hash or "none yet"),
    ]
    return "\n".join(f"{name:<27}{value}" for name, value in rows)


def _changed(stats: Stats) -> list[str]:
    """Returns the shares of the routers' choices that did not run, as text."""
    shares = {"skipped": stats.skipped_share, "substituted": stats.substituted_share}
    return [f"{what} {100 * share:.1f}%" for what, share in shares.items() if share]


def _rate(count: int, seconds: float, unit: str) -> str:
    return f"{count / seconds:.1f} {unit}" if count > 0 and seconds > 0 else ""


def _hit_rate(stats: Stats) -> str:
    uses = stats.hits + stats.misses
    there = f" ({100 * stats.device_hits / uses:.1f}% on the device)" if _has_device(stats) else ""
    return f"hit {100 * stats.hit_rate:.1f}%{there}" if uses else ""


def _has_device(stats: Stats) -> bool:
    return bool(stats.device_bytes or stats.device_bytes_in or stats.device_hits)


def _copied(stats: Stats) -> str:
    copied = stats.device_bytes_in
    return f"copied {copied / 1e9:.2f} GB to the device" if _has_device(stats) else ""


def _device_rows(stats: Stats) -> list[tuple[str, str]]:
    """Returns the table's rows about a device; none without one."""
    if not _has_device(stats):
        return []
    return [
        ("experts run on the device", f"{stats.device_hits} of {stats.hits + stats.misses}"),
        ("copied to the device", f"{stats.device_bytes_in / 1e9:.2f} GB"),
        ("experts on the device now", _mib(stats.device_bytes)),
    ]


def _reads(stats: Stats) -> str:
    speed = stats.bytes_read / stats.read_s / 1e9 if stats.read_s > 0 else 0.0
    at = f" at {speed:.1f} GB/s" if speed else ""
    return f"read {stats.bytes_read / 1e9:.2f} GB{at}"


def _mib(count: float) -> str:
    return f"{count / 2**20:.0f} MiB"
