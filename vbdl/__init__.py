"""vbdl: a JIT-compiled functional ensemble engine for Bayesian deep learning in PyTorch."""
