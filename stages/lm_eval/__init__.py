"""Benchmarks through EleutherAI's lm-evaluation-harness.

config -> tasks (lm-eval's task objects, with a user's own data) -> stage: simple_evaluate with model (resumable)
-> results (score rows, results.json, samples); trusted_code keeps third-party code from running; fetch downloads data
"""
