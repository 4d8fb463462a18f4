"""Orchestration: reads a recipe, plans its steps, runs those without a result, and stores every result by its content.

    recipe text -> recipe.loader -> cells -> plan.planner -> Plan -> plan.cache -> preflight.prepare -> run.loop
                                                                                                     |       |
                                                                          store.store <- run.worker <-       -> console

Imports no torch, transformers, trl, peft, datasets or lm_eval, so that the command starts quickly.
"""
