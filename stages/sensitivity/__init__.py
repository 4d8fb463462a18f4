"""Prompt sensitivity (POSIX): how much a model's answer depends on the wording of a request."""
