"""RNA transcripts: FASTA files, k-mer tokens, reading frames, and BERT-like models that tell long non-coding RNA
(lncRNA) from messenger RNA.

LoRA-BERT (arXiv 2411.08073) names the long RNA, not low-rank adaptation: its published program trains every weight.
Both ways are here, ``full`` as published and ``lora`` as this studio's own use: one frozen k-mer model and a small
adapter for each task.
"""
