"""Programs that make the shipped assets: data, VAE, base model, judge, evaluation, export, adapters.

Each is one command, ``python -m assets.build.<name>``, can be stopped and started again, and runs on
CPU and GPU. Intermediate files lie in :func:`assets.build.common.build_dir`, outside the repository.
"""
