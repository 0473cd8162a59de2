"""Funnel-Transformer in PyTorch: fine-tune text classifiers on any layout of blocks and layers."""
