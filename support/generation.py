"""Draws by transformers' own `generate`, for models whose past is no keys and values of a path (state
spaces, linear attention) or whose attention is their own. It knows nothing of the algorithm.
"""

import torch
import transformers

from support.cli import UserError


class Draws(transformers.LogitsProcessor):
    """Leaves of each row's logits one token: the draw of that row's key (support/sampler.py)."""

    def __init__(self, lm, draw, first: int):
        self.lm, self.draw, self.first = lm, draw, first

    def __call__(self, input_ids, scores):
        token = self.draw(scores.float(), input_ids.shape[1] - self.first)  # (B,)
        if (token >= scores.shape[1]).any():
            raise UserError(f"{self.lm.path}: a logit is NaN; train it again")
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)


def generate(lm, prefixes: list[list[int]], longest: int, draw) -> list[list[int]]:
    """A continuation of at most `longest` tokens for each prefix, all of one length, up to an EOS (kept).

    draw: (logits (B, V), how many tokens the rows have drawn) -> token ids (B,); V for a NaN. There is
    no padding, so a row's numbers are its own, to rounding.
    """
    ids = torch.tensor(prefixes, device=lm.device)  # (B, T)
    config = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=longest, eos_token_id=lm.eos, pad_token_id=lm.eos[0]
    )
    # What the model's own says of temperature, top-p or repetition would be added.
    own, lm.model.generation_config = lm.model.generation_config, config
    try:
        with lm.autocast():
            out = lm.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                logits_processor=[Draws(lm, draw, ids.shape[1])],
            )
    finally:
        lm.model.generation_config = own
    continued = []
    for new in out[:, ids.shape[1] :].tolist():
        ends = [n for n, token in enumerate(new, 1) if token in lm.eos]
        continued.append(new[: ends[0]] if ends else new)
    return continued
