"""Data files -> training rows, shared by sft and dpo.

files -> records -> formats (checked by columns) -> reader -> rows -> chat_rendering -> tokenization -> prepared rows
"""
