"""Benchmarks through EleutherAI's lm-evaluation-harness."""
