"""Fuzzers of everything that reads what somebody else wrote; see `scripts/fuzz`."""
