"""Prompt sensitivity (POSIX): how much a model's answer depends on the wording of a request.

sets (prompts with the same intent) -> stage: answers and log-probabilities by a model -> the index -> score rows
"""
