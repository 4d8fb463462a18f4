"""Prompt sensitivity: how much a model's answer depends on the wording of one request (POSIX)."""
