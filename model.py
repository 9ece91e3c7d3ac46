"""The language model of every stage, and the three quantities of the paper that are read from it.

Read from top to bottom:
  load_lm           reads a Hugging Face decoder with its tokenizer, checks both and hands over an LM
  LM                prompts, where steps end, hidden states, logits
  step_advantages   A(s, a) of many steps at once, eq. 13
  linear_logprobs   log-probs from hidden states without holding [tokens, vocabulary]
  step_logprobs, step_values   log pi(a | s) and V(s) of many steps at once, by a model

Sizes: N tokens of a pack (support/packing.py: trees of steps side by side in one row of tokens), M
scored nodes, S states, K actions, B rows of a batch, T columns, V vocabulary, d width.
"""

import functools
import re
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import transformers

from support.architectures import checkpoint_layers, choose_form, decoder_of, refuse_dropout
from support.attention import forward_pack, on_cuda, pack_hidden, seen_through
from support.cli import UserError, first_line
from support.distributed import bring_weights, is_sharded, joined, rank, whole_state
from support.packing import Pack
from support.records import are_counts
from support.tokens import Codec
from support.weights import read_generation_config, read_once, read_weights

# A stage's lines are the only ones on the screen, whoever loads or saves a model in it.
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


# ------------------------------------------------------------ the language model


