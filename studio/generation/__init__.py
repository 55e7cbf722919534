"""Generated adapters: training a generator, making adapters with it."""
