"""Prompt characteristics: properties of prompts that the report correlates with the best prompt weight.

config (sets of rows) -> stage: rows -> lengths, n-gram diversity, and log-probabilities by a model -> score rows
"""
