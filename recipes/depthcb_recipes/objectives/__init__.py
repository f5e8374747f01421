"""Objectives: one LightningModule each, and the monitor of their distance from pretraining."""
