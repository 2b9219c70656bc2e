"""Raw log -> dataset -> SequenceBatch. Knows nothing of models; imports without torchrec except for the batches."""
