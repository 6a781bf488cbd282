"""Files on disk: the `.moe` format, and the code that reads, writes and checks it."""
