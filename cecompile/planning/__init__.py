"""What a run is to be: how large its buckets, what memory that takes, which layers go where, how long it lasts."""
