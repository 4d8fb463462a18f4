"""Everything that a person sees: lines, tables, the live view of a run, and the command that continues it."""
