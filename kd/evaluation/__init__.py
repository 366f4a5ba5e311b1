"""Evaluation: likelihood, agreement, benchmarks, judge, speed, and the report on them."""
