"""The repeat bias: what is added to the scores of items that a user already has, fitted on validation items."""
