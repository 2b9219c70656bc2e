"""A model as tables and a dense part, without torchrec: what every model has, and one with whole tables."""
