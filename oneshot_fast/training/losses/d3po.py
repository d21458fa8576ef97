"""D3PO: the loss of PSO on pairs of stochastic samples, by DDIM with eta 1 where it was published.

Direct Preference for Denoising Diffusion Policy Optimization (Yang et al. 2023, arXiv 2311.13231)
has beta 0.1 and the clip 0.1 on log-probabilities that are means over D; its ties add log 2, ours
nothing. See pso.py.
"""

from oneshot_fast.training.losses.pso import PSO


def d3po(size: int) -> PSO:
    """As published, of latents with ``size`` elements."""
    return PSO(beta=0.1, clip=0.1, form="original", scale=1 / size)
