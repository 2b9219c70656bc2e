"""Options of what a model reads beside ids."""
