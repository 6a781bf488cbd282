"""What programs use: the engine, its budget, chats, traces, profiles, benchmarks."""
