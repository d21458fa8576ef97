"""How well early values tell final ones: of N candidates of each of P prompts, in float64."""

import numpy as np
import scipy.stats

from oneshot_fast.search.pruning import Floats, survivors


def spearman(early: Floats, final: Floats) -> Floats:
    """Correlation of ranks within each prompt, [P], of values [P, N]; ties have their mean rank.

    0 where all values of a prompt are equal.
    """
    ranks = [scipy.stats.rankdata(values, axis=-1) for values in (early, final)]
    x, y = (rank - rank.mean(-1, keepdims=True) for rank in ranks)
    return _ratio((x * y).sum(-1), (x**2).sum(-1), (y**2).sum(-1))


def kendall(early: Floats, final: Floats) -> Floats:
    """Kendall's tau-b within each prompt, [P], of values [P, N]; 0 where all of one are equal."""
    found = []
    for pair in zip(early, final, strict=True):
        x, y = (np.sign(values[:, None] - values) for values in pair)
        found.append(((x * y).sum(), (x**2).sum(), (y**2).sum()))
    above, of_x, of_y = np.array(found).T
    return _ratio(above, of_x, of_y)


def _ratio(above: Floats, of_x: Floats, of_y: Floats) -> Floats:
    below = np.sqrt(of_x * of_y)
    return np.divide(above, below, out=np.zeros_like(below), where=below > 0)


def kept_best(early: Floats, final: Floats, share: float) -> tuple[Floats, Floats]:
    """What pruning to a share by ``early`` values does to the best candidates of each prompt.

    k = max(1, floor(share N + 1e-9)) are kept; of equal values the lower number.

    Returns:
        Whether the best one is kept (1 or 0), and best value minus best kept one, [P] each.
    """
    N = final.shape[-1]
    kept = survivors(early, max(1, int(share * N + 1e-9)))
    best = final.argmax(-1)
    gap = final.max(-1) - np.take_along_axis(final, kept, -1).max(-1)
    return (kept == best[:, None]).any(-1).astype(np.float64), gap
