"""Safety audit of a language adapter: does it weaken the base's refusals, refuse harmless requests, or cost ability?

The purpose is to know before an adapter is published or merged. So the package only measures, in both directions and
paired with the adapter's own base, and its one way to write weights pulls an adapter towards the aligned model
(:mod:`studio.audit.mitigation`). It ships no harmful prompt, trains nothing, removes no refusal direction from anything
and writes none, and keeps the text of prompts and answers out of reports unless it is asked for.
"""
