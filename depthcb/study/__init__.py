"""Hundreds of fits that survive anything: a grid of runs, a folder a run as the only state, and what the runs say.

``grid`` resolves a study's YAML file into run configurations, ``store`` keeps their folders, ``pool`` makes what is
missing, here or on a cluster (``ray``), ``analysis`` the table and the claims of finished runs. Each fit is a
``process`` of its own, in which ``worker`` holds the run's lock.
"""
