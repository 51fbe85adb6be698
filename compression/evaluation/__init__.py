"""How good a model is, beside predictors that learned nothing, and what it must show to be published."""
