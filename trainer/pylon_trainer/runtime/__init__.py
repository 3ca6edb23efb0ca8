"""What a worker process needs around training: its world, its peers, signals, seeds and its end."""
