"""AlpacaEval and MT-Bench: a model's answers, judged by another model behind an OpenAI-compatible endpoint.

questions -> model_answers (the model's answers) -> mt_bench or alpaca_eval (prompts for the judge, grades)
-> judge_client -> endpoint; stage turns the grades into score rows
"""
