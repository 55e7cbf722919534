"""``python -m studio`` is the command ``studio`` (and what ``accelerate launch -m studio`` starts)."""

from studio.cli import main

main()
