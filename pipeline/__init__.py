"""Orchestration: recipe -> plan -> run -> store. Imports no torch, transformers, trl or lm_eval."""
