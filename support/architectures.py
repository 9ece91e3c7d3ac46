"""What a language model's architecture asks of packing and training. It knows nothing of the algorithm.

`lm` is a model.LM.
"""

import functools
import sys

import torch
from torch.utils.checkpoint import checkpoint

from support.attention import NAME, TreeView, forward_pack
from support.cli import UserError, first_line
from support.distributed import decoder_layers, rank
from support.packing import Tree, pack_trees


@torch.no_grad()
def choose_form(lm, why: str = ""):
    """Trees in packs where a tree mask holds for the model, else one path per row (lm.paths).

    why: what is known already to speak against packs. It is tried: two branches in a pack must come
    out as each path alone by the model's own attention, and from hidden states must come the model's
    own logits. Raises UserError where they do not.
    """
    ids = [i % lm.config.vocab_size for i in range(3, 12)]
    tree = Tree([ids[:4], ids[4:6], ids[6:]], [-1, 0, 0], [True, True, True])
    (pack,) = pack_trees([tree], 99)
    if not why:
        view, layers = TreeView(pack, lm.device, remember=True), lm.config.num_hidden_layers
        try:
            packed = lm.logits(forward_pack(lm, pack, view)[: len(ids)])
        except Exception as e:  # noqa: BLE001  whatever a model does with a mask that it does not know
            why = first_line(e)
        else:
            if len(view.layers) != layers:
                why = f"{layers - len(view.layers)} of its {layers} layers are no attention"
            lm.shapes = view.shapes
        own_attention(lm.model)
    lm.paths = True
    apart = lm.logits(forward_pack(lm, pack)[: len(ids)])
    path = torch.arange(len(ids))[(pack.end[: len(ids)] > pack.last[-1])]
    with lm.autocast():
        own = lm.model(input_ids=pack.ids[path][None].to(lm.device), use_cache=False).logits[0]
    kind = lm.config.model_type
    if not own.isfinite().all():
        raise UserError(f"{lm.path}: its logits are NaN; train it again")
    if (own - apart[path]).abs().max() > (0.1 if lm.in_bfloat16 else 1e-3) * own.abs().max():
        raise UserError(f"{lm.path}: {kind} scales its logits in a way that is not supported")
    if not why and not torch.allclose(packed, apart, atol=0.5 if lm.in_bfloat16 else 1e-3):
        why = "a token sees more than its path"
    if not why:
        lm.model.set_attn_implementation(NAME)
        lm.paths = False
    elif rank() == 0:
        slower = "each path of a tree is computed by itself, several times slower"
        print(f"warning: {lm.path}: {kind} cannot be packed ({why}); {slower}", file=sys.stderr)


def own_attention(model):
    """Give a model the attention that transformers would."""
    try:
        model.set_attn_implementation("sdpa")
    except ValueError:  # it has none
        model.set_attn_implementation("eager")


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
