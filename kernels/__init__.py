"""Triton kernels, imported as `llm2_fast.kernels`.

No imports here: started in the repository root, transformers finds this folder when it probes for the unrelated package
`kernels`, and imports it.
"""
