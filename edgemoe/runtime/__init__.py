"""The library that programs use: the engine, its memory budget, chats, traces, profiles and benchmarks."""
