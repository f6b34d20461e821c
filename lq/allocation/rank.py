"""Rank-and-threshold: the order of the scores decides, their size does not (Dumitru et al., arXiv 2406.17415, section
3).

With two widths this is the paper's rule: blocks in order of importance get the higher width while the budget lasts, the
rest the lower one. With more widths the thresholds must be chosen, and are, by the least expected error

    sum_l  r_l n_l 4^(-b_l),      r_l = (L - rank of l) / L,   n_l weights

under the budget (the costs "place" of `lq.allocation.costs`): everything starts at the lowest width and the step of
greatest gain per bit is taken while it fits. 4^(-b) is convex in b and r_l falls with the rank, so among units of equal
shape a more important one never gets fewer bits. A step that does not fit is passed over and the next is tried, so that
less than the smallest remaining step of the budget is left unspent.
"""

from lq.allocation.problem import Choice, NoOptions, Problem
from lq.allocation.relaxation import greedy


def rank(problem: Problem, options: NoOptions) -> Choice:
    """Widths by the place in the order alone: the most important units get the most bits."""
    return greedy(problem, options)
