"""What recipes/benchmark.py times: an iteration of training, its bare network passes, and where its time goes."""
