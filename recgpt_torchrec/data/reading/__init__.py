"""From the row groups of a dataset to histories; every value is checked, damaged rows are listed."""
