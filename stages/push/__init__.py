"""Uploads a published model to a repository of the hub.

config (checks access) -> stage: model and its card, completed with scores -> hub (one commit)
"""
