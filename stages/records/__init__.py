"""Typed records with one definition each: metrics and score rows, the manifest (stage.json), the run record
(run.json)."""
