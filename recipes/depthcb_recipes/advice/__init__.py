"""``depthcb advise``: which layers to train within a budget, proposed by named rules and tested by training."""
