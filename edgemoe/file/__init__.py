"""Everything about bytes at rest: the `.moe` file and who reads, writes and checks it."""
