"""memory. It knows nothing of the algorithm."""

import argparse
import os

import torch
import transformers

from support.attention import head_sizes, row_bytes
from support.cli import UserError, first_line
from support.distributed import decoder_layers, world


def memory(config, columns: int, tokens: int, rows: int, cards: int, offload: bool) -> dict:
    """Bytes that a model needs on one card, by stage and part; from its config alone.

    columns: of a row of the key/value cache (prompt and response); tokens of a pack; rows decoded
    at once. Training is in bfloat16 with checkpointed layers.
    """
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
    except ValueError as e:
        raise UserError(f"{config.model_type}: no language model with a decoder alone") from e
    config = config.get_text_config()
    count = sum(p.numel() for p in model.parameters())
    layers, width, vocabulary = config.num_hidden_layers, config.hidden_size, config.vocab_size
    layer = sum(p.numel() for p in decoder_layers(model)[0].parameters())
    inner = getattr(config, "intermediate_size", None) or 4 * width
    heads, _, size = head_sizes(config)
    queries = heads * size  # width of all query heads
    sampling = {
        "weights": 2 * count,
        "key/value cache": rows * row_bytes(config, columns, 2),
        "logits and their sums": rows * vocabulary * 20,
    }
    # On one card autocast rounds float32 weights, and the residual stream is float32.
    alone = cards == 1 and not offload
    stream = 4 if alone else 2  # bytes of a number of it
    state = 0 if offload else 16 * count // cards  # float32 weights, gradients and two moments
    if alone:
        whole_weights = 2 * layer  # of the layer that is computed, rounded
    elif offload:
        whole_weights = 6 * count  # until a step's last pack, gradients in float32 too
    else:  # of two layers, and of what is outside them; gradients, and their sum in float32
        whole_weights = 10 * layer + 8 * (count - layers * layer)
    # A layer while it is computed again: 4 bytes a number of its activations and their gradients.
    one_layer = 4 * tokens * (4 * width + 3 * queries + 4 * inner)
    # Two blocks of logits and one rounded; the head rounded, its gradient, a block's in float32; of
    # the hidden states copies and gradients.
    block = min(vocabulary, 16384)
    blocks = 10 * min(tokens, 4096) * block + 4 * width * (vocabulary + block)
    blocks += 14 * tokens * width
    training = {
        "weights, gradients, moments": state,
        "gathered weights and gradients": whole_weights,
        "layers' inputs": stream * (layers + 2) * tokens * width,  # the last norm keeps two more
        "one layer, or blocks of the vocabulary": max(one_layer, blocks),
    }
    # Each process reads the whole model, which is then sharded.
    loading = {} if alone else {"the whole weights, in float32": 4 * count}
    host = {"weights of every process, as they are loaded": 4 * count * cards}
    if offload and cards <= 4:  # then what training holds there is more
        host = {"weights, gradients, moments": 16 * count}
    disk = {"two checkpoints and a third": 3 * 12 * count, "the model folder": 4 * count}
    parts = {"sampling": sampling, "loading to train": loading, "training": training}
    return parts | {"host": host, "disk": disk}


def config_of(path: str):
    """The config of a folder or hub id; UserError if there is none."""
    try:
        return transformers.AutoConfig.from_pretrained(path)
    except Exception as e:
        raise UserError(f"{path}: not a model folder ({first_line(e)})") from e


def require_memory(path: str, tokens: int, offload: bool, card: float | None = None):
    """Refuse training that cannot fit, before anything is loaded. card: bytes of one, by default
    this machine's; without one nothing is refused."""
    if card is None and torch.cuda.is_available():
        card = torch.cuda.mem_get_info()[1]
    if card is None:
        return
    config = config_of(path)
    found = memory(config, 0, tokens, 0, world(), offload)
    without = " and without --offload" if offload else ", --offload"
    for stage, mend in (
        ("training", f"torchrun with more cards{without}, or a smaller --budget"),
        ("loading to train", "cards of more memory"),
    ):
        need = sum(found[stage].values())
        if need > 0.92 * card:
            each = f"{need / 1e9:.0f} GB of each card, which has {card / 1e9:.0f}"
            raise UserError(f"{path}: {stage} needs {each}; mend it by {mend}")
    host = sum(found["host"].values())
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if host > have:
        wrong = f"training needs {host / 1e9:.0f} GB of the host's memory, which has"
        mend = "more of it, or torchrun without --offload" if offload else "fewer cards"
        raise UserError(f"{path}: {wrong} {have / 1e9:.0f}; mend it by {mend}")


def print_memory(arguments: list[str]):
    """python model.py MODEL [--cards N] [--memory GB] [--columns C] [--tokens T] [--rows R]"""

    parser = argparse.ArgumentParser(description="What a model needs of memory in every stage.")
    parser.add_argument("model", help="a folder or hub id; only its config is read")
    parser.add_argument("--cards", type=int, default=1, help="that training is sharded over")
    parser.add_argument("--memory", type=float, default=80.0, help="of one card")
    parser.add_argument("--columns", type=int, default=2448, help="tokens of prompt and response")
    parser.add_argument("--tokens", type=int, default=8192, help="of a pack, --budget")
    parser.add_argument("--rows", type=int, default=256, help="decoded at once, --batch")
    s = parser.parse_args(arguments)
    if min(s.cards, s.memory, s.columns, s.tokens, s.rows) <= 0:
        raise UserError("model.py: a number is not above 0")
    config = config_of(s.model)
    print(f"{s.model}, GB on each of {s.cards} card(s) of {s.memory:.0f} GB")
    for offload in (False, True):
        found = memory(config, s.columns, s.tokens, s.rows, s.cards, offload)
        for stage, parts in found.items():
            if not parts or (offload and stage in ("sampling", "disk")):
                continue
            total = sum(parts.values()) / 1e9
            title = f"{stage}, --offload" if offload else stage
            listed = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in parts.items())
            verdict = ""
            if stage not in ("host", "disk"):
                room = 0.92e9 * s.memory  # the rest: kernels, fragments
                mend = {"sampling": "--batch is lowered to what fits"}
                if parts.get("weights", 0) > room:
                    mend["sampling"] = "an engine on more cards"
                mend["loading to train"] = "cards of more memory"
                without = " without it" if offload else ", --offload"
                mend["training"] = f"more cards{without}, or a smaller --budget"
                verdict = " fits" if 1e9 * total < room else f" does not fit: {mend[stage]}"
            print(f"  {title}: {total:.1f}{verdict} ({listed})")
