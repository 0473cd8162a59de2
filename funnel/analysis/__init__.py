"""Analysis of trained models: reports on runs, attention rollout."""
