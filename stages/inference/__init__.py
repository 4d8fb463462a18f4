"""A language model that generates and scores, for stages that need the tokens themselves."""