def load_lm(
    path, train=False, device: str | None = None, dtype="", weights=True, checkpointed=True
) -> "LM":
    """The decoder and tokenizer of a Hugging Face folder or hub id.

    dtype: what it computes in, by default bfloat16 on CUDA and float32 on the CPU. train=True holds
    the weights in float32 all the same (bfloat16 cannot hold AdamW's updates at the paper's
    learning rates) and computes by autocast. weights=False reads tokenizer and config alone, for
    stages whose draws come from a server. checkpointed: gradient checkpointing where a model is
    trained on CUDA. Raises UserError for what cannot work: no tokenizer, no EOS, no line break,
    attention that a tree mask would break.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("bfloat16" if device == "cuda" else "float32")
    if dtype not in ("bfloat16", "float32"):
        raise UserError(f"--dtype {dtype}: wanted bfloat16 or float32")
    try:
        if weights and joined():  # several processes, or one with --offload
            lm = read_once(lambda: read_lm(path, train, "cpu", dtype, weights=True))
            lm.place(device)
            if not train:  # else `shard` does it
                bring_weights(lm.model, device)
        else:
            lm = read_lm(path, train, device, dtype, weights)
    except torch.OutOfMemoryError as e:
        raise UserError(f"{path}: the weights do not fit on this GPU, or others use it") from e
    if weights and train and checkpointed and device == "cuda":
        checkpoint_layers(lm.model)
    return lm


def read_lm(path, train: bool, device: str, dtype: str, weights: bool) -> "LM":
    """An LM as the files of a folder say, its weights on one device."""
    model, why = None, ""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        config = transformers.AutoConfig.from_pretrained(path).get_text_config()
        if weights:
            kind = torch.float32 if train else getattr(torch, dtype)
            model, why = read_weights(path, kind, device)
            config, generation = model.config.get_text_config(), model.generation_config
        else:
            generation = read_generation_config(path, config)
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # a broken folder raises all kinds; the user needs one line
        raise UserError(f"{path}: not a model folder with a tokenizer ({first_line(e)})") from e
    lm = LM(str(path), device, dtype == "bfloat16", tokenizer, config, generation, model)
    if weights:
        choose_form(lm, why)
    if weights and train:
        refuse_dropout(lm)
    return lm


class LM:
    """A decoder and its tokenizer, as `load_lm` hands them over.

    path, device, in_bfloat16 (what it computes in; else float32), tokenizer, config (of the text
    model), generation (its generation config), model (None without weights; in eval mode always, so
    that the log-ratio starts at exactly 0).
    """

    def __init__(self, path, device, in_bfloat16, tokenizer, config, generation, model=None):
        self.path, self.in_bfloat16 = path, in_bfloat16
        self.tokenizer, self.config, self.generation = tokenizer, config, generation
        self.hold(model)
        # What load_lm finds out. Logits are softcap * tanh(scale * product / softcap).
        self.scale, self.softcap = 1.0, None
        # Trees are computed path by path, since a tree mask does not hold.
        self.paths = False
        # Of the layers: how many of the last tokens each sees, None: all.
        self.windows = []
        self.codec = Codec(tokenizer, path, generation.eos_token_id, config.vocab_size)
        self.eos, self.own_eos = self.codec.eos, self.codec.own_eos
        self.step = "line"  # what a step is (`step_ends`)
        self.place(device)

    def hold(self, model):
        """Compute by this Hugging Face model from now on; None: by none."""
        self.model = model
        self.decoder = None if model is None else decoder_of(model)

    def place(self, device: str):
        """Compute on this device from now on; its weights must come there, too."""
        self.device = device
        self.may_capture = device == "cuda"  # may sampling capture CUDA graphs (support/sampler.py)
        # Whether flex_attention does what plain attention does. None: it is tried at the first
        # pack, so that stages which only draw need not wait until it is compiled.
        self.flex = None if device == "cuda" else False

    @property
    def head(self) -> torch.Tensor:
        return self.model.get_output_embeddings().weight  # (V, d)

    @property
    def head_bias(self) -> torch.Tensor | None:
        return getattr(self.model.get_output_embeddings(), "bias", None)  # (V,)

    @property
    def max_length(self) -> int:
        return getattr(self.config, "max_position_embeddings", None) or 1 << 30

    def prompt_ids(self, prompt: str) -> list[int]:
        """Token ids of a user message: by chat template if there is one, else plain; one BOS."""
        return self.codec.prompt_ids(prompt)

    def response_ids(self, text: str) -> list[int]:
        """Token ids of a demonstration, with the EOS that the policy must learn."""
        return self.codec.response_ids(text)

    def text(self, ids: list[int]) -> str:
        return self.codec.text(ids)

    def step_ends(self, ids: list[int]) -> list[int]:
        """Offsets one past each step's last token (section 3): the one place that cuts responses.

        A fork that cuts elsewhere replaces the body, by `return [*range(32, len(ids), 32), len(ids)]`
        say, and samples again. Its contract, which sample.py and label_steps.py check:
          - The offsets rise, and the last one is len(ids). Without ids there is none.
          - `ids` may be the rest of a response from a step's end on, since a completion begins at a
            state. The rest must be cut as it is cut within the whole, so where a step ends may depend
            on the tokens since the step before, but not on their place in the response.
          - An EOS should end the step before it: a step of EOS alone costs m completions for nothing.

        lm.step, the unit that sample.py --step chose:
        "line": a step ends after a token whose text has a line break. A step of white space alone
        belongs to the one before it (at the very start, where there is none, to the one after it).
        "5 + 3 = 8\\n" "\\n" "So 8.\\n" EOS -> two steps; the blank line joins the first.
        "paragraph": lines up to one that a blank line follows. "response": all is one step. "32": a
        step has 32 tokens.
        """
        if not ids:
            return []
        if self.step == "response":
            return [len(ids)]
        if self.step.isdigit():
            return [*range(int(self.step), len(ids), int(self.step)), len(ids)]
        ids = np.asarray(ids)
        ends = np.append(np.flatnonzero(self.codec.breaks[ids[:-1]]) + 1, len(ids))  # (steps,)
        blank = np.logical_and.reduceat(self.codec.blank[ids], np.append(0, ends[:-1]))
        # step i ends if step i + 1 is not blank, and something up to here is not blank either
        inner = ~blank[1:] & (np.cumsum(~blank)[:-1] > 0)
        ends = np.append(ends[:-1][inner], len(ids)).tolist()
        if self.step == "line":
            return ends
        lines = [self.text(ids[a:b]) for a, b in pairwise([0, *ends])]
        followed = [bool(re.search(r"\S[^\S\n]*\n[^\S\n]*\n", line)) for line in lines]
        return [end for end, last in zip(ends, followed) if last or end == len(ids)]

    def autocast(self):
        """bfloat16 products where the weights are held in float32; elsewhere the weights already
        have the dtype that they compute in.

        A pass uses each weight once, so to keep its rounded copy would only cost memory.
        """
        enabled = self.in_bfloat16 and self.head.dtype is torch.float32
        return torch.autocast(self.device, torch.bfloat16, enabled=enabled, cache_enabled=False)

    def hidden(self, ids: torch.Tensor, pos: torch.Tensor, view) -> torch.Tensor:
        """Last hidden states (B, T, d) of ids (B, T) at positions (B, T); `view`: who sees whom."""
        mask = torch.ones_like(ids)  # so that transformers does not look for sequences in `pos`
        with self.autocast(), seen_through(view):
            out = self.decoder(
                input_ids=ids, attention_mask=mask, position_ids=pos, use_cache=False
            )
        return out.last_hidden_state

    def product(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states (B, d) and the head (V, d) of one dtype, whose product are the logits; if
        they have a bias, it is one more column of the head, for a one in each hidden state."""
        head = self.head.to(hidden.dtype)
        if self.head_bias is not None:
            hidden = torch.nn.functional.pad(hidden, (0, 1), value=1.0)
            head = torch.cat([head, self.head_bias.to(head.dtype)[:, None]], 1)
        return hidden, head

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) of hidden states (B, d), in float32."""
        (hidden, head), in_bfloat16 = self.product(hidden), hidden.dtype is torch.bfloat16
        z = _matmul32(_wide(hidden), _wide(head).T, in_bfloat16) * self.scale  # (B, V)
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def with_weights(self, function):
        """function(), with all weights gathered. Where they are sharded it runs as a method of the
        model (see `shard`), since only that gathers them."""
        return self.model.with_weights(function) if is_sharded(self.model) else function()

    def save(self, folder: Path):
        """Write a Hugging Face folder; of several processes the first one writes."""
        state = whole_state(self.model)
        if rank() > 0:
            return
        try:
            self.model.generation_config.validate(strict=True)
        except ValueError:  # a temperature without do_sample, which may be loaded but not saved
            self.model.generation_config.do_sample = True
        self.model.save_pretrained(folder, state_dict=state)
        self.tokenizer.save_pretrained(folder)


def checked_step_ends(lm: LM, ids: list[int]) -> list[int]:
    """lm.step_ends(ids), looked at before anything is made of it: a fork's own may be wrong."""
    ends = lm.step_ends(ids)
    if not are_counts(ends) or ends != sorted({*ends, len(ids)} - {0}):
        wanted = f"wanted offsets that rise to {len(ids)}"
        raise UserError(f"LM.step_ends (model.py): cuts {len(ids)} tokens at {ends}; {wanted}")
    return ends


