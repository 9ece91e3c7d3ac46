"""The language model of every stage: packing, attention, log-probs, advantages, the training loop.

Read from top to bottom:
  LM                any Hugging Face decoder with its tokenizer; prompts; where steps end
  pack_trees        step trees -> one row of tokens; `end` is causal and tree mask at once
  attend            the attention of every model; a pack or a cache decides who sees whom
  linear_logprobs   log-probs from hidden states without holding [tokens, vocabulary]
  step_logprobs, step_values, step_advantages   the three quantities of the paper, a number a step
  join, shard       several cards (torchrun, FSDP2), or one with the host's memory
  fit               the training loop: accumulation, NaN check, metrics, exact resume
  memory            what a model needs in every stage: python model.py MODEL --cards 8 --memory 80

Sizes: N tokens of a pack, M scored nodes, S states, B rows of a batch, T columns, V vocabulary,
d width, L layers, G key/value heads, R query heads a key/value head, D head size, K gathered keys or
(eq. 13) actions.
"""

import functools
import re
import sys
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.utils.checkpoint import checkpoint

from support.attention import TreeView, _pack_hidden, attend, on_cuda, pack_hidden
from support.cli import UserError, first_line
from support.distributed import decoder_layers, is_sharded, rank, whole_state
from support.packing import Pack, Tree, pack_trees
from support.records import misfit
from support.tokens import Codec

# A stage's lines are the only ones on the screen, whoever loads or saves a model in it.
transformers.logging.set_verbosity_error()


transformers.logging.disable_progress_bar()


# ------------------------------------------------------------ the language model


