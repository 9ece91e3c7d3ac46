"""What a language model's architecture asks of packing and training. It knows nothing of the algorithm.

`lm` is a model.LM.
"""

import functools
import sys

import torch
from torch.utils.checkpoint import checkpoint

from support.attention import NAME, TreeView, forward_pack, is_window, windows_of
from support.cli import UserError, first_line
from support.distributed import decoder_layers
from support.packing import Tree, pack_trees


@torch.no_grad()
def choose_form(lm, why: str = ""):
    """Find out whether a tree mask holds for the model. Where it does not, trees are computed path by
    path (lm.paths), which one line of warning says.

    why: what is known already to speak against a tree mask. It is tried: two branches in a pack must
    come out as each path alone by the model's own attention, in every layer. Raises UserError where
    the model's logits are no product of hidden states and head.
    """
    ids = [i % lm.config.vocab_size for i in range(3, 12)]
    tree = Tree([ids[:4], ids[4:6], ids[6:]], [-1, 0, 0], [True, True, True])
    (pack,) = pack_trees([tree], 99)
    if not why:
        view, layers = TreeView(pack, lm.device, remember=True), lm.config.num_hidden_layers
        try:
            packed = forward_pack(lm, pack, view)
        except Exception as e:  # noqa: BLE001  whatever a model does with a mask that it does not know
            why = first_line(e)
        else:
            if len(view.layers) != layers:
                why = f"{layers - len(view.layers)} of its {layers} layers have no attention"
            for rule, window in zip(view.rules, windows_of(lm.config)):
                lm.windows.append(window if is_window(rule, window, lm.device) else None)
        own_attention(lm.model)
    lm.paths = True
    apart = forward_pack(lm, pack)
    path = (torch.arange(len(pack.ids)) <= pack.last[-1]) & (pack.end > pack.last[-1])
    choose_logits(lm, pack.ids[path].to(lm.device), apart[path])
    real = slice(len(ids))  # without the tokens that fill the pack up
    if not why and not torch.allclose(
        lm.logits(packed[real]), lm.logits(apart[real]), atol=0.5 if lm.in_bfloat16 else 1e-3
    ):
        why = "a token sees more than its path"
    if not why:
        lm.model.set_attn_implementation(NAME)
        lm.paths = False
    else:
        what = f"{lm.config.model_type} cannot take a tree in one pass ({why})"
        slower = "each path is computed by itself, at half the speed or less (benchmarks/architectures.md)"
        print(f"warning: {lm.path}: {what}; {slower}", file=sys.stderr)


def choose_logits(lm, ids, hidden):
    """What the model does to the product of hidden states (T, d), those of ids (T,), and its head: of
    what its config may mean the nearest to its own logits."""
    with lm.autocast():
        own = lm.model(input_ids=ids[None], use_cache=False).logits[0].float()
    if not own.isfinite().all():
        raise UserError(f"{lm.path}: its logits are NaN; train it again")
    field = lambda name: getattr(lm.config, name, None)
    lm.softcap = field("final_logit_softcapping") or field("logits_soft_cap")
    lm.softcap = lm.softcap or field("output_logit_soft_cap")
    factor = field("logit_scale") or field("lm_head_multiplier") or 1.0
    scaling, errors = field("logits_scaling") or 1.0, {}
    # Granite divides by "logits_scaling", HyperCLOVA X multiplies by it, Llama does not read it.
    for scale in (factor / scaling, factor * scaling, 1.0):
        lm.scale = scale
        errors[scale] = float((own - lm.logits(hidden)).abs().max())
    lm.scale = min(errors, key=errors.get)
    if errors[lm.scale] > (0.1 if lm.in_bfloat16 else 1e-3) * own.abs().max():
        wrong = "its logits are no product of its last hidden states and its head"
        raise UserError(f"{lm.path}: {lm.config.model_type} is not supported: {wrong}")


def decoder_of(model):
    """The part whose last hidden states the head is multiplied with; of a model that reads images too
    its language model."""
    decoder = model.get_decoder()
    return model.model if decoder is model else decoder  # Llama 4 says itself


def own_attention(model):
    """Give a model the attention that transformers would; where scores have a soft-cap the slow one,
    since older versions of transformers forget it in the other."""
    softcap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    try:
        model.set_attn_implementation("eager" if softcap else "sdpa")
    except ValueError:  # it has none
        model.set_attn_implementation("eager")
    if model.config._attn_implementation == NAME:  # of the old kind, which asks for masks only
        model.config._attn_implementation = "eager"


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
