"""Jobs: their records, storage, and the way of a job to its end."""
