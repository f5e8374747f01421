"""Fine-tuning objectives (one LightningModule each), and a monitor of their distance to the pretraining objective."""
