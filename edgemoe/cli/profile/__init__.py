"""`edgemoe profile`: one file a subcommand."""
