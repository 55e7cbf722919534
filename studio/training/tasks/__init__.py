"""The kinds of training, one module each; see :class:`studio.training.task.Task`."""