def require_step_unit(step: str):
    """Refuse a --step that `LM.step_ends` does not know."""
    if step not in ("line", "paragraph", "response") and not re.fullmatch("[1-9][0-9]*", step):
        wanted = "wanted line, paragraph, response, or a number of tokens"
        raise UserError(f"--step {step}: {wanted}")


# ------------------------------------------------------------ advantages (eq. 13)


def step_advantages(q, parent, draws):
    """Eq. 13, A(s, a) = Q(s, a) - 1/M sum_j Q(s, a_j), for every action of every state at once.

    q (K,) value of each action, parent (K,) its state in 0 .. S-1, draws (K,) how often it was
    drawn there: duplicates count in the mean, since it estimates E_{a ~ pi_ref} Q.
    -> adv (K,), mean (S,), gap (S,) = max A - min A (appendix F.1).

    One state, q = [1, 0, .5], draws [1, 2, 1]: mean = 1.5 / 4 = .375, adv = [.625, -.375, .125].
    """
    states = int(parent.max()) + 1
    total = q.new_zeros(states).index_add(0, parent, q * draws)
    count = q.new_zeros(states).index_add(0, parent, draws.to(q.dtype))
    mean = total / count
    high = q.new_full((states,), -torch.inf).scatter_reduce(0, parent, q, "amax")
    low = q.new_full((states,), torch.inf).scatter_reduce(0, parent, q, "amin")
    return q - mean[parent], mean, high - low  # eq. 13, its mean, the gap


