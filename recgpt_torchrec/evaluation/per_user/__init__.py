"""Results of an evaluation by user: a Parquet file beside its JSON, for paired comparisons later on."""
