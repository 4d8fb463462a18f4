"""Runs the steps of a plan that have no result, each in a process of its own, and publishes what they leave.

Plan + decisions -> loop -> job.json -> executor (this machine, or a Ray cluster) -> worker -> stage.run
worker -> progress and result (job) -> loop -> store.publish and run.json (record_writer)
"""
