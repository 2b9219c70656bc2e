"""The SQL of the columns and rows of each file format."""
