"""The training losses: divergences of logits, hidden-state losses, and the metrics they report."""
