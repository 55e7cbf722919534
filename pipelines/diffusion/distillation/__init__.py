"""Distillation of diffusion models into LoRAs on the same frozen base.

``guidance``     two passes a step become one                 (arXiv 2312.06899)
``consistency``  twenty to fifty steps become two to eight    (arXiv 2310.04378, 2311.05556)
``student``      one model as teacher (adapter off) and student (adapter on)
``embedding``    the guidance strength as an input            (arXiv 2210.03142)
``trajectories`` recorded states of a teacher's sampling
``mark``         the metadata of a distilled adapter's file
"""
