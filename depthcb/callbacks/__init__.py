"""The Lightning callbacks: each decides *when*; the pure functions beside this folder decide *what*."""
