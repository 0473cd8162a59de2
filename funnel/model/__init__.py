"""The network: configuration, pooling, attention, blocks, heads; its checkpoints and costs."""
