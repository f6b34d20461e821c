"""Logit lens: how much nearer a block brings what the stream says to what the model says.

    D_l = mean over tokens of KL( softmax(head(h_l)) || softmax(head(h_L)) )

with h_l the stream entering block l, decoded as if it were the last: final norm, unembedding. D_L is 0. Published is
D_l along the depth, as a picture of where the answer forms. Our reading, as a score of the block between:

    D_l - D_{l+1}

Larger is a larger step towards the answer; negative is a step away from it. The steps of all blocks add up to D_0, what
the embedding alone leaves to be said, and a block that does nothing takes none.

Source: Csordas et al., Do Language Models Use Their Depth Efficiently?, arXiv 2505.13898, and the code beside it;
nostalgebraist, interpreting GPT: the logit lens (2020).
"""

from lq.calibration.data import Windows
from lq.importance.replay import Replay
from lq.importance.similarity import StreamOptions
from lq.models.source import ParameterSource


def logit_lens(source: ParameterSource, windows: Windows, options: StreamOptions) -> dict:
    """How much nearer a block brings the decoded distribution to the final one: KL before less KL after.

    Returns under `extra` what is published: the divergence behind every block.
    """
    run = Replay(source, windows, options.batch_size)
    values, behind, distance = {}, {}, None
    for index, _, before, after in run.blocks():
        distance = run.lens(before) if distance is None else distance
        behind[f"block_{index}"] = run.lens(after)
        values[f"block_{index}"] = distance - behind[f"block_{index}"]
        distance = behind[f"block_{index}"]
    return {"values": values, "passes": run.passes, "extra": {"kl": behind}}
