"""Everything that a person sees.

run.loop -> console (plain lines, or live_view on a terminal) with progress_summary
--plan, --status, --estimate, results -> console; recipe_list describes the recipes of a folder
"""
