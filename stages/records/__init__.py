"""Typed records with one definition each.

stage.run -> metrics (Metrics, ScoreRow) -> manifest (stage.json); run_record (run.json): the state of each step
"""
