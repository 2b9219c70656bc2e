"""`--preset auto`: options that follow from the statistics of a dataset."""
