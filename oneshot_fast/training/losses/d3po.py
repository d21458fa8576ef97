"""D3PO: the loss of PSO on pairs of stochastic samples, by DDIM with eta 1 where it was published.

Direct Preference for Denoising Diffusion Policy Optimization (Yang et al. 2023, arXiv 2311.13231)
clips as the original PSO does, with beta 0.1 and clip 0.1 on mean log-probabilities; its ties add
log 2, ours nothing. See pso.py.
"""

from oneshot_fast.training.losses.pso import PSO

D3PO = PSO(beta=0.1, clip=0.1, form="original", on_means=True)
