"""What all stages that score models share.

config: one step for each model; answer_log: answers that survive a killed step
items -> score_rows (score rows, sample files) -> the report; past_runs: score rows of other recipes' runs
"""
