"""`edgemoe profile`: one module per subcommand."""
