"""Looking at adapters: what they change, and how they get along."""
