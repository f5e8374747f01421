"""Hundreds of fits that survive interruption: a grid of runs, one folder per run as the only state, and the analysis.

`grid` resolves a study's YAML file into run configurations, `store` keeps their folders, `pool` runs what is missing,
here or on a cluster (`ray`), `analysis` makes the table and the claims from finished runs. Each fit is a `process` of
its own, in which `worker` holds the run's lock and `run` does the work.
"""
