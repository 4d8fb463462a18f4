"""Uploads a published model to a repository of the hub, its card completed with scores."""
