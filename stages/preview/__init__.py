"""Previews: the rows of a training stage, token by token, as the trainer gets them.

a stage's preview.py -> page (prepares rows; HTML) -> token_display (tokens that a person can read; JSON, terminal)
"""
