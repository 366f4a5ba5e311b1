"""LLM-as-a-judge evaluation: grades (MT-Bench) and win rates (AlpacaEval)."""
