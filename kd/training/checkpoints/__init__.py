"""Checkpoints: written atomically, sealed by a manifest, verified before use."""
