"""Documents as tokens: the token store on disk, and packing its windows into batches."""
