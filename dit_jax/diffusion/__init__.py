"""Diffusion as pure maths: no network, no config, no files.

    schedules    how much picture and how much noise is in x_t
    process      noising, and the algebra between x0, epsilon, v and flow
    objectives   at which times to train, and the loss
    guidance     from a network and a text to ``denoise(x_t, t)``
    grids        at which times
    samplers     from noise to a latent, by many calls of ``denoise``
    editing      entering a run late, from a picture, and keeping a part of it
    mixture      data whose denoiser is known, to measure samplers by

All this package knows of the network is ``predict(x_t, t, text)``; the text is an opaque pytree.
"""
