"""The figures in README, each by one command."""
