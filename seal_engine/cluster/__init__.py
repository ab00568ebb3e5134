"""The inner loop on many engines: a driver that loops, workers that train and sample, and Ray between them."""
