"""Data files -> training rows, for all stages.

files (JSONL, JSON, CSV, Parquet, Arrow), folders -> columns (one value) -> formats (one row) -> reader (all rows, bad
ones reported or dropped) -> chat_rendering (text with the origin of each character) -> tokenization (tokens with
segments)
-> dataset_cache (on disk, for all steps that read the same rows)
segments: what a token can be, and the weight of each segment
"""
