"""Writing down speech with adapters: the job, its command, and the models it keeps loaded."""
