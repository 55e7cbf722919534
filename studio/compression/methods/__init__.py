"""Methods that make a smaller base: each module declares its job (``KIND = Kind(...)``) and runs it."""
