"""Trained models: reports, attention rollout."""
