"""What a language model's architecture asks of packing and training. It knows nothing of the algorithm.

`lm` is a model.LM.
"""

import functools

import torch
from torch.utils.checkpoint import checkpoint

from support.attention import TreeView, pack_hidden
from support.cli import UserError
from support.distributed import decoder_layers
from support.packing import Tree, pack_trees


@torch.no_grad()
def check_attention(lm):
    """Refuse a model that a tree mask would break, by its config and by trying: two branches in a
    pack must come out as each path alone, and from hidden states must come the model's own logits."""
    config, kind = lm.config, lm.config.model_type
    if getattr(lm.model.get_output_embeddings(), "bias", None) is not None:
        raise UserError(f"{lm.path}: {kind} has a bias on its logits, which is not supported")
    other = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
    windows = getattr(config, "use_sliding_window", True)
    if other or (windows and getattr(config, "sliding_window", None)):
        what = ", ".join(sorted(other)) or "a sliding window"
        raise UserError(f"{lm.path}: {kind} has {what}; tree packing needs full attention")
    ids = [i % config.vocab_size for i in range(3, 12)]
    tree = Tree([ids[:4], ids[4:6], ids[6:]], [-1, 0, 0], [False, True, True])
    (pack,) = pack_trees([tree], 99)
    view = TreeView(pack, lm.device)
    packed = lm.logits(pack_hidden(lm, pack, view))
    for k, (_, v) in enumerate(pack.owner):
        (alone,) = pack_trees([tree._replace(score=[False, v == 1, v == 2])], 99)
        path = lm.logits(pack_hidden(lm, alone, TreeView(alone, lm.device)))
        together, apart = packed[pack.node == k], path[alone.node == 0]
        if not together.isfinite().all():
            raise UserError(f"{lm.path}: its log-probs are NaN; train it again")
        if not torch.allclose(together, apart, atol=0.5 if lm.in_bfloat16 else 1e-3):
            raise UserError(f"{lm.path}: {kind} ignores a tree mask, so it cannot be used")
    ids, pos = pack.ids[None].to(lm.device), pack.pos[None].to(lm.device)
    with lm.autocast():
        own = lm.model(input_ids=ids, position_ids=pos, use_cache=False, view=view).logits[0]
    if (own - packed).abs().max() > (0.1 if lm.in_bfloat16 else 1e-3) * own.abs().max():
        raise UserError(f"{lm.path}: {kind} scales its logits in a way that is not supported")


def refuse_dropout(lm):
    """The model stays in eval mode, so that the log-ratio starts at exactly 0. A config with dropout
    is refused rather than trained without it unasked."""
    names = []
    for name, value in lm.config.to_dict().items():
        of_a_classifier = name.startswith(("summary", "classifier"))
        if "drop" in name and isinstance(value, float) and value and not of_a_classifier:
            names.append(name)
    if names:
        wrong = f"its config has dropout ({', '.join(names)}), training has none"
        raise UserError(f"{lm.path}: {wrong}; set it to 0.0 there")


def checkpoint_layers(model):
    """Keep of each layer its input alone and compute the rest again in the backward pass: of 8,192
    tokens of an 8B model 4 GB in place of 65. The gradients are the same to the last bit.

    Hugging Face's own switch acts in train mode only, and the model stays in eval mode; so layers
    are wrapped here.
    """
    again = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    for layer in decoder_layers(model):
        layer.forward = functools.partial(again, layer.forward)
