"""Cells of a recipe -> the steps of a plan, and the decision which of them are cached. Everything here is immutable.

Recipe -> planner -> Plan of Steps
resolver: references -> content hashes, commits, paths
Plan + store -> cache -> CacheDecision (cached, reason, published) of each step
selection: --stage, --from, --force; search: one plan after the other for a recipe with `search`
"""
