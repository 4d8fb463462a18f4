"""What can be known before anything runs: checks, previews, estimates and downloads.

Plan -> prepare: fetched references, verified inputs, all problems -> run.loop
Plan -> preview | estimate | prefetch -> probe -> one process (probe_worker) in which the stages answer -> console
"""
