"""Training: SFT and distillation on one Trainer, on-policy rollouts, checkpoints, diagnostics."""
