"""Which type every tensor gets, and what that weighs: pure functions of shapes and a recipe, never of weights."""