# ------------------------------------------------------------ log-probs and values


def _wide(x):
    """What `_matmul32` takes: on the CPU bfloat16 numbers are written in float32, without loss."""
    return x if on_cuda(x) else x.to(torch.promote_types(x.dtype, torch.float32))


def _matmul32(a, b, in_bfloat16: bool):
    """a (n, k) @ b (k, m) with sums in float32 at least; in_bfloat16: of bfloat16 numbers.

    The one place where CPU and CUDA multiply differently: CUDA takes bfloat16 and gives float32, the
    CPU takes the same numbers written in float32 and may use its bfloat16 units for them.
    """
    if not in_bfloat16:
        return a @ b
    if on_cuda(a):
        return torch.mm(a, b, out_dtype=torch.float32)
    matmul = torch.backends.mkldnn.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        return a @ b
    finally:
        matmul.fp32_precision = before


def _largest_block(x) -> tuple[int, int]:
    """(tokens, vocabulary) of the logits that exist at once: what was fast on CPUs, and on an H200."""
    return (4096, 16384) if on_cuda(x) else (2048, 2048)


def _running_sum(z, top, total):
    """Running maximum (n,), and running sum of exp(logit - maximum), with one more block of logits
    z (n, v)."""
    new = torch.maximum(top, z.amax(-1))
    return new, total * (top - new).exp() + (z - new[:, None]).exp_().sum(-1)


def _softmax_times(z, lse, factor, dtype: torch.dtype):
    """factor * softmax of a block of logits z (n, v), in float32 until it is rounded to dtype."""
    return ((z - lse[:, None]).exp_().mul_(factor)).to(dtype)


@functools.cache
def _one_kernel(function):
    """`function`, compiled to a kernel that reads each logit once; only CUDA comes here. Operator by
    operator most of the time is spent on passes over the logits. Where torch cannot compile, the
    operators go on, with one line of warning."""
    compiled = torch.compile(function, dynamic=True)

    def run(*arguments):
        nonlocal compiled
        try:
            return compiled(*arguments)
        except torch._dynamo.exc.TorchDynamoException as e:
            wrong = f"log-probs are slower, torch cannot compile here ({first_line(e)})"
            print(f"warning: {wrong}", file=sys.stderr)
            compiled = function
            return function(*arguments)

    return run


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, scale, softcap):
        high = torch.promote_types(hidden.dtype, torch.float32)
        top = hidden.new_full((len(hidden),), -torch.inf, dtype=high)  # running maximum
        total = torch.zeros_like(top)  # running sum of exp(logit - top)
        target = torch.zeros_like(top)  # the target's logit
        in_bfloat16, wide = hidden.dtype is torch.bfloat16, _wide(hidden)
        tokens, vocabulary = _largest_block(hidden)
        running_sum = _one_kernel(_running_sum) if on_cuda(hidden) else _running_sum
        for w, first in _chunks(weight, vocabulary):
            for h, row in _chunks(wide, tokens):
                z = _times(_matmul32(h, w.T, in_bfloat16), scale)
                if softcap is not None:
                    z = softcap * torch.tanh(z / softcap)
                rows = slice(row, row + len(h))
                local = targets[rows] - first
                inside = (local >= 0) & (local < len(w))
                own = z.gather(1, local.clamp(0, len(w) - 1)[:, None])[:, 0]
                target[rows] += torch.where(inside, own, 0)
                top[rows], total[rows] = running_sum(z, top[rows], total[rows])
        lse = top + total.log()
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.scale, ctx.softcap = scale, softcap
        return target - lse

    @staticmethod
    def backward(ctx, grad):
        """d logp_t / d logit_v = [v = t] - softmax_v, recomputed block by block.

        Vocabulary outside, tokens inside: one float32 accumulator of a block's rows, not of [V, d].
        """
        hidden, weight, targets, lse = ctx.saved_tensors
        need_h, need_w = ctx.needs_input_grad[:2]
        grad_h = torch.zeros_like(hidden, dtype=lse.dtype) if need_h else None
        grad_w = torch.empty_like(weight) if need_w else None
        in_bfloat16, wide = hidden.dtype is torch.bfloat16, _wide(hidden)
        tokens, vocabulary = _largest_block(hidden)
        softmax_times = _one_kernel(_softmax_times) if on_cuda(hidden) else _softmax_times
        for w, first in _chunks(weight, vocabulary):
            acc = torch.zeros(w.shape, dtype=lse.dtype, device=w.device) if need_w else None
            for h, row in _chunks(wide, tokens):
                rows = slice(row, row + len(h))
                z = _times(_matmul32(h, w.T, in_bfloat16), ctx.scale)
                slope = grad[rows, None] * ctx.scale  # of logp by the product, but for the softmax
                if ctx.softcap is not None:
                    t = torch.tanh(z / ctx.softcap)
                    z, slope = ctx.softcap * t, slope * (1 - t * t)
                g = softmax_times(z, lse[rows], -slope, wide.dtype)  # (n, v)
                # The target's own entry is 1 - softmax, in float32 before any rounding.
                local = targets[rows] - first
                inside = ((local >= 0) & (local < len(w)))[:, None]
                column = local.clamp(0, len(w) - 1)[:, None]
                own = slope.expand_as(z).gather(1, column)  # (n, 1)
                entry = (z.gather(1, column) - lse[rows, None]).exp() * -own + own
                entry = torch.where(inside, entry.to(wide.dtype), g.gather(1, column))
                g.scatter_(1, column, entry)
                if need_h:
                    grad_h[rows] += _matmul32(g, w, in_bfloat16)
                if need_w:
                    acc += _matmul32(g.T, h, in_bfloat16)
            if need_w:
                grad_w[first : first + len(w)] = acc
        return grad_h.to(hidden.dtype) if need_h else None, grad_w, None, None, None


