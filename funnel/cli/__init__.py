"""Commands: `funnel` with its subcommands, and what train.py shares with them."""
