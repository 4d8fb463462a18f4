"""The page, tables and CSV that a run ends with."""
