"""The command `funnel` and what train.py shares with it."""
