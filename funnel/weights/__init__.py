"""Pretrained weights: reading and writing checkpoint formats, changing the layout, building classifiers, exporting."""