def _times(x, factor):
    """x * factor, in place; nearly every model's factor is 1, which need not read x again."""
    return x if factor == 1.0 else x.mul_(factor)


def _chunks(x, size):
    """Blocks of `size` rows, each with the number of its first row."""
    for first in range(0, len(x), size):
        yield _wide(x[first : first + size]), first


def linear_logprobs(hidden, weight, targets, scale: float = 1.0, softcap: float | None = None):
    """log softmax(hidden @ weight')[targets] without ever holding [N, V].

    hidden (N, d), weight (V, d) of one dtype, targets (N,) int64 -> (N,) float32 (or float64). An
    online logsumexp over vocabulary chunks; backward recomputes them. The model's logit transforms:
    softcap * tanh(scale * logit / softcap).
    """
    return _LinearLogprobs.apply(hidden, weight, targets, scale, softcap)


def step_logprobs(lm: LM, pack: Pack) -> torch.Tensor:
    """log pi(a | s) of every scored node: the sum over its tokens, EOS included (eq. 12). (M,)"""
    # A prompt's first token has none before it, so it has no log-prob.
    token = ((pack.node >= 0) & (pack.prev >= 0)).nonzero()[:, 0]
    source, target = pack.prev[token].to(lm.device), pack.ids[token].to(lm.device)

    def token_logprobs():
        hidden = forward_pack(lm, pack)
        if lm.in_bfloat16:  # autocast leaves the last norm in float32
            hidden = hidden.bfloat16()
        hidden, head = lm.product(hidden[source])
        return linear_logprobs(hidden, head, target, lm.scale, lm.softcap)

    logp = lm.with_weights(token_logprobs)
    sums = torch.zeros(len(pack.owner), dtype=logp.dtype, device=lm.device)
    return sums.index_add(0, pack.node[token].to(lm.device), logp)


def step_values(lm: LM, value_head: torch.nn.Linear, pack: Pack) -> torch.Tensor:
    """Logit of V(s) of every scored node, read at the state's last token (eq. 15). (M,)"""
    return value_head(pack_hidden(lm, pack)[pack.last.to(lm.device)].float())[:, 0]
