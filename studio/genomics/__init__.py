"""Classifying RNA transcripts: the job, its configuration, its table and command."""
