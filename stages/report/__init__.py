"""The report at the end of a run: one page as HTML and Markdown, LaTeX tables, a CSV file and figures.

steps that scored a model -> results.py (scores, averages, differences) -> grid.py (grids of weights)
run.json of other recipes -> runs.py  -> results and grids of each run
results and grids -> tables.py, improvements.py, correlations.py, figures.py, sentences.py
stage.py puts these into sections; page.py writes the sections as HTML, Markdown and LaTeX
"""
