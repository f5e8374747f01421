"""Hundreds of fits that survive anything: a grid of runs, a folder a run as the only state, and what the runs say.

``grid`` resolves a study's YAML file into run configurations, ``store`` keeps their folders, ``pool`` runs what is
missing, ``analysis`` makes the table and the claims of finished runs. The fits are processes of their own.
"""