class LM:
    """A decoder and its tokenizer, from a Hugging Face folder or hub id.

    dtype: what it computes in, by default bfloat16 on CUDA and float32 on the CPU. train=True holds
    the weights in float32 all the same (bfloat16 cannot hold AdamW's updates at the paper's
    learning rates) and computes by autocast. weights=False loads tokenizer and config alone, for
    stages whose draws come from a server. checkpointed: of a trained model on CUDA the layers are
    computed twice, which saves memory. Raises UserError for what cannot work: no tokenizer, no EOS,
    no line break, attention that a tree mask would break.
    """

    def __init__(
        self,
        path,
        train=False,
        device: str | None = None,
        dtype="",
        weights=True,
        checkpointed=True,
    ):
        # Registered here and not on import: it takes seconds, and a complete stage should say so
        # at once.
        transformers.AttentionInterface.register("dapo", attend)
        self.path = str(path)
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or ("bfloat16" if self.device == "cuda" else "float32")
        if dtype not in ("bfloat16", "float32"):
            raise UserError(f"--dtype {dtype}: wanted bfloat16 or float32")
        self.in_bfloat16 = dtype == "bfloat16"
        self.model = None
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
            self.config = transformers.AutoConfig.from_pretrained(path).get_text_config()
            if weights:
                self._load(torch.float32 if train else getattr(torch, dtype))
                self.generation = self.model.generation_config
            else:
                self.generation = transformers.GenerationConfig.from_model_config(self.config)
                if (Path(path) / "generation_config.json").exists():
                    self.generation = transformers.GenerationConfig.from_pretrained(path)
                elif not Path(path).is_dir():
                    with suppress(OSError):  # many a model of the hub has none
                        self.generation = transformers.GenerationConfig.from_pretrained(path)
        except torch.OutOfMemoryError as e:
            raise UserError(f"{path}: the weights do not fit on this GPU, or others use it") from e
        except Exception as e:  # a broken folder raises all kinds; the user needs one line
            raise UserError(f"{path}: not a model folder with a tokenizer ({first_line(e)})") from e
        end, size = self.generation.eos_token_id, self.config.vocab_size
        self.codec = Codec(self.tokenizer, self.path, end, size)
        self.eos, self.own_eos = self.codec.eos, self.codec.own_eos
        self.step = "line"  # what a step is (`step_ends`)
        self.may_capture = self.device == "cuda"  # may sampling capture CUDA graphs (sample.Slots)
        # Whether flex_attention does what the gathered form does. None: it is tried at the first
        # pack, so that stages which only draw need not wait until it is compiled.
        self.flex = False
        if weights:
            self._refuse_other_attention()
            self.flex = None if self.device == "cuda" else False
        if weights and train:
            self._refuse_dropout()
            if checkpointed and self.device == "cuda":
                self.checkpoint_layers()

    def _load(self, dtype: torch.dtype):
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            self.path, dtype=dtype, attn_implementation="dapo", output_loading_info=True
        )
        if report["missing_keys"]:
            raise ValueError(f"no {min(report['missing_keys'])} in the weights")
        self.model = model.to(self.device).eval()
        self.decoder, self.config = model.base_model, model.config.get_text_config()
        self.scale = getattr(self.config, "logit_scale", None) or 1.0
        self.scale /= getattr(self.config, "logits_scaling", None) or 1.0
        self.softcap = getattr(self.config, "final_logit_softcapping", None)

    @property
    def head(self) -> torch.Tensor:
        return self.model.get_output_embeddings().weight  # (V, d)

    @property
    def max_length(self) -> int:
        return getattr(self.config, "max_position_embeddings", None) or 1 << 30

    @torch.no_grad()
    def _refuse_other_attention(self):
        """By config, and by trying: two branches in a pack must score as each path alone, and from
        hidden states must come the model's own logits."""
        kind = self.config.model_type
        if getattr(self.model.get_output_embeddings(), "bias", None) is not None:
            raise UserError(f"{self.path}: {kind} has a bias on its logits, which is not supported")
        other = set(getattr(self.config, "layer_types", None) or []) - {"full_attention"}
        windows = getattr(self.config, "use_sliding_window", True)
        if other or (windows and getattr(self.config, "sliding_window", None)):
            what = ", ".join(sorted(other)) or "a sliding window"
            raise UserError(f"{self.path}: {kind} has {what}; tree packing needs full attention")
        ids = [i % self.config.vocab_size for i in range(3, 12)]
        tree = Tree([ids[:4], ids[4:6], ids[6:]], [-1, 0, 0], [False, True, True])
        (pack,) = pack_trees([tree], 99)
        together = step_logprobs(self, pack)
        apart = []
        for _, v in pack.owner:
            alone = tree._replace(score=[False, v == 1, v == 2])
            apart.append(step_logprobs(self, *pack_trees([alone], 99)))
        if not together.isfinite().all():
            raise UserError(f"{self.path}: its log-probs are no numbers; train it anew")
        if not torch.allclose(together, torch.cat(apart), atol=0.5 if self.in_bfloat16 else 1e-3):
            raise UserError(f"{self.path}: {kind} ignores a tree mask, so it cannot be used")
        ids, pos = pack.ids[None].to(self.device), pack.pos[None].to(self.device)
        view = TreeView(pack, self.device)
        with self._autocast():
            own = self.model(input_ids=ids, position_ids=pos, use_cache=False, view=view).logits[0]
        difference = (own - self.logits(self.hidden(ids, pos, view)[0])).abs().max()
        if difference > (0.1 if self.in_bfloat16 else 1e-3) * own.abs().max():
            raise UserError(f"{self.path}: {kind} scales its logits in a way that is not supported")

    def _refuse_dropout(self):
        """The model stays in eval mode, so that the log-ratio starts at exactly 0. A config with
        dropout is refused rather than trained without it unasked."""
        names = []
        for name, value in self.config.to_dict().items():
            of_a_classifier = name.startswith(("summary", "classifier"))
            if "drop" in name and isinstance(value, float) and value and not of_a_classifier:
                names.append(name)
        if names:
            wrong = f"its config has dropout ({', '.join(names)}), training has none"
            raise UserError(f"{self.path}: {wrong}; set it to 0.0 there")

    def checkpoint_layers(self):
        """Keep of each layer its input alone and compute the rest again in the backward pass: of
        8,192 tokens of an 8B model 4 GB in place of 65. The gradients are the same to the last bit.

        Hugging Face's own switch acts in train mode only, and the model stays in eval mode; so
        layers are wrapped here.
        """
        again = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        for layer in decoder_layers(self.model):
            layer.forward = functools.partial(again, layer.forward)

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

    def _autocast(self):
        """bfloat16 products where the weights are held in float32; elsewhere the weights already
        have the dtype that they compute in.

        A pass uses each weight once, so to keep its rounded copy would only cost memory.
        """
        enabled = self.in_bfloat16 and self.head.dtype is torch.float32
        return torch.autocast(self.device, torch.bfloat16, enabled=enabled, cache_enabled=False)

    def hidden(self, ids: torch.Tensor, pos: torch.Tensor, view) -> torch.Tensor:
        """Last hidden states (B, T, d) of ids (B, T) at positions (B, T); `view`: who sees whom."""
        with self._autocast():
            out = self.decoder(input_ids=ids, position_ids=pos, use_cache=False, view=view)
        return out.last_hidden_state

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) of hidden states (B, d), in float32."""
        head, in_bfloat16 = _wide(self.head.to(hidden.dtype)), hidden.dtype is torch.bfloat16
        z = _matmul32(_wide(hidden), head.T, in_bfloat16) * self.scale  # (B, V)
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
    if misfit(ends, [int]) or ends != sorted({*ends, len(ids)} - {0}):
        wanted = f"wanted offsets that rise to {len(ids)}"
        raise UserError(f"LM.step_ends (model.py): cuts {len(ids)} tokens at {ends}; {wanted}")
    return ends


def require_step_unit(step: str):
    """Refuse a --step that `LM.step_ends` does not know."""
    if step not in ("line", "paragraph", "response") and not re.fullmatch("[1-9][0-9]*", step):
        wanted = "wanted line, paragraph, response, or a number of tokens"
        raise UserError(f"--step {step}: {wanted}")


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
    return x if isinstance(factor, float) and factor == 1.0 else x.mul_(factor)


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
        hidden = _pack_hidden(lm, pack)[0]
        if lm.in_bfloat16:  # autocast leaves the last norm in float32
            hidden = hidden.bfloat16()
        head = lm.head.to(hidden.dtype)
        return linear_logprobs(hidden[source], head, target, lm.scale, lm.softcap)

    logp = lm.with_weights(token_logprobs)
    sums = torch.zeros(len(pack.owner), dtype=logp.dtype, device=lm.device)
    return sums.index_add(0, pack.node[token].to(lm.device), logp)


def step_values(lm: LM, value_head: torch.nn.Linear, pack: Pack) -> torch.Tensor:
    """Logit of V(s) of every scored node, read at the state's last token (eq. 15). (M,)"""
    return value_head(pack_hidden(lm, pack)[pack.last.to(lm.device)].float())[:, 0]


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
    return q - mean[parent], mean, high - low
