"""What a model will need of memory, and an iteration of time, from a config and a few counts.

It knows nothing of the algorithm: how many tokens are drawn and trained on, it is told.

    python -m support.memory MODEL [--cards N] [--memory GB] [--help]
"""

import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from support.attention import head_sizes, row_bytes
from support.cli import Help, UserError, first_line, flag, without_limits
from support.distributed import PINNED_EXACTLY, decoder_layers, local_world, pin_exactly, world
from support.scoring import ROUND

USABLE = 0.92  # of a card's memory; the rest is for kernels and fragments
# Bytes of the host's memory per token, of records and of packs (measured).
TREE_BYTES, PACK_BYTES = 28, 46


def memory(
    config,
    columns: int,
    tokens: int,
    rows: int,
    cards: int,
    offload: bool,
    tree_tokens: int = 0,
    on_host: int = 0,
) -> dict[str, dict[str, int]]:
    """{stage: {part: bytes}} of one card, of a host, and of the disk.

    columns: of a row of the key/value cache (prompt and response); tokens of a pack; rows decoded
    at once; cards: that the weights are sharded over, on_host: how many of them one host has, by
    default all; tree_tokens: of the trees that are read. Training is in bfloat16 with checkpointed
    layers.
    """
    on_host = on_host or cards
    model, config = empty_model(config), config.get_text_config()
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
    unsharded = cards == 1 and not offload
    stream = 4 if unsharded else 2  # bytes of a number of it
    state = 0 if offload else 16 * count // cards  # float32 weights, gradients and two moments
    if unsharded:
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
    host = {"weights, as the first process reads them": 4 * count}
    if offload:
        shard = sum(pinned_bytes(p.shape, cards) for p in model.parameters())
        moments = 8 * count * on_host // cards
        held = {"weights and gradients, pinned": 2 * shard * on_host, "moments": moments}
        host = max(host, held, key=lambda parts: sum(parts.values()))
    host["trees, read by every process"] = TREE_BYTES * tree_tokens * on_host
    host["packs of a round"] = PACK_BYTES * min(tree_tokens, cards * ROUND) * on_host // cards
    disk = {"two checkpoints and a third": 3 * 12 * count, "critic and actor": 8 * count}
    return {"sampling": sampling, "training": training, "host": host, "disk": disk}


def empty_model(config) -> torch.nn.Module:
    """The model of a config, without memory for its weights."""
    for kind in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText):
        with suppress(ValueError), torch.device("meta"):
            return kind.from_config(config)
    raise UserError(f"{config.model_type}: no language model with a decoder alone")


