"""Text into token ids and token ids into text, for any Hugging Face tokenizer. It knows nothing of
the algorithm.

Read from top to bottom:
  Codec         prompts, responses and steps as ids; ids as text; which tokens break lines
  token_bytes   what each token adds to a text, whatever the kind of tokenizer

The text of some ids is what their tokens' bytes say, one after the other. `tokenizer.decode` is not
used for it, since it takes what it is given for a whole text: tokenizers of SentencePiece's kind
(Llama 2, Mistral) drop a space at its start, which of a step or a completion is its indentation.
"""

import codecs
import datetime
import json
import re
from functools import cached_property

import numpy as np
import tokenizers

from support.cli import UserError


class Codec:
    """A Hugging Face tokenizer, and what this repository asks of it.

    name        whose tokenizer, for errors
    end         eos_token_id of the model's generation_config: an id, some, or None
    size        rows of the model's embedding; those beyond the tokenizer have no text

    eos (list of ids): a response ends at any of them. The tokenizer's own end is one of them, whether
    generation_config names it or not: engines that serve a model end there too.
    bytes (size): what each id adds to a text. breaks (size,): is there a line break in it. blank
    (size,): is it white space or nothing.
    date: what a chat template is told that asks for it, "2026-11-28".
    """

    def __init__(self, tokenizer, name: str, end: int | list[int] | None, size: int):
        self.tokenizer = tokenizer
        self.date = datetime.date.today().isoformat()
        ends = {end} if isinstance(end, int) else {*(end or ())}
        own = tokenizer.eos_token_id
        self.eos = sorted(ends if own is None else ends | {own})
        if not self.eos:
            raise UserError(f"{name}: no EOS; add eos_token_id to generation_config.json")
        self.own_eos = self.eos[0] if own is None else own
        self.bytes = token_bytes(tokenizer)
        self.bytes += [b""] * (size - len(self.bytes))
        for i in self.eos:  # where a text ends is not shown, be the token special or not
            if i < len(self.bytes):
                self.bytes[i] = b""
        self.breaks = np.array([b"\n" in data for data in self.bytes])
        self.blank = np.array([not _text(data).strip() for data in self.bytes])
        if not self.breaks.any():
            raise UserError(f"{name}: no token holds a line break, so steps cannot be cut")

    # -------------------------------------------------------- ids as text

    def text(self, ids: list[int]) -> str:
        """What ids say where they stand: with the space or indentation that they begin with."""
        return _text(b"".join([self.bytes[i] for i in ids]))

    def tree_texts(self, parents: list[int], ids: list[list[int]], ends: list[bool]) -> list[str]:
        """The text of each node of a tree of ids; along a path they join to the text of its ids.

        parents (K,): -1 or an earlier node. ends (K,): nothing follows this node. Of a character
        whose bytes are in two nodes the whole character stands in the second. But none goes from the
        root, the prompt, into a response.
        """
        texts, pending = [], []  # pending: a node's bytes that are no whole character yet
        for parent, node, last in zip(parents, ids, ends):
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            before = pending[parent] if parent >= 0 else b""
            data = before + b"".join([self.bytes[i] for i in node])
            texts.append(decoder.decode(data, final=last or parent < 0))
            pending.append(decoder.getstate()[0])
        return texts

    # -------------------------------------------------------- text as ids

    def ids(self, text: str) -> list[int]:
        """Ids of a text that goes on after another: no special token, whatever it quotes, and no
        space before it. `text(ids(x))` is x, if the tokenizer has tokens for x."""
        if self._plain is None:
            options = {"add_special_tokens": False, "split_special_tokens": True}
            return self.tokenizer(text, **options)["input_ids"]
        return self._plain.encode(text, add_special_tokens=False).ids

    def response_ids(self, text: str) -> list[int]:
        """Ids of a demonstration, with the EOS that the policy must learn."""
        return [*self.ids(text), self.own_eos]

    def prompt_ids(self, prompt: str) -> list[int]:
        """Ids of a user message: by chat template if there is one, else plain; one BOS, no EOS.

        A special token that the message quotes ("<|im_end|>") is text like any other: it must not
        end the turn. Only the template's own are special.
        """
        if self.tokenizer.chat_template is None:
            return self._plain_prompt_ids(prompt)
        message = [{"role": "user", "content": prompt}]
        options = {"add_generation_prompt": True, "tokenize": False}
        text = self.tokenizer.apply_chat_template(message, chat_template=self._template, **options)
        ids = self._encode(text)
        quoted = [i for i in self._encode(prompt) if i in self._control]
        if quoted and prompt.strip() in text:
            before = text[: text.index(prompt.strip())]
            own = sum(i in self._control for i in self._encode(before))  # the template's, in front
            places = [k for k, i in enumerate(ids) if i in self._control]
            for k, i in reversed([*zip(places[own:], quoted)]):
                ids[k : k + 1] = self.ids(self._control[i])
        return ids

    def _plain_prompt_ids(self, prompt: str) -> list[int]:
        """Without a chat template: BOS if the tokenizer adds one, but not the EOS that some add."""
        ids = self.tokenizer(prompt, split_special_tokens=True)["input_ids"]
        bare = self.tokenizer(prompt, split_special_tokens=True, add_special_tokens=False)
        bare = bare["input_ids"]
        while ids and ids[-1] in self.eos and ids[-len(bare) :] != bare:
            ids = ids[:-1]
        return ids

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @property
    def asks_for_date(self) -> bool:
        """Does a prompt depend on the day (as Llama 3.2's does)?"""
        return "strftime_now" in str(self.tokenizer.chat_template)

    @property
    def _template(self) -> str:
        """The chat template, in which `date` stands where it asks for it."""
        day = datetime.date.fromisoformat(self.date)
        asks = r"""strftime_now\(\s*(["'])(.*?)\1\s*\)"""
        written = lambda asked: repr(day.strftime(asked[2]))
        return re.sub(asks, written, self.tokenizer.get_chat_template())

    def unknown(self, ids: list[int]) -> int:
        """How many of some ids stand for text that the tokenizer does not know."""
        return ids.count(self.tokenizer.unk_token_id)

    @cached_property
    def _control(self) -> dict[int, str]:
        """The tokens that steer a model, by id: special ones, and what else the template writes."""
        template, found = str(self.tokenizer.chat_template), {}
        for i, token in self.tokenizer.added_tokens_decoder.items():
            written = token.content in template and not token.content.isspace()
            if token.special or written or i in self.eos:
                found[i] = token.content
        return found

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer | None:
        """The same tokenizer, but for text in the middle: it knows no control tokens and puts no
        space before a text. None for the few that are not made by the `tokenizers` library."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, tokenizers.Tokenizer):
            return None
        state = json.loads(backend.to_str())
        state["added_tokens"] = [t for t in state["added_tokens"] if t["id"] not in self._control]
        for part in ("normalizer", "pre_tokenizer"):
            state[part] = _without_prefix(state[part])
        state |= {"post_processor": None, "truncation": None, "padding": None}
        return tokenizers.Tokenizer.from_str(json.dumps(state))


def _without_prefix(part: dict | None) -> dict | None:
    """A normaliser or pre-tokeniser, as tokenizer.json has it, that puts no space before a text."""
    if part is None or part["type"] == "Prepend":
        return None
    if part["type"] == "Metaspace":
        return part | {"prepend_scheme": "never"}
    if part["type"] == "ByteLevel":
        return part | {"add_prefix_space": False}
    for name in ("normalizers", "pretokenizers"):  # of a "Sequence"
        if name in part:
            inner = [_without_prefix(each) for each in part[name]]
            part = part | {name: [each for each in inner if each is not None]}
    return part


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _byte_of_character() -> dict[str, int]:
    """How byte-level BPE writes bytes: printable ones as themselves, the others from U+0100 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    table = {chr(byte): byte for byte in visible}
    return table | {chr(256 + k): byte for k, byte in enumerate(hidden)}


def token_bytes(tokenizer) -> list[bytes]:
    """The bytes that each token adds to a text; none for special tokens.

    Each is decoded behind another token, so that nothing is dropped for standing at the start. A token
    of half a character decodes to U+FFFD: its bytes are in its name, "<0xE4>" or byte-level BPE's.
    """
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}

    def decode(ids: list[list[int]]) -> list[str]:
        return tokenizer.batch_decode(ids, **options)

    first = next((i for i in range(len(tokenizer)) if decode([[i]])[0].strip().isalnum()), None)
    front = [] if first is None else [first]
    before, byte_of = decode([front])[0], _byte_of_character()
    found = []
    for i, text in enumerate(decode([[*front, i] for i in range(len(tokenizer))])):
        text = text.removeprefix(before)
        name = tokenizer.convert_ids_to_tokens(i) if "\ufffd" in text else ""
        if re.fullmatch("<0x[0-9A-F]{2}>", name):
            found.append(bytes([int(name[3:5], 16)]))
        elif name and all(character in byte_of for character in name):
            found.append(bytes(byte_of[character] for character in name))
        else:
            found.append(text.encode())
    return found
