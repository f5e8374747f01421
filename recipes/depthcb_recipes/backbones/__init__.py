"""Pretrained networks: catalogue, loading, and the mini zoo that is pretrained on this machine."""