def pinned_bytes(shape, cards: int) -> int:
    """What torch takes of the host for a float32 parameter's pinned shard: the next power of two,
    but for those above a MB where it was told not to (`pin_exactly`)."""
    size = 4 * -(-shape[0] // cards) * shape[1:].numel()
    exact = size > 1 << 20 and PINNED_EXACTLY in os.environ.get("PYTORCH_ALLOC_CONF", "")
    return size if exact else 1 << (size - 1).bit_length()


def host_memory(groups=Path("/proc/self/cgroup"), root=Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory that this process may have: the machine's, or less if its container (cgroup,
    version 1 or 2) or one around that has a limit."""
    least = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for line in groups.read_text().splitlines() if groups.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):  # of version 2, or of version 1's for memory
            continue
        folder = root / controllers / path.lstrip("/")
        while folder.is_relative_to(root):
            for name in ("memory.max", "memory.limit_in_bytes"):
                limit = (folder / name).read_text().strip() if (folder / name).exists() else "max"
                if limit != "max":
                    least = min(least, int(limit))
            folder = folder.parent
    return least


def config_of(path: str):
    """The config of a folder or hub id; UserError if there is none."""
    try:
        return transformers.AutoConfig.from_pretrained(path)
    except Exception as e:
        raise UserError(f"{path}: not a model folder ({first_line(e)})") from e


def remedy(stage: str, offload: bool) -> str:
    """What helps where a stage does not fit."""
    other = " and without --offload" if offload else ", --offload"
    return {
        "sampling": "a smaller --batch (it is lowered to what fits), or an engine on more cards",
        "training": f"torchrun with more cards{other}, or a smaller --budget",
        "host": f"more of it, or {'torchrun without --offload' if offload else 'fewer cards'}",
    }[stage]


def require_memory(
    path: str, tokens: int, offload: bool, records: list[dict] = (), card: float | None = None
) -> int:
    """Refuse training that cannot fit, before a model is loaded. records: the trees that are read;
    card: bytes of one, by default this machine's; without one nothing is refused.

    -> over how many processes to shard the weights: of several machines over one machine's if they
    fit there, since then only gradients travel between machines; else over all.
    """
    if card is None and torch.cuda.is_available():
        card = torch.cuda.mem_get_info()[1]
    numbers = [world()] if offload else [local_world(), world()]
    if card is None:
        return numbers[0]
    config = config_of(path)
    tree_tokens = sum(len(node["ids"]) for record in records for node in record["nodes"])
    for cards in numbers:
        found = memory(config, 0, tokens, 0, cards, offload, tree_tokens, local_world())
        wrong = shortage(found, card, offload)
        if not wrong:
            return cards
    raise UserError(f"{path}: {wrong}")


def shortage(found: dict, card: float, offload: bool) -> str | None:
    """What training lacks of what `memory` found, and what helps."""
    for stage, whose, most in (
        ("training", "each card's memory", USABLE * card),
        ("host", "the host's memory", host_memory()),
    ):
        need = sum(found[stage].values())
        if need > most:
            gap = f"training needs {need / 1e9:.0f} GB of {whose}, and may have {most / 1e9:.0f}"
            return f"{gap}; mend it by {remedy(stage, offload)}"
    return None


@dataclass(frozen=True)
class Work:
    """What one iteration's hours are computed from. Tokens are counted per problem; rates are one
    H100's with a model of 7.6 billion parameters, and inverse to a model's parameters."""

    problems: int = flag("problems of the iteration: MATH's", 7500)
    sampled: int = flag("tokens drawn in sampling: 32 responses of 400", 12_800)
    labelled: int = flag("tokens drawn in labelling (computed: 210,000 to 310,000)", 260_000)
    kept: int = flag("tokens of a tree without its leaves, which the critic trains on", 2500)
    tree: int = flag("tokens of a tree: 900 nodes of 35", 31_500)
    drawing: float = flag("tokens/s drawn by an engine (assumed; 15300 without one)", 20_000.0)
    training: float = flag("tokens/s trained on (measured without the optimiser)", 8200.0)
    passing: float = flag("tokens/s of a forward pass (a training pass is four)", 32_800.0)
    critic_step: int = flag("tokens of an optimiser step of the critic: 512 states", 12_600)
    actor_step: int = flag("tokens of an optimiser step of the actor: 2048 pairs", 82_000)
    offload_seconds: float = flag("what --offload adds per step and billion (measured, 1.5B)", 0.92)
    critic_share: float = flag("of eight cards' time in a critic's step that is used", 0.83)
    actor_share: float = flag("of eight cards' time in an actor's step that is used", 0.93)


def hours(parameters: int, cards: int, offload: bool, work: Work) -> dict[str, float]:
    """{stage: hours} of one iteration on `cards` cards of one machine, without loading, evaluation
    and checkpoints: what is drawn and trained on, by the cards' rates.

    A tenth of the problems is held out from the critic and tested on. Before the actor trains, one
    pass over the trees has the values and one the reference log-probs.
    """
    size, tokens = parameters / 7.6e9, work.problems * work.tree
    drawing, passing = cards * work.drawing / size, cards * work.passing / size  # tokens/s
    training = cards * work.training / size
    critic_tokens = 0.9 * work.problems * work.kept
    critic_share, actor_share = (work.critic_share, work.actor_share) if cards > 1 else (1, 1)
    waiting = work.offload_seconds * parameters / 1e9 if offload else 0  # seconds per step
    seconds = {
        "sampling": work.problems * work.sampled / drawing,
        "labelling": work.problems * work.labelled / drawing,
        "critic": critic_tokens * (1 / training / critic_share + waiting / work.critic_step),
        "critic's test": 0.1 * tokens / passing,
        "values and reference log-probs": 2 * tokens / passing,
        "actor": tokens * (1 / training / actor_share + waiting / work.actor_step),
    }
    return {stage: s / 3600 for stage, s in seconds.items()}


def print_table(arguments: list[str]):
    """The memory of every stage, and the hours of an iteration, for one model and machine."""
    parser = transformers.HfArgumentParser(
        without_limits(Work), description=__doc__, formatter_class=Help
    )
    parser.add_argument("model", help="a folder or hub id; only its config is read")
    parser.add_argument("--cards", type=int, default=1, help="of one machine, that train together")
    parser.add_argument("--memory", type=float, default=80.0, help="GB of one card")
    parser.add_argument("--columns", type=int, default=2448, help="tokens of prompt and response")
    parser.add_argument("--tokens", type=int, default=8192, help="of a pack, --budget")
    parser.add_argument("--rows", type=int, default=256, help="decoded at once, --batch")
    work, s = parser.parse_args_into_dataclasses(arguments)
    for name, number in (vars(s) | vars(work)).items():
        if name != "model" and number <= 0:
            raise UserError(f"--{name} {number}: wanted a number above 0")
    pin_exactly()  # as training does
    config = config_of(s.model)
    trees = work.problems * work.tree
    print(f"{s.model}, GB on each of {s.cards} card(s) of {s.memory:.0f} GB")
    for offload in (False, True):
        found = memory(config, s.columns, s.tokens, s.rows, s.cards, offload, trees)
        for stage, parts in found.items():
            if not parts or (offload and stage in ("sampling", "disk")):
                continue
            total = sum(parts.values()) / 1e9
            title = "sampling without an engine" if stage == "sampling" else stage
            title += ", --offload" * offload
            listed = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in parts.items())
            verdict = ""
            if stage not in ("host", "disk"):
                fits = total < USABLE * s.memory
                verdict = " fits" if fits else f" does not fit: {remedy(stage, offload)}"
            print(f"  {title}: {total:.1f}{verdict} ({listed})")
    count = sum(p.numel() for p in empty_model(config).parameters())
    print(
        f"hours of an iteration of {work.problems} problems (--help: what they are computed from)"
    )
    for offload in (False, True)[: 2 if s.cards == 1 else 1]:  # --offload: measured on one
        found = hours(count, s.cards, offload, work)
        listed = ", ".join(f"{stage} {number:.1f}" for stage, number in found.items())
        print(f"  {'--offload: ' if offload else ''}{sum(found.values()):.1f} ({listed})")


if __name__ == "__main__":
    try:
        print_table(sys.argv[1:])
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
