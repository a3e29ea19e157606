"""Takes notes out of the adapters that learnt them: deletes what holds them, and repeats the runs without them."""
