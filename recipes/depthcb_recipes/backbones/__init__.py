"""Pretrained networks: what there is, how each is loaded, and the mini zoo that is pretrained on this machine."""
