"""Previews: the rows of a training stage, token by token, as the trainer gets them.

a stage's preview.py -> sample (a few rows, prepared as for training) -> token_display (tokens that a person can read)
-> page (HTML) and terminal (text)
"""
