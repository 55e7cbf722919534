"""Distillation of diffusion models into LoRAs on the same frozen base.

``guidance``     two passes a step become one                 (arXiv 2312.06899)
``consistency``  twenty to fifty steps become two to eight    (arXiv 2310.04378, 2311.05556)
``student``      one model as teacher (adapter off) and student (adapter on)
``embedding``    the guidance strength as an input            (arXiv 2210.03142)
``trajectories`` states a teacher passes while it samples, recorded
``mark``         how a file says that it holds a distilled adapter
"""
