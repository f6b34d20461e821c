"""How good a model is: perplexity, and how far it has moved from the original."""

from lq.evaluation.evaluate import Evaluation, Reference, evaluate, make_reference, scored_targets

__all__ = ["Evaluation", "Reference", "evaluate", "make_reference", "scored_targets"]
