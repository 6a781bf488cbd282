"""Fuzzers of everything that reads foreign files; see `scripts/fuzz`."""
