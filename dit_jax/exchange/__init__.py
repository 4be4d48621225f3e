"""Trained models as other programs have them.

layouts     names and axes of parameters in PyTorch, ours and the reference DiT's
schedulers  the scheduler of diffusers that walks where a sampler walks
components  a folder of components, as diffusers has them
card        the README of an export
"""
